"""Statistics from the weights alone. With windows of a single token attention is the value of the token: transformers'
own model of every known structure gives the reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import models
from transformers.pytorch_utils import Conv1D

from loftq_cli.activations.weight_statistics import has_known_blocks, measure_weights
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.model.blocks import parse_structures, structures
from loftq_cli.model.builtin import resolve_model
from loftq_cli.model.family import Family
from loftq_cli.runtime.workers import started

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
# name -> config class, model class, options, and number of linears with a statistic in each block
FAMILIES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED, 7),
    "llama with a head size": ("LlamaConfig", "LlamaForCausalLM", {**GROUPED, "head_dim": 24}, 7),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED, 7),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED, 7),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED, 7),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {**GROUPED, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
        7,
    ),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", GROUPED, 7),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GROUPED, "head_dim": 16}, 7),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GROUPED, "head_dim": 16}, 7),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**GROUPED, "head_dim": 16}, 7),
    "cohere": ("CohereConfig", "CohereForCausalLM", GROUPED, 7),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", GROUPED, 7),
    "phi": ("PhiConfig", "PhiForCausalLM", SIZES, 6),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GROUPED, 4),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", GROUPED, 6),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 160, "n_embd": 64, "n_layer": 2, "n_head": 4}, 4),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES, 4),
    "opt": ("OPTConfig", "OPTForCausalLM", {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64}, 6),
    "bert": ("BertConfig", "BertForMaskedLM", SIZES, 6),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**GROUPED, "num_local_experts": 2}, 4),
}


def saved(name: str, directory: Path) -> Any:
    config_class, model_class, options, _ = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return model


def reference(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean squares of the inputs of all linears over windows of a single token, in float64."""
    found: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        return lambda module, args: found.update({f"{name}.weight": args[0].double().flatten(0, -2).square().mean(0)})

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        model(ids[:, None])
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_by_themselves_are_as_in_transformers(tmp_path, name):
    model = saved(name, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    rows = torch.randint(160, (300,), generator=torch.Generator().manual_seed(0))  # the first draws of a fixed seed
    expected = reference(model, rows)
    statistics = measure_weights(checkpoint, Family(checkpoint.config()), tokens=300, attended=1)
    counted = [key for key in statistics.names if ".1." in key]
    assert len(counted) == FAMILIES[name][3]
    # Past the experts that the structure lacks, a mixture's inputs differ: only the first block compares.
    compared = [key for key in statistics.names if name != "mixtral" or ".0." in key]
    for key in compared:
        torch.testing.assert_close(statistics.load(key).double(), expected[key], rtol=1e-4, atol=1e-7)


def test_every_structure_is_tried_here():
    tried = {
        "llama",
        "gemma",
        "gemma3",
        "cohere",
        "olmo2",
        "phi",
        "phi3",
        "starcoder2",
        "gpt2",
        "gpt_neox",
        "opt",
        "bert",
    }
    assert tried == set(structures()) and tried <= FAMILIES.keys()


def test_heads_that_average_tokens_shrink_what_varies_and_keep_the_mean(tmp_path):
    """The mean square of an average of n tokens is the mean's square plus the variance over n."""
    saved("llama", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    alone, wide = (measure_weights(checkpoint, Family(checkpoint.config()), attended=n) for n in (1, 200))
    name = "model.layers.0.self_attn.o_proj.weight"
    ratio = wide.load(name) / alone.load(name)
    inverse = 0.0  # of n, where log(n) is even: the mean of 1/n over the draws
    draws = torch.rand(100_000, generator=torch.Generator().manual_seed(1)) * torch.tensor(201.0).log()
    inverse = float((1 / draws.exp().long().clamp(1, 200)).mean())
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    values = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: values.append(args[0]))
    with torch.no_grad():
        model(torch.arange(160)[:, None])
    x = values[0].flatten(0, 1).double()
    expected = (x.mean(0).square() + x.var(0) * inverse) / x.square().mean(0)
    torch.testing.assert_close(ratio.double(), expected, rtol=0.35, atol=0.02)
    assert abs(float((ratio / expected).mean()) - 1) < 0.1


def test_numbers_do_not_depend_on_the_number_of_threads():
    checkpoint = open_checkpoint(resolve_model("builtin:tiny-llama"))
    one = measure_weights(checkpoint, Family(checkpoint.config()))
    with started(3) as workers:
        three = measure_weights(checkpoint, Family(checkpoint.config()), workers=workers)
    assert len(one.names) == 28 and all(torch.equal(one.load(name), three.load(name)) for name in one.names)


def test_blocks_of_unknown_structure_have_no_statistics(tmp_path):
    for builder in (models.t5, models.mamba):
        checkpoint = open_checkpoint(builder(tmp_path / builder.__name__))
        assert not has_known_blocks(checkpoint.tensors.keys(), Family(checkpoint.config()))
        assert measure_weights(checkpoint, Family(checkpoint.config())).names == frozenset()


def test_weights_that_are_not_finite_give_no_statistics_behind_them(tmp_path):
    model = saved("llama", tmp_path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    names = measure_weights(checkpoint, Family(checkpoint.config())).names
    assert "model.layers.0.mlp.up_proj.weight" in names and "model.layers.1.mlp.up_proj.weight" not in names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[x]\nlist = 'h'\nembedding = 'e'\nattention = {output = 'o'}\nmlp = {output = 'd'}\nother = 1",
            "unknown keys",
        ),
        ("[x]\nlist = 'h'\nattention = {output = 'o'}\nmlp = {output = 'd'}", "not complete"),
        (
            "[x]\nlist = 'h'\nembedding = 'e'\nattention = {output = 'o', value_rows = 'first'}\nmlp = {output = 'd'}",
            "first",
        ),
        ("[x]\nlist = 'h'\nembedding = {}\nattention = {output = 'o'}\nmlp = {output = 'd'}", "wrong type"),
    ],
)
def test_a_row_with_a_mistake_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=message):
        parse_structures(text)
