"""What quantized linears with adapters compute.

Expected values are float64 formulas, torch's own autograd over them, and PEFT.
"""

from __future__ import annotations

import copy
import types

import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from support.adapted_modules import (
    ALPHA,
    IN,
    KINDS,
    OUT,
    POOL,
    RANK,
    SCALING,
    adapted,
    added,
    assert_close,
    decoded,
    quantized,
    random,
)
from torch import nn

from loftq_cli.nn import LoftQLinear, QALoRALinear, QuantizedLinear
from loftq_cli.quant.formats import FORMATS
from loftq_cli.tensors.specs import LoraSpec, Pooling


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("cache", [False, True], ids=["decoded on the fly", "kept decoded"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant_type", FORMATS)
def test_the_output_is_the_decoded_weight_plus_the_adapter(quant_type, kind, cache, bias):
    tensor, x = quantized(quant_type), random(2, 5, IN)
    offset = random(OUT, seed=4) if bias else None
    module = adapted(kind, QuantizedLinear(tensor, offset, cache=cache))

    exact = x.double() @ decoded(tensor).T + added(kind, x.double(), module.lora_A.double(), module.lora_B.double())
    exact = exact if offset is None else exact + offset.double()

    assert_close(module(x), exact, 1e-5)  # float32 sums of 128 terms
    assert_close(module(x), exact, 1e-5)
    assert_close(module(x[0, 0]), exact[0, 0], 1e-5)
    assert_close(module.double()(x.double()), exact, 1e-5)  # the decoded weight is float32 still


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant_type", ["nf4", "int2", "int8"])
def test_bfloat16_inputs_give_bfloat16_outputs(quant_type, kind, cache):
    tensor, x = quantized(quant_type, "bfloat16"), random(7, IN, dtype=torch.bfloat16)
    module = adapted(kind, QuantizedLinear(tensor, random(OUT, seed=4), cache=cache))

    exact = x.double() @ decoded(tensor).T + random(OUT, seed=4).double()
    exact += added(kind, x.double(), module.lora_A.double(), module.lora_B.double())

    found = module(x)
    assert found.dtype == torch.bfloat16
    assert_close(found, exact, 2**-7)  # weights, base output and sum are each rounded to 8 bits


@pytest.mark.parametrize("spec", [{"symmetric": True}, {"zero_point": "float"}], ids=str)
def test_symmetric_and_float_offset_bases_compute_too(spec):
    tensor, x = quantized("int4", **spec), random(3, IN)
    module = adapted("paper", QuantizedLinear(tensor))

    exact = x.double() @ decoded(tensor).T + added("paper", x.double(), module.lora_A.double(), module.lora_B.double())

    assert_close(module(x), exact, 1e-5)


def test_a_base_that_is_dense_takes_every_adapter():
    linear, x = nn.Linear(IN, OUT), random(3, IN)
    for kind in KINDS:
        module = adapted(kind, copy.deepcopy(linear))
        expected = linear(x) + added(kind, x, module.lora_A, module.lora_B)
        assert_close(module(x), expected, 1e-5)
        assert [name for name, p in module.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_qalora_in_the_convention_of_peft_is_what_peft_computes():
    module, x = adapted("peft", QuantizedLinear(quantized())), random(2, 5, IN)
    stub = types.SimpleNamespace(
        lora_A={"default": types.SimpleNamespace(weight=module.lora_A)},
        lora_B={"default": types.SimpleNamespace(weight=module.lora_B)},
        lora_dropout={"default": nn.Identity()},
        scaling={"default": SCALING},
        qalora_group_size={"default": POOL},
        in_features=IN,
        training=True,
    )

    expected = QALoraLinearVariant.forward(stub, "default", x, module.base_layer(x))

    assert_close(module(x), expected, 1e-6)


def test_autocast_computes_in_its_dtype():
    module, x = adapted("loftq", QuantizedLinear(quantized())), random(3, IN).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
    found.float().sum().backward()

    assert found.dtype == torch.bfloat16
    assert x.grad.dtype == module.lora_A.grad.dtype == torch.float32
    assert_close(found, module(x), 2**-6)


@pytest.mark.parametrize("cache", [False, True])
def test_training_goes_on_after_inference(cache):
    module, x = adapted("loftq", QuantizedLinear(quantized(), cache=cache)), random(3, IN).requires_grad_()
    with torch.inference_mode():
        before = module(x)

    output = module(x)
    output.sum().backward()

    assert torch.equal(output, before)
    assert x.grad is not None


def test_what_computes_with_the_weight_itself_gets_the_effective_one():
    # In evaluation without gradients, this layer of torch hands its linears' weights to one fused operation.
    encoder, x = nn.TransformerEncoderLayer(IN, 4, dim_feedforward=OUT, batch_first=True).eval(), random(2, 5, IN)
    encoder.linear1 = adapted("loftq", QuantizedLinear(quantized(), random(OUT)))
    with torch.no_grad():
        fused = encoder(x)

    assert_close(fused, encoder(x.requires_grad_()), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_A": torch.zeros(RANK, IN - 1)}, "does not read 128 inputs"),
        ({"lora_B": torch.zeros(OUT, RANK + 1)}, "does not give 48 outputs"),
        ({"lora": LoraSpec(RANK, ALPHA, pooling=Pooling("paper", POOL))}, "LoftQLinear is for an adapter that is not"),
    ],
)
def test_factors_that_do_not_fit_are_refused(change, message):
    arguments = {"lora_A": torch.zeros(RANK, IN), "lora_B": torch.zeros(OUT, RANK), "lora": LoraSpec(RANK, ALPHA)}
    with pytest.raises(ValueError, match=message):
        LoftQLinear(QuantizedLinear(quantized()), **{**arguments, **change})
    with pytest.raises(ValueError, match="QALoRALinear is for a pooled adapter"):
        QALoRALinear(QuantizedLinear(quantized()), **arguments)


def test_an_empty_batch_is_a_batch():
    module = adapted("peft", QuantizedLinear(quantized()))
    assert module(torch.zeros(0, IN)).shape == (0, OUT)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", ["loftq", "peft"])
@pytest.mark.parametrize("quant_type", FORMATS)
def test_a_module_moves_to_a_gpu_and_computes_the_same(quant_type, kind, cache):
    module, x = adapted(kind, QuantizedLinear(quantized(quant_type), random(OUT), cache=cache)), random(3, IN)
    expected = module(x)

    module.cuda()

    assert module.weight.device.type == "cuda"
    assert_close(module(x.cuda()).cpu(), expected, 1e-5)
    assert_close(module.merge()(x.cuda()).cpu(), expected, 1e-5)
