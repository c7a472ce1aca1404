"""Codes and block constants chosen for the least error: the contract. First for each block by itself, then under what
an adapter absorbs: of an error E [rows, in] the adapter with orthonormal right vectors V takes E·V·Vᵀ, and what is left
is E·H·Eᵀ with H = I − V·Vᵀ. Where columns count differently, H has their importance d instead of ones and vectors √d·V;
where they depend on each other it is any matrix. Blocks are `block_size` neighbouring columns of one row, and rows are
independent.

A value is level * scale + bias in float32, before a loader rounds it: see `Levels`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq_cli.triton_kernels.affine.contract import AFFINE_BITS, SCALE_DTYPES
from loftq_cli.triton_kernels.backend import implementation

OFFSETS = ("none", "int", "float")

# Factors of a block's range that are tried first, and how often least squares then goes on from the best. Measured on
# MiniLM: with half of both, int4 loses 0.8 % more at once, and 0.3 % more after the alternations of a joint fit.
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
REFITS = 6
WARM_REFITS = 1  # a second one changes nothing there that shows in three digits

# Of the importance of a column what H leaves of it, 1 − |v|² where all are 1: what has less is the adapter's, and
# float32 could not tell what it costs.
LEAST_WEIGHT = 1e-3

# Of a step that neither raises nor lowers the error, what a step may be at most: float32 does not decide closer ones.
WORTHWHILE = 1.0 - 1e-5


@dataclass(frozen=True, slots=True)
class Levels:
    """What codes mean: value = level * scale + bias.

    table        float32 [16], ascending: level = table[code]; None: level = code - zero point
    bits         of a code
    offset       "none": the zero point is 2^(bits - 1), unless there is a table; "int": uint8 zero points; "float":
                 biases in the dtype of the scales, and zero points of 0
    scale_dtype  what constants are rounded to, before their error is judged
    is_signed    whether a scale may be negative: a table that is not symmetric then has two forms
    """

    table: torch.Tensor | None
    bits: int
    offset: str
    scale_dtype: torch.dtype
    is_signed: bool = False


@dataclass(frozen=True, slots=True)
class Blocks:
    """A quantized matrix: codes uint8 [rows, in], scales [rows, in / block_size], and offsets of that shape or None."""

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Refined:
    """Of each row the squared error under H, before and after, float64 [rows]; and E·V float32 [rows, r], after."""

    before: torch.Tensor
    after: torch.Tensor
    projections: torch.Tensor


@dataclass(frozen=True, slots=True)
class RowErrors:
    """Of each row the squared error under H, before and after, float64 [rows]."""

    before: torch.Tensor
    after: torch.Tensor


def codebook_levels(table: torch.Tensor) -> Levels:
    """Those of a codebook format: float32 constants of either sign."""
    return Levels(table, 4, "none", torch.float32, is_signed=True)


def factors_of(levels: Levels, start: Blocks | None) -> tuple[float, ...]:
    """The factors of a block's range that a search tries."""
    if start is not None:
        return FACTORS[:1]
    has_signs = levels.is_signed and levels.offset == "none"
    return (*FACTORS, *(-factor for factor in FACTORS)) if has_signs else FACTORS


def block_importance(importance: torch.Tensor, block_size: int) -> torch.Tensor:
    """float32 [blocks of a row, block_size]: of each column the importance relative to the largest of its block; ones
    where all are 0.
    """
    blocks = importance.view(-1, block_size)
    largest = blocks.amax(dim=1, keepdim=True)
    return torch.where(largest > 0.0, blocks / largest, 1.0)


def search_scales(
    weight: torch.Tensor,
    block_size: int,
    levels: Levels,
    start: Blocks | None = None,
    importance: torch.Tensor | None = None,
) -> Blocks:
    """The codes and constants of float32 [rows, in] with little squared error, each block by itself. `importance`
    float32 [in], finite and not negative, is what the squared error of each column counts; None: all the same.

    The range of a block times each of FACTORS, for signed scales with both signs; the best of them is refitted by
    least squares to its codes, and the codes to that, for as long as it helps, at most REFITS times. Constants are
    rounded before they are judged. Multiples by powers of two have the same codes. With a `start`, its constants are
    tried instead, beside the whole range for integers and where they are 0, and refitted WARM_REFITS times: several
    times faster, for weights that hardly differ from those that it is of.
    What counts is the importance within a block: one where it is 0 everywhere is searched as if it were 1.
    A block of zeros has scale 0, or 1 for integers, and decodes to zeros. A scale is not finite exactly where a weight
    of its block is not, or the scale overflows its dtype; codes there mean nothing.
    Raises ValueError unless `weight` is contiguous float32 [rows, in] and blocks divide its rows, and where other
    shapes or dtypes do not fit.
    """
    _check_levels(levels)
    _check_weight(weight, block_size)
    if start is not None:
        _check_blocks(start, levels, weight.shape, block_size)
    _check_importance(importance, weight)
    search = implementation("refinement", weight.device.type).search_scales
    found: Blocks = search(weight, block_size, levels, start, importance)
    return found


