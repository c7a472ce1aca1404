"""The Triton kernels of codebook formats compute what the plain-torch definition does, bit for bit: interpreted where
there is no GPU, compiled where there is one.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.interpreter import interpreted

from loftq_cli.triton_kernels.codebook import reference as codebook_reference
from loftq_cli.triton_kernels.codebook.contract import (
    CODEBOOKS,
    codebook_residual,
    dequantize_codebook,
    quantize_codebook,
)

triton = pytest.importorskip("triton")
codebook_triton = pytest.importorskip("loftq_cli.triton_kernels.codebook.triton")

pytestmark = pytest.mark.interpreter
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NF4 = torch.tensor(CODEBOOKS["nf4"])
FP4 = torch.tensor(CODEBOOKS["fp4"])
# Of the encoder's cells: numbers whose mantissa is a multiple of a quarter. The smallest are subnormal.
POWERS = 2.0 ** -torch.tensor([*range(1, 14), 126, 130])
EDGES = torch.outer(POWERS, torch.arange(4, 9) / 4).view(-1)
every_codebook = pytest.mark.parametrize("codebook", CODEBOOKS)


def normal_float(bits: int) -> torch.Tensor:
    """NF2 and NF3 as QLoRA makes NF4: quantiles of the normal distribution, one more of them positive, and zero."""
    half, largest = 2 ** (bits - 1), 0.9677083  # of the probabilities; both ends are 1 once it is divided by theirs
    positive = torch.special.ndtri(torch.linspace(largest, 0.5, half + 1, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(largest, 0.5, half, dtype=torch.float64)[:-1])
    return (torch.cat([negative, positive.new_zeros(1), positive.flip(0)]) / positive[0]).float()


def normal(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def designed(dtype: torch.dtype, table: torch.Tensor = NF4) -> torch.Tensor:
    """Blocks of 64: zeros, zeros of both signs, one outlier, every midpoint and its neighbours, the largest and the
    smallest numbers.
    """
    midpoints = (table[:-1] + table[1:]) / 2
    edges = torch.cat([midpoints, midpoints.nextafter(torch.tensor(2.0)), midpoints.nextafter(torch.tensor(-2.0))])
    blocks = torch.zeros(12, 64)
    blocks[1, ::2] = -0.0
    blocks[2] = 1e-4
    blocks[2, 5] = 1000.0
    blocks[3, :45], blocks[3, 45] = edges, 1.0
    blocks[4] = -blocks[3]
    blocks[5] = blocks[3] * 0.37
    blocks[6] = torch.linspace(-1, 1, 64) * torch.finfo(dtype).max
    blocks[7] = torch.linspace(-1, 1, 64) * torch.finfo(dtype).tiny
    blocks[8] = torch.linspace(-8, 8, 64) * torch.finfo(dtype).smallest_normal / 1024
    blocks[9] = torch.tensor([1.0, -1.0]).repeat(32)
    blocks[10], blocks[10, 0] = EDGES[:64], -1.0
    blocks[11] = (torch.arange(-32, 32) + 0.5) / 32
    return blocks.view(-1).to(dtype)


def assert_same(quantized: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert torch.equal(quantized[0], expected[0])
    assert torch.equal(quantized[1].view(torch.int32), expected[1].view(torch.int32))


@every_codebook
@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_and_constants_of_designed_blocks_are_those_of_the_reference(dtype, codebook):
    weight = designed(dtype, torch.tensor(CODEBOOKS[codebook]))
    assert_same(interpreted(quantize_codebook, weight, codebook, 64), quantize_codebook(weight, codebook, 64))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 64 * 128, 64 * 129 + 31])
def test_a_ragged_end_is_quantized_like_the_reference_does(n, dtype):
    weight = normal(n, dtype, seed=n)
    assert_same(interpreted(quantize_codebook, weight, "nf4", 64), quantize_codebook(weight, "nf4", 64))


@pytest.mark.parametrize("block_size", [2, 6, 32, 64, 96, 128, 256, 512, 1024, 2048, 4096])
def test_every_block_size_gives_the_codes_of_the_reference(block_size):
    weight = normal(3 * block_size + block_size // 2, seed=block_size)
    assert_same(interpreted(quantize_codebook, weight, "nf4", block_size), quantize_codebook(weight, "nf4", block_size))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("minus_dtype", FLOATS)
def test_a_difference_is_quantized_as_float32(dtype, minus_dtype):
    weight, minus = normal(1000, dtype), normal(1000, minus_dtype, seed=1)
    options = {"minus": minus}
    assert_same(
        interpreted(quantize_codebook, weight, "nf4", 64, **options), quantize_codebook(weight, "nf4", 64, **options)
    )


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_has_such_a_constant_and_its_neighbours_do_not(value):
    weight = normal(64 * 5)
    weight[64 * 3 + 17] = value
    _, absmax = interpreted(quantize_codebook, weight, "nf4", 64)
    assert absmax.isfinite().tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("table", [NF4, normal_float(3), normal_float(2), FP4], ids=["nf4", "nf3", "nf2", "fp4"])
def test_any_ascending_table_is_encoded_by_counting_midpoints(table):
    """Against a search for each number, of numbers at and around the midpoints and the edges of cells."""
    midpoints = (table[:-1] + table[1:]) / 2
    numbers = torch.cat([midpoints, -EDGES, EDGES, torch.zeros(1), -torch.zeros(1), torch.rand(3000) * 2 - 1])
    numbers = torch.cat([numbers, numbers.nextafter(torch.tensor(2.0)), numbers.nextafter(torch.tensor(-2.0))])
    weight = torch.cat([numbers.clamp(-1, 1), torch.ones(1)])  # one block, whose absmax is 1
    weight = torch.cat([weight, weight.new_zeros(-weight.numel() % 2)])
    packed, absmax = torch.empty(weight.numel() // 2, dtype=torch.uint8), torch.empty(1)
    interpreted(codebook_triton.quantize, weight, None, table, weight.numel(), packed, absmax)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)
    expected = (weight.double()[:, None] > midpoints.double()[None, :]).sum(dim=1)
    assert absmax.item() == 1.0
    assert torch.equal(codes.long(), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 65, 64 * 130 + 7])
def test_codes_decode_to_what_the_reference_decodes_them_to(n, dtype):
    packed, absmax = quantize_codebook(normal(n, seed=n), "nf4", 64)
    decoded = interpreted(dequantize_codebook, packed, absmax, "nf4", 64, n, dtype)
    expected = dequantize_codebook(packed, absmax, "nf4", 64, n, dtype)
    assert torch.equal(decoded.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_the_residual_is_that_of_the_reference_and_its_squares_add_up(dtype, out_dtype):
    n = 64 * 130 + 7
    weight = normal(n, torch.bfloat16)
    packed, absmax = quantize_codebook(weight, "nf4", 64)
    outs = [torch.full((n,), math.nan, dtype=out_dtype) for _ in range(2)]
    squares = interpreted(codebook_residual, weight, packed, absmax, "nf4", 64, dtype, outs[0])
    codebook_residual(weight, packed, absmax, "nf4", 64, dtype, outs[1])
    assert torch.equal(outs[0], outs[1])
    decoded = dequantize_codebook(packed, absmax, "nf4", 64, n, dtype).double()
    assert squares == pytest.approx(float((weight.double() - decoded).square().sum()), rel=1e-6)


@every_codebook
def test_a_cell_needs_one_comparison_and_finds_every_midpoint(codebook):
    cells = codebook_triton.encoder_cells(torch.tensor(CODEBOOKS[codebook])).view(-1, codebook_triton.CELLS)
    assert len(cells) == 2
    assert cells[1].isfinite().sum() == 15
    assert cells[0].min() == 0 and cells[0].max() == 15
    assert codebook_reference.SMALLEST_ABSMAX == 1e-38  # the kernel has it as a literal
