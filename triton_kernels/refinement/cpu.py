"""The search for block constants, and refinement, compiled for a processor. The order of sums differs from
refinement/reference.py, so results can differ where float32 cannot tell two candidates apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loftq_cli.triton_kernels.cpu_kernels import (
    add_inner_products,
    refine_columns,
    refine_rows,
    residual_of_rows,
    search_steps,
    search_table,
)
from loftq_cli.triton_kernels.refinement.contract import (
    LEAST_WEIGHT,
    OFFSETS,
    REFITS,
    WARM_REFITS,
    WORTHWHILE,
    Blocks,
    Levels,
    Refined,
    RowErrors,
    block_importance,
    factors_of,
)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_UNROLLED = 4  # columns of V in a step of a loop

# Columns that share a product of errors and H: steps inside the tile are followed in the first cache of a processor.
_TILE = 64


def search_scales(
    weight: torch.Tensor, block_size: int, levels: Levels, start: Blocks | None, importance: torch.Tensor | None
) -> Blocks:
    """See refinement/reference.py."""
    relative_importance = (
        torch.empty(0, block_size, dtype=torch.float32)
        if importance is None
        else block_importance(importance, block_size)
    )
    shape = (weight.shape[0], weight.shape[1] // block_size)
    blocks, codes = weight.view(-1, block_size).numpy(), np.empty((weight.numel() // block_size, block_size), np.uint8)
    scales, zeros, biases = (np.empty(len(codes), np.float32) for _ in range(3))
    if start is not None:
        scales, zeros, biases = (constants.reshape(-1) for constants in _constants(start, levels))
    factors = np.array(factors_of(levels, start), np.float32)
    refits = REFITS if start is None else WARM_REFITS
    fixed = (factors, refits, levels.is_signed, _DTYPES[levels.scale_dtype], start is not None, codes)
    if levels.table is not None:
        search_table(blocks, relative_importance.numpy(), *_table(levels), *fixed, scales)
    else:
        numbers = (OFFSETS.index(levels.offset), 2**levels.bits - 1)
        search_steps(blocks, relative_importance.numpy(), *numbers, *fixed, scales, zeros, biases)
    offsets_by_kind = {"none": None, "int": _tensor(zeros, torch.uint8), "float": _tensor(biases, levels.scale_dtype)}
    offsets = offsets_by_kind[levels.offset]
    return Blocks(
        torch.from_numpy(codes).view(weight.shape),
        _tensor(scales, levels.scale_dtype).view(shape),
        None if offsets is None else offsets.view(shape),
    )


def residual(weight: torch.Tensor, blocks: Blocks, levels: Levels, out: torch.Tensor) -> torch.Tensor:
    """See refinement/reference.py."""
    squares = np.empty(len(weight))
    codes, constants, table = blocks.codes.numpy(), _constants(blocks, levels), _table(levels)[0]
    residual_of_rows(weight.numpy(), codes, *constants, table, out.numpy(), squares)
    return torch.from_numpy(squares)


def refine(
    weight: torch.Tensor,
    blocks: Blocks,
    block_size: int,
    levels: Levels,
    vectors: torch.Tensor,
    importance: torch.Tensor | None,
    sweeps: int,
    fits_scales: bool,
    out: torch.Tensor | None,
) -> Refined:
    """See refinement/reference.py."""
    rows, rank = weight.shape[0], vectors.shape[1]
    scales, zeros, biases = _constants(blocks, levels)
    padded = torch.nn.functional.pad(vectors, (0, -rank % _UNROLLED)).contiguous()
    if importance is None:
        importance = torch.ones_like(weight[0])
    before, after = np.empty((2, rows))
    projections = np.empty((rows, rank), np.float32)
    refine_rows(
        weight.numpy(),
        blocks.codes.numpy(),
        scales,
        zeros,
        biases,
        *_table(levels),
        2**levels.bits - 1,
        padded.numpy(),
        importance.numpy(),
        sweeps,
        *_moves(levels, fits_scales),
        before,
        after,
        projections,
        np.empty((0, 0), np.float32) if out is None else out.numpy(),
    )
    _store(blocks, levels, scales, biases)
    return Refined(torch.from_numpy(before), torch.from_numpy(after), torch.from_numpy(projections))


def refine_dense(
    weight: torch.Tensor,
    blocks: Blocks,
    block_size: int,
    levels: Levels,
    hessian: torch.Tensor,
    sweeps: int,
    fits_scales: bool,
    out: torch.Tensor | None,
) -> RowErrors:
    """See refinement/reference.py.

    The products of a tile of columns with all errors are computed when the pass reaches the tile, in two parts: with
    errors that have moved, and with errors that have not. With the few products inside tiles, the second parts of the
    first pass sum to the error before, and the first parts of the last pass sum to the error after.
    """
    rows, columns = weight.shape
    error = torch.empty_like(weight) if out is None else out
    constants = _constants(blocks, levels)
    codes, table = blocks.codes.numpy(), _table(levels)
    before, after, is_changed = np.zeros(rows), np.zeros(rows), np.zeros(rows, np.bool_)
    residual_of_rows(weight.numpy(), codes, *constants, table[0], error.numpy(), np.empty(rows))
    if not sweeps:
        add_inner_products((error @ hessian).numpy(), error.numpy(), 0, 1.0, before)
    width = max(_TILE // block_size, 1) * block_size
    for sweep in range(sweeps):
        for start in range(0, columns, width):
            tile = slice(start, min(start + width, columns))
            tile_hessian = hessian[tile, tile].contiguous()
            products = error[:, start:] @ hessian[start:, tile]
            if sweep == 0:
                add_inner_products(products.numpy(), error.numpy(), start, 2.0, before)
                add_inner_products((error[:, tile] @ tile_hessian).numpy(), error.numpy(), start, -1.0, before)
            moved_products = error[:, :start] @ hessian[:start, tile]
            refine_columns(
                weight.numpy(),
                codes,
                *constants,
                *table,
                2**levels.bits - 1,
                tile_hessian.numpy(),
                products.add_(moved_products).numpy(),
                start,
                *_moves(levels, fits_scales),
                error.numpy(),
                is_changed,
            )
            if sweep == sweeps - 1:
                add_inner_products(moved_products.numpy(), error.numpy(), start, 2.0, after)
                add_inner_products((error[:, tile] @ tile_hessian).numpy(), error.numpy(), start, 1.0, after)
    _store(blocks, levels, constants[0], constants[2])
    return RowErrors(torch.from_numpy(before), torch.from_numpy(np.where(is_changed, after, before)))


def _moves(levels: Levels, fits_scales: bool) -> tuple[Any, ...]:
    """Limits of a step, as arguments of the kernels that refine."""
    limits = np.array([LEAST_WEIGHT, 2.0 * WORTHWHILE], np.float32)
    fits = int(fits_scales) * (2 if levels.offset == "float" else 1)
    return fits, levels.is_signed, _DTYPES[levels.scale_dtype], limits


def _store(blocks: Blocks, levels: Levels, scales: Any, biases: Any) -> None:
    """Store moved constants in `blocks`."""
    blocks.scales.copy_(torch.from_numpy(scales))
    if levels.offset == "float" and blocks.offsets is not None:
        blocks.offsets.copy_(torch.from_numpy(biases))


def _table(levels: Levels) -> tuple[Any, Any]:
    """Levels and 16 thresholds, the last infinite; None twice for integers."""
    if levels.table is None:
        return None, None
    thresholds = torch.cat([(levels.table[:-1] + levels.table[1:]) / 2, levels.table.new_full((1,), torch.inf)])
    return levels.table.numpy(), thresholds.numpy()


def _constants(blocks: Blocks, levels: Levels) -> tuple[Any, Any, Any]:
    """Copies of scales, zero points and biases as float32."""
    scales = blocks.scales.to(torch.float32, copy=True).numpy()
    zeros, biases = np.zeros_like(scales), np.zeros_like(scales)
    if blocks.offsets is not None:
        (zeros if levels.offset == "int" else biases)[:] = blocks.offsets.float().numpy()
    elif levels.table is None:
        zeros += np.float32(2 ** (levels.bits - 1))
    return scales, zeros, biases


def _tensor(constants: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(constants).to(dtype)
