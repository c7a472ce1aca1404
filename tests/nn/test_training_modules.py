"""Linears that stay quantized, and adapters that train on them: what they compute, what they leave alone, how they are
loaded, merged and saved.

Expected values are float64 formulas written out here, torch's own autograd over them, and PEFT.
"""

from __future__ import annotations

import copy
import gc
import json
import pickle
import shutil
import types
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file, save_file
from support import models
from support.adapters import PREFIX, edit_json, edit_tensors, lora_tensors, quietly, write_adapter
from support.conversions import run_conversion, run_merge
from support.interpreter import kernel_device, triton_kernels
from torch import nn
from torch.nn import functional

from loftq_cli.errors import InputError, LoftqError, MismatchError, UsageError
from loftq_cli.model.stored import BaseModel
from loftq_cli.nn import (
    LoftQLinear,
    QALoRALinear,
    QLoRALinear,
    QuantizedLinear,
    load_adapted,
    save_adapter,
)
from loftq_cli.planning.recipe import Override
from loftq_cli.quant.formats import FORMATS, make_quantizer
from loftq_cli.tensors.matrices import CodebookTensor, NestedAbsmax
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec, LoraSpec, Pooling

OUT, IN, RANK, POOL = 48, 128, 4, 32
ALPHA = 6.0
SCALING = 1.5  # alpha / rank

# What PEFT, the paper and its code read of a group of 32 of 128 inputs, by definition.
POOLED = {
    "peft": lambda groups: groups.mean(-1) * 4,
    "paper": lambda groups: groups.sum(-1),
    "repo": lambda groups: groups.mean(-1),
}
KINDS = ["loftq", "qlora", *POOLED]
CLASSES = {"loftq": LoftQLinear, "qlora": QLoRALinear}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spec_of(quant_type: str, *, symmetric: bool = False, zero_point: str = "int", group_size: int = POOL) -> Any:
    if quant_type == "nf4":
        return CodebookSpec()
    return AffineSpec(FORMATS[quant_type].bits, group_size, symmetric, zero_point)


def quantize(weight: torch.Tensor, spec: Any, dtype: str = "float32") -> Any:
    return make_quantizer(spec, dtype).quantize(TensorRows(weight))


def quantized(quant_type: str = "int4", dtype: str = "float32", **spec: Any) -> Any:
    return quantize(random(OUT, IN, seed=1) * 0.1, spec_of(quant_type, **spec), dtype)


def decoded(tensor: Any) -> torch.Tensor:
    """The weight that the stored numbers mean, in float64, by the definition of the formats."""
    if not isinstance(tensor, CodebookTensor):
        scales = tensor.scales.double().repeat_interleave(tensor.spec.group_size, 1)
        if tensor.biases is not None:
            return tensor.codes.double() * scales + tensor.biases.double().repeat_interleave(tensor.spec.group_size, 1)
        middle = torch.full(tensor.scales.shape, 2.0 ** (tensor.spec.bits - 1))
        zero_points = middle if tensor.zero_points is None else tensor.zero_points
        return (tensor.codes.double() - zero_points.double().repeat_interleave(tensor.spec.group_size, 1)) * scales
    nested = tensor.absmax
    assert isinstance(nested, NestedAbsmax)
    absmax = nested.code_map[nested.codes.long()].double()
    absmax = absmax * nested.absmax.double().repeat_interleave(256)[: len(absmax)] + nested.offset.double()
    table = bitsandbytes.functional.get_4bit_type("nf4", device="cpu").double()
    values = table[torch.stack([tensor.packed >> 4, tensor.packed & 15], 1).long().flatten()]
    return (values * absmax.repeat_interleave(64)).view(tensor.shape)


