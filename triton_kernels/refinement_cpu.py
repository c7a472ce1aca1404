"""The search for block constants and their refinement compiled for the processor: what refinement_reference.py defines,
but for the order of sums, which shows where float32 cannot tell two candidates apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loftq_cli.triton_kernels.cpu_kernels import refine_rows, residual_of_rows, search_steps, search_table
from loftq_cli.triton_kernels.refinement import (
    LEAST_WEIGHT,
    OFFSETS,
    REFITS,
    WARM_REFITS,
    WORTHWHILE,
    Blocks,
    Levels,
    Refined,
    factors_of,
)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_UNROLLED = 4  # columns of V that a loop takes at once


def search_scales(weight: torch.Tensor, block_size: int, levels: Levels, start: Blocks | None) -> Blocks:
    """See refinement_reference.py."""
    shape = (weight.shape[0], weight.shape[1] // block_size)
    blocks, codes = weight.view(-1, block_size).numpy(), np.empty((weight.numel() // block_size, block_size), np.uint8)
    scales, zeros, biases = (np.empty(len(codes), np.float32) for _ in range(3))
    if start is not None:
        scales, zeros, biases = (constants.reshape(-1) for constants in _constants(start, levels))
    factors = np.array(factors_of(levels, start), np.float32)
    refits = REFITS if start is None else WARM_REFITS
    fixed = (factors, refits, levels.is_signed, _DTYPES[levels.scale_dtype], start is not None, codes)
    if levels.table is not None:
        search_table(blocks, *_table(levels), *fixed, scales)
    else:
        search_steps(blocks, OFFSETS.index(levels.offset), 2**levels.bits - 1, *fixed, scales, zeros, biases)
    kept = {"none": None, "int": _tensor(zeros, torch.uint8), "float": _tensor(biases, levels.scale_dtype)}
    offsets = kept[levels.offset]
    return Blocks(
        torch.from_numpy(codes).view(weight.shape),
        _tensor(scales, levels.scale_dtype).view(shape),
        None if offsets is None else offsets.view(shape),
    )


def residual(weight: torch.Tensor, blocks: Blocks, levels: Levels, out: torch.Tensor) -> torch.Tensor:
    """See refinement_reference.py."""
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
    sweeps: int,
    fits_scales: bool,
    out: torch.Tensor | None,
) -> Refined:
    """See refinement_reference.py."""
    rows, rank = weight.shape[0], vectors.shape[1]
    scales, zeros, biases = _constants(blocks, levels)
    padded = torch.nn.functional.pad(vectors, (0, -rank % _UNROLLED)).contiguous()
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
        sweeps,
        int(fits_scales) * (2 if levels.offset == "float" else 1),
        levels.is_signed,
        _DTYPES[levels.scale_dtype],
        np.array([LEAST_WEIGHT, 2.0 * WORTHWHILE], np.float32),
        before,
        after,
        projections,
        np.empty((0, 0), np.float32) if out is None else out.numpy(),
    )
    blocks.scales.copy_(torch.from_numpy(scales))
    if levels.offset == "float" and blocks.offsets is not None:
        blocks.offsets.copy_(torch.from_numpy(biases))
    return Refined(torch.from_numpy(before), torch.from_numpy(after), torch.from_numpy(projections))


def _table(levels: Levels) -> tuple[Any, Any]:
    """The levels and 16 thresholds, the last of them infinite; of integers None twice."""
    if levels.table is None:
        return None, None
    thresholds = torch.cat([(levels.table[:-1] + levels.table[1:]) / 2, levels.table.new_full((1,), torch.inf)])
    return levels.table.numpy(), thresholds.numpy()


def _constants(blocks: Blocks, levels: Levels) -> tuple[Any, Any, Any]:
    """Scales, zero points and biases as float32, in memory of their own."""
    scales = blocks.scales.to(torch.float32, copy=True).numpy()
    zeros, biases = np.zeros_like(scales), np.zeros_like(scales)
    if blocks.offsets is not None:
        (zeros if levels.offset == "int" else biases)[:] = blocks.offsets.float().numpy()
    elif levels.table is None:
        zeros += np.float32(2 ** (levels.bits - 1))
    return scales, zeros, biases


def _tensor(constants: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(constants).to(dtype)
