"""An adapter whose names differ from the base's by more than a prefix: q, k and v of a fused matrix, or a text model
inside a vision-language model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from support.trained import LLAMA, loaded, outputs, randomized, saved, trained

from loftq_cli.adapter.fused import groups_of, rows_of_parts
from loftq_cli.adapter.naming import spelled_names
from loftq_cli.cli.main import _run

WIDTHS = {"q_proj": 64, "k_proj": 32, "v_proj": 32}


def merge(base: Path, adapter: Path, out: Path, *arguments: str) -> int:
    return _run(["merge", str(base), str(adapter), str(out), "--dtype", "float32", *arguments])


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("Phi3ForCausalLM", tmp_path_factory.mktemp("phi") / "base", **LLAMA)


def split(phi: Path) -> transformers.LlamaForCausalLM:
    """The same model as a Llama, with a matrix for each of q, k, v, gate and up."""
    fused = loaded(phi)
    config = transformers.LlamaConfig(**LLAMA, rope_parameters=fused.config.rope_parameters)
    config.rms_norm_eps = fused.config.rms_norm_eps
    state = {}
    for name, value in fused.state_dict().items():
        if "qkv_proj" in name:
            parts = dict(zip(WIDTHS, value.split(list(WIDTHS.values())), strict=True))
            state |= {name.replace("qkv_proj", part): rows.clone() for part, rows in parts.items()}
        elif "gate_up_proj" in name:
            parts = dict(zip(("gate_proj", "up_proj"), value.chunk(2), strict=True))
            state |= {name.replace("gate_up_proj", part): rows.clone() for part, rows in parts.items()}
        else:
            state[name] = value
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"]},
        {"target_modules": ["k_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "use_rslora": True, "use_dora": True},
    ],
    ids=["all", "some", "keys alone", "DoRA with patterns"],
)
def test_split_adapters_are_rows_of_the_fused_matrix(config, phi, tmp_path, capsys):
    made = trained(split(phi), tmp_path / "adapter", **config)

    assert merge(phi, made.path, tmp_path / "out") == 0

    torch.testing.assert_close(outputs(loaded(tmp_path / "out")), made.outputs, rtol=0, atol=1e-5)
    said = [line for line in capsys.readouterr().err.splitlines() if "rows of the base's" in line]
    assert len(said) == 1


def test_rows_of_another_count_are_refused(phi, tmp_path, capsys):
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "num_key_value_heads": 4}))
    made = trained(wide, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])

    assert merge(phi, made.path, tmp_path / "out") == 4
    assert "called like model.layers.0.self_attn.qkv_proj" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        ({"model_type": "phi3", "num_attention_heads": 8}, 1),
        ({"model_type": "gpt_neox", "num_attention_heads": 8}, 8),
        ({"model_type": "bloom", "n_head": 8}, 8),
        ({"model_type": "falcon", "num_attention_heads": 8, "multi_query": True}, 1),
        ({"model_type": "falcon", "num_attention_heads": 8, "num_kv_heads": 2, "new_decoder_architecture": True}, 2),
        ({"model_type": "internlm2", "num_attention_heads": 8, "num_key_value_heads": 2}, 2),
        ({"model_type": "codegen", "num_attention_heads": 8}, None),
    ],
)
def test_the_order_of_rows_is_the_familys(config, groups):
    assert groups_of(config) == groups


def test_rows_by_heads_are_those_of_gpt_neox():
    """GPT-NeoX views the output as [heads, 3, width]: transformers' own code."""
    rows = rows_of_parts({"model_type": "gpt_neox", "num_attention_heads": 2}, 12, ("q", "k", "v"), {"q": 4})
    assert rows is not None
    view = torch.arange(12).view(2, 3, 2)
    for part, place in zip(("q", "k", "v"), view.unbind(1), strict=True):
        assert rows[part].places() == place.flatten().tolist()


def test_a_text_adapter_finds_the_text_model_of_a_larger_model(tmp_path, capsys):
    text = transformers.Gemma3TextConfig(**LLAMA, head_dim=16)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text.to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        image_token_index=159,
        mm_tokens_per_image=4,
    )
    small = randomized(transformers.Gemma3ForCausalLM(text))
    large = randomized(transformers.Gemma3ForConditionalGeneration(config), seed=3)
    large.model.language_model.load_state_dict(small.model.state_dict())
    large.save_pretrained(tmp_path / "base")
    made = trained(small, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])

    assert merge(tmp_path / "base", made.path, tmp_path / "out") == 0

    merged = loaded(tmp_path / "out", "AutoModelForImageTextToText")
    torch.testing.assert_close(outputs(merged), made.outputs, rtol=0, atol=1e-5)
    said = [line for line in capsys.readouterr().err.splitlines() if "in the adapter is" in line]
    assert len(said) == 1
    assert "model.language_model.layers.0" in said[0]


def test_two_places_for_an_adapter_are_none():
    names = {f"{place}.layers.0.q.weight": f"model.{place}.layers.0.q.weight" for place in ("first", "second")}
    assert spelled_names(names, ["model.layers.0.q"]) == names
