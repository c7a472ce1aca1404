"""The search for block constants, and refinement, on a GPU. The order of sums differs from refinement/reference.py, so
results can differ where float32 cannot tell two candidates apart.

Blocks too wide for a program, and tables that leave [-1, 1], go to the reference.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from loftq_cli.triton_kernels.affine.triton import ends
from loftq_cli.triton_kernels.codebook.triton import CELLS, TRITON_DTYPES, encode, encoder_cells, largest_magnitude
from loftq_cli.triton_kernels.launch_triton import cdiv, launch
from loftq_cli.triton_kernels.refinement import reference as refinement_reference
from loftq_cli.triton_kernels.refinement.contract import (
    LEAST_WEIGHT,
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

_WARP_NUMEL = 256  # weights of a warp in a search: with 16 a thread, importance included, some compilers spill
_WIDEST = 8192  # widest block of a search, with 16 warps
_RESIDUAL_NUMEL = 1024  # weights of a row decoded in a step

# A refining program has few warps: columns follow each other, so many programs should run side by side.
_PROJECTIONS = 128  # rows times vectors of a warp
_LARGEST_RANK = 1024
_ROWS = 8  # rows of a program under a dense H; with 16 some compilers spill
_WIDEST_TILE = 128  # widest block in a single tile under a dense H; wider blocks move in tiles of _TILE columns
_TILE = 64


def search_scales(
    weight: torch.Tensor, block_size: int, levels: Levels, start: Blocks | None, importance: torch.Tensor | None
) -> Blocks:
    """See refinement/reference.py."""
    if block_size > _WIDEST or not _is_encoded(levels):
        return refinement_reference.search_scales(weight, block_size, levels, start, importance)
    shape, device = (weight.shape[0], weight.shape[1] // block_size), weight.device
    n = weight.numel() // block_size
    found = Blocks(
        torch.empty(weight.shape, dtype=torch.uint8, device=device),
        torch.empty(shape, dtype=levels.scale_dtype, device=device),
        _offsets(shape, levels, device),
    )
    begun = found if start is None else start
    width = 1 << (block_size - 1).bit_length()
    num_warps = min(max(width // _WARP_NUMEL, 4), 16)
    blocks = max(num_warps * _WARP_NUMEL // width, 1)
    factors = _factors(factors_of(levels, start), device)
    launch(
        _search_blocks,
        (cdiv(n, blocks),),
        weight,
        weight if importance is None else block_importance(importance, block_size),
        factors,
        *_tables(levels, weight),
        begun.scales,
        begun.scales if begun.offsets is None else begun.offsets,
        found.codes,
        found.scales,
        found.scales if found.offsets is None else found.offsets,
        n,
        shape[1],
        **_constants_of(levels),
        SCALE=TRITON_DTYPES[levels.scale_dtype],
        IS_SIGNED=levels.is_signed,
        HAS_START=start is not None,
        WEIGHTED=importance is not None,
        TRIALS=len(factors),
        REFITS=REFITS if start is None else WARM_REFITS,
        BLOCK_SIZE=block_size,
        WIDTH=width,
        BLOCKS=blocks,
        num_warps=num_warps,
    )
    return found


def residual(weight: torch.Tensor, blocks: Blocks, levels: Levels, out: torch.Tensor) -> torch.Tensor:
    """See refinement/reference.py."""
    rows, columns = weight.shape
    squares = torch.empty(rows, dtype=torch.float64, device=weight.device)
    launch(
        _residual_of_rows,
        (rows,),
        weight,
        blocks.codes,
        blocks.scales,
        blocks.scales if blocks.offsets is None else blocks.offsets,
        _tables(levels, weight)[0],
        out,
        squares,
        columns,
        TOP=2**levels.bits - 1,
        OFFSET=levels.offset,
        TABLE=levels.table is not None,
        BLOCK_SIZE=columns // max(blocks.scales.shape[1], 1),
        WIDTH=_RESIDUAL_NUMEL,
    )
    return squares


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
    """See refinement/reference.py. A launch is a single pass: no thread reads memory that another thread wrote."""
    (rows, columns), rank = weight.shape, vectors.shape[1]
    if rank > _LARGEST_RANK or not _is_encoded(levels):
        return refinement_reference.refine(
            weight, blocks, block_size, levels, vectors, importance, sweeps, fits_scales, out
        )
    error, vectors = torch.empty_like(weight) if out is None else out, vectors.contiguous()
    if importance is None:
        importance = torch.ones_like(weight[0])
    left = importance - vectors.square().sum(dim=1)
    left = torch.where(left > LEAST_WEIGHT * importance, left, 0.0)
    before, m = _absorbed(weight, blocks, levels, vectors, importance, error)
    ranks = max(1 << (rank - 1).bit_length(), 2)
    tile = min(max(_PROJECTIONS // ranks, 1), 8)
    for _ in range(sweeps):
        launch(
            _refine_rows,
            (cdiv(rows, tile),),
            weight,
            blocks.codes,
            blocks.scales,
            blocks.scales if blocks.offsets is None else blocks.offsets,
            *_tables(levels, weight),
            vectors,
            importance,
            left,
            _reciprocals(left),
            m,
            rows,
            columns,
            rank,
            **_constants_of(levels),
            **_steps_of(levels, fits_scales),
            BLOCK_SIZE=block_size,
            ROWS=tile,
            RANKS=ranks,
            num_warps=max(ranks // _PROJECTIONS, 1),
        )
    after, m = _absorbed(weight, blocks, levels, vectors, importance, error)
    return Refined(before, after, m)


def _absorbed(
    weight: torch.Tensor,
    blocks: Blocks,
    levels: Levels,
    vectors: torch.Tensor,
    importance: torch.Tensor,
    error: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared errors under H, float64 [rows], and the projections; the error goes into `error`."""
    residual(weight, blocks, levels, error)
    m = error @ vectors
    squares = torch.linalg.vecdot(error.double().square(), importance.double()[None, :])
    return squares - m.double().square().sum(dim=1), m


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
    """See refinement/reference.py. The pass computes the products of a tile with all errors on reaching the tile."""
    if not _is_encoded(levels):
        return refinement_reference.refine_dense(weight, blocks, block_size, levels, hessian, sweeps, fits_scales, out)
    rows, columns = weight.shape
    error = torch.empty_like(weight) if out is None else out
    residual(weight, blocks, levels, error)
    before, reciprocals = _dense_errors(error, hessian), _reciprocals(hessian.diagonal())
    is_wide = block_size > _WIDEST_TILE
    width = _TILE if is_wide else block_size
    for _ in range(sweeps):
        for first in range(0, columns, block_size):
            last = first + block_size
            if is_wide and fits_scales:
                values = weight[:, first:last] - error[:, first:last]
                refinement_reference.fit_dense(error, values, blocks, first // block_size, levels, hessian[first:last])
                error[:, first:last] = weight[:, first:last] - values
            for start in range(first, last, width):
                stop = min(start + width, last)
                launch(
                    _refine_tile,
                    (cdiv(rows, _ROWS),),
                    weight,
                    blocks.codes,
                    blocks.scales,
                    blocks.scales if blocks.offsets is None else blocks.offsets,
                    *_tables(levels, weight),
                    hessian,
                    reciprocals,
                    error @ hessian[:, start:stop],
                    error,
                    rows,
                    columns,
                    start,
                    stop - start,
                    **_constants_of(levels),
                    **_steps_of(levels, fits_scales and not is_wide),
                    BLOCK_SIZE=block_size,
                    WIDTH=max(1 << (width - 1).bit_length(), 2),
                    ROWS=_ROWS,
                )
    return RowErrors(before, _dense_errors(error, hessian))


def _reciprocals(left: torch.Tensor) -> torch.Tensor:
    return torch.where(left > 0.0, 1.0 / left, 0.0)


def _dense_errors(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    products: torch.Tensor = torch.linalg.vecdot((error @ hessian).double(), error.double())
    return products


def _steps_of(levels: Levels, fits_scales: bool) -> dict[str, Any]:
    """Limits of a step, as arguments of the kernels that refine."""
    return {
        "SCALE": TRITON_DTYPES[levels.scale_dtype],
        "IS_SIGNED": levels.is_signed,
        "FITS": fits_scales,
        "LEAST": LEAST_WEIGHT,
        "MOST": 2.0 * WORTHWHILE,
    }


def _is_encoded(levels: Levels) -> bool:
    """Whether the cells of an encoder can find every code."""
    return levels.table is None or _largest_level(levels.table) <= 1.0


@lru_cache(maxsize=16)  # keyed by identity, as `encoder_cells`
def _largest_level(table: torch.Tensor) -> float:
    return float(table.abs().max())


@lru_cache(maxsize=16)
def _factors(factors: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(factors, dtype=torch.float32, device=device)


def _offsets(shape: tuple[int, int], levels: Levels, device: torch.device) -> torch.Tensor | None:
    if levels.offset == "none":
        return None
    return torch.empty(shape, dtype=torch.uint8 if levels.offset == "int" else levels.scale_dtype, device=device)


def _tables(levels: Levels, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels of a table, and the encoder cells; placeholders for integers."""
    return (weight, weight) if levels.table is None else (levels.table, encoder_cells(levels.table))


def _constants_of(levels: Levels) -> dict[str, Any]:
    """Compile-time constants of the kernels."""
    depth = 0 if levels.table is None else len(encoder_cells(levels.table)) // CELLS - 1
    return {
        "TOP": 2**levels.bits - 1,
        "OFFSET": levels.offset,
        "TABLE": levels.table is not None,
        "DEPTH": depth,
    }


@triton.jit
def _inverse(numbers):
    """The reciprocal; 0 for numbers so small that a reciprocal may overflow."""
    return tl.where(tl.abs(numbers) < 1e-38, 0.0, tl.div_rn(tl.full(numbers.shape, 1.0, tl.float32), numbers))


@triton.jit
def _nearest(steps, zero, table_ptr, cells_ptr, TOP: tl.constexpr, TABLE: tl.constexpr, DEPTH: tl.constexpr):
    """Levels nearest to `steps`, and their codes as whole float32 numbers. Clamping first gives equal codes, because
    the bounds are whole, and lets an addition round. The code of NaN is arbitrary but valid.
    """
    if TABLE:
        code = encode(tl.minimum(tl.maximum(steps, -1.0), 1.0), cells_ptr, DEPTH)
        level = tl.load(table_ptr + code.to(tl.int32))
    else:
        level = tl.minimum(tl.maximum(steps, -zero), TOP - zero)
        level = (level + 12582912.0) - 12582912.0
        code = level + zero
    return level, code


@triton.jit
def _level(code, zero, table_ptr, TABLE: tl.constexpr):
    return tl.load(table_ptr + code.to(tl.int32)) if TABLE else code.to(tl.float32) - zero


@triton.jit
def _load_constants(scales_ptr, offsets_ptr, place, mask, TOP: tl.constexpr, OFFSET: tl.constexpr, TABLE: tl.constexpr):
    """Scales, zero points and biases, float32."""
    scale = tl.load(scales_ptr + place, mask=mask, other=0.0).to(tl.float32)
    zero, bias = tl.zeros_like(scale), tl.zeros_like(scale)
    if OFFSET == "int":
        zero = tl.load(offsets_ptr + place, mask=mask, other=0).to(tl.float32)
    elif OFFSET == "float":
        bias = tl.load(offsets_ptr + place, mask=mask, other=0.0).to(tl.float32)
    elif not TABLE:
        zero += TOP // 2 + 1
    return scale, zero, bias


@triton.jit
def _range(
    lowest,
    highest,
    factor,
    TOP: tl.constexpr,
    OFFSET: tl.constexpr,
    TABLE: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Constants of the range of each block times `factor`."""
    if TABLE:
        scale = highest * factor
    elif OFFSET == "none":
        scale = tl.div_rn(highest * factor, tl.full(highest.shape, TOP / 2, tl.float32))
    else:
        scale = tl.div_rn((highest - lowest) * factor, tl.full(highest.shape, TOP, tl.float32))
    scale = scale.to(SCALE).to(tl.float32)
    if not TABLE:
        scale = tl.where(scale == 0.0, 1.0, scale)
    zero, bias = tl.zeros_like(scale), tl.zeros_like(scale)
    if OFFSET == "int":
        zero = tl.minimum(tl.maximum(tl.div_rn(-lowest * factor, scale), 0.0), TOP)
        zero = (zero + 12582912.0) - 12582912.0
    elif OFFSET == "float":
        centre = (lowest + highest) * 0.5
        bias = (centre + (lowest - centre) * factor).to(SCALE).to(tl.float32)
    elif not TABLE:
        zero += TOP // 2 + 1
    return scale, zero, bias


@triton.jit
def _sums(
    values,
    importance,
    is_column,
    unit,
    scale,
    zero,
    bias,
    table_ptr,
    cells_ptr,
    TOP: tl.constexpr,
    TABLE: tl.constexpr,
    DEPTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    IS_PADDED: tl.constexpr,
):
    """Per block: the squared error, the sums of weight * level and of level * level, and the sum of levels."""
    steps = (values - bias[:, None]) * _inverse(scale)[:, None]
    level, _ = _nearest(steps, zero[:, None], table_ptr, cells_ptr, TOP, TABLE, DEPTH)
    difference = (values - (level * scale[:, None] + bias[:, None])) * unit[:, None]
    counted, squares = level, difference * difference
    if WEIGHTED:
        counted, squares = level * importance, squares * importance
    elif IS_PADDED:
        counted, squares = tl.where(is_column, level, 0.0), tl.where(is_column, squares, 0.0)
    mixed = tl.sum(values * unit[:, None] * counted, axis=1)
    return tl.sum(squares, axis=1), mixed, tl.sum(level * counted, axis=1), tl.sum(counted, axis=1)


@triton.jit
def _line(mixed, square, total, steps, n, zero, moves_zero, TOP: tl.constexpr, OFFSET: tl.constexpr):
    """Least squares line of weights over levels: the slope, the level where the line is 0 (the zero point), and the
    value at level 0 (the bias). `n` is the sum of the importance.
    """
    slope, start, moved = tl.div_rn(mixed, square), tl.zeros_like(mixed), zero
    if OFFSET != "none":
        centred = square - tl.div_rn(steps * steps, n)
        free = tl.div_rn(mixed - tl.div_rn(total * steps, n), centred)
        rest = tl.div_rn(total - free * steps, n)
        if OFFSET == "float":
            slope, start = free, rest
        else:
            target = zero - tl.div_rn(rest, free)
            rounded = tl.minimum(tl.maximum(target, 0.0), TOP)
            rounded = (rounded + 12582912.0) - 12582912.0
            move = zero - rounded
            other = tl.div_rn(mixed + move * total, square + move * (2.0 * steps + n * move))
            other = tl.where(tl.abs(target) < float("inf"), other, float("nan"))
            slope, moved = tl.where(moves_zero, other, slope), tl.where(moves_zero, rounded, zero)
    return slope, moved, start


@triton.jit
def _search_blocks(
    weight_ptr,
    importance_ptr,
    factors_ptr,
    table_ptr,
    cells_ptr,
    start_scales_ptr,
    start_offsets_ptr,
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    n,
    blocks_of_row,
    TOP: tl.constexpr,
    OFFSET: tl.constexpr,
    TABLE: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALE: tl.constexpr,
    IS_SIGNED: tl.constexpr,
    HAS_START: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TRIALS: tl.constexpr,
    REFITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block, column = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, WIDTH)[None, :]
    is_block, is_column, infinity = block < n, column < BLOCK_SIZE, float("inf")
    is_weight = is_block[:, None] & is_column
    places = block[:, None] * BLOCK_SIZE + column
    values = tl.load(weight_ptr + places, mask=is_weight, other=0.0)
    importance, count = values, tl.full([BLOCKS], BLOCK_SIZE, tl.float32)
    if WEIGHTED:
        # 2^31 blocks fit 32 bits; a remainder in 64 bits is a call and costs registers.
        of_row = (block.to(tl.int32) % blocks_of_row)[:, None] * BLOCK_SIZE + column
        importance = tl.load(importance_ptr + of_row, mask=is_weight, other=0.0)
        count = tl.sum(importance, axis=1)
    largest = largest_magnitude(values)
    lowest, highest = ends(values, is_column, OFFSET)
    unit = _inverse(largest)
    units = values * unit[:, None]
    total = tl.sum(units * importance if WEIGHTED else units, axis=1)
    scale, zero, bias = _range(lowest, highest, 1.0, TOP, OFFSET, TABLE, SCALE)
    error = tl.full([BLOCKS], infinity, tl.float32)
    mixed, square, steps = tl.zeros_like(error), tl.zeros_like(error), tl.zeros_like(error)
    begun_scale, begun_zero, begun_bias = scale, zero, bias
    if HAS_START:
        begun_scale, begun_zero, begun_bias = _load_constants(
            start_scales_ptr, start_offsets_ptr, block, is_block, TOP, OFFSET, TABLE
        )
    for trial in range(-1 if HAS_START else 0, TRIALS + REFITS):
        if trial < TRIALS:
            factor = tl.load(factors_ptr + tl.maximum(trial, 0))
            new_scale, new_zero, new_bias = _range(lowest, highest, factor, TOP, OFFSET, TABLE, SCALE)
            is_usable = new_scale != 0.0
            if HAS_START:
                if TABLE:
                    is_usable &= error == infinity
                new_scale = tl.where(trial < 0, begun_scale, new_scale)
                new_zero = tl.where(trial < 0, begun_zero, new_zero)
                new_bias = tl.where(trial < 0, begun_bias, new_bias)
                is_usable = tl.where(trial < 0, new_scale != 0.0, is_usable)
        else:
            slope, new_zero, rest = _line(
                mixed, square, total, steps, count, zero, (trial - TRIALS) % 2 == 0, TOP, OFFSET
            )
            new_scale = (slope * largest).to(SCALE).to(tl.float32)
            new_bias = (rest * largest).to(SCALE).to(tl.float32)
            is_usable = new_scale != 0.0 if IS_SIGNED else new_scale > 0.0
        is_usable &= (tl.abs(new_scale) < infinity) & (tl.abs(new_bias) < infinity)
        new_error, new_mixed, new_square, new_steps = _sums(
            values, importance, is_column, unit, new_scale, new_zero, new_bias, table_ptr, cells_ptr,
            TOP, TABLE, DEPTH, WEIGHTED, WIDTH != BLOCK_SIZE,
        )  # fmt: skip
        is_less = is_usable & (new_error < error)
        error, mixed = tl.where(is_less, new_error, error), tl.where(is_less, new_mixed, mixed)
        square, steps = tl.where(is_less, new_square, square), tl.where(is_less, new_steps, steps)
        scale, zero = tl.where(is_less, new_scale, scale), tl.where(is_less, new_zero, zero)
        bias = tl.where(is_less, new_bias, bias)
    scale = tl.where(largest < infinity, scale, float("nan"))
    nearest = (values - bias[:, None]) * _inverse(scale)[:, None]
    _, code = _nearest(nearest, zero[:, None], table_ptr, cells_ptr, TOP, TABLE, DEPTH)
    tl.store(codes_ptr + places, code.to(tl.uint8), mask=is_weight)
    tl.store(scales_ptr + block, scale.to(SCALE), mask=is_block)
    if OFFSET != "none":
        offset = zero if OFFSET == "int" else bias
        tl.store(offsets_ptr + block, offset.to(offsets_ptr.dtype.element_ty), mask=is_block)


@triton.jit
def _residual_of_rows(
    weight_ptr,
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    table_ptr,
    out_ptr,
    squares_ptr,
    columns,
    TOP: tl.constexpr,
    OFFSET: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([WIDTH], tl.float64)
    for start in range(0, columns, WIDTH):
        column = start + tl.arange(0, WIDTH)
        is_column, place = column < columns, row * columns + column
        block = row * (columns // BLOCK_SIZE) + column // BLOCK_SIZE
        scale, zero, bias = _load_constants(scales_ptr, offsets_ptr, block, is_column, TOP, OFFSET, TABLE)
        level = _level(tl.load(codes_ptr + place, mask=is_column, other=0), zero, table_ptr, TABLE)
        weight = tl.load(weight_ptr + place, mask=is_column, other=0.0)
        error = weight - (level * scale + bias)
        tl.store(out_ptr + place, error, mask=is_column)
        wide = tl.where(is_column, error, 0.0).to(tl.float64)
        squares += wide * wide
    tl.store(squares_ptr + row, tl.sum(squares, axis=0))


@triton.jit
def _fitted(
    right,
    right_bias,
    mixed,
    square,
    square_bias,
    bound,
    scale,
    bias,
    OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
    IS_SIGNED: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Scales and biases of blocks after a fit, where the error falls; and the added multiples of `linear` and of ones.
    The products are the fields of `Products` in refinement/reference.py.
    """
    is_usable = square > LEAST * bound
    if OFFSET == "float":
        determinant = square * square_bias - mixed * mixed
        is_usable &= determinant > LEAST * square * square_bias
        inverse = tl.div_rn(tl.full(right.shape, 1.0, tl.float32), determinant)
        factor = (right * square_bias - right_bias * mixed) * inverse
        shift = (right_bias * square - right * mixed) * inverse
    else:
        factor, shift = tl.div_rn(right, square), tl.zeros_like(right)
    new_scale = (scale * (1.0 + factor)).to(SCALE).to(tl.float32)
    new_bias = (bias + shift).to(SCALE).to(tl.float32) if OFFSET == "float" else bias
    factor, shift = (new_scale - scale) * _inverse(scale), new_bias - bias
    change = factor * (factor * square - 2.0 * right)
    if OFFSET == "float":
        change += shift * (shift * square_bias - 2.0 * right_bias + 2.0 * factor * mixed)
    is_usable &= (change < 0.0) & (tl.abs(new_scale) < float("inf"))
    is_usable &= new_scale != 0.0 if IS_SIGNED else new_scale > 0.0
    factor, shift = tl.where(is_usable, factor, 0.0), tl.where(is_usable, shift, 0.0)
    return factor, shift, tl.where(is_usable, new_scale, scale), tl.where(is_usable, new_bias, bias)


@triton.jit
def _step(
    value,
    slope,
    h,
    reciprocal,
    scale,
    zero,
    bias,
    inverse,
    table_ptr,
    cells_ptr,
    TOP: tl.constexpr,
    TABLE: tl.constexpr,
    DEPTH: tl.constexpr,
    MOST: tl.constexpr,
):
    """New values of a column of rows, the codes of the values, and whether the error falls. `h` is the diagonal element
    of H for the column, `reciprocal` is 1 / h.
    """
    h = tl.zeros_like(value) + h
    target = (value + slope * reciprocal - bias) * inverse
    level, code = _nearest(target, zero, table_ptr, cells_ptr, TOP, TABLE, DEPTH)
    found = level * scale + bias
    step = found - value
    is_towards = ((step > 0.0) & (slope > 0.0)) | ((step < 0.0) & (slope < 0.0))
    return found, code, is_towards & (tl.abs(step) * h < MOST * tl.abs(slope)) & (h > 0.0)


@triton.jit
def _refine_rows(
    weight_ptr,
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    table_ptr,
    cells_ptr,
    vectors_ptr,
    importance_ptr,
    left_ptr,
    reciprocals_ptr,
    m_ptr,
    rows,
    columns,
    rank,
    TOP: tl.constexpr,
    OFFSET: tl.constexpr,
    TABLE: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALE: tl.constexpr,
    IS_SIGNED: tl.constexpr,
    FITS: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    row, inner = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANKS)
    is_row, is_inner = row < rows, inner < rank
    m_place, is_m = row[:, None] * rank + inner[None, :], is_row[:, None] & is_inner[None, :]
    m = tl.load(m_ptr + m_place, mask=is_m, other=0.0)
    for block in range(columns // BLOCK_SIZE):
        place, first = row * (columns // BLOCK_SIZE) + block, block * BLOCK_SIZE
        scale, zero, bias = _load_constants(scales_ptr, offsets_ptr, place, is_row, TOP, OFFSET, TABLE)
        if FITS:
            right, right_bias, mixed = tl.zeros_like(scale), tl.zeros_like(scale), tl.zeros_like(scale)
            bound, projected, ones = tl.zeros_like(scale), tl.zeros_like(m), tl.zeros([RANKS], tl.float32)
            count = 0.0
            for j in range(first, first + BLOCK_SIZE):
                v = tl.load(vectors_ptr + tl.cast(j, tl.int64) * rank + inner, mask=is_inner, other=0.0)
                d = tl.load(importance_ptr + j)
                code = tl.load(codes_ptr + row * columns + j, mask=is_row, other=0)
                linear = _level(code, zero, table_ptr, TABLE) * scale
                error = (tl.load(weight_ptr + row * columns + j, mask=is_row, other=0.0) - (linear + bias)) * d
                right, right_bias = right + linear * error, right_bias + error
                mixed, bound, count = mixed + linear * d, bound + linear * linear * d, count + d
                projected, ones = projected + linear[:, None] * v[None, :], ones + v
            square = bound - tl.sum(projected * projected, axis=1)
            right -= tl.sum(projected * m, axis=1)
            right_bias -= tl.sum(m * ones[None, :], axis=1)
            mixed -= tl.sum(projected * ones[None, :], axis=1)
            factor, shift, scale, bias = _fitted(
                right, right_bias, mixed, square, count - tl.sum(ones * ones, axis=0), bound, scale, bias,
                OFFSET, SCALE, IS_SIGNED, LEAST,
            )  # fmt: skip
            m -= factor[:, None] * projected + shift[:, None] * ones[None, :]
            tl.store(scales_ptr + place, scale.to(SCALE), mask=is_row)
            if OFFSET == "float":
                tl.store(offsets_ptr + place, bias.to(SCALE), mask=is_row)
        inverse = _inverse(scale)
        for j in range(first, first + BLOCK_SIZE):
            v = tl.load(vectors_ptr + tl.cast(j, tl.int64) * rank + inner, mask=is_inner, other=0.0)
            weight = tl.load(weight_ptr + row * columns + j, mask=is_row, other=0.0)
            code = tl.load(codes_ptr + row * columns + j, mask=is_row, other=0)
            value = _level(code, zero, table_ptr, TABLE) * scale + bias
            slope = (weight - value) * tl.load(importance_ptr + j) - tl.sum(m * v[None, :], axis=1)
            found, new_code, lowers = _step(
                value, slope, tl.load(left_ptr + j), tl.load(reciprocals_ptr + j), scale, zero, bias, inverse,
                table_ptr, cells_ptr, TOP, TABLE, DEPTH, MOST,
            )  # fmt: skip
            m -= tl.where(lowers, found - value, 0.0)[:, None] * v[None, :]
            tl.store(codes_ptr + row * columns + j, new_code.to(tl.uint8), mask=is_row & lowers)
    tl.store(m_ptr + m_place, m, mask=is_m)


@triton.jit(do_not_specialize=["start", "count"])  # a single compilation serves all tiles
def _refine_tile(
    weight_ptr,
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    table_ptr,
    cells_ptr,
    hessian_ptr,
    reciprocals_ptr,
    products_ptr,
    error_ptr,
    rows,
    columns,
    start,
    count,
    TOP: tl.constexpr,
    OFFSET: tl.constexpr,
    TABLE: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALE: tl.constexpr,
    IS_SIGNED: tl.constexpr,
    FITS: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    is_row, is_column = row < rows, column < count
    is_weight = is_row[:, None] & is_column[None, :]
    place, of_block = (
        row[:, None] * columns + start + column[None, :],
        row * (columns // BLOCK_SIZE) + start // BLOCK_SIZE,
    )
    scale, zero, bias = _load_constants(scales_ptr, offsets_ptr, of_block, is_row, TOP, OFFSET, TABLE)
    g = tl.load(products_ptr + row[:, None] * count + column[None, :], mask=is_weight, other=0.0)
    code = tl.load(codes_ptr + place, mask=is_weight, other=0)
    level = tl.where(is_weight, _level(code, zero[:, None], table_ptr, TABLE), 0.0)
    codes, inner = code.to(tl.float32), column[None, :]
    tl.debug_barrier()  # threads may hold equal elements: all threads read before any thread writes
    own_ptr = hessian_ptr + tl.cast(start, tl.int64) * (columns + 1)
    if FITS:
        linear = level * scale[:, None]
        projected, ones = tl.zeros_like(g), tl.zeros([WIDTH], tl.float32)
        for j in range(count):
            own = tl.load(own_ptr + tl.cast(j, tl.int64) * columns + column, mask=is_column, other=0.0)
            projected += tl.sum(tl.where(inner == j, linear, 0.0), axis=1)[:, None] * own[None, :]
            ones += own
        diagonal = tl.load(own_ptr + column.to(tl.int64) * (columns + 1), mask=is_column, other=0.0)
        factor, shift, scale, bias = _fitted(
            tl.sum(linear * g, axis=1),
            tl.sum(g, axis=1),
            tl.sum(projected, axis=1),
            tl.sum(linear * projected, axis=1),
            tl.sum(ones, axis=0),
            tl.sum(linear * linear * diagonal[None, :], axis=1),
            scale,
            bias,
            OFFSET,
            SCALE,
            IS_SIGNED,
            LEAST,
        )
        g -= factor[:, None] * projected + shift[:, None] * ones[None, :]
        tl.store(scales_ptr + of_block, scale.to(SCALE), mask=is_row)
        if OFFSET == "float":
            tl.store(offsets_ptr + of_block, bias.to(SCALE), mask=is_row)
    values, inverse = level * scale[:, None] + bias[:, None], _inverse(scale)
    for j in range(count):
        is_j = inner == j
        own_row = own_ptr + tl.cast(j, tl.int64) * columns
        value = tl.sum(tl.where(is_j, values, 0.0), axis=1)
        found, new_code, lowers = _step(
            value, tl.sum(tl.where(is_j, g, 0.0), axis=1), tl.load(own_row + j), tl.load(reciprocals_ptr + start + j),
            scale, zero, bias, inverse, table_ptr, cells_ptr, TOP, TABLE, DEPTH, MOST,
        )  # fmt: skip
        step = tl.where(lowers, found - value, 0.0)
        g -= step[:, None] * tl.load(own_row + column, mask=is_column, other=0.0)[None, :]
        is_moved = is_j & lowers[:, None]
        values, codes = tl.where(is_moved, found[:, None], values), tl.where(is_moved, new_code[:, None], codes)
    tl.store(codes_ptr + place, codes.to(tl.uint8), mask=is_weight)
    weight = tl.load(weight_ptr + place, mask=is_weight, other=0.0)
    tl.store(error_ptr + place, weight - values, mask=is_weight)
