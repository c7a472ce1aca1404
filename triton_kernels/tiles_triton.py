"""Tiles of matrices that never reach memory: decoded codes, and products of two factors, for fused kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from loftq_cli.triton_kernels.codebook.triton import decode_pairs


@triton.jit
def decode_tile(
    packed_ptr,
    absmax_ptr,
    table_ptr,
    first_row,
    first_column,
    rows,
    columns,
    DECODED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """float32 [ROWS, COLUMNS]: decoded codes of a [rows, columns] matrix, rounded to DECODED; zero outside the matrix.

    `columns` and `first_column` are even, so no byte holds codes of two rows. Blocks may cross rows.
    """
    row = tl.arange(0, ROWS).to(tl.int64)[:, None] + first_row
    pair = tl.arange(0, COLUMNS // 2)[None, :] + first_column // 2
    is_byte = (row < rows) & (pair < columns // 2)
    byte = row * (columns // 2) + pair
    absmax = tl.load(absmax_ptr + byte // (BLOCK_SIZE // 2), mask=is_byte, other=0.0)
    high, low = decode_pairs(tl.load(packed_ptr + byte, mask=is_byte, other=0), table_ptr, absmax)
    return tl.interleave(high, low).to(DECODED).to(tl.float32)


@triton.jit
def product_tile(
    left_ptr,
    right_ptr,
    first_row,
    first_column,
    rows,
    columns,
    rank,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """float32 [ROWS, COLUMNS] of left [rows, rank] @ right [rank, columns], both row-major, in float32 arithmetic. A
    step covers 16 of the rank, the smallest size that tl.dot takes.
    """
    row = tl.arange(0, ROWS).to(tl.int64)[:, None] + first_row
    column = tl.arange(0, COLUMNS)[None, :] + first_column
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rank, 16):
        across, down = tl.arange(0, 16)[None, :] + start, tl.arange(0, 16).to(tl.int64)[:, None] + start
        left = tl.load(left_ptr + row * rank + across, mask=(row < rows) & (across < rank), other=0.0)
        right = tl.load(right_ptr + down * columns + column, mask=(down < rank) & (column < columns), other=0.0)
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return total
