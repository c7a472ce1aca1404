"""Training that sees the rounded zero points of a merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.adapted_modules import (
    IN,
    OUT,
    POOL,
    POOLED,
    SCALING,
    adapted,
    added,
    assert_close,
    decoded,
    quantized,
    random,
)
from torch import nn

from loftq_cli.nn import QALoRALinear, QuantizedLinear


def rounded_update(module: QALoRALinear, tensor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """U of each group of the base and what it becomes with whole zero points, in float64, weight by weight."""
    factor = {"peft": 4 / POOL, "paper": 1.0, "repo": 1 / POOL}[module.lora.pooling.convention]
    update = SCALING * factor * (module.lora_B.detach().double() @ module.lora_A.detach().double())
    update = update.repeat_interleave(POOL // tensor.spec.group_size, 1)
    rounded = torch.empty_like(update)
    for row in range(update.shape[0]):
        for group in range(update.shape[1]):
            zero, scale = int(tensor.zero_points[row, group]), float(tensor.scales[row, group].double())
            moved = min(max(round(zero - float(update[row, group]) / scale), 0), 2**tensor.spec.bits - 1)
            rounded[row, group] = scale * (zero - moved)
    return update, rounded


@pytest.mark.parametrize("group_size", [POOL, POOL // 2])
@pytest.mark.parametrize("kind", POOLED)
@pytest.mark.parametrize("quant_type", ["int2", "int3", "int4", "int8"])
def test_training_sees_rounded_zero_points_when_asked_to(quant_type, kind, group_size):
    tensor = quantized(quant_type, group_size=group_size)
    module, x = adapted(kind, QuantizedLinear(tensor), size=0.3), random(2, 5, IN).requires_grad_()
    plain = module(x)
    update, rounded = rounded_update(module, tensor)
    assert not torch.equal(update, rounded)

    module.quantization_enabled = True

    weight = decoded(tensor) + rounded.repeat_interleave(group_size, 1)
    assert_close(module(x), x.double() @ weight.T, 1e-5)
    upstream = random(2, 5, OUT, seed=5)
    module(x).backward(upstream)
    # Straight through: the adapter's gradient is that of U unrounded; the input's is that of the rounded weight.
    exact = [t.detach().double().requires_grad_() for t in (x, module.lora_A, module.lora_B)]
    added(kind, *exact).backward(upstream.double())
    assert_close(module.lora_A.grad, exact[1].grad, 1e-5)
    assert_close(module.lora_B.grad, exact[2].grad, 1e-5)
    assert_close(x.grad, upstream.double() @ weight, 1e-5)
    module.quantization_enabled = False
    assert torch.equal(module(x), plain)


def test_rounded_training_has_the_weights_that_rounded_zero_points_decode_to():
    from loftq_cli.quant.affine import move_offsets

    tensor = quantized("int4", "float32")
    module = adapted("paper", QuantizedLinear(tensor), size=0.3)
    module.quantization_enabled = True
    update = SCALING * module.lora_B.detach() @ module.lora_A.detach()
    deployed = QuantizedLinear(move_offsets(tensor, update, tensor.spec, "float32"))

    x = random(5, IN)
    assert_close(module(x), deployed(x), 1e-5)


def test_quantization_is_off_at_first_and_its_error_is_known_at_any_time():
    tensor = quantized("int4", group_size=POOL // 2)
    module = adapted("peft", QuantizedLinear(tensor), size=0.3)
    update, rounded = rounded_update(module, tensor)
    difference = (update - rounded).repeat_interleave(POOL // 2, 1).abs()  # of the weights

    assert module.quantization_enabled is False
    for enabled in (False, True):
        module.quantization_enabled = enabled
        stats = module.quantization_stats()
        assert stats.groups == OUT * IN // (POOL // 2)
        assert stats.mean_error == pytest.approx(float(difference.mean()), rel=1e-5)
        assert stats.max_error == pytest.approx(float(difference.max()), rel=1e-5)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: QuantizedLinear(quantized("int4", symmetric=True)), "symmetric: it has no zero points"),
        (lambda: QuantizedLinear(quantized("int4", zero_point="float")), "there is nothing to round"),
        (lambda: QuantizedLinear(quantized("nf4")), "no integer codes"),
        (lambda: nn.Linear(IN, OUT), "no integer codes"),
        (lambda: QuantizedLinear(quantized("int4", group_size=64)), "pooled groups of 32 are not whole groups of 64"),
    ],
)
def test_a_base_without_zero_points_to_round_refuses_to_simulate_them(base, message):
    module = adapted("paper", base())
    with pytest.raises(ValueError, match=message):
        module.quantization_enabled = True
    with pytest.raises(ValueError, match=message):
        module.quantization_stats()
    module.quantization_enabled = False
    assert module.quantization_enabled is False
