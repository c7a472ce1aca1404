"""PEFT over quantized linears."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapted_modules import IN, OUT, assert_close, quantize, quantized, random, spec_of
from torch import nn
from torch.nn import functional

from loftq_cli.nn import QuantizedLinear


class Small(nn.Module):
    """Two quantized linears under the names that PEFT is given."""

    def __init__(self, cache: bool = False) -> None:
        super().__init__()
        self.first = QuantizedLinear(quantized("int4"), random(OUT), cache=cache)
        self.second = QuantizedLinear(quantize(random(8, OUT, seed=6), spec_of("nf4")))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("cache", [False, True])
def test_peft_trains_lora_over_a_quantized_linear(cache):
    model, x = Small(cache), random(16, IN)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"]))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    target = random(16, 8, seed=7)

    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(functional.mse_loss(wrapped(x), target))
        losses[-1].backward()
        optimizer.step()

    assert losses[-1] < 0.9 * losses[0]
    layers = [model.first, model.second]
    products = [2.0 * m.lora_B["default"].weight.double() @ m.lora_A["default"].weight.double() for m in layers]
    weights = [m.base_layer.dequantized().double() + product for m, product in zip(layers, products, strict=True)]
    hidden = torch.tanh(x.double() @ weights[0].T + random(OUT).double())
    assert_close(wrapped(x), hidden @ weights[1].T, 1e-5)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_with_peft_fails_instead_of_losing_the_adapter(safe_merge):
    wrapped = get_peft_model(Small(), LoraConfig(r=4, target_modules=["first", "second"]))
    with pytest.raises(RuntimeError, match=r"a change to it would be lost.*loftq merge"):
        wrapped.merge_and_unload(safe_merge=safe_merge)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initializations_of_peft_that_change_the_base_fail(init):
    config = LoraConfig(r=4, target_modules=["first"], init_lora_weights=init)
    with pytest.raises(RuntimeError, match="a change to it would be lost"):
        get_peft_model(Small(), config)
