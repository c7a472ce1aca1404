"""Block-wise codebook quantization on a GPU; bits equal codebook/reference.py.

Kernels cover whole blocks. A short last block goes to the reference, which divides there instead of multiplying.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch
import triton
import triton.language as tl

from loftq_cli.triton_kernels.codebook import reference as codebook_reference
from loftq_cli.triton_kernels.launch_triton import cdiv, launch

# Weights a program: 64 a thread with 4 warps. Compiled for sm_90 that is 20 instructions a weight in 96 registers; with
# 32 a thread 23 instructions, because work done once a block weighs more.
PROGRAM_NUMEL = 8192

_CELL_SHIFT = 21
CELLS = 2048  # cells of the encoder table: one for each sign, exponent and upper two bits of a mantissa


def quantize(
    weight: torch.Tensor,
    minus: torch.Tensor | None,
    table: torch.Tensor,
    block_size: int,
    packed: torch.Tensor,
    absmax: torch.Tensor,
) -> None:
    """See codebook/reference.py."""
    n_blocks = weight.numel() // block_size
    whole = n_blocks * block_size
    cells = encoder_cells(table)
    blocks, width = _tile(block_size)
    launch(
        _quantize_blocks,
        (cdiv(n_blocks, blocks),),
        weight,
        weight if minus is None else minus,
        cells,
        packed,
        absmax,
        n_blocks,
        HAS_MINUS=minus is not None,
        DEPTH=len(cells) // CELLS - 1,
        BLOCK_SIZE=block_size,
        WIDTH=width,
        BLOCKS=blocks,
    )
    if whole < weight.numel():
        tail = None if minus is None else minus[whole:]
        codebook_reference.quantize(weight[whole:], tail, table, block_size, packed[whole // 2 :], absmax[n_blocks:])


def dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, block_size: int, values: torch.Tensor
) -> None:
    """See codebook/reference.py."""
    numel = values.numel()
    launch(
        _dequantize,
        (cdiv(numel, PROGRAM_NUMEL),),
        packed,
        absmax,
        table,
        values,
        numel,
        BLOCK_SIZE=block_size,
        BYTES=PROGRAM_NUMEL // 2,
    )


def residual(
    weight: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    out: torch.Tensor,
) -> float:
    """See codebook/reference.py. Each program sums squares in float32; the sum over programs is float64."""
    numel = weight.numel()
    programs = cdiv(numel, PROGRAM_NUMEL)
    squares = torch.empty(programs, dtype=torch.float32, device=weight.device)
    launch(
        _residual,
        (programs,),
        weight,
        packed,
        absmax,
        table,
        out,
        squares,
        numel,
        DECODED=TRITON_DTYPES[dtype],
        BLOCK_SIZE=block_size,
        BYTES=PROGRAM_NUMEL // 2,
    )
    return float(squares.sum(dtype=torch.float64))


TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@lru_cache(maxsize=16)  # keyed by identity: the contract passes a cached table
def encoder_cells(table: torch.Tensor) -> torch.Tensor:
    """The encoder of a table: float32 [(1 + depth) * CELLS].

    A cell covers all numbers with equal upper 11 bits, so a shift finds the cell of a number. The first CELLS entries
    count the midpoints of `table` below the whole cell; each of the next `depth` parts holds a midpoint inside the
    cell, or infinity. A code is the count plus a comparison with each midpoint. NF4 and FP4 need depth 1; fifteen
    comparisons without the encoder take three times the instructions. Cells near zero are as fine as the values of FP4.
    """
    midpoints = ((table[:-1] + table[1:]) / 2).double().tolist()
    edges = (torch.arange(CELLS // 2 + 1) << _CELL_SHIFT).int().view(torch.float32).double().tolist()
    cells = [(low, high, 1.0) for low, high in pairwise(edges)] + [(low, high, -1.0) for low, high in pairwise(edges)]
    below, inside = [], []
    for low, high, sign in cells:
        # A cell holds [low, high) or (-high, -low]; a midpoint on an excluded end counts like a midpoint beyond the
        # cell.
        first, last = (low, high) if sign > 0 else (math.nextafter(-high, 0.0), -low)
        below.append(float(sum(m < first for m in midpoints)))
        inside.append([m for m in midpoints if first <= m < last])
    depth = max(map(len, inside))
    rows = [below] + [[found[i] if i < len(found) else math.inf for found in inside] for i in range(depth)]
    return torch.tensor(rows, dtype=torch.float32).view(-1).to(table.device)


def _tile(block_size: int) -> tuple[int, int]:
    """Blocks of a program, and the power of two that holds a block."""
    width = 1 << (block_size - 1).bit_length()
    return max(PROGRAM_NUMEL // width, 1), width


@triton.jit
def encode(scaled, cells_ptr, DEPTH: tl.constexpr):
    """Codes, as whole float32 numbers: see `encoder_cells`. The code of NaN is arbitrary but valid."""
    entry = cells_ptr + (scaled.to(tl.uint32, bitcast=True) >> 21).to(tl.int32)
    code = tl.load(entry)
    for i in tl.static_range(DEPTH):
        code += (scaled > tl.load(entry + (i + 1) * 2048)).to(tl.float32)
    return code


@triton.jit
def pack_pairs(code, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """uint8 [ROWS, BYTES] from codes [ROWS, 2 * BYTES] of `encode`; the first code of a pair takes the high half.

    Adding 2^23 leaves the byte in the last bits; a conversion instruction runs at a quarter of the speed.
    """
    high, low = tl.split(tl.reshape(code, [ROWS, BYTES, 2]))
    return tl.fma(high, 16.0, low + 8388608.0).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def largest_magnitude(values):
    """The largest magnitude of each row of float32 [rows, columns]. Compared as integers, magnitudes keep their order
    and NaN is the greatest, so a NaN always wins.
    """
    return tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(largest, BLOCKS: tl.constexpr):
    """1 / absmax as in the reference: exactly rounded, with a floor under the divisor."""
    floored = tl.where(largest < 1e-38, 1e-38, largest)
    return tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), floored)


@triton.jit
def _quantize_blocks(
    weight_ptr,
    minus_ptr,
    cells_ptr,
    packed_ptr,
    absmax_ptr,
    n_blocks,
    HAS_MINUS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    column, byte = tl.arange(0, WIDTH)[None, :], tl.arange(0, WIDTH // 2)[None, :]
    is_block = block < n_blocks
    is_weight = is_block[:, None] & (column < BLOCK_SIZE)
    offsets = block[:, None] * BLOCK_SIZE + column
    values = tl.load(weight_ptr + offsets, mask=is_weight, other=0.0).to(tl.float32)
    if HAS_MINUS:
        values -= tl.load(minus_ptr + offsets, mask=is_weight, other=0.0).to(tl.float32)
    largest = largest_magnitude(values)
    tl.store(absmax_ptr + block, largest, mask=is_block)
    scaled = values * reciprocal(largest, BLOCKS)[:, None]
    packed = pack_pairs(encode(scaled, cells_ptr, DEPTH), BLOCKS, WIDTH // 2)
    is_byte = is_block[:, None] & (byte < BLOCK_SIZE // 2)
    tl.store(packed_ptr + block[:, None] * (BLOCK_SIZE // 2) + byte, packed, mask=is_byte)


@triton.jit
def decode_pairs(byte, table_ptr, absmax):
    """Both float32 values of each byte of codes in a block with `absmax`."""
    pair = byte.to(tl.int32)
    return tl.load(table_ptr + (pair >> 4)) * absmax, tl.load(table_ptr + (pair & 15)) * absmax


@triton.jit
def _decoded(packed_ptr, absmax_ptr, table_ptr, byte, numel, BLOCK_SIZE: tl.constexpr):
    is_byte = byte * 2 < numel
    absmax = tl.load(absmax_ptr + byte // (BLOCK_SIZE // 2), mask=is_byte, other=0.0)
    high, low = decode_pairs(tl.load(packed_ptr + byte, mask=is_byte, other=0), table_ptr, absmax)
    return tl.interleave(high, low)


@triton.jit
def _dequantize(packed_ptr, absmax_ptr, table_ptr, values_ptr, numel, BLOCK_SIZE: tl.constexpr, BYTES: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BYTES
    values = _decoded(packed_ptr, absmax_ptr, table_ptr, first + tl.arange(0, BYTES), numel, BLOCK_SIZE)
    offsets = first * 2 + tl.arange(0, 2 * BYTES)
    tl.store(values_ptr + offsets, values.to(values_ptr.dtype.element_ty), mask=offsets < numel)


@triton.jit
def _residual(
    weight_ptr,
    packed_ptr,
    absmax_ptr,
    table_ptr,
    out_ptr,
    squares_ptr,
    numel,
    DECODED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BYTES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BYTES
    values = _decoded(packed_ptr, absmax_ptr, table_ptr, first + tl.arange(0, BYTES), numel, BLOCK_SIZE)
    offsets = first * 2 + tl.arange(0, 2 * BYTES)
    weight = tl.load(weight_ptr + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
    difference = tl.where(offsets < numel, weight - values.to(DECODED).to(tl.float32), 0.0)
    tl.store(out_ptr + offsets, difference.to(out_ptr.dtype.element_ty), mask=offsets < numel)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(difference * difference, axis=0))
