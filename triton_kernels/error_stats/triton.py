"""The error sums on a GPU: each program sums in float64, and so does the sum over programs, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loftq_cli.triton_kernels.codebook.triton import TRITON_DTYPES
from loftq_cli.triton_kernels.error_stats import reference as error_stats_reference
from loftq_cli.triton_kernels.launch_triton import cdiv, launch
from loftq_cli.triton_kernels.tiles_triton import decode_tile, product_tile

PROGRAM_NUMEL = 2048

# Tile of the fused sums: a product of float32 factors holds 32 sums, 32 weights and 32 codes a thread.
TILE_ROWS, TILE_COLUMNS = 64, 64


def sums(
    weight: torch.Tensor, decoded: torch.Tensor, delta: torch.Tensor | None
) -> tuple[float, float, float, float, float]:
    """See error_stats/reference.py."""
    numel = weight.numel()
    programs = max(cdiv(numel, PROGRAM_NUMEL), 1)
    partial = torch.empty((5, programs), dtype=torch.float64, device=weight.device)
    launch(
        _sums,
        (programs,),
        weight.contiguous(),
        decoded.contiguous(),
        weight if delta is None else delta.contiguous(),
        partial,
        numel,
        HAS_DELTA=delta is not None,
        NUMEL=PROGRAM_NUMEL,
    )
    squared_weight, squared_base, squared_error, max_error, squared_delta = _totals(partial).tolist()
    return squared_weight, squared_base, squared_error, max_error, squared_delta


def codebook_sums(
    weight: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """See error_stats/reference.py, which also serves matrices where a byte holds codes of two rows."""
    rows, columns = weight.shape
    if columns % 2:
        return error_stats_reference.codebook_sums(
            weight, packed, absmax, table, block_size, dtype, lora_A, lora_B, scaling
        )
    grid = max(cdiv(rows, TILE_ROWS), 1), max(cdiv(columns, TILE_COLUMNS), 1)
    partial = torch.empty((7, grid[0] * grid[1]), dtype=torch.float64, device=weight.device)
    launch(
        _codebook_sums,
        grid,
        weight,
        packed,
        absmax,
        table,
        table if lora_A is None else lora_A,
        table if lora_B is None else lora_B,
        partial,
        rows,
        columns,
        0 if lora_A is None else lora_A.shape[0],
        scaling,
        HAS_DELTA=lora_A is not None,
        DECODED=TRITON_DTYPES[dtype],
        BLOCK_SIZE=block_size,
        ROWS=TILE_ROWS,
        COLUMNS=TILE_COLUMNS,
        num_warps=8,
    )
    return _totals(partial)


def _totals(partial: torch.Tensor) -> torch.Tensor:
    """float64 [fields] from [fields, programs]: sums, but the maximum of the fourth field, NaN if any is NaN."""
    totals = partial.sum(dim=1)
    totals[3] = partial[3].amax()
    return totals


@triton.jit
def _error_sums(weight, decoded, both, delta):
    """The fields of ErrorSums, float64, from float32 tiles that are zero outside the matrix.

    Squares are float64: squares of 1e20 or of 1e-23 leave the range of float32. Compared as integers, magnitudes keep
    their order and NaN is the greatest, so a NaN always wins.
    """
    w, d = weight.to(tl.float64), delta.to(tl.float64)
    base_error, error = w - decoded.to(tl.float64), w - both.to(tl.float64)
    magnitudes = error.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    largest = tl.max(magnitudes, axis=None).to(tl.float64, bitcast=True)
    squares = tl.sum(w * w, axis=None), tl.sum(base_error * base_error, axis=None), tl.sum(error * error, axis=None)
    return squares[0], squares[1], squares[2], largest, tl.sum(d * d, axis=None)


@triton.jit
def _sums(weight_ptr, decoded_ptr, delta_ptr, partial_ptr, numel, HAS_DELTA: tl.constexpr, NUMEL: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    offsets = program.to(tl.int64) * NUMEL + tl.arange(0, NUMEL)
    is_weight = offsets < numel
    weight = tl.load(weight_ptr + offsets, mask=is_weight, other=0.0).to(tl.float32)
    decoded = tl.load(decoded_ptr + offsets, mask=is_weight, other=0.0).to(tl.float32)
    delta = tl.zeros([NUMEL], tl.float32)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + offsets, mask=is_weight, other=0.0).to(tl.float32)
    found = _error_sums(weight, decoded, decoded + delta, delta)
    for field in tl.static_range(5):
        tl.store(partial_ptr + field * programs + program, found[field])


@triton.jit
def _codebook_sums(
    weight_ptr,
    packed_ptr,
    absmax_ptr,
    table_ptr,
    lora_A_ptr,
    lora_B_ptr,
    partial_ptr,
    rows,
    columns,
    rank,
    scaling,
    HAS_DELTA: tl.constexpr,
    DECODED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first_row, first_column = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1) * COLUMNS
    row, column = tl.arange(0, ROWS)[:, None] + first_row, tl.arange(0, COLUMNS)[None, :] + first_column
    is_weight = (row < rows) & (column < columns)
    delta = tl.zeros([ROWS, COLUMNS], tl.float32)
    if HAS_DELTA:
        product = product_tile(lora_B_ptr, lora_A_ptr, first_row, first_column, rows, columns, rank, ROWS, COLUMNS)
        # A factor that is not finite turns zeros outside the matrix into NaN.
        delta = tl.where(is_weight, product * scaling, 0.0)
    decoded = decode_tile(
        packed_ptr, absmax_ptr, table_ptr, first_row, first_column, rows, columns, DECODED, BLOCK_SIZE, ROWS, COLUMNS
    )
    weight = tl.load(weight_ptr + row * columns + column, mask=is_weight, other=0.0).to(tl.float32)
    both = decoded + delta
    found = _error_sums(weight, decoded, both, delta)
    flips = ((weight < 0) & (both > 0)) | ((weight > 0) & (both < 0))
    zeros = (weight != 0) & (both == 0)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    for field in tl.static_range(5):
        tl.store(partial_ptr + field * programs + program, found[field])
    tl.store(partial_ptr + 5 * programs + program, tl.sum(flips.to(tl.int32), axis=None).to(tl.float64))
    tl.store(partial_ptr + 6 * programs + program, tl.sum(zeros.to(tl.int32), axis=None).to(tl.float64))
