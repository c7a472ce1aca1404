"""DoRA, trained rows of single tokens, and adapters of embeddings and tied heads merge as PEFT computes: the outputs of
the merged model are those of PEFT's forward pass in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import decoded, state_of, tensors_of
from support.conversions import run_conversion
from support.trained import LLAMA, SIZES, config_of, loaded, outputs, saved, trained

from loftq_cli.cli.main import _run
from loftq_cli.model.stored import BaseModel

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q0 = "model.layers.0.self_attn.q_proj.weight"
GPT2 = {"vocab_size": 160, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
SIDES = {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_layers": 1, "decoder_layers": 1}
BART = {**SIDES, "vocab_size": 160, "d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    saved("LlamaForCausalLM", folder / "llama", **LLAMA)
    saved("LlamaForCausalLM", folder / "tied", **LLAMA, tie_word_embeddings=True)
    saved("GPT2LMHeadModel", folder / "gpt2", **GPT2)
    saved("BertForMaskedLM", folder / "bert", **SIZES)
    saved("BartForConditionalGeneration", folder / "bart", **BART, pad_token_id=0, eos_token_id=1)
    run_conversion(folder / "llama", folder / "converted", rank=4, method="qlora")
    return folder


def merge(base: Path, adapter: Path, out: Path, *arguments: str) -> int:
    return _run(["merge", str(base), str(adapter), str(out), "--dtype", "float32", *arguments])


PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}
ROWS = {"trainable_token_indices": [9, 1]}
BOTH_ROWS = {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 7]}}
# base, config, whether embedding and head still share a weight
KINDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "DoRA": ("llama", {"target_modules": ["q_proj", "down_proj", "v_proj"], "use_dora": True, **PATTERNS}, False),
    "DoRA on Conv1D": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}, True),
    "DoRA with biases": ("bert", {"target_modules": ["query", "dense"], "use_dora": True, "bias": "lora_only"}, True),
    "DoRA on an embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, False),
    "rows": ("llama", {"target_modules": ["q_proj"], **ROWS}, False),
    "rows of two matrices": ("llama", {"target_modules": ["q_proj"], **BOTH_ROWS}, False),
    "rows of a tied pair": ("tied", {"target_modules": ["q_proj"], "use_dora": True, **ROWS}, True),
    "rows of a tied pair, called wte": ("gpt2", {"target_modules": ["c_attn"], **ROWS}, True),
    "other rows of a tied pair": ("tied", {"target_modules": ["q_proj"], **BOTH_ROWS}, False),
    "an embedding": ("llama", {"target_modules": ["embed_tokens"], "lora_alpha": 3, "use_rslora": True}, False),
    "a tied embedding": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}, False),
    "a tied embedding, called wte": ("gpt2", {"target_modules": ["wte"]}, False),
    "a tied head": ("tied", {"target_modules": ["lm_head", "q_proj"]}, False),
    "a tied pair": ("tied", {"target_modules": ["lm_head", "embed_tokens"], "rank_pattern": {"lm_head": 2}}, False),
    "DoRA on a tied embedding": ("tied", {"target_modules": ["embed_tokens"], "use_dora": True}, False),
    "a pair kept tied": ("tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, True),
    "a saved pair kept tied": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "a saved embedding": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "a tied embedding of BERT": ("bert", {"target_modules": ["word_embeddings"]}, False),
    "the tied head of an encoder and decoder": ("bart", {"target_modules": ["lm_head", "q_proj"]}, False),
    "a saved head": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_what_peft_computes(kind, checkpoints, tmp_path):
    base, config, is_tied = KINDS[kind]
    auto = {"bert": "AutoModelForMaskedLM", "bart": "AutoModelForSeq2SeqLM"}.get(base, "AutoModelForCausalLM")
    made = trained(loaded(checkpoints / base, auto), tmp_path / "adapter", **config)

    assert merge(checkpoints / base, made.path, tmp_path / "out") == 0

    merged = loaded(tmp_path / "out", auto)
    assert merged.config.tie_word_embeddings is is_tied
    torch.testing.assert_close(outputs(merged), made.outputs, rtol=0, atol=1e-5)


def test_rows_are_the_adapters_and_all_other_rows_the_bases(checkpoints, tmp_path):
    made = trained(loaded(checkpoints / "llama"), tmp_path / "adapter", target_modules=["q_proj"], **ROWS)

    assert merge(checkpoints / "llama", made.path, tmp_path / "out") == 0

    rows = tensors_of(made.path)["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    merged, before = tensors_of(tmp_path / "out")[EMBEDDING], tensors_of(checkpoints / "llama")[EMBEDDING]
    others = [row for row in range(160) if row not in (9, 1)]
    assert torch.equal(merged[[9, 1]], rows)
    assert torch.equal(merged[others], before[others])


def test_dora_over_codes_scales_the_decoded_weight(checkpoints, tmp_path):
    """PEFT forward over bitsandbytes needs a GPU's kernels; the formula of the paper is checked in float64."""
    made = trained(loaded(checkpoints / "llama"), tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)

    assert merge(checkpoints / "converted", made.path, tmp_path / "out") == 0

    tensors = tensors_of(made.path)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    delta = 2.0 * tensors[f"{prefix}.lora_B.weight"].double() @ tensors[f"{prefix}.lora_A.weight"].double()
    weight = decoded(checkpoints / "converted")[Q0].double() + delta
    lengths = tensors[f"{prefix}.lora_magnitude_vector"].double()
    expected = lengths[:, None] * weight / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(tensors_of(tmp_path / "out")[Q0].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("arguments", [("--requantize", "int8"), ("--requantize", "nf4", "--force")])
def test_dora_and_rows_survive_quantizing_again(arguments, checkpoints, tmp_path):
    config = {"target_modules": ["q_proj", "v_proj"], "use_dora": True, **ROWS}
    made = trained(loaded(checkpoints / "llama"), tmp_path / "adapter", **config)
    out = tmp_path / "out"

    assert _run(["merge", str(checkpoints / "llama"), str(made.path), str(out), *arguments]) == 0

    assert _run(["merge", str(checkpoints / "llama"), str(made.path), str(tmp_path / "dense")]) == 0
    dense = state_of(tmp_path / "dense")[Q0].double()
    steps = 2.5e-2 if "int8" in arguments else 0.3  # of the largest weight: half a step of the format
    with BaseModel.open(out) as model:
        stored = model.matrix(Q0).double()
    assert float((stored - dense).abs().max() / dense.abs().max()) < steps
    rows = tensors_of(made.path)["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    torch.testing.assert_close(tensors_of(out)[EMBEDDING][[9, 1]].float(), rows, rtol=1e-2, atol=1e-2)


def test_a_tied_head_of_its_own_is_said(checkpoints, tmp_path, capsys):
    made = trained(loaded(checkpoints / "tied"), tmp_path / "adapter", target_modules=["embed_tokens"])

    assert merge(checkpoints / "tied", made.path, tmp_path / "out") == 0

    assert "embedding and head get weights of their own" in capsys.readouterr().err
    merged, before = tensors_of(tmp_path / "out"), tensors_of(checkpoints / "tied")
    assert torch.equal(merged[HEAD], before[EMBEDDING])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_rows_under_an_adapter_of_the_whole_matrix_are_refused(checkpoints, tmp_path, capsys):
    made = trained(loaded(checkpoints / "tied"), tmp_path / "adapter", target_modules=["lm_head"])
    rows = trained(loaded(checkpoints / "tied"), tmp_path / "rows", target_modules=["q_proj"], **BOTH_ROWS)
    arguments = [str(made.path), str(tmp_path / "out"), "--adapter", str(rows.path)]

    assert _run(["merge", str(checkpoints / "tied"), *arguments]) == 4

    assert "trains rows of a matrix under an adapter" in capsys.readouterr().err
