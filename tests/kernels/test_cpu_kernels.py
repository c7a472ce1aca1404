"""The compiled CPU kernels compute what the plain-torch definitions do, bit for bit; sums up to the order of additions.

Expected values are those of the reference, of bitsandbytes, or of exact float64 arithmetic: a float64 product, sum or
difference of two float32 numbers rounds to the float32 one.
"""

from __future__ import annotations

import importlib
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from loftq_cli.methods.method import Fitting, load_method
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.matrices import AffineTensor, CodebookTensor, NestedAbsmax
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec, LoraSpec, Pooling
from loftq_cli.triton_kernels import backend
from loftq_cli.triton_kernels.affine.contract import AFFINE_BITS, SCALE_DTYPES, AffineGroups, quantize_affine
from loftq_cli.triton_kernels.backend import implementation, use_compiled_kernels, use_reference_kernels
from loftq_cli.triton_kernels.codebook.contract import (
    CODEBOOKS,
    codebook_residual,
    dequantize_codebook,
    quantize_codebook,
)
from loftq_cli.triton_kernels.double_quant.contract import double_dequantize, double_quantize, dynamic_map
from loftq_cli.triton_kernels.error_stats.contract import ErrorSums, error_stats

numba = pytest.importorskip("numba")
bnb = pytest.importorskip("bitsandbytes.functional")

COMPILED = ("affine", "codebook", "double_quant", "error_stats")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float32, torch.bfloat16)
MAYBE_FLOATS = (None, *FLOATS)
DECODED = (*FLOATS, torch.float16)
TABLE = torch.tensor(CODEBOOKS["nf4"])
FORMS = {
    "symmetric": {"symmetric": True},
    "int": {"symmetric": False},
    "float": {"symmetric": False, "zero_point": "float"},
}
BAD = {
    "NaN": float("nan"),
    "negative NaN": struct.unpack("f", struct.pack("I", 0xFFC00000))[0],
    "NaN of a GPU": struct.unpack("f", struct.pack("I", 0x7FFFFFFF))[0],
    "Inf": float("inf"),
    "-Inf": -float("inf"),
}
# Quiet ones, a signalling one, and those whose upper half would carry into the sign if it were rounded like a number.
NAN_PATTERNS = (0x7F800001, 0x7FC00000, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF)


@pytest.fixture(autouse=True)
def the_reference_again() -> Any:
    yield
    use_reference_kernels()


