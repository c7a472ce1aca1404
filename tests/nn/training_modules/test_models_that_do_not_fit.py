"""load_adapted refuses a model, a base or an adapter that does not fit, and leaves the model as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.adapted_models import fresh
from support.adapted_modules import random
from support.adapters import write_adapter
from support.conversions import run_conversion
from torch import nn

from loftq_cli.errors import InputError, LoftqError, MismatchError
from loftq_cli.nn import load_adapted


def without_head(model: nn.Module) -> None:
    del model.lm_head


def with_another_linear(model: nn.Module) -> None:
    model.extra = nn.Linear(2, 2)


def with_a_wider_linear(model: nn.Module) -> None:
    model.model.layers[0].mlp.up_proj = nn.Linear(128, 200, bias=False)


def with_no_linear(model: nn.Module) -> None:
    model.model.layers[0].mlp.up_proj = nn.Embedding(192, 128)


def with_one_layer_less(model: nn.Module) -> None:
    del model.model.layers[1]


def with_a_bias(model: nn.Module) -> None:
    model.model.layers[0].mlp.up_proj = nn.Linear(128, 192)


def with_a_larger_vocabulary(model: nn.Module) -> None:
    model.model.embed_tokens = nn.Embedding(161, 128)


def tied(model: nn.Module) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_head, r"base: tensor lm_head\.weight: has no place in the model"),
        (with_one_layer_less, r"base: tensor model\.layers\.1\.\S+: has no place in the model"),
        (with_another_linear, r"base: does not give extra\.weight of the model"),
        (with_a_bias, r"base: does not give model\.layers\.0\.mlp\.up_proj\.bias of the model"),
        (with_a_wider_linear, r"up_proj\.weight: is \(192, 128\), and \S+up_proj of the model is \(200, 128\)"),
        (with_no_linear, r"up_proj\.weight: is for a linear, and \S+up_proj of the model is Embedding"),
        (with_a_larger_vocabulary, r"embed_tokens\.weight: is \(160, 128\), and \S+ of the model is \(161, 128\)"),
        (tied, r"embed_tokens\.weight: differs from lm_head\.weight, and the model shares one weight for both"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(change, message, converted):
    model = fresh(converted)
    change(model)
    kinds, before = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())

    with pytest.raises(MismatchError, match=message):
        load_adapted(model, converted)

    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_memory_is_refused(converted):
    with torch.device("meta"):
        model = fresh(converted)
    with pytest.raises(ValueError, match="meta device"):
        load_adapted(model, converted)


def test_attention_that_bypasses_its_linear_is_refused(tmp_path):
    attention = nn.MultiheadAttention(64, 2, bias=False)
    model = nn.Module()
    model.blocks = nn.ModuleList([attention])
    (tmp_path / "model").mkdir()
    tensors = {f"blocks.0.{name}": value for name, value in attention.state_dict().items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    run_conversion(tmp_path / "model", tmp_path / "base", rank=4, include=("out_proj",))

    with pytest.raises(MismatchError, match=r"out_proj of the model is NonDynamicallyQuantizableLinear"):
        load_adapted(model, tmp_path / "base")


def test_adapters_that_cannot_be_trained_here_are_refused(converted, checkpoints, tmp_path):
    def refusal(adapter: Path) -> LoftqError:
        with pytest.raises(LoftqError) as raised:
            load_adapted(fresh(converted), converted, adapter=adapter)
        return raised.value

    elsewhere = write_adapter(
        tmp_path / "elsewhere", {"other.lora_A.weight": torch.zeros(4, 8), "other.lora_B.weight": torch.zeros(8, 4)}
    )
    assert "tensor base_model.model.other.lora_A.weight: its module is not in the base" in str(refusal(elsewhere))

    q_proj = "model.layers.0.self_attn.q_proj"
    factors = {f"{q_proj}.lora_A.weight": torch.zeros(4, 64), f"{q_proj}.lora_B.weight": torch.zeros(128, 4)}
    narrow = str(refusal(write_adapter(tmp_path / "narrow", factors)))
    assert "lora_A.weight: is (4, 64), and its layer asks for (4, 128)" in narrow

    factors[f"{q_proj}.lora_A.weight"] = torch.zeros(4, 128)
    biased = write_adapter(tmp_path / "biased", {**factors, f"{q_proj}.lora_B.bias": torch.zeros(128)})
    assert "nothing else is trained here" in str(refusal(biased))
    whole = write_adapter(
        tmp_path / "whole", {**factors, "lm_head.weight": torch.zeros(160, 128)}, modules_to_save=["lm_head"]
    )
    assert "lm_head.weight: is neither lora_A nor lora_B of a linear" in str(refusal(whole))

    run_conversion(checkpoints / "llama", tmp_path / "other", rank=8, seed=3, block_size=128)
    foreign = refusal(tmp_path / "other" / "loftq_init")
    assert isinstance(foreign, MismatchError) and "this base is another quantized base" in str(foreign)
    assert isinstance(refusal(tmp_path / "nowhere"), InputError)


def test_a_module_of_two_names_takes_one_weight_only(tmp_path):
    save_file({f"{name}.weight": random(64, 64, seed=i) for i, name in enumerate("ab")}, tmp_path / "w.safetensors")
    run_conversion(tmp_path / "w.safetensors", tmp_path / "base", method="qlora", include=("a|b",), rank=2)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Linear(64, 64, bias=False)

    with pytest.raises(MismatchError, match="belong to one module of the model"):
        load_adapted(Twice(), tmp_path / "base")