def adapted(
    kind: str, base: nn.Linear, *, dtype: torch.dtype = torch.float32, pool: int = POOL, size: float = 0.1
) -> Any:
    """The module of a method over `base`, with random factors."""
    pooling = Pooling(kind, pool) if kind in POOLED else None
    lora = LoraSpec(RANK, ALPHA, dtype=str(dtype).removeprefix("torch."), pooling=pooling)
    lora_A = random(RANK, IN // lora.group_size, seed=2, dtype=dtype) * size
    lora_B = random(OUT, RANK, seed=3, dtype=dtype) * size
    return CLASSES.get(kind, QALoRALinear)(base, lora_A, lora_B, lora)


def added(kind: str, x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, pool: int = POOL) -> torch.Tensor:
    """s·B·A·x by the definition of each method."""
    read = POOLED[kind](x.unflatten(-1, (-1, pool))) if kind in POOLED else x
    return SCALING * (read @ lora_A.T @ lora_B.T)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """`tolerance` is a share of the largest expected value: sums of many terms, some of which nearly cancel."""
    assert found.shape == expected.shape
    assert float((found.detach().double() - expected.detach().double()).abs().max()) <= tolerance * float(
        expected.detach().abs().max()
    )


# What they compute


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


# Gradients


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


# What multiplies by codes itself


@pytest.fixture
def on_triton():
    """Triton's kernels; the weight must not be decoded as a whole."""
    with triton_kernels(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedLinear, "dequantized", lambda self: pytest.fail("decoded"))
        yield


@pytest.mark.interpreter
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_kernels_that_multiply_codes_give_the_output_and_the_gradients(double_quant, dtype, bias, on_triton):
    tensor = quantize(random(OUT, IN, seed=1) * 0.1, CodebookSpec(double_quant=double_quant))
    offset = random(OUT, seed=4) if bias else None
    layer = QuantizedLinear(tensor, offset).to(kernel_device())
    weight = make_quantizer(tensor.spec, "float32").dequantize(tensor).to(dtype).double()
    inputs, upstream = random(2, 5, IN, dtype=dtype), random(2, 5, OUT, seed=5, dtype=dtype)
    x = inputs.to(kernel_device()).requires_grad_()

    output = layer(x)
    output.backward(upstream.to(kernel_device()))

    tolerance = 1e-6 + torch.finfo(dtype).eps  # the product is rounded, and with the bias again
    exact = inputs.double() @ weight.T + (0.0 if offset is None else offset.to(dtype).double())
    assert output.dtype == x.grad.dtype == dtype
    assert_close(output.cpu(), exact, tolerance)
    assert_close(x.grad.cpu(), upstream.double() @ weight, tolerance)


@pytest.mark.interpreter
def test_kernels_that_multiply_codes_take_any_number_of_inputs(on_triton):
    layer, x = QuantizedLinear(quantized("nf4")).to(kernel_device()), random(100, IN)
    exact = x.double() @ decoded(quantized("nf4")).T

    x = x.to(kernel_device())
    assert_close(layer(x).cpu(), exact, 1e-5)
    assert_close(layer(x[0]).cpu(), exact[0], 1e-5)
    assert layer(x[:0]).shape == (0, OUT)


@pytest.mark.interpreter
def test_what_kernels_cannot_multiply_is_decoded():
    """Other formats, other dtypes, rows that share a byte, autocast, and a weight that is kept."""
    device = kernel_device()
    odd = QuantizedLinear(quantize(random(OUT, 33) * 0.1, CodebookSpec(double_quant=False))).to(device)
    nf4, exact = QuantizedLinear(quantized("nf4")).to(device), decoded(quantized("nf4")).T
    x, x_odd = random(3, IN).to(device), random(3, 33).to(device)
    with triton_kernels():
        assert_close(nf4(x.double()).cpu(), x.double().cpu() @ exact, 1e-6)
        assert_close(odd(x_odd).cpu(), x_odd.cpu() @ odd.dequantized().T.cpu(), 1e-6)
        for layer in (QuantizedLinear(quantized("int4")), QuantizedLinear(quantized("nf4"), cache=True)):
            layer = layer.to(device)
            assert_close(layer(x).cpu(), x.cpu() @ layer.dequantized().T.cpu(), 1e-6)
        with torch.autocast(device.type, torch.bfloat16):
            assert nf4(x).dtype == torch.bfloat16


# Storage


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


# The weight is for reading


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


# Quantization awareness


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


# merge and reset


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


# PEFT


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


# Loading


AUTO = {"bert": "AutoModelForSequenceClassification"}
IDS = torch.arange(24).view(2, 12) * 5 % 160


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("llama", "tied llama", "gpt2", "bert"):
        models.BUILDERS[name](folder / name)
    models.gpt2_without_prefix(folder / "gpt2 of the hub")
    models.torch_llama(folder / "torch llama")
    return folder


@pytest.fixture(scope="module")
def converted(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama in NF4 with a LoftQ adapter of rank 8 and scaling 2."""
    output = tmp_path_factory.mktemp("converted") / "base"
    run_conversion(checkpoints / "llama", output, rank=8, alpha=16.0)
    return output


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 llama in INT4 with a fitted QA-LoRA adapter: with bfloat16 scales, every decoded weight is rounded to
    8 bits, and those of a merged model with float32 offsets are not.
    """
    folder = tmp_path_factory.mktemp("pooled")
    output = folder / "base"
    run_conversion(
        models.llama(folder / "llama", dtype=torch.float32),
        output,
        method="qalora",
        quant_type="int4",
        group_size=32,
        rank=4,
    )
    return output


def fresh(checkpoint: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a checkpoint with random numbers in it."""
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    torch.manual_seed(7)
    return getattr(transformers, AUTO.get(name, "AutoModelForCausalLM")).from_config(config, dtype=dtype).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def product_of(adapter: Path, module: str) -> torch.Tensor:
    """What the adapter adds to the weight of `module`, [out, in] in float64, from its files alone."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    lora_A, lora_B = (tensors[f"{PREFIX}{module}.lora_{x}.weight"].double() for x in "AB")
    product = config["lora_alpha"] / config["r"] * lora_B @ lora_A
    if not (config.get("use_qalora") or config.get("qalora_pooling")):
        return product
    size = config["qalora_group_size"]
    factor = {"paper": 1.0, "repo": 1 / size}.get(config.get("qalora_pooling"), lora_A.shape[1] / size)
    return factor * product.repeat_interleave(size, 1)


def reference(checkpoint: Path, base: Path, adapter: Path | None, name: str = "llama") -> nn.Module:
    """The dense float64 model with dequant(Q) + s·B·A in every converted layer."""
    auto = getattr(transformers, AUTO.get(name, "AutoModelForCausalLM"))
    model = auto.from_pretrained(checkpoint, dtype=torch.float32).double().eval()
    with BaseModel.open(base) as opened, torch.no_grad():
        for layer in json.loads((base / "loftq_report.json").read_text())["layers"]:
            weight = opened.matrix(layer["name"]).double()
            if adapter is not None:
                weight = weight + product_of(adapter, layer["module"])
            module = model.get_submodule(layer["module"])
            module.weight.copy_(weight.T if hasattr(module, "nf") else weight)
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("method", ["loftq", "qlora"])
@pytest.mark.parametrize("name", ["llama", "tied llama", "torch llama", "gpt2", "gpt2 of the hub", "bert"])
def test_a_loaded_model_computes_with_the_effective_weights(name, method, cache, checkpoints, tmp_path):
    base = tmp_path / "base"
    run_conversion(checkpoints / name, base, method=method, rank=4, alpha=8.0)
    if method == "qlora":  # a start that adds nothing would hide a wrong scaling
        edit_tensors(
            base / "qlora_init" / "adapter_model.safetensors",
            lambda tensors: tensors.update({key: random(*value.shape) * 0.05 for key, value in tensors.items()}),
        )

    model = load_adapted(fresh(base, name), base, cache=cache)

    expected = reference(checkpoints / name, base, base / f"{method}_init", name)
    assert_close(logits(model), logits(expected), 1e-4)  # float32 through two blocks
    modules = [m for m in model.modules() if type(m) is CLASSES[method]]
    assert len(modules) == len(json.loads((base / "loftq_report.json").read_text())["layers"])
    assert all(m.base_layer.cache is cache for m in modules)
    assert trainable(model) == {"lora_A", "lora_B"}


@pytest.mark.parametrize(
    ("layout", "quant_type"),
    [
        ("compressed-tensors", "int2"),
        ("compressed-tensors", "int3"),
        ("compressed-tensors", "int8"),
        ("gptq", "int4"),
        ("metal", "int4"),
        ("mlx", "int3"),
        ("dense", "int4"),
        ("dense", "nf4"),
    ],
)
@pytest.mark.parametrize("method", ["loftq", "qalora"])
def test_every_layout_loads(layout, quant_type, method, checkpoints, tmp_path):
    if (method, quant_type) == ("qalora", "nf4"):
        pytest.skip("there is no such conversion")
    base = tmp_path / "base"
    run_conversion(checkpoints / "llama", base, method=method, quant_type=quant_type, layout=layout, rank=4)

    model = load_adapted(fresh(base), base)

    expected = reference(checkpoints / "llama", base, base / f"{method}_init")
    assert_close(logits(model), logits(expected), 1e-4)
    kind = LoftQLinear if method == "loftq" else QALoRALinear
    inner = nn.Linear if layout == "dense" else QuantizedLinear
    modules = [m for m in model.modules() if isinstance(m, kind)]
    assert len(modules) == 14 and all(type(m.base_layer) is inner for m in modules)
    assert trainable(model) == {"lora_A", "lora_B"}


@pytest.mark.parametrize("pooling", POOLED)
def test_pooled_adapters_load_in_their_convention(pooling, checkpoints, tmp_path):
    base = tmp_path / "base"
    run_conversion(checkpoints / "llama", base, method="qalora", quant_type="int2", pooling=pooling, rank=4, alpha=6.0)

    model = load_adapted(fresh(base), base)

    assert_close(logits(model), logits(reference(checkpoints / "llama", base, base / "qalora_init")), 1e-4)


def test_the_dtype_and_the_mode_of_the_model_are_kept(converted):
    model = load_adapted(fresh(converted, dtype=torch.bfloat16).train(), converted)

    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == torch.bfloat16
    assert (layer.lora_A.dtype, layer.training, layer.base_layer.training) == (torch.float32, True, True)
    assert logits(model).dtype == torch.bfloat16
    assert not any(module.training for module in load_adapted(fresh(converted), converted).modules())


def test_any_module_with_the_right_names_is_loaded(tmp_path):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(IN, 64)
            self.norm = nn.LayerNorm(64)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])
            self.layers[1] = self.layers[0]  # one module under two names
            self.register_buffer("steps", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[1].norm(self.layers[1].proj(x)) + self.steps.sum()

    tensors = {
        "layers.0.proj.weight": random(64, IN),
        "layers.0.proj.bias": random(64, seed=1),
        "layers.0.norm.weight": random(64, seed=2),
        "layers.0.norm.bias": random(64, seed=3),
        "steps": torch.arange(3.0),
    }
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    run_conversion(tmp_path / "model", tmp_path / "base", rank=4)

    model = load_adapted(Plain(), tmp_path / "base")

    assert model.layers[0].proj is model.layers[1].proj and isinstance(model.layers[0].proj, LoftQLinear)
    with BaseModel.open(tmp_path / "base") as base:
        weight = base.matrix("layers.0.proj.weight").double()
    weight = weight + product_of(tmp_path / "base" / "loftq_init", "layers.0.proj")
    x = random(5, IN)
    hidden = x.double() @ weight.T + tensors["layers.0.proj.bias"]
    expected = functional.layer_norm(
        hidden, (64,), tensors["layers.0.norm.weight"].double(), tensors["layers.0.norm.bias"].double()
    )
    assert_close(model(x), expected + 3, 1e-5)


def test_layers_without_an_adapter_and_directories_without_one(converted, checkpoints, tmp_path):
    some = tmp_path / "some"
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    shutil.copytree(converted / "loftq_init", some)
    kept = {f"{PREFIX}{name}.lora_{x}.weight" for name in names for x in "AB"}
    edit_tensors(
        some / "adapter_model.safetensors", lambda t: [t.pop(name) for name in list(t) if name not in kept] and None
    )
    model = load_adapted(fresh(converted), converted, adapter=some)
    assert {name for name, m in model.named_modules() if isinstance(m, LoftQLinear)} == set(names)
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 14

    bare = tmp_path / "bare"
    shutil.copytree(converted, bare, ignore=shutil.ignore_patterns("loftq_init"))
    model = load_adapted(fresh(bare), bare)
    assert trainable(model) == set()
    assert_close(logits(model), logits(reference(checkpoints / "llama", bare, None)), 1e-4)


def test_an_adapter_that_peft_trained_is_loaded(converted, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(model, converted, subfolder="loftq_init", is_trainable=True)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(random(*parameter.shape) * 0.01)
    quietly(wrapped.save_pretrained, tmp_path / "trained")

    model = load_adapted(fresh(converted), converted, adapter=tmp_path / "trained")

    layer = model.model.layers[1].mlp.down_proj
    assert type(layer) is LoftQLinear
    with BaseModel.open(converted) as base:
        exact = base.matrix("model.layers.1.mlp.down_proj.weight").double()
    exact = exact + product_of(tmp_path / "trained", "model.layers.1.mlp.down_proj")
    assert_close(layer.weight.clone(), exact, 1e-6)


def test_a_pooled_adapter_reads_every_input_where_peft_could_not_pool(converted, tmp_path):
    # PEFT pools only on GPTQ layers, and trains an ordinary adapter on every other one under the same config.
    q_proj = "model.layers.0.self_attn.q_proj"
    adapter = write_adapter(
        tmp_path / "adapter", lora_tensors(q_proj, (128, 128)), use_qalora=True, qalora_group_size=32, r=4
    )

    model = load_adapted(fresh(converted), converted, adapter=adapter)

    layer = model.get_submodule(q_proj)
    assert isinstance(layer, LoftQLinear)
    factors = load_file(adapter / "adapter_model.safetensors")
    lora_A, lora_B = (factors[f"{PREFIX}{q_proj}.lora_{x}.weight"].double() for x in "AB")
    assert_close(layer.weight.clone(), layer.base_layer.dequantized().double() + lora_B @ lora_A, 1e-6)


def without_head(model: nn.Module) -> None:
    del model.lm_head


def with_another_linear(model: nn.Module) -> None:
    model.extra = nn.Linear(2, 2)


def with_a_wider_linear(model: nn.Module) -> None:
    model.model.layers[0].mlp.up_proj = nn.Linear(128, 200, bias=False)


def with_no_linear(model: nn.Module) -> None:
    model.model.layers[0].mlp.up_proj = nn.Embedding(192, 128)


def with_one_layer_less(model: nn.Module) -> None:
    del model.model.layers[1]


def with_a_bias(model: nn.Module) -> None:
    model.model.layers[0].mlp.up_proj = nn.Linear(128, 192)


def with_a_larger_vocabulary(model: nn.Module) -> None:
    model.model.embed_tokens = nn.Embedding(161, 128)


def tied(model: nn.Module) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_head, r"base: tensor lm_head\.weight: has no place in the model"),
        (with_one_layer_less, r"base: tensor model\.layers\.1\.\S+: has no place in the model"),
        (with_another_linear, r"base: does not give extra\.weight of the model"),
        (with_a_bias, r"base: does not give model\.layers\.0\.mlp\.up_proj\.bias of the model"),
        (with_a_wider_linear, r"up_proj\.weight: is \(192, 128\), and \S+up_proj of the model is \(200, 128\)"),
        (with_no_linear, r"up_proj\.weight: is for a linear, and \S+up_proj of the model is Embedding"),
        (with_a_larger_vocabulary, r"embed_tokens\.weight: is \(160, 128\), and \S+ of the model is \(161, 128\)"),
        (tied, r"embed_tokens\.weight: differs from lm_head\.weight, and the model shares one weight for both"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(change, message, converted):
    model = fresh(converted)
    change(model)
    kinds, before = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())

    with pytest.raises(MismatchError, match=message):
        load_adapted(model, converted)

    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_memory_is_refused(converted):
    with torch.device("meta"):
        model = fresh(converted)
    with pytest.raises(ValueError, match="meta device"):
        load_adapted(model, converted)


def test_attention_that_bypasses_its_linear_is_refused(tmp_path):
    attention = nn.MultiheadAttention(64, 2, bias=False)
    model = nn.Module()
    model.blocks = nn.ModuleList([attention])
    (tmp_path / "model").mkdir()
    tensors = {f"blocks.0.{name}": value for name, value in attention.state_dict().items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    run_conversion(tmp_path / "model", tmp_path / "base", rank=4, include=("out_proj",))

    with pytest.raises(MismatchError, match=r"out_proj of the model is NonDynamicallyQuantizableLinear"):
        load_adapted(model, tmp_path / "base")


def test_adapters_that_cannot_be_trained_here_are_refused(converted, checkpoints, tmp_path):
    def refusal(adapter: Path) -> LoftqError:
        with pytest.raises(LoftqError) as raised:
            load_adapted(fresh(converted), converted, adapter=adapter)
        return raised.value

    elsewhere = write_adapter(
        tmp_path / "elsewhere", {"other.lora_A.weight": torch.zeros(4, 8), "other.lora_B.weight": torch.zeros(8, 4)}
    )
    assert "tensor base_model.model.other.lora_A.weight: its module is not in the base" in str(refusal(elsewhere))

    q_proj = "model.layers.0.self_attn.q_proj"
    factors = {f"{q_proj}.lora_A.weight": torch.zeros(4, 64), f"{q_proj}.lora_B.weight": torch.zeros(128, 4)}
    narrow = str(refusal(write_adapter(tmp_path / "narrow", factors)))
    assert "lora_A.weight: is (4, 64), and its layer asks for (4, 128)" in narrow

    factors[f"{q_proj}.lora_A.weight"] = torch.zeros(4, 128)
    biased = write_adapter(tmp_path / "biased", {**factors, f"{q_proj}.lora_B.bias": torch.zeros(128)})
    assert "nothing else is trained here" in str(refusal(biased))
    whole = write_adapter(
        tmp_path / "whole", {**factors, "lm_head.weight": torch.zeros(160, 128)}, modules_to_save=["lm_head"]
    )
    assert "lm_head.weight: is neither lora_A nor lora_B of a linear" in str(refusal(whole))

    run_conversion(checkpoints / "llama", tmp_path / "other", rank=8, seed=3, block_size=128)
    foreign = refusal(tmp_path / "other" / "loftq_init")
    assert isinstance(foreign, MismatchError) and "this base is another quantized base" in str(foreign)
    assert isinstance(refusal(tmp_path / "nowhere"), InputError)


# Saving


def trained(model: nn.Module, **save: Any) -> nn.Module:
    """The model after two steps that change every factor."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_trained_adapter_is_saved_and_merged(name, checkpoints, tmp_path):
    base = tmp_path / "base"
    other = Override(match="q_proj|c_proj", rank=8, alpha=4.0)
    run_conversion(checkpoints / name, base, rank=4, alpha=8.0, rslora=True, override=(other,))
    model = trained(load_adapted(fresh(base, name), base))

    save_adapter(model, tmp_path / "trained")

    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    start = json.loads((base / "loftq_init" / "adapter_config.json").read_text())
    assert start["alpha_pattern"]
    assert sorted(config.pop("target_modules")) == sorted(start.pop("target_modules"))
    assert config == start
    provenance = "loftq_provenance.json"
    assert (tmp_path / "trained" / provenance).read_bytes() == (base / "loftq_init" / provenance).read_bytes()
    output = run_merge(base, tmp_path / "trained", tmp_path / "merged", dtype="float32")
    deployed = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    assert_close(logits(deployed), logits(model), 1e-4)
    again = load_adapted(fresh(base, name), base, adapter=tmp_path / "trained")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("layout", ["dense", "metal", "mlx"])
def test_a_trained_pooled_adapter_is_saved_and_merged(layout, pooled, tmp_path):
    model = trained(load_adapted(fresh(pooled), pooled))

    save_adapter(model, tmp_path / "trained")

    output = run_merge(pooled, tmp_path / "trained", tmp_path / "merged", layout=layout, dtype="float32")
    again = load_adapted(fresh(pooled), output)
    assert_close(logits(again), logits(model), 1e-4)
    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    assert (config["use_qalora"], config["qalora_group_size"]) == (True, 32)


def test_what_rounded_training_sees_is_what_round_zeros_writes(pooled, tmp_path):
    model = load_adapted(fresh(pooled), pooled)
    for module in model.modules():
        if isinstance(module, QALoRALinear):
            module.quantization_enabled = True
    trained(model)
    save_adapter(model, tmp_path / "trained")

    deployed = run_merge(pooled, tmp_path / "trained", tmp_path / "merged", round_zeros=True, force=True)

    assert_close(logits(load_adapted(fresh(pooled), deployed)), logits(model), 1e-4)


def test_peft_reads_a_saved_adapter(converted, tmp_path):
    model = trained(load_adapted(fresh(converted), converted))

    save_adapter(model, tmp_path / "trained")

    dense = load_adapted(fresh(converted), converted, adapter=tmp_path / "trained")
    for module in list(dense.modules()):
        for name, child in module.named_children():
            if isinstance(child, LoftQLinear):
                setattr(module, name, child.base_layer)
    wrapped = PeftModel.from_pretrained(dense, tmp_path / "trained").eval()
    assert_close(logits(wrapped), logits(model), 1e-5)


def test_a_saved_adapter_is_replaced_on_demand_only(converted, tmp_path):
    model = load_adapted(fresh(converted), converted)
    save_adapter(model, tmp_path / "trained")
    first = (tmp_path / "trained" / "adapter_model.safetensors").read_bytes()
    trained(model)

    with pytest.raises(UsageError, match="exists already"):
        save_adapter(model, tmp_path / "trained")
    save_adapter(model, tmp_path / "trained", overwrite=True)

    assert (tmp_path / "trained" / "adapter_model.safetensors").read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trained"]


@pytest.mark.parametrize("where", [".", "loftq_init", "new", ".."])
def test_the_base_is_never_written_to(where, converted):
    model = load_adapted(fresh(converted), converted)
    before = sorted(path.name for path in converted.iterdir())

    with pytest.raises(UsageError, match="may not be, contain or lie inside the input"):
        save_adapter(model, converted / where, overwrite=True)

    assert sorted(path.name for path in converted.iterdir()) == before


def test_an_adapter_can_be_saved_when_its_base_has_gone(converted, tmp_path, monkeypatch):
    shutil.copytree(converted, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = load_adapted(fresh(converted), "base")
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    save_adapter(model, "trained")

    files = [path / "adapter_config.json" for path in (converted / "loftq_init", Path("trained"))]
    start, saved = (json.loads(file.read_text()) for file in files)
    assert saved["base_model_name_or_path"] == start["base_model_name_or_path"]
    assert (saved["task_type"], saved["lora_alpha"]) == (start["task_type"], start["lora_alpha"])
    assert (Path("trained") / "loftq_provenance.json").is_file()


def test_what_wraps_a_model_is_not_in_the_names_that_are_saved(converted, tmp_path):
    model = load_adapted(fresh(converted), converted)
    save_adapter(model, tmp_path / "plain")
    layers = model.model.layers
    layers[0] = torch.compile(layers[0])

    for place, wrapped in enumerate((torch.compile(model), nn.DataParallel(model), model)):
        save_adapter(wrapped, tmp_path / str(place))
        names = load_file(tmp_path / str(place) / "adapter_model.safetensors").keys()
        assert names == load_file(tmp_path / "plain" / "adapter_model.safetensors").keys()


def test_nan_neither_gets_in_nor_out(converted, tmp_path):
    model = load_adapted(fresh(converted), converted)
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, LoftQLinear))
    with torch.no_grad():
        layer.lora_A[0, 0] = float("nan")
    with pytest.raises(LoftqError, match=rf"{name}.lora_A.weight: holds NaN or infinite values"):
        save_adapter(model, tmp_path / "trained")
    assert not list(tmp_path.iterdir())

    for file, tensor in (
        ("model.safetensors", f"{name}.weight.nested_absmax"),
        ("loftq_init/adapter_model.safetensors", f"{PREFIX}{name}.lora_B.weight"),
    ):
        base = tmp_path / Path(file).stem
        shutil.copytree(converted, base)
        edit_tensors(base / file, lambda t, key=tensor: t[key].view(-1)[:1].fill_(float("inf")))
        with pytest.raises(InputError, match=rf"{name}.*holds NaN or infinite values"):
            load_adapted(fresh(converted), base)


def test_a_module_of_two_names_takes_one_weight_only(tmp_path):
    save_file({f"{name}.weight": random(64, 64, seed=i) for i, name in enumerate("ab")}, tmp_path / "w.safetensors")
    run_conversion(tmp_path / "w.safetensors", tmp_path / "base", method="qlora", include=("a|b",), rank=2)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Linear(64, 64, bias=False)

    with pytest.raises(MismatchError, match="belong to one module of the model"):
        load_adapted(Twice(), tmp_path / "base")


def test_an_empty_batch_is_a_batch():
    module = adapted("peft", QuantizedLinear(quantized()))
    assert module(torch.zeros(0, IN)).shape == (0, OUT)


def test_an_adapter_in_another_dtype_and_without_a_source_is_saved(tmp_path):
    model = nn.Sequential(adapted("repo", QuantizedLinear(quantized())).to(torch.bfloat16))

    save_adapter(model, tmp_path / "trained")

    tensors = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert torch.equal(tensors[f"{PREFIX}0.lora_A.weight"], model[0].lora_A)
    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    assert (config["qalora_pooling"], config["qalora_group_size"], config["lora_alpha"]) == ("repo", POOL, 6)
    assert sorted(path.name for path in (tmp_path / "trained").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checksums.json",
    ]


def test_a_source_can_be_named(converted, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(converted / "loftq_init", source)
    edit_json(source / "adapter_config.json", base_model_name_or_path="somewhere")

    save_adapter(load_adapted(fresh(converted), converted), tmp_path / "trained", source)

    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere"


def test_adapters_that_one_directory_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(nn.Linear(2, 2), tmp_path / "trained")
    model = nn.Sequential(*(adapted(kind, QuantizedLinear(quantized())) for kind in ("repo", "peft")))
    with pytest.raises(ValueError, match="one pooling"):
        save_adapter(model, tmp_path / "trained")
    model = nn.Sequential(adapted("loftq", QuantizedLinear(quantized())))
    model[0].lora_A = nn.Parameter(torch.zeros(RANK + 1, IN))
    with pytest.raises(ValueError, match="planned were"):
        save_adapter(model, tmp_path / "trained")
    assert not list(tmp_path.iterdir())


def test_a_layer_that_is_not_pooled_does_not_hide_how_the_others_are(tmp_path):
    model = nn.Sequential(*(adapted(kind, QuantizedLinear(quantized())) for kind in ("loftq", "repo")))

    save_adapter(model, tmp_path / "trained")

    assert json.loads((tmp_path / "trained" / "adapter_config.json").read_text())["qalora_pooling"] == "repo"


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