def residual(weight: torch.Tensor, blocks: Blocks, block_size: int, levels: Levels, out: torch.Tensor) -> torch.Tensor:
    """float64 [rows]: of each row of float32 [rows, in] the squared error; the error itself goes into `out`, float32.

    Raises ValueError where shapes or dtypes do not fit.
    """
    _check_levels(levels)
    _check_weight(weight, block_size)
    _check_blocks(blocks, levels, weight.shape, block_size)
    _check("out", out, torch.float32, weight.shape)
    squares: torch.Tensor = implementation("refinement", weight.device.type).residual(weight, blocks, levels, out)
    return squares


def refine(
    weight: torch.Tensor,
    blocks: Blocks,
    block_size: int,
    levels: Levels,
    vectors: torch.Tensor,
    importance: torch.Tensor | None = None,
    *,
    sweeps: int,
    fits_scales: bool,
    out: torch.Tensor | None = None,
) -> Refined:
    """What the error under H = D − vectors·vectorsᵀ becomes by `sweeps` passes over `blocks`, which change in place;
    the error itself goes into `out` float32 [rows, in]. D is the diagonal matrix of `importance` float32 [in], finite
    and not negative; None: of ones. `vectors` float32 [in, r] are √D·V, where V has orthonormal columns or zeros.

    A pass goes through the blocks of a row in order. If it `fits_scales`, it moves the scale of a block, and its bias,
    to the least error for its codes, if that is less after rounding. (Zero points stay.) Then it moves the code of one
    column after another to the least error for all others. No step raises the error: one whose gain float32 cannot see
    is not made. A column that the adapter has almost by itself or whose importance is 0 keeps its code, and a
    block with scale 0 all of them.
    Rows do not depend on each other, however they are ordered or divided; compiled, not even in their last bits. What
    becomes of a row with NaN, infinity or numbers whose squares are not inside float32's range means nothing: its
    errors are not finite then, and other rows do not notice.
    Raises ValueError where shapes or dtypes do not fit.
    """
    _check_levels(levels)
    _check_weight(weight, block_size)
    _check_blocks(blocks, levels, weight.shape, block_size)
    _check_importance(importance, weight)
    if vectors.dtype != torch.float32 or vectors.dim() != 2 or len(vectors) != weight.shape[1]:
        raise ValueError(f"vectors must be float32 [{weight.shape[1]}, r]")
    if out is not None:
        _check("out", out, torch.float32, weight.shape)
    refined: Refined = implementation("refinement", weight.device.type).refine(
        weight, blocks, block_size, levels, vectors, importance, sweeps, fits_scales, out
    )
    return refined


def refine_dense(
    weight: torch.Tensor,
    blocks: Blocks,
    block_size: int,
    levels: Levels,
    hessian: torch.Tensor,
    *,
    sweeps: int,
    fits_scales: bool,
    out: torch.Tensor | None = None,
) -> RowErrors:
    """The same as `refine` under any H: `hessian` float32 [in, in], symmetric and positive semidefinite. Each pass
    costs a product of [rows, in] and H.

    A column whose diagonal element is not positive keeps its code. Errors are told in the digits that float32 products
    have; of a row that did not change, before and after are equal.
    Raises ValueError where shapes or dtypes do not fit.
    """
    _check_levels(levels)
    _check_weight(weight, block_size)
    _check_blocks(blocks, levels, weight.shape, block_size)
    _check("hessian", hessian, torch.float32, (weight.shape[1], weight.shape[1]))
    if out is not None:
        _check("out", out, torch.float32, weight.shape)
    errors: RowErrors = implementation("refinement", weight.device.type).refine_dense(
        weight, blocks, block_size, levels, hessian, sweeps, fits_scales, out
    )
    return errors


def _check_levels(levels: Levels) -> None:
    if levels.offset not in OFFSETS or (levels.table is not None and levels.offset != "none"):
        raise ValueError(f"unknown offset {levels.offset!r}; known: {', '.join(OFFSETS)}, and no other with a table")
    if levels.scale_dtype not in SCALE_DTYPES.values():
        raise ValueError(f"unknown scale dtype {levels.scale_dtype}; known: {', '.join(SCALE_DTYPES)}")
    if levels.bits not in AFFINE_BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, AFFINE_BITS))}")
    if levels.table is not None and (levels.table.shape != (16,) or levels.table.dtype != torch.float32):
        raise ValueError("table must be float32 with 16 entries")


def _check_blocks(blocks: Blocks, levels: Levels, shape: tuple[int, ...], block_size: int) -> None:
    constants = (shape[0], shape[1] // block_size)
    _check("codes", blocks.codes, torch.uint8, shape)
    _check("scales", blocks.scales, levels.scale_dtype, constants)
    if (blocks.offsets is None) != (levels.offset == "none"):
        raise ValueError(f"offsets must be there exactly where levels have them: {levels.offset!r}")
    if blocks.offsets is not None:
        _check("offsets", blocks.offsets, torch.uint8 if levels.offset == "int" else levels.scale_dtype, constants)


def _check_weight(weight: torch.Tensor, block_size: int) -> None:
    if weight.dtype != torch.float32 or weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError("weight must be contiguous float32 with two dimensions")
    if block_size < 1 or weight.shape[1] % block_size:
        raise ValueError(f"{weight.shape[1]} columns do not split into blocks of {block_size}")


def _check_importance(importance: torch.Tensor | None, weight: torch.Tensor) -> None:
    if importance is not None:
        _check("importance", importance, torch.float32, weight.shape[1:])


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous {dtype} with shape {shape}")
