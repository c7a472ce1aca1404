"""Gradients of quantized linears with adapters, and what training leaves alone."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from support.adapted_modules import IN, KINDS, OUT, adapted, added, assert_close, decoded, quantized, random

from loftq_cli.nn import QuantizedLinear
from loftq_cli.quant.formats import FORMATS


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant_type", FORMATS)
def test_gradients_are_those_of_the_formula(quant_type, kind, cache):
    tensor = quantized(quant_type)
    module = adapted(kind, QuantizedLinear(tensor, random(OUT, seed=4), cache=cache))
    x, upstream = random(2, 5, IN).requires_grad_(), random(2, 5, OUT, seed=5)
    exact = [t.detach().double().requires_grad_() for t in (x, module.lora_A, module.lora_B)]

    module(x).backward(upstream)
    output = exact[0] @ decoded(tensor).T + added(kind, *exact)
    output.backward(upstream.double())

    for found, expected in zip((x, module.lora_A, module.lora_B), exact, strict=True):
        assert_close(found.grad, expected.grad, 1e-5)


@pytest.mark.parametrize("quant_type", FORMATS)
def test_training_moves_the_adapter_and_nothing_else(quant_type):
    module = adapted("loftq", QuantizedLinear(quantized(quant_type), random(OUT)))
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)

    for step in range(3):
        optimizer.zero_grad()
        module(random(4, IN, seed=step)).square().sum().backward()
        optimizer.step()

    after = module.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"lora_A", "lora_B"}
    assert all(tensor.grad is None for tensor in (*module.base_layer.buffers(), *module.base_layer.parameters()))


def dense_tensors_alive() -> int:
    return sum(
        isinstance(thing, torch.Tensor) and thing.is_floating_point() and tuple(thing.shape) == (OUT, IN)
        for thing in gc.get_objects()
    )


@pytest.mark.parametrize("kind", ["loftq", "peft"])
def test_nothing_dense_is_kept_for_backward(kind):
    module, x = adapted(kind, QuantizedLinear(quantized())), random(3, IN).requires_grad_()
    saved: list[tuple[int, ...]] = []
    gc.collect()
    before = dense_tensors_alive()

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t):
        output = module(x)

    assert (OUT, IN) not in saved and (IN, OUT) not in saved
    gc.collect()
    assert dense_tensors_alive() == before
    output.sum().backward()
    assert x.grad is not None


def test_a_frozen_bias_can_be_trained_on_demand():
    layer, x = QuantizedLinear(quantized(), random(OUT)), random(3, 4, IN)
    assert not layer.bias.requires_grad
    layer.bias.requires_grad_()

    layer(x).sum().backward()

    assert torch.equal(layer.bias.grad, torch.full((OUT,), 12.0))
