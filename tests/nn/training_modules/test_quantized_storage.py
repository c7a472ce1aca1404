"""How a quantized linear keeps its weight: dtypes, caches, state dicts, memory."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.adapted_modules import IN, OUT, adapted, quantize, quantized, random, spec_of
from torch import nn
from torch.nn import functional

from loftq_cli.nn import QuantizedLinear
from loftq_cli.quant.formats import FORMATS


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
@pytest.mark.parametrize("quant_type", FORMATS)
def test_casting_a_model_leaves_what_is_decoded_as_it_is(quant_type, cast):
    layer, x = QuantizedLinear(quantized(quant_type), random(OUT)), random(3, IN)
    buffers = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    expected = layer.dequantized()

    getattr(nn.Sequential(layer), cast)()

    dtype = {"half": torch.float16, "double": torch.float64, "float": torch.float32}.get(cast, torch.bfloat16)
    for name, tensor in layer.named_buffers():
        assert tensor.dtype == buffers[name].dtype
        assert torch.equal(tensor, buffers[name])
    assert torch.equal(layer.dequantized(), expected)
    assert layer.bias.dtype == layer.weight.dtype == dtype
    assert torch.equal(layer(x.to(dtype)), functional.linear(x.to(dtype), expected.to(dtype), layer.bias))


def test_a_cached_weight_follows_what_happens_to_the_module():
    layer, other, x = QuantizedLinear(quantized(), cache=True), quantized("int4", dtype="bfloat16"), random(3, IN)
    layer(x)
    state = QuantizedLinear(quantize(random(OUT, IN, seed=9), other.spec)).state_dict()

    layer.load_state_dict(state)

    expected = functional.linear(x, layer.dequantized())
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.to(torch.bfloat16)(x), expected)


@pytest.mark.parametrize("quant_type", FORMATS)
def test_a_state_dict_holds_all_of_it_and_loads(quant_type):
    source = adapted("loftq", QuantizedLinear(quantized(quant_type), random(OUT)))
    empty = quantize(torch.zeros(OUT, IN), spec_of(quant_type))
    target = adapted("loftq", QuantizedLinear(empty, torch.zeros(OUT)), size=0.0)
    x = random(3, IN)
    assert not torch.equal(target(x), source(x))

    target.load_state_dict(source.state_dict())

    assert torch.equal(target(x), source(x))
    for copied in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert torch.equal(copied(x), source(x))


@pytest.mark.parametrize(("quant_type", "bits"), [("int2", 2), ("int3", 3), ("int4", 4), ("int8", 8), ("nf4", 4)])
def test_codes_take_their_bits_in_memory(quant_type, bits):
    layer = QuantizedLinear(quantized(quant_type))
    codes = layer.packed if quant_type == "nf4" else layer.codes
    assert codes.nbytes == OUT * IN * bits // 8


def test_a_printed_layer_names_its_format():
    text = repr(adapted("peft", QuantizedLinear(quantized("int2"), random(OUT))))
    assert "in_features=128, out_features=48, bias=True, int2, group 32" in text
    assert "rank=4, scaling=0.1875" in text  # 1.5 * 4 groups / 32
