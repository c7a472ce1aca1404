"""merge and reset of modules with adapters."""

from __future__ import annotations

import pytest
import torch
from support.adapted_modules import (
    IN,
    KINDS,
    OUT,
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

from loftq_cli.nn import QuantizedLinear
from loftq_cli.quant.formats import FORMATS


@pytest.mark.parametrize("kind", ["loftq", "qlora"])
@pytest.mark.parametrize("quant_type", FORMATS)
def test_merging_gives_a_dense_linear_that_computes_the_same(quant_type, kind):
    tensor, x = quantized(quant_type), random(3, IN)
    module = adapted(kind, QuantizedLinear(tensor, random(OUT)))

    merged = module.merge()

    assert type(merged) is nn.Linear
    exact = decoded(tensor) + SCALING * module.lora_B.double() @ module.lora_A.double()
    assert_close(merged.weight, exact, 1e-6)
    assert torch.equal(merged.bias, random(OUT)) and merged.bias is not module.bias
    assert not any(p.requires_grad for p in merged.parameters())
    assert_close(merged(x), module(x), 1e-5)


@pytest.mark.parametrize("spec", [{}, {"symmetric": True}, {"zero_point": "float"}, {"group_size": 16}], ids=str)
@pytest.mark.parametrize("kind", POOLED)
@pytest.mark.parametrize("quant_type", ["int2", "int3", "int4", "int8"])
def test_merging_qalora_keeps_the_codes_and_moves_the_offsets(quant_type, kind, spec):
    tensor, x = quantized(quant_type, **spec), random(3, IN)
    module = adapted(kind, QuantizedLinear(tensor, random(OUT)))

    merged = module.merge()

    assert type(merged) is QuantizedLinear
    assert torch.equal(merged.quantized().codes, tensor.codes)
    assert merged.quantized().biases.dtype == torch.float32
    exact = torch.eye(IN, dtype=torch.float64) @ decoded(tensor).T
    exact += added(kind, torch.eye(IN, dtype=torch.float64), module.lora_A.double(), module.lora_B.double())
    assert_close(merged.dequantized(), exact.T, 1e-6)  # float32 offsets
    assert torch.equal(merged.bias, random(OUT)) and merged.bias is not module.bias
    assert_close(merged(x), module(x), 1e-5)


def test_merging_qalora_where_offsets_cannot_hold_it():
    for base in (nn.Linear(IN, OUT), QuantizedLinear(quantized("nf4"))):
        module, x = adapted("repo", base), random(3, IN)
        merged = module.merge()
        assert type(merged) is nn.Linear
        assert_close(merged(x), module(x), 1e-5)
    with pytest.raises(ValueError, match="pooled groups of 32 are not whole groups of 64"):
        adapted("repo", QuantizedLinear(quantized(group_size=64))).merge()


@pytest.mark.parametrize("kind", KINDS)
def test_reset_brings_the_loaded_adapter_back(kind):
    module, x = adapted(kind, QuantizedLinear(quantized())), random(3, IN)
    start = module(x)
    module(x).sum().backward()
    with torch.no_grad():
        module.lora_A -= module.lora_A.grad
        module.lora_B.zero_()
    assert not torch.allclose(module(x), start)

    module.reset()

    assert torch.equal(module(x), start)
    assert module.lora_A.requires_grad
