"""Mixtures of experts in transformers and PEFT: every expert of the loaded model is the expert that was written, the
reported error of each expert is the error of the loaded expert, and the whole adapter trains.

The expected values are the original's own weights, as transformers loads the original.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from support.conversions import run_conversion
from support.moes import FAMILIES, moe

from loftq_cli.conversion.report import LayerResult
from loftq_cli.conversion.run import Outcome
from loftq_cli.model.stored import BaseModel

INT4 = {"quant_type": "int4", "symmetric": True, "group_size": 32, "rank": 4, "iterations": 2}
NF4_VALUES = {"layout": "dense", "block_size": 32, "rank": 4, "iterations": 2}
# One family for each way to lie on disk and to be loaded; the others are slow tests.
QUICK = ["mixtral", "deepseek_v3", "llama4_text"]
NO_PACKED = ["gpt_oss", "granitemoe"]  # transformers reads no packed experts of these families
PACKED = [family for family in FAMILIES if family not in NO_PACKED]
IDS = (torch.arange(128).reshape(2, 64) * 7 + 5) % 150 + 3


@dataclass
class Case:
    """A converted model, loaded for training, and the original beside."""

    outcome: Outcome
    original: Any
    info: dict[str, Any]
    peft: PeftModel
    said: list[str]

    @property
    def experts(self) -> list[LayerResult]:
        return [layer for layer in self.outcome.layers if layer.experts is not None]

    @property
    def file(self) -> dict[str, torch.Tensor]:
        return load_file(self.outcome.adapter / "adapter_model.safetensors")


def build(family: str, folder: Path, options: dict[str, Any]) -> Case:
    outcome = run_conversion(moe(family, folder / "model"), folder / "base", **options)
    auto = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder / "base", output_loading_info=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(
            model, folder / "base", subfolder=outcome.adapter.name, is_trainable=True, torch_device="cpu"
        )
    said = [str(warning.message) for warning in caught if "adapter" in str(warning.message).lower()]
    return Case(outcome, auto.from_pretrained(folder / "model"), info, peft, said)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    """Convert and load a family once: `case(family, container)`."""
    cases: dict[tuple[str, str], Case] = {}

    def get(family: str, container: str) -> Case:
        if (family, container) not in cases:
            options = INT4 if container == "packed" else NF4_VALUES
            cases[family, container] = build(family, tmp_path_factory.mktemp(f"{family}-{container}"), options)
        return cases[family, container]

    return get


def families(*containers: tuple[str, list[str], list[str]]) -> Any:
    """Parameters (family, container); those that are not quick are slow tests."""
    return pytest.mark.parametrize(
        ("family", "container"),
        [
            pytest.param(family, container, marks=() if family in quick else pytest.mark.slow)
            for container, listed, quick in containers
            for family in listed
        ],
    )


EVERYWHERE = families(("packed", PACKED, QUICK), ("values", list(FAMILIES), ["gpt_oss"]))


def originals(model: Any, layer: LayerResult) -> torch.Tensor:
    """The experts of a layer in the original, [experts, out, in] as the linear map has the dimensions, float64.

    transformers holds gpt-oss and Llama 4 as [experts, in, out]; from packed weights Llama 4 has a module for each
    expert and projection, and the original has gate above up in one parameter.
    """
    names = dict(model.named_parameters())
    if layer.name in names:
        values = names[layer.name].detach().double()
        return values if values.shape[1:] == layer.shape else values.transpose(1, 2)
    parent, _, last = layer.name.rpartition(".")
    both = names[f"{parent}.{'gate_up_proj' if last != 'down_proj' else last}"].detach().double().transpose(1, 2)
    half = both.shape[1] // 2
    return {"gate_proj": both[:, :half], "up_proj": both[:, half:], "down_proj": both}[last]


def deltas(peft: PeftModel, layer: LayerResult) -> torch.Tensor:
    """What PEFT adds to the experts of a layer, [experts, out, in], float64."""
    modules = dict(peft.base_model.model.named_modules())
    parent, _, last = layer.name.rpartition(".")
    if not hasattr(modules[parent], "parameter_name"):
        found = [modules[f"{parent}.{i}.{last}"].get_delta_weight("default") for i in range(layer.experts or 0)]
        return torch.stack(found).double()
    wrapper = modules[parent]
    while wrapper.parameter_name != last:
        wrapper = wrapper.base_layer
    delta = wrapper.get_delta_weight("default").double()
    return delta if delta.shape[1:] == layer.shape else delta.transpose(1, 2)


@EVERYWHERE
def test_the_loader_finds_every_tensor_and_no_other(case, family, container):
    found = case(family, container)
    assert {key: value for key, value in found.info.items() if value} == {}
    assert found.said == []


@EVERYWHERE
def test_every_expert_of_the_loaded_model_is_the_expert_in_the_files(case, family, container):
    found = case(family, container)
    assert found.experts
    with BaseModel.open(found.outcome.output) as base:
        for layer in found.experts:
            weights = layer.weights or ()
            if len(weights) > 1:
                per = len(weights) // (layer.experts or 1)
                stored = [
                    torch.cat([base.matrix(w) for w in weights[i : i + per]]) for i in range(0, len(weights), per)
                ]
                written = torch.stack(stored).double()
            else:
                written = base.load(weights[0]).double()
                written = written if written.shape[1:] == layer.shape else written.transpose(1, 2)
            assert torch.equal(base_of(found.peft, layer), written)


def base_of(peft: PeftModel, layer: LayerResult) -> torch.Tensor:
    """The experts of a layer under the adapters of PEFT, [experts, out, in], float64."""
    modules = dict(peft.base_model.model.named_modules())
    parent, _, last = layer.name.rpartition(".")
    wrapper = modules[parent]
    if hasattr(wrapper, "parameter_name"):
        values = getattr(wrapper.get_base_layer(), last).detach().double()
        return values if values.shape[1:] == layer.shape else values.transpose(1, 2)
    found = [modules[f"{parent}.{i}.{last}"].base_layer.weight for i in range(layer.experts or 0)]
    return torch.stack(found).detach().double()


@EVERYWHERE
def test_the_reported_error_of_each_expert_is_the_error_of_the_loaded_expert(case, family, container):
    found = case(family, container)
    for layer in found.experts:
        original = originals(found.original, layer)
        error = original - base_of(found.peft, layer) - deltas(found.peft, layer)
        relative = error.flatten(1).norm(dim=1) / original.flatten(1).norm(dim=1)
        # PEFT rounds the delta to bfloat16 in memory.
        torch.testing.assert_close(relative, torch.tensor(layer.expert_errors).double(), atol=2e-4, rtol=0.0)


@EVERYWHERE
def test_all_numbers_of_the_adapter_are_trained_and_the_loss_falls(case, family, container):
    found = case(family, container)
    trained = {k.replace(".default", ""): p for k, p in found.peft.named_parameters() if p.requires_grad}
    assert {name: tuple(p.shape) for name, p in trained.items()} == {k: tuple(t.shape) for k, t in found.file.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = found.peft(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        if len(losses) == 1:
            silent = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
            assert silent == []
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in PACKED])
def test_4_bit_models_have_less_than_5_bits_with_embeddings_apart(tmp_path, family):
    outcome = run_conversion(moe(family, tmp_path / "model"), tmp_path / "base", method="qlora", **{**INT4, "rank": 1})
    apart = ("embed_tokens", "lm_head", "norm", ".bias", ".gate.", "router", "_shape")
    with BaseModel.open(outcome.output) as base:
        refs = base.checkpoint.tensors.values()
        nbytes = sum(ref.nbytes for ref in refs if not any(word in ref.name for word in apart))
        weights = sum(ref.numel for ref in base.tensors.values() if not any(word in ref.name for word in apart))
    assert 8 * nbytes / weights < 5.0
