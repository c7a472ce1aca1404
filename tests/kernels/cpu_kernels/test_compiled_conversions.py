"""Conversions, several threads and double quantization have the bytes of the reference with the compiled kernels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.compiled_kernels import FLOATS, compiled, generator, normal, same

from loftq_cli.methods.method import Fitting, load_method
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.matrices import AffineTensor, CodebookTensor, NestedAbsmax
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec, LoraSpec, Pooling
from loftq_cli.triton_kernels.affine.contract import quantize_affine
from loftq_cli.triton_kernels.codebook.contract import codebook_residual, dequantize_codebook, quantize_codebook
from loftq_cli.triton_kernels.double_quant.contract import double_dequantize, double_quantize, dynamic_map
from loftq_cli.triton_kernels.error_stats.contract import error_stats

# Several threads.


def test_several_threads_at_once_compute_the_same_bytes():
    weights = [normal(64, 1536, seed=seed, dtype=FLOATS[seed % 2]) for seed in range(12)]

    def work(weight: torch.Tensor) -> list[Any]:
        packed, absmax = quantize_codebook(weight, "nf4", 64, minus=weight / 3)
        decoded = dequantize_codebook(packed, absmax, "nf4", 64, weight.numel(), torch.bfloat16).view(weight.shape)
        residual = torch.empty(weight.shape, dtype=torch.bfloat16)
        squares = codebook_residual(weight, packed, absmax, "nf4", 64, torch.bfloat16, residual)
        groups = quantize_affine(weight.float(), 3, 64, symmetric=False, scale_dtype="bfloat16")
        return [
            packed,
            absmax,
            decoded,
            residual,
            groups.codes,
            groups.scales,
            groups.zero_points,
            squares,
            error_stats(weight, decoded, residual),
        ]

    alone = compiled(lambda: list(SERIAL.map(work, weights)))
    workers = Workers(2)
    try:
        together = compiled(lambda: list(workers.map(work, weights)))
    finally:
        workers.close()
    for found, expected in zip(together, alone, strict=True):
        for value, other in zip(found, expected, strict=True):
            assert same(value, other) if isinstance(value, torch.Tensor) else value == other


# What a conversion makes of a weight.


SPECS = {
    "nf4": CodebookSpec(),
    "nf4, plain constants": CodebookSpec(block_size=128, double_quant=False),
    "fp4": CodebookSpec("fp4"),
    "int4": AffineSpec(4, 64, symmetric=False),
    "int2 with biases": AffineSpec(2, 32, symmetric=False, zero_point="float"),
    "int8": AffineSpec(8, 64, symmetric=True, scale_dtype="float32"),
}


def tensors_of(quantized: Any, lora: Any) -> dict[str, torch.Tensor]:
    """Everything of a converted weight that is written."""
    made = {"lora_A": lora.lora_A, "lora_B": lora.lora_B}
    if isinstance(quantized, CodebookTensor):
        made["packed"], nested = quantized.packed, quantized.absmax
        if not isinstance(nested, NestedAbsmax):
            return {**made, "absmax": nested}
        return {**made, "codes": nested.codes, "absmax": nested.absmax, "offset": nested.offset}
    assert isinstance(quantized, AffineTensor)
    made |= {"codes": quantized.codes, "scales": quantized.scales}
    offsets = {"zero_points": quantized.zero_points, "biases": quantized.biases}
    return made | {name: tensor for name, tensor in offsets.items() if tensor is not None}


def converted(weight: torch.Tensor, spec: Any, dtype: str, lora: LoraSpec, **options: Any) -> Any:
    method = "loftq" if lora.pooling is None else "qalora"
    quantizer = make_quantizer(spec, dtype)
    fitting = Fitting(**{"init": "residual", **options})
    return load_method(method)(TensorRows(weight), quantizer, lora, fitting, generator=generator())


def assert_same_conversion(*arguments: Any, **options: Any) -> None:
    expected, found = converted(*arguments, **options), compiled(converted, *arguments, **options)
    assert found.best_iteration == expected.best_iteration
    ours, theirs = tensors_of(found.quantized, found.lora), tensors_of(expected.quantized, expected.lora)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert same(tensor, theirs[name]), name
    assert found.quantization_error == pytest.approx(expected.quantization_error, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("svd", ["fast", "exact"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_conversion_has_the_same_bytes_with_the_compiled_kernels(spec, svd, dtype):
    weight = normal(200, 192, dtype=torch.float32 if dtype == "float32" else torch.bfloat16)
    assert_same_conversion(weight, SPECS[spec], dtype, LoraSpec(8, 8, dtype=dtype), iterations=4, svd=svd)


@pytest.mark.parametrize("bits_and_rank", [(2, 3), (4, 8)])
def test_a_pooled_conversion_has_the_same_bytes_with_the_compiled_kernels(bits_and_rank):
    n_bits, rank = bits_and_rank
    lora = LoraSpec(rank, rank, pooling=Pooling("peft", 32))
    spec = AffineSpec(n_bits, 32, symmetric=False)
    assert_same_conversion(normal(96, 256), spec, "bfloat16", lora, iterations=4, svd="exact")


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rank", [16, 48, 64])
def test_where_the_adapter_leaves_almost_nothing_the_same_iteration_is_the_best(rank, double_quant):
    spec = CodebookSpec(double_quant=double_quant)
    for seed in range(4):
        assert_same_conversion(
            normal(64, 64, seed=seed), spec, "float32", LoraSpec(rank, rank), iterations=8, svd="exact"
        )


# Weights whose last iterations differ in the ninth digit.
@pytest.mark.parametrize(
    ("seed", "shape", "rank", "iterations"),
    [(779822, (128, 64), 8, 50), (404658, (32, 64), 4, 20), (405785, (32, 64), 2, 50), (786071, (64, 64), 4, 50)],
)
def test_where_iterations_hardly_change_anything_the_same_one_is_the_best(seed, shape, rank, iterations):
    spec = CodebookSpec(double_quant=seed != 786071)
    assert_same_conversion(
        normal(*shape, seed=seed), spec, "float32", LoraSpec(rank, rank), iterations=iterations, svd="exact"
    )


CONSTANTS = {
    "ordinary": torch.rand(5000, generator=torch.Generator().manual_seed(0)),
    "tiny": torch.rand(700, generator=torch.Generator().manual_seed(1)) * 1e-30,
    "huge": torch.rand(700, generator=torch.Generator().manual_seed(2)) * 1e30,
    "equal": torch.full((700,), 3.3),
    "zeros": torch.zeros(700),
    "one": torch.tensor([0.25]),
    "a whole block and one": torch.rand(257, generator=torch.Generator().manual_seed(3)),
    "one far off": torch.cat([torch.rand(700, generator=torch.Generator().manual_seed(4)), torch.tensor([3e38])]),
    "a mean that overflows": torch.full((700,), 3e38),
    "NaN": torch.cat([torch.rand(300, generator=torch.Generator().manual_seed(5)), torch.tensor([math.nan])]),
}


@pytest.mark.parametrize("nested_block_size", [64, 256])
@pytest.mark.parametrize("name", CONSTANTS)
def test_double_quantization_of_constants_is_that_of_the_reference(name, nested_block_size):
    absmax = CONSTANTS[name]
    expected = double_quantize(absmax, nested_block_size)
    found = compiled(double_quantize, absmax, nested_block_size)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    arguments = (expected[0], expected[1], dynamic_map(), expected[2], nested_block_size)
    decoded = compiled(double_dequantize, *arguments)
    torch.testing.assert_close(decoded, double_dequantize(*arguments), rtol=0, atol=0, equal_nan=True)
