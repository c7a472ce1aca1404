"""Which starts train: a start whose base alone stays a model bears dropout, and moves in bfloat16. The best start of
the weights, whose base alone is no model, does neither.

PEFT's dropout acts on the adapter alone: on average over the tokens, base and adapter stop to fit each other. Trainers
of TRL keep the trained weights of a 4-bit base in bfloat16, where a small step to a large number changes nothing: a
step of AdamW is as long as the rate, and 2e-4 moves numbers below 1/16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from support.adapters import quietly
from support.conversions import run_conversion
from support.loading import keep_trainable
from support.pages import ROOT

import loftq_cli as loftq

ADAPTERS = {"loftq": "loftq_init", "qlora": "qlora_init"}
STARTS: dict[str, dict[str, Any]] = {
    "default": {"fit": "joint"},
    "default with a text": {"fit": "joint", "calibration": "statistics"},
    "default without statistics": {"fit": "joint", "calibration": "none"},
    "with a text, base and adapter count": {"fit": "joint", "keep_base": 0.0, "calibration": "statistics"},
    "the best start of the weights": {"fit": "joint", "start": "principal", "keep_base": 0.0, "calibration": "none"},
    "QLoRA": {"method": "qlora"},
}
KEEP = ["default", "default with a text", "default without statistics", "with a text, base and adapter count"]
PRINCIPAL = "the best start of the weights"

RATE = 2e-4
DRAWS = 4  # passes with dropout that are averaged

Loader = Callable[..., PeftModel]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """Load a start for training: `load(name, dropout)`. Each start is converted once."""
    folder = tmp_path_factory.mktemp("starts")
    calibration = folder / "calibration.txt"
    calibration.write_text((ROOT / "LICENSE").read_text()[4096:])

    @cache
    def statistics() -> str:
        loftq.calibrate("builtin:tiny-llama", calibration, folder / "statistics", context=256, threads=1)
        return str(folder / "statistics")

    @cache
    def convert(name: str) -> tuple[Path, str]:
        options = dict(STARTS[name])
        if options.get("calibration") == "statistics":
            options["calibration"] = statistics()
        output = folder / name.replace(" ", "-")
        run_conversion("builtin:tiny-llama", output, **options)
        return output, ADAPTERS[options.get("method", "loftq")]

    def load_start(name: str, dropout: float) -> PeftModel:
        output, adapter = convert(name)
        config = LoraConfig.from_pretrained(output / adapter)
        config.lora_dropout = dropout
        model = quietly(transformers.AutoModelForCausalLM.from_pretrained, output)
        model = PeftModel.from_pretrained(model, output / adapter, config=config, is_trainable=True)
        return keep_trainable(model).train()

    return load_start


def windows() -> torch.Tensor:
    """Bytes of a text that no start was calibrated on, [8, 256]."""
    return torch.tensor(list((ROOT / "LICENSE").read_bytes()[:2048])).view(8, 256)


def loss_of(model: PeftModel) -> torch.Tensor:
    return model(input_ids=windows(), labels=windows()).loss


def cost_of_dropout(load: Loader, name: str, dropout: float) -> float:
    """Nats a token that dropout adds to the loss before the first step."""
    torch.manual_seed(0)
    with torch.no_grad():
        dropped = load(name, dropout)
        return sum(float(loss_of(dropped)) for _ in range(DRAWS)) / DRAWS - float(loss_of(load(name, 0.0)))


def moved(load: Loader, name: str) -> dict[str, float]:
    """Shares of the entries of lora_A and of lora_B that one step of AdamW in bfloat16 changes."""
    model = load(name, 0.0)
    factors = {name: factor for name, factor in model.named_parameters() if factor.requires_grad}
    assert len(factors) == 2 * 28
    for factor in factors.values():
        factor.data = factor.data.bfloat16()  # as TRL does
    before = {name: factor.detach().clone() for name, factor in factors.items()}
    loss_of(model).backward()
    torch.optim.AdamW(factors.values(), lr=RATE).step()
    changed = {name: (factor != before[name]).flatten() for name, factor in factors.items()}
    return {
        side: float(torch.cat([share for name, share in changed.items() if side in name]).float().mean())
        for side in ("lora_A", "lora_B")
    }


@pytest.mark.parametrize("name", KEEP)
def test_dropout_costs_nothing_where_the_base_alone_stays_a_model(load, name):
    assert abs(cost_of_dropout(load, name, 0.05)) <= 0.01
    assert abs(cost_of_dropout(load, name, 0.1)) <= 0.01


def test_dropout_costs_much_where_the_base_alone_is_no_model(load):
    costs = [cost_of_dropout(load, PRINCIPAL, dropout) for dropout in (0.05, 0.1)]
    assert costs[0] > 0.05
    assert costs[1] > 2 * costs[0]


@pytest.mark.parametrize("name", KEEP)
def test_a_step_in_bfloat16_moves_the_factors_where_the_base_alone_stays_a_model(load, name):
    shares = moved(load, name)
    assert min(shares.values()) >= 0.9, shares


def test_a_step_in_bfloat16_leaves_half_of_the_large_factors_of_the_best_start(load):
    shares = moved(load, PRINCIPAL)
    assert max(shares.values()) < 0.6, shares


def test_a_step_in_bfloat16_moves_all_of_a_zero_factor(load):
    # Where lora_B is 0, lora_A has no gradient before the second step.
    assert moved(load, "QLoRA") == {"lora_A": 0.0, "lora_B": 1.0}
