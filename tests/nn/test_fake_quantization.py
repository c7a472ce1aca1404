"""A base that trains: each pass sees the quantized form of the full-precision weight, gradients go straight through,
and what is frozen or merged afterwards has the codes of the trained weight.

Expected values are float64 formulas over what a quantizer of its own decodes, and torch's autograd over them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loftq_cli.errors import InputError, UsageError
from loftq_cli.nn import (
    AdaptedLinear,
    FakeQuantizedLinear,
    LoftQLinear,
    QALoRALinear,
    QLoRALinear,
    QuantizedLinear,
    save_adapter,
)
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.tensors.rows import TensorRows

OUT, IN, RANK, GROUP = 64, 128, 4, 32
BUILDERS: dict[str, Any] = {
    "loftq": lambda linear, **options: LoftQLinear.from_linear(linear, RANK, 6.0, svd="exact", **options),
    "loftq int4": lambda linear, **options: LoftQLinear.from_linear(
        linear, RANK, quant_type="int4", group_size=GROUP, svd="exact", **options
    ),
    "qlora": lambda linear, **options: QLoRALinear.from_linear(linear, RANK, 6.0, **options),
    "qalora": lambda linear, **options: QALoRALinear.from_linear(
        linear, RANK, 4, GROUP, 6.0, fit="loftq", iterations=1, svd="exact", pooling="paper", **options
    ),
    "qalora standard": lambda linear, **options: QALoRALinear.from_linear(
        linear, RANK, 4, GROUP, init="standard", pooling="paper", **options
    ),
}


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias).to(dtype)


def decoded(layer: AdaptedLinear) -> torch.Tensor:
    """float64 [out, in]: what the format makes of the weight of the base as it is."""
    base = layer.base_layer
    quantizer = make_quantizer(base.spec, "float32")
    return quantizer.dequantize(quantizer.quantize(TensorRows(base.weight.detach()))).double()


def codes_of(linear: QuantizedLinear) -> dict[str, torch.Tensor]:
    return dict(linear.named_buffers(recurse=False))


@pytest.mark.parametrize("kind", BUILDERS)
def test_gradients_are_those_of_the_straight_through_formula(kind):
    layer = BUILDERS[kind](linear(), freeze_base=False)
    torch.manual_seed(1)
    layer.lora_B.data += 0.05 * torch.randn(OUT, RANK)
    x, direction = torch.randn(3, 5, IN, requires_grad=True), torch.randn(3, 5, OUT)

    output = layer(x)
    (output * direction).sum().backward()

    # y = (Q(W) + s·B·A·P)·x + b, in float64; Q's derivative is 1 by definition.
    exact = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    input = x.detach().double().requires_grad_()
    weight = exact["base_layer.weight"] + (decoded(layer) - exact["base_layer.weight"]).detach()
    read = input.unflatten(-1, (-1, GROUP)).sum(-1) if kind.startswith("qalora") else input
    formula = input @ weight.T + exact["base_layer.bias"]
    formula = formula + layer.scaling * (read @ exact["lora_A"].T @ exact["lora_B"].T)
    (formula * direction).sum().backward()
    torch.testing.assert_close(output.double(), formula, rtol=0, atol=1e-4)  # float32 sums of 128 terms
    torch.testing.assert_close(x.grad.double(), input.grad, rtol=0, atol=1e-4)
    for name, parameter in layer.named_parameters():
        assert parameter.requires_grad
        torch.testing.assert_close(parameter.grad.double(), exact[name].grad, rtol=0, atol=1e-3, msg=name)


@pytest.mark.parametrize("kind", BUILDERS)
def test_training_starts_with_the_codes_of_the_frozen_base(kind):
    frozen, trained = BUILDERS[kind](linear()), BUILDERS[kind](linear(), freeze_base=False)

    codes = codes_of(trained.base_layer.frozen())

    assert codes.keys() == codes_of(frozen.base_layer).keys()
    assert all(torch.equal(codes[name], tensor) for name, tensor in codes_of(frozen.base_layer).items())
    torch.testing.assert_close(trained.lora_A, frozen.lora_A, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained.lora_B, frozen.lora_B, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["qlora", "qalora standard"])
def test_a_method_that_fits_nothing_trains_the_weight_itself(kind):
    assert torch.equal(BUILDERS[kind](linear(), freeze_base=False).base_layer.weight, linear().weight)


def test_the_weight_that_trains_is_what_the_last_alternation_quantizes():
    before = LoftQLinear.from_linear(linear(), RANK, 6.0, iterations=4, svd="exact")
    trained = BUILDERS["loftq"](linear(), freeze_base=False)

    expected = linear().weight.double() - before.scaling * (before.lora_B.double() @ before.lora_A.double())

    torch.testing.assert_close(trained.base_layer.weight.double(), expected, rtol=0, atol=1e-6)


def test_the_weight_that_trains_holds_the_part_of_the_adapter_that_the_base_keeps():
    options = {"svd": "exact", "keep_base": 0.25}
    before = LoftQLinear.from_linear(linear(), RANK, 6.0, iterations=2, **options)
    trained = LoftQLinear.from_linear(linear(), RANK, 6.0, iterations=3, freeze_base=False, **options)

    added = before.scaling * (before.lora_B.double() @ before.lora_A.double())

    expected = linear().weight.double() - 0.75 * added
    torch.testing.assert_close(trained.base_layer.weight.double(), expected, rtol=0, atol=1e-6)
    frozen = LoftQLinear.from_linear(linear(), RANK, 6.0, iterations=3, **options)
    codes = codes_of(trained.base_layer.frozen())
    assert all(torch.equal(codes[name], tensor) for name, tensor in codes_of(frozen.base_layer).items())


@pytest.mark.parametrize("quant_type", ["nf4", "int3"])
@pytest.mark.parametrize("fit", ["loftq", "joint"])
def test_the_adapter_is_the_best_one_of_what_quantizing_that_weight_loses(fit, quant_type):
    layer = LoftQLinear.from_linear(
        linear(), RANK, 6.0, fit=fit, svd="exact", quant_type=quant_type, freeze_base=False, iterations=3
    )
    residual = linear().weight.detach().double() - layer.base_layer.dequantized().double()

    error = residual - layer.scaling * (layer.lora_B.double() @ layer.lora_A.double()).detach()

    least = torch.linalg.svdvals(residual)[RANK:].norm()  # Eckart and Young
    assert float(error.norm()) == pytest.approx(float(least), rel=1e-5)
    assert float(error.norm()) < 0.95 * float(residual.norm())


def test_conv1d_trains_in_the_orientation_of_a_linear():
    torch.manual_seed(0)
    source = Conv1D(96, IN)
    layer = QLoRALinear.from_linear(source, RANK, freeze_base=False)

    layer(torch.randn(2, IN)).sum().backward()

    assert torch.equal(layer.base_layer.weight, source.weight.T)
    assert layer.base_layer.weight.grad.shape == (96, IN) and layer.base_layer.weight.is_contiguous()


def test_a_trained_base_is_frozen_with_the_codes_of_its_weight():
    layer = BUILDERS["loftq"](linear(), freeze_base=False).eval()
    start = codes_of(layer.base_layer.frozen())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    x = torch.randn(16, IN)
    layer(x).square().mean().backward()
    optimizer.step()
    expected = make_quantizer(layer.base_layer.spec, "float32").quantize(TensorRows(layer.base_layer.weight.detach()))
    output, weight = layer(x).detach(), layer.weight.clone()

    merged = layer.merge()
    frozen = layer.freeze_base()

    assert frozen is layer and isinstance(layer.base_layer, QuantizedLinear) and not layer.base_layer.training
    assert not torch.equal(layer.base_layer.packed, start["packed"])
    assert torch.equal(layer.base_layer.packed, expected.packed)
    assert torch.equal(layer.base_layer.absmax_codes, expected.absmax.codes)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    torch.testing.assert_close(layer(x), output)
    assert torch.equal(layer.weight, weight) and torch.equal(merged.weight, weight)


@pytest.mark.parametrize("rounds", [False, True])
def test_a_trained_pooled_base_merges_into_the_offsets_of_the_trained_codes(rounds):
    layer = BUILDERS["qalora standard"](linear(), freeze_base=False)
    layer.quantization_enabled = rounds
    layer.lora_B.data += 0.05 * torch.randn(OUT, RANK)
    x = torch.randn(16, IN)
    layer(x).square().mean().backward()
    torch.optim.SGD(layer.parameters(), lr=0.05).step()

    merged = layer.merge()

    assert torch.equal(merged.codes, layer.base_layer.frozen().codes)
    layer.quantization_enabled = False
    torch.testing.assert_close(merged(x), layer(x), rtol=0, atol=1e-4)


def test_rounded_zero_points_are_those_of_the_weight_as_trained():
    trained, frozen = (BUILDERS["qalora standard"](linear(), freeze_base=freeze) for freeze in (False, True))
    for layer in (trained, frozen):
        layer.quantization_enabled = True
        layer.lora_B.data = torch.linspace(-0.1, 0.1, OUT * RANK).view(OUT, RANK)
    x = torch.randn(4, IN)

    torch.testing.assert_close(trained(x), frozen(x))
    assert trained.quantization_stats() == frozen.quantization_stats()


def test_training_lowers_a_loss_that_the_factors_alone_cannot():
    target = linear().weight.detach() + 0.1 * torch.sign(torch.randn(OUT, IN))  # of full rank
    x = torch.randn(256, IN)

    def loss_after(freeze_base: bool) -> float:
        layer = QLoRALinear.from_linear(linear(bias=False), RANK, freeze_base=freeze_base)
        optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=5e-3)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (layer(x) - x @ target.T).square().mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert loss_after(freeze_base=False) < 0.5 * loss_after(freeze_base=True)


def test_bfloat16_trains_in_bfloat16():
    layer = BUILDERS["loftq"](linear(dtype=torch.bfloat16), freeze_base=False)

    output = layer(torch.randn(2, IN, dtype=torch.bfloat16))
    output.sum().backward()

    assert output.dtype == layer.base_layer.weight.dtype == layer.base_layer.weight.grad.dtype == torch.bfloat16


def test_a_state_dict_holds_the_weight_and_loads():
    layer = BUILDERS["loftq"](linear(), freeze_base=False)
    other = QLoRALinear.from_linear(nn.Linear(IN, OUT), RANK, 6.0, freeze_base=False)

    other.load_state_dict(layer.state_dict())

    x = torch.randn(2, IN)
    assert torch.equal(other(x), layer(x))


def test_a_weight_that_is_no_longer_finite_stops_the_pass():
    layer = BUILDERS["qlora"](linear(), freeze_base=False)
    layer.base_layer.weight.data[0, 0] = float("inf")

    with pytest.raises(InputError, match="holds NaN or infinite values"):
        layer(torch.randn(2, IN))


def test_an_adapter_over_a_base_that_trains_is_not_saved_alone(tmp_path):
    model = nn.Sequential(BUILDERS["loftq"](linear(), freeze_base=False))

    with pytest.raises(UsageError) as caught:
        save_adapter(model, tmp_path / "adapter")

    assert str(caught.value) == (
        "tensor 0: the base trains too, and an adapter directory holds no base "
        "(freeze_base() keeps the codes of the trained weight; save the whole with model.state_dict())"
    )
    model[0].freeze_base()
    save_adapter(model, tmp_path / "adapter")


def test_a_fake_quantized_linear_is_a_linear():
    base = BUILDERS["loftq"](linear(), freeze_base=False).base_layer

    assert isinstance(base, FakeQuantizedLinear) and isinstance(base, nn.Linear)
    assert repr(base) == "FakeQuantizedLinear(in_features=128, out_features=64, bias=True, nf4, block 64)"
