"""The decoded weight of a quantized linear is for reading."""

from __future__ import annotations

import pytest
import torch
from support.adapted_modules import IN, OUT, SCALING, adapted, assert_close, decoded, quantized
from torch import nn

from loftq_cli.nn import QuantizedLinear


def change_in_place(weight: torch.Tensor) -> None:
    weight.add_(1)


def change_the_data(weight: torch.Tensor) -> None:
    weight.data += 1


def replace_the_data(weight: torch.Tensor) -> None:
    weight.data = torch.zeros(OUT, IN)


def change_an_element(weight: torch.Tensor) -> None:
    weight[0, 0] = 1


def change_the_detached(weight: torch.Tensor) -> None:
    weight.detach().mul_(2)


def initialize_again(weight: torch.Tensor) -> None:
    nn.init.normal_(weight)


def write_as_out(weight: torch.Tensor) -> None:
    torch.add(torch.ones(OUT, IN), 1, out=weight)


def change_as_one_of_many(weight: torch.Tensor) -> None:
    torch._foreach_add_([weight], 1)


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_the_data,
        replace_the_data,
        change_an_element,
        change_the_detached,
        initialize_again,
        write_as_out,
        change_as_one_of_many,
    ],
)
def test_changing_a_decoded_weight_fails_loudly(change):
    layer = QuantizedLinear(quantized())
    for module in (layer, adapted("loftq", layer)):
        with pytest.raises(RuntimeError, match=r"a change to it would be lost.*loftq merge"):
            change(module.weight)


def test_assigning_a_weight_fails_loudly():
    layer = QuantizedLinear(quantized())
    for value in (torch.zeros(OUT, IN), nn.Parameter(torch.zeros(OUT, IN))):
        with pytest.raises(RuntimeError, match="a change to it would be lost"):
            layer.weight = value


def test_a_weight_says_what_it_is_without_decoding_and_reads_like_a_tensor(monkeypatch):
    layer = QuantizedLinear(quantized("int4", "bfloat16"), dtype=torch.float32)
    module, expected = adapted("loftq", layer), layer.dequantized()
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedLinear, "dequantized", lambda self: pytest.fail("decoded"))
        for weight in (layer.weight, module.weight, layer.weight.data):
            assert isinstance(weight, torch.Tensor)
            assert (weight.dtype, weight.device.type, weight.shape) == (torch.float32, "cpu", (OUT, IN))
            assert (weight.dim(), weight.numel(), weight.requires_grad) == (2, OUT * IN, False)

    assert torch.equal(layer.weight, expected)
    assert torch.equal(layer.weight.data.clone().T, expected.T)
    assert torch.equal(layer.weight[3], expected[3])
    assert torch.equal(torch.zeros(OUT, IN).copy_(layer.weight), expected)
    assert repr(layer.weight) == repr(expected)
    effective = decoded(quantized("int4")) + SCALING * module.lora_B.double() @ module.lora_A.double()
    assert_close(module.weight.clone(), effective, 2**-8)  # the base is rounded to bfloat16
