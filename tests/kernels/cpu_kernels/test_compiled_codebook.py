"""The compiled NF4 kernels compute what the plain-torch definitions do, bit for bit.

Expected values are those of the reference, of bitsandbytes, or of exact float64 arithmetic: a float64 product or
difference of two float32 numbers rounds to the float32 one.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from support.compiled_kernels import (
    BAD,
    BLOCK_SIZES,
    DECODED,
    FLOATS,
    MAYBE_FLOATS,
    NAN_PATTERNS,
    TABLE,
    bit_patterns,
    bits,
    bnb,
    compiled,
    generator,
    normal,
    of_bits,
    repeated,
    same,
    sizes,
)

from loftq_cli.triton_kernels.codebook.contract import (
    CODEBOOKS,
    codebook_residual,
    dequantize_codebook,
    quantize_codebook,
)
from loftq_cli.triton_kernels.error_stats.contract import ErrorSums, error_stats

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