def compiled(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the compiled kernels make of it."""
    assert use_compiled_kernels() is None
    try:
        return operation(*arguments, **options)
    finally:
        use_reference_kernels()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=generator(seed)) * 0.05).to(dtype)


def bit_patterns(numel: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Finite numbers of every size and both signs, subnormal ones too."""
    low, high, integers = (-(2**31), 2**31, torch.int32) if dtype == torch.float32 else (-(2**15), 2**15, torch.int16)
    values = torch.randint(low, high, (numel,), generator=generator(seed), dtype=integers).view(dtype)
    return values.where(torch.isfinite(values), 0.0).to(dtype)


def of_bits(pattern: int) -> torch.Tensor:
    return torch.tensor([pattern], dtype=torch.uint32).view(torch.float32)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What is compared: -0.0 is not 0.0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.view(integers[tensor.element_size()])


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether all bits are equal; one NaN is as good as another."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(found, expected)
    nan = torch.isnan(expected)
    return torch.equal(torch.isnan(found), nan) and torch.equal(bits(found)[~nan], bits(expected)[~nan])


def repeated(constants: torch.Tensor, block_size: int, numel: int) -> torch.Tensor:
    return constants.repeat_interleave(block_size)[:numel]


def sizes(block_size: int) -> list[int]:
    """Numbers of weights: parts of a block, one, several, ragged ends of both parities, more than a buffer holds."""
    return [1, 2, 3, block_size - 1, block_size, block_size + 1, 3 * block_size + 7, 2 * 4096 + 5 * block_size + 30]


# Which kernels run.


def test_the_reference_serves_until_the_compiled_kernels_are_asked_for() -> None:
    for op in (*COMPILED, "packing"):
        assert implementation(op, "cpu").__name__.endswith(f".{op}.reference")
    assert use_compiled_kernels() is None
    for op in COMPILED:
        assert implementation(op, "cpu").__name__.endswith(f".{op}.cpu")
    for op in ("packing",):
        assert implementation(op, "cpu").__name__.endswith(f".{op}.reference")
    use_reference_kernels()
    for op in COMPILED:
        assert implementation(op, "cpu").__name__.endswith(f".{op}.reference")


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop what has been imported of the compiled kernels, until the end of a test."""
    for name in ("cpu_kernels", *(f"{op}.cpu" for op in COMPILED)):
        full_name = f"{backend.__package__}.{name}"
        importlib.import_module(full_name)  # or there would be nothing to put back
        monkeypatch.delitem(sys.modules, full_name)


def test_without_numba_a_sentence_says_so_and_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "numba", None)
    missing = use_compiled_kernels()
    assert missing is not None and "numba" in missing and "\n" not in missing
    assert implementation("codebook", "cpu").__name__.endswith(".codebook.reference")
    weight = normal(4, 64)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    found = quantize_codebook(weight, "nf4", 64)
    assert torch.equal(found[0], packed.view(-1)) and torch.equal(found[1], state.absmax)


def test_where_no_cache_can_be_written_kernels_are_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    njit, asked = numba.njit, []

    def without_a_cache(*arguments: Any, cache: bool = False, **options: Any) -> Any:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*arguments, **options)

    forget(monkeypatch)
    monkeypatch.setattr(numba, "njit", without_a_cache)
    weight, decoded = normal(3, 1000), normal(3, 1000, seed=1)
    found = compiled(error_stats, weight, decoded)
    assert True in asked and False in asked
    assert_sums(found, weight, decoded, None)


# NF4: to codes and constants.


def weights_of(kind: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
    weight = normal(numel, seed=numel)
    if kind == "zero blocks":
        weight[numel // 3 :] = 0.0
        weight[::5] = -0.0
    elif kind == "subnormal":
        weight = weight.sign() * 1e-40
    elif kind == "smallest":
        weight = weight.sign() * torch.finfo(dtype).smallest_normal * 2.0**-7
    elif kind == "near the smallest divisor":
        weight = weight * 2e-37
    elif kind == "huge":
        weight = weight.sign() * 3e38 * torch.rand(numel, generator=generator(3))
        weight[::7] = 3e38
    elif kind == "outliers":
        weight[::97] *= 1000.0
    elif kind == "any":
        return bit_patterns(numel, numel, dtype)
    return weight.to(dtype)


KINDS = (
    "normal",
    "zero blocks",
    "subnormal",
    "smallest",
    "near the smallest divisor",
    "huge",
    "outliers",
    "any",
)


def assert_same_blocks(found: Any, expected: Any, block_size: int, numel: int) -> None:
    """Equal constants and codes of all blocks, but that the codes of those that are not finite mean nothing."""
    (packed, absmax), (expected_packed, expected_absmax) = found, expected
    finite = torch.isfinite(expected_absmax)
    assert torch.equal(torch.isfinite(absmax), finite)
    assert torch.equal(bits(absmax)[finite], bits(expected_absmax)[finite])
    assert packed.dtype == torch.uint8 and packed.shape == expected_packed.shape
    means_something = repeated(finite, block_size // 2, len(packed))  # a byte is of one block
    assert len(means_something) == len(packed) == (numel + 1) // 2
    assert torch.equal(packed[means_something], expected_packed[means_something])


@pytest.mark.parametrize("minus_dtype", MAYBE_FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_codes_and_constants_of_a_codebook_are_those_of_the_definition(block_size, dtype, minus_dtype):
    for kind in KINDS:
        for codebook, numel in product(CODEBOOKS, sizes(block_size)):
            weight = weights_of(kind, numel, dtype)
            minus = None if minus_dtype is None else weights_of(kind, numel + 1, minus_dtype)[1:].contiguous()
            expected = quantize_codebook(weight, codebook, block_size, minus=minus)
            found = compiled(quantize_codebook, weight, codebook, block_size, minus=minus)
            try:
                assert_same_blocks(found, expected, block_size, numel)
            except AssertionError as error:
                raise AssertionError(f"{kind}, {codebook}, {numel}") from error


@pytest.mark.parametrize("minus_dtype", MAYBE_FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block_size", [64, 4096])
def test_nf4_codes_and_constants_are_those_of_bitsandbytes(block_size, dtype, minus_dtype):
    for kind in ("normal", "zero blocks", "subnormal", "near the smallest divisor", "huge", "outliers"):
        for numel in sizes(block_size):
            weight = weights_of(kind, numel, dtype)
            minus = None if minus_dtype is None else normal(numel, seed=1, dtype=minus_dtype)
            theirs = weight if minus is None else weight.float() - minus.float()
            packed, state = bnb.quantize_4bit(theirs, blocksize=block_size, quant_type="nf4", compress_statistics=False)
            found = compiled(quantize_codebook, weight, "nf4", block_size, minus=minus)
            try:
                assert_same_blocks(found, (packed.view(-1), state.absmax), block_size, numel)
            except AssertionError as error:
                raise AssertionError(f"{kind}, {numel}") from error


@pytest.mark.parametrize("minus_dtype", MAYBE_FLOATS)
@pytest.mark.parametrize("absmax", [1.0, 0.25, 0.0437, 2.0**-130, 3e38])
def test_nf4_thresholds_are_strictly_above_the_code_below_them(absmax, minus_dtype):
    thresholds = (TABLE[:-1] + TABLE[1:]) / 2
    beside = [thresholds, *(torch.nextafter(thresholds, torch.tensor(end)) for end in (-2.0, 2.0))]
    values = torch.cat(beside) * absmax
    values = torch.cat([values, *(torch.nextafter(values, torch.tensor(end)) for end in (-math.inf, math.inf))])
    weight = torch.full((4 * 256,), absmax)
    weight[1 : 1 + len(values)] = values
    minus = None if minus_dtype is None else torch.zeros(len(weight), dtype=minus_dtype)
    found = compiled(quantize_codebook, weight, "nf4", 256, minus=minus)
    assert_same_blocks(found, quantize_codebook(weight, "nf4", 256), 256, len(weight))
    packed, state = bnb.quantize_4bit(weight, blocksize=256, quant_type="nf4", compress_statistics=False)
    assert_same_blocks(found, (packed.view(-1), state.absmax), 256, len(weight))
    if absmax in (1.0, 0.25):  # powers of two scale without rounding: then the codes are known
        codes = torch.stack([found[0] >> 4, found[0] & 15], dim=1).view(-1)[1:46].tolist()
        assert codes == [*range(15), *range(15), *range(1, 16)]


@pytest.mark.parametrize("block_size", [64, 2048])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", BAD)
def test_a_constant_is_not_finite_exactly_where_its_block_is_not(bad, dtype, block_size):
    numel = 3 * block_size + 9
    clean, zero = normal(numel, dtype=dtype), torch.zeros(numel, dtype=dtype)
    expected_packed, expected_absmax = quantize_codebook(clean, "nf4", block_size)
    for place in (0, 1, block_size - 1, block_size, 2 * block_size + 5, numel - 9, numel - 1):
        block = place // block_size
        spoiled, spoiled_zero = clean.clone(), zero.clone()
        spoiled[place] = spoiled_zero[place] = BAD[bad]
        for weight, minus in ((spoiled, None), (spoiled, zero), (clean, spoiled_zero), (spoiled, spoiled_zero)):
            packed, absmax = compiled(quantize_codebook, weight, "nf4", block_size, minus=minus)
            assert torch.isfinite(absmax).logical_not().nonzero().tolist() == [[block]]
            others = torch.arange(len(absmax)) != block
            assert torch.equal(bits(absmax)[others], bits(expected_absmax)[others])
            others = repeated(others, block_size // 2, len(packed))
            assert torch.equal(packed[others], expected_packed[others])


def test_nf4_is_put_where_it_is_wanted_and_nowhere_else():
    weight, block_size = normal(5 * 64 + 3), 64
    expected_packed, expected_absmax = quantize_codebook(weight, "nf4", block_size)
    packed, absmax = torch.full((200,), 0xAA, dtype=torch.uint8), torch.full((20,), -7.0)
    out = packed[11 : 11 + len(expected_packed)], absmax[3 : 3 + len(expected_absmax)]
    made = compiled(quantize_codebook, weight, "nf4", block_size, out=out)
    assert all(a is b for a, b in zip(made, out, strict=True))
    assert torch.equal(out[0], expected_packed) and torch.equal(out[1], expected_absmax)
    assert bool((packed[:11] == 0xAA).all() and (packed[11 + len(expected_packed) :] == 0xAA).all())
    assert bool((absmax[:3] == -7.0).all() and (absmax[3 + len(expected_absmax) :] == -7.0).all())


def test_an_empty_tensor_has_no_codes_and_no_error():
    packed, absmax = compiled(quantize_codebook, torch.empty(0), "nf4", 64)
    assert packed.shape == absmax.shape == (0,)
    assert compiled(dequantize_codebook, packed, absmax, "nf4", 64, 0, torch.bfloat16).shape == (0,)
    empty = torch.empty(0)
    assert compiled(codebook_residual, empty, packed, absmax, "nf4", 64, torch.float32, empty.clone()) == 0.0
    assert compiled(error_stats, empty, empty, empty) == ErrorSums(0.0, 0.0, 0.0, 0.0, 0.0)


# NF4: back to values.


def stored(numel: int, block_size: int, kind: str = "normal") -> tuple[torch.Tensor, torch.Tensor]:
    """Every byte, and constants."""
    packed = torch.arange((numel + 1) // 2).mul(37).remainder(256).to(torch.uint8)
    n_blocks = -(-numel // block_size)
    absmax = normal(n_blocks, seed=numel).abs()
    if kind == "any":
        absmax = bit_patterns(n_blocks, numel, torch.float32)
    elif kind == "zero":
        absmax[::2] = 0.0
    elif kind == "not finite":
        absmax[::3] = of_bits(0x7FC00000)
        absmax[1::3] = float("inf")
    return packed, absmax


def exactly_decoded(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    block_size: int,
    numel: int,
    dtype: torch.dtype,
    codebook: str = "nf4",
) -> torch.Tensor:
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:numel].long()
    table = torch.tensor(CODEBOOKS[codebook]).double()
    return (table[codes] * repeated(absmax, block_size, numel)).float().to(dtype)


@pytest.mark.parametrize("dtype", DECODED)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_values_are_table_times_constant_rounded_to_their_dtype(block_size, dtype):
    for kind in ("normal", "any", "zero", "not finite"):
        for codebook, numel in product(CODEBOOKS, sizes(block_size)):
            packed, absmax = stored(numel, block_size, kind)
            found = compiled(dequantize_codebook, packed, absmax, codebook, block_size, numel, dtype)
            expected = exactly_decoded(packed, absmax, block_size, numel, dtype, codebook)
            assert same(found, expected), (kind, codebook, numel)


@pytest.mark.parametrize("dtype", DECODED)
@pytest.mark.parametrize("pattern", NAN_PATTERNS, ids=hex)
def test_a_constant_that_is_nan_decodes_to_nan(pattern, dtype):
    packed, absmax = stored(3 * 64, 64)
    absmax[1] = of_bits(pattern)
    found = compiled(dequantize_codebook, packed, absmax, "nf4", 64, 3 * 64, dtype)
    assert torch.isnan(found).view(3, 64).tolist() == [[False] * 64, [True] * 64, [False] * 64]


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("decoded_dtype", DECODED)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block_size", [32, 64, 1024, 4096])
def test_a_residual_is_the_float32_difference_and_its_squares_are_summed(block_size, dtype, decoded_dtype, out_dtype):
    for numel in sizes(block_size):
        weight = normal(numel, seed=numel, dtype=dtype)
        packed, absmax = quantize_codebook(weight, "nf4", block_size)
        out = torch.full((numel + 2,), -7.0, dtype=out_dtype)
        squares = compiled(
            codebook_residual, weight, packed, absmax, "nf4", block_size, decoded_dtype, out[1 : numel + 1]
        )
        decoded = exactly_decoded(packed, absmax, block_size, numel, decoded_dtype)
        difference = weight.float() - decoded.float()
        assert same(out[1 : numel + 1], difference.to(out_dtype))
        assert out[0] == out[-1] == -7.0
        assert squares == pytest.approx(math.fsum(difference.double().square().tolist()), rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e-17, 1e-6, 1e6, 1e18, 1e25])
def test_squares_are_summed_whatever_the_size_of_the_weights(scale, dtype):
    weight = (normal(4 * 4096) * scale).to(dtype)
    packed, absmax = quantize_codebook(weight, "nf4", 64)
    out = torch.empty_like(weight)
    squares = compiled(codebook_residual, weight, packed, absmax, "nf4", 64, dtype, out)
    difference = weight.float() - exactly_decoded(packed, absmax, 64, weight.numel(), dtype).float()
    assert squares == pytest.approx(math.fsum(difference.double().square().tolist()), rel=1e-6)


@pytest.mark.parametrize("block_size", [64, 4096])
@pytest.mark.parametrize("value", [0.1, 0.7, 1.0, 1 / 3])
def test_squares_that_are_all_the_same_do_not_add_up_their_roundings(value, block_size):
    weight = torch.full((8 * 4096,), value)
    packed, absmax = torch.zeros(4 * 4096, dtype=torch.uint8), torch.zeros(8 * 4096 // block_size)
    out = torch.empty_like(weight)
    squares = compiled(codebook_residual, weight, packed, absmax, "nf4", block_size, torch.float32, out)
    assert squares == pytest.approx(weight.numel() * weight[0].double().item() ** 2, rel=1e-6)


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("bad", BAD)
def test_a_residual_of_what_is_not_finite_says_so(bad, out_dtype):
    for place in (0, 700, 3 * 64 - 1, 12 * 64 + 3):
        weight = normal(12 * 64 + 5)
        packed, absmax = quantize_codebook(weight, "nf4", 64)
        weight[place] = BAD[bad]
        out = torch.empty(weight.shape, dtype=out_dtype)
        squares = compiled(codebook_residual, weight, packed, absmax, "nf4", 64, torch.bfloat16, out)
        assert not math.isfinite(squares)
        assert torch.isfinite(out).logical_not().nonzero().tolist() == [[place]]


# Error sums.


def assert_sums(found: ErrorSums, weight: torch.Tensor, decoded: torch.Tensor, delta: torch.Tensor | None) -> None:
    w, q = (tensor.float().numpy().reshape(-1) for tensor in (weight, decoded))
    d = np.zeros_like(q) if delta is None else delta.float().numpy().reshape(-1)
    both = q + d
    assert both.dtype == np.float32
    w, q, both, d = (array.astype(np.float64) for array in (w, q, both, d))
    expected = {
        "squared_weight": math.fsum(w * w),
        "squared_base_error": math.fsum((w - q) ** 2),
        "squared_error": math.fsum((w - both) ** 2),
        "squared_delta": math.fsum(d * d),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12, abs=0.0), name
    assert found.max_error == float(np.abs(w - both).max())


@pytest.mark.parametrize("delta_dtype", MAYBE_FLOATS)
@pytest.mark.parametrize("decoded_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_error_sums_are_those_of_float64(dtype, decoded_dtype, delta_dtype):
    for numel in (1, 7, 1023, 1024, 1025, 5000, 300_000):
        weight, decoded = normal(numel, dtype=dtype), normal(numel, seed=1, dtype=decoded_dtype)
        delta = None if delta_dtype is None else normal(numel, seed=2, dtype=delta_dtype)
        assert_sums(compiled(error_stats, weight, decoded, delta), weight, decoded, delta)


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-30, 1e30, 1e38])
def test_error_sums_hold_what_float32_does_not(scale):
    weight, decoded, delta = (normal(40, 50, seed=seed) * scale for seed in range(3))
    assert_sums(compiled(error_stats, weight, decoded, delta), weight, decoded, delta)


@pytest.mark.parametrize("place", [0, 1023, 1024, 2499])
def test_the_largest_error_is_found_wherever_it_is(place):
    weight, decoded = normal(2500), normal(2500, seed=1)
    weight[place] = -3.5
    found = compiled(error_stats, weight, decoded)
    assert found.max_error == abs(-3.5 - decoded[place].double().item())
    assert_sums(found, weight, decoded, None)


@pytest.mark.parametrize("place", [0, 1023, 1024, 2499])
@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_is_in_every_sum_that_it_is_part_of(bad, place):
    clean = [normal(2500, seed=seed) for seed in range(3)]
    parts = {
        0: ("squared_weight", "squared_base_error", "squared_error", "max_error"),
        1: ("squared_base_error", "squared_error", "max_error"),
        2: ("squared_error", "max_error", "squared_delta"),
    }
    for spoiled, names in parts.items():
        tensors = [tensor.clone() for tensor in clean]
        tensors[spoiled][place] = BAD[bad]
        found = compiled(error_stats, *tensors)
        for field in fields(ErrorSums):
            value = getattr(found, field.name)
            if field.name not in names:
                assert math.isfinite(value), field.name
            elif "NaN" in bad:
                assert math.isnan(value), field.name
            else:
                assert value == math.inf, field.name


# Integers.


def matrix_of(kind: str, group_size: int) -> torch.Tensor:
    weight = normal(24, 3 * group_size, seed=group_size)
    if kind == "zero groups":
        weight[:, :group_size] = 0.0
        weight[-1] = 0.0
    elif kind == "signed zeros":
        weight[:, ::2], weight[:, 1::2] = 0.0, -0.0
        weight[6:12] = normal(6, 3 * group_size).relu() * weight[6:12].add(1.0)
        weight[12:] = torch.where(normal(12, 3 * group_size) > 0.0, 0.0, -0.0)
        weight[18:, ::3] = -0.25
    elif kind == "constant":
        weight.fill_(-0.25)
        weight[::2] = 0.3
    elif kind == "one sided":
        weight = weight.abs() + 0.5
        weight[::2] *= -1.0
    elif kind == "outliers":
        weight[::3, ::17] *= 300.0
    elif kind == "huge":
        weight *= 3e38
        weight[3, 5], weight[3, 6] = 3e38, -3e38
    elif kind == "beyond float16":  # a bias can be infinite where the scale is not, and the other way round
        weight = weight * 100.0 + torch.tensor([-70000.0, 70000.0]).repeat(12)[:, None]
        weight[-2:] *= 1000.0
    elif kind == "subnormal":
        weight *= 1e-42
    elif kind == "quarters":
        weight = torch.arange(weight.numel()).mul(7).remainder(65).sub(32).div(4).view(24, -1)
    elif kind == "mirrored":
        weight[:, group_size // 2 : group_size] = -weight[:, : group_size // 2].flip(1)
        weight[:, group_size:] = torch.linspace(-1.0, 1.0, 2 * group_size)
    elif kind == "any":
        weight = bit_patterns(weight.numel(), 5, torch.float32).view(24, -1)
    elif kind == "not finite":
        for row, value in enumerate(BAD.values()):
            weight[row, row], weight[row + 6, -1], weight[row + 12, group_size:] = value, value, value
        weight[-1, 0], weight[-1, 1] = math.inf, -math.inf
    return weight.float().contiguous()


MATRICES = (
    "normal",
    "zero groups",
    "signed zeros",
    "constant",
    "one sided",
    "outliers",
    "huge",
    "beyond float16",
    "subnormal",
    "quarters",
    "mirrored",
    "any",
    "not finite",
)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_bits", AFFINE_BITS)
def test_integer_codes_and_constants_are_those_of_the_definition(n_bits, form, scale_dtype):
    options = {"scale_dtype": scale_dtype, **FORMS[form]}
    for kind in MATRICES:
        for group_size in (16, 64, 200):
            weight = matrix_of(kind, group_size)
            expected = quantize_affine(weight, n_bits, group_size, **options)
            found = compiled(quantize_affine, weight, n_bits, group_size, **options)
            for field in fields(AffineGroups):
                tensor, other = getattr(found, field.name), getattr(expected, field.name)
                assert (tensor is None) == (other is None), (kind, group_size, field.name)
                assert tensor is None or same(tensor, other), (kind, group_size, field.name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_an_empty_matrix_has_no_groups(shape, form):
    groups = compiled(quantize_affine, torch.empty(shape), 4, 32, scale_dtype="float32", **FORMS[form])
    assert groups.codes.shape == shape and groups.scales.shape == (shape[0], shape[1] // 32)


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


FULL_DISK = """
import resource, signal, torch
from loftq_cli.triton_kernels import backend
from loftq_cli.triton_kernels.codebook.contract import quantize_codebook
assert backend.use_compiled_kernels() is None
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
print(quantize_codebook(torch.ones(64), "nf4", 64)[0].tolist())
"""


def test_a_disk_that_is_full_keeps_no_kernel_and_computes(tmp_path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", FULL_DISK], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == str([0xFF] * 32), run.stderr
