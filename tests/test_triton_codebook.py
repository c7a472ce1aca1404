"""The Triton kernels of codebook formats compute what the plain-torch definition does, bit for bit: interpreted where
there is no GPU, compiled where there is one.
"""

from __future__ import annotations

import math

import pytest
import torch
from interpreter import interpreted

from loftq_cli.triton_kernels import codebook_reference
from loftq_cli.triton_kernels.codebook import CODEBOOKS, codebook_residual, dequantize_codebook, quantize_codebook

triton = pytest.importorskip("triton")
codebook_triton = pytest.importorskip("loftq_cli.triton_kernels.codebook_triton")

pytestmark = pytest.mark.interpreter
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NF4 = torch.tensor(CODEBOOKS["nf4"])
# What a table of other size would look like: the quantiles are not theirs, which the encoder need not know.
NF3_LIKE = torch.tensor([-1.0, -0.55, -0.25, 0.0, 0.2, 0.4, 0.65, 1.0])
NF2_LIKE = torch.tensor([-1.0, -0.3, 0.25, 1.0])
FP4 = torch.tensor(
    sorted([0.0, 0.0, *(s * v for s in (-1, 1) for v in (0.0052083, 2 / 3, 1, 1 / 3, 0.5, 1 / 6, 0.25))])
)


def normal(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def designed(dtype: torch.dtype) -> torch.Tensor:
    """Blocks of 64: zeros, zeros of both signs, one outlier, every midpoint and its neighbours, the largest and the
    smallest numbers.
    """
    midpoints = (NF4[:-1] + NF4[1:]) / 2
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
    blocks[10] = torch.arange(-32, 32) / 32  # the edges of the encoder's cells
    blocks[11] = (torch.arange(-32, 32) + 0.5) / 32
    return blocks.view(-1).to(dtype)


def assert_same(quantized: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert torch.equal(quantized[0], expected[0])
    assert torch.equal(quantized[1].view(torch.int32), expected[1].view(torch.int32))


@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_and_constants_of_designed_blocks_are_those_of_the_reference(dtype):
    weight = designed(dtype)
    assert_same(interpreted(quantize_codebook, weight, "nf4", 64), quantize_codebook(weight, "nf4", 64))


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


@pytest.mark.parametrize("table", [NF4, NF3_LIKE, NF2_LIKE, FP4], ids=["nf4", "nf3", "nf2", "fp4"])
def test_any_ascending_table_is_encoded_by_counting_midpoints(table):
    """Against a search for each number, of numbers at and around the midpoints and the edges of cells."""
    midpoints = (table[:-1] + table[1:]) / 2
    numbers = torch.cat([midpoints, (torch.arange(-64, 65) / 64), torch.rand(3000) * 2 - 1]).clamp(-1, 1)
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


def test_no_number_lies_in_a_cell_whose_comparisons_could_miss_a_midpoint():
    """Each cell of the encoder, closed at both ends, holds no more midpoints than it compares with."""
    cells = codebook_triton.encoder_cells(NF4).view(-1, codebook_triton.CELLS)
    assert len(cells) == 2  # one comparison
    assert cells[1].isfinite().sum() == 15
    assert cells[0, :65].max() <= 15
    assert codebook_reference.SMALLEST_ABSMAX == 1e-38  # the kernel has it as a literal
