"""Merging on a GPU in a single pass over the codes, and the sums of retention, float64 throughout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loftq_cli.triton_kernels.codebook.triton import TRITON_DTYPES
from loftq_cli.triton_kernels.launch_triton import cdiv, launch
from loftq_cli.triton_kernels.merging import reference as merging_reference
from loftq_cli.triton_kernels.tiles_triton import decode_tile, product_tile

PROGRAM_NUMEL = 2048
TILE_ROWS, TILE_COLUMNS = 64, 64  # 32 weights a thread


def merge(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    out: torch.Tensor,
) -> None:
    """See merging/reference.py, which also serves matrices where a byte holds codes of two rows."""
    rows, columns = out.shape
    if columns % 2:
        merging_reference.merge(packed, absmax, table, block_size, dtype, lora_A, lora_B, scaling, out)
        return
    launch(
        _merge,
        (cdiv(rows, TILE_ROWS), cdiv(columns, TILE_COLUMNS)),
        packed,
        absmax,
        table,
        lora_A,
        lora_B,
        out,
        rows,
        columns,
        lora_A.shape[0],
        scaling,
        DECODED=TRITON_DTYPES[dtype],
        BLOCK_SIZE=block_size,
        ROWS=TILE_ROWS,
        COLUMNS=TILE_COLUMNS,
    )


def retention(base: torch.Tensor, requantized: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """See merging/reference.py."""
    numel = base.numel()
    programs = cdiv(numel, PROGRAM_NUMEL)
    partial = torch.empty((3, programs), dtype=torch.float64, device=base.device)
    tensors = base.contiguous(), requantized.contiguous(), delta.contiguous()
    launch(_retention, (programs,), *tensors, partial, numel, NUMEL=PROGRAM_NUMEL)
    return partial.sum(dim=1)


@triton.jit
def _merge(
    packed_ptr,
    absmax_ptr,
    table_ptr,
    lora_A_ptr,
    lora_B_ptr,
    out_ptr,
    rows,
    columns,
    rank,
    scaling,
    DECODED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first_row, first_column = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1) * COLUMNS
    row, column = tl.arange(0, ROWS)[:, None] + first_row, tl.arange(0, COLUMNS)[None, :] + first_column
    delta = product_tile(lora_B_ptr, lora_A_ptr, first_row, first_column, rows, columns, rank, ROWS, COLUMNS)
    decoded = decode_tile(
        packed_ptr, absmax_ptr, table_ptr, first_row, first_column, rows, columns, DECODED, BLOCK_SIZE, ROWS, COLUMNS
    )
    merged = (delta * scaling + decoded).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * columns + column, merged, mask=(row < rows) & (column < columns))


@triton.jit
def _retention(base_ptr, requantized_ptr, delta_ptr, partial_ptr, numel, NUMEL: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    offsets = program.to(tl.int64) * NUMEL + tl.arange(0, NUMEL)
    is_weight = offsets < numel
    # Convert to float32 first: the interpreter converts float32 exactly, and a GPU gives equal bits.
    base = tl.load(base_ptr + offsets, mask=is_weight, other=0.0).to(tl.float32).to(tl.float64)
    delta = tl.load(delta_ptr + offsets, mask=is_weight, other=0.0).to(tl.float32).to(tl.float64)
    requantized = tl.load(requantized_ptr + offsets, mask=is_weight, other=0.0).to(tl.float32).to(tl.float64)
    tl.store(partial_ptr + program, tl.sum(base * base, axis=0))
    tl.store(partial_ptr + programs + program, tl.sum(delta * delta, axis=0))
    tl.store(partial_ptr + 2 * programs + program, tl.sum((requantized - base) * delta, axis=0))
