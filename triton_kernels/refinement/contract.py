"""Codes and block constants of least error: the contract.

A search treats each block alone. Refinement then counts only the error that an adapter leaves: an adapter with
orthonormal right vectors V absorbs E·V·Vᵀ of an error E [rows, in] and leaves the cost E·H·Eᵀ with H = I − V·Vᵀ.
Columns of unequal importance d give H = diag(d) − v·vᵀ with v = √d·V; correlated columns give any H. V may be shorter:
√γ·V counts the error of the base alone by a share of 1 − γ. A block is `block_size` neighbouring columns of a row, and
rows are independent. README.md in this folder has the derivation.

A value is level * scale + bias in float32, before a loader rounds the value: see `Levels`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq_cli.triton_kernels.affine.contract import AFFINE_BITS, SCALE_DTYPES
from loftq_cli.triton_kernels.backend import implementation

OFFSETS = ("none", "int", "float")

# Factors of the range of a block that a search tries, and the least squares refits of the best factor. Measured on
# MiniLM: with half of both, int4 loses 0.8 % more at once, and 0.3 % more after the alternations of a joint fit.
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
REFITS = 6
WARM_REFITS = 1  # a second refit changes nothing in three digits

# Least share of the importance of a column that H must leave (1 − |v|² for equal columns). A column with less belongs
# to the adapter, and float32 cannot resolve the cost of a step.
LEAST_WEIGHT = 1e-3

# Largest step, relative to a step that leaves the error unchanged: float32 does not decide closer calls.
WORTHWHILE = 1.0 - 1e-5


@dataclass(frozen=True, slots=True)
class Levels:
    """The meaning of codes: value = level * scale + bias.

    table        float32 [16], ascending: level = table[code]; None: level = code - zero point
    bits         bits of a code
    offset       "none": the zero point is 2^(bits - 1), unless a table is given; "int": uint8 zero points; "float":
                 biases in the dtype of the scales, and zero points of 0
    scale_dtype  dtype of stored constants; constants are rounded before an error is judged
    is_signed    whether a scale may be negative: a table that is not symmetric then has two forms
    """

    table: torch.Tensor | None
    bits: int
    offset: str
    scale_dtype: torch.dtype
    is_signed: bool = False


@dataclass(frozen=True, slots=True)
class Blocks:
    """A quantized matrix: codes uint8 [rows, in], scales [rows, in / block_size], offsets like scales or None."""

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Refined:
    """Squared error of each row under H, before and after, float64 [rows]; and E·vectors float32 [rows, r], after."""

    before: torch.Tensor
    after: torch.Tensor
    projections: torch.Tensor


@dataclass(frozen=True, slots=True)
class RowErrors:
    """Squared error of each row under H, before and after, float64 [rows]."""

    before: torch.Tensor
    after: torch.Tensor


def codebook_levels(table: torch.Tensor) -> Levels:
    """Levels of a codebook format: float32 constants of either sign.

    >>> codebook_levels(torch.linspace(-1.0, 1.0, 16)).is_signed
    True
    """
    return Levels(table, 4, "none", torch.float32, is_signed=True)


def factors_of(levels: Levels, start: Blocks | None) -> tuple[float, ...]:
    """Factors of the range of a block that a search tries.

    >>> factors_of(Levels(None, 4, "int", torch.float32), None) == FACTORS
    True
    """
    if start is not None:
        return FACTORS[:1]
    has_signs = levels.is_signed and levels.offset == "none"
    return (*FACTORS, *(-factor for factor in FACTORS)) if has_signs else FACTORS


def block_importance(importance: torch.Tensor, block_size: int) -> torch.Tensor:
    """float32 [blocks of a row, block_size]: importance of each column relative to the largest in the block; ones where
    the whole block is 0.

    >>> block_importance(torch.tensor([1.0, 4.0, 0.0, 0.0]), 2).tolist()
    [[0.25, 1.0], [1.0, 1.0]]
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
    """Search codes and constants of little squared error for float32 [rows, in], each block alone.

    `importance` float32 [in], finite and not negative, weighs the squared error of each column; None weighs all columns
    equally. Only ratios within a block matter; a block with importance 0 everywhere is searched with importance 1.

    The search tries the range of a block times each of FACTORS (signed scales: both signs) and refits the best
    candidate by least squares to the codes, and the codes to the constants, while the error falls, at most REFITS
    times. Constants are rounded before an error is judged. A `start` replaces the factors by the constants of `start`
    (integers, and constants of 0, try the whole range too) and refits WARM_REFITS times: several times faster for
    weights near the weights of `start`. A block of zeros has scale 0, or 1 for integers, and decodes to zeros. A scale
    is not finite exactly where a weight of the block is not finite or the scale overflows the scale dtype; codes of
    such a block are meaningless. Raises ValueError unless `weight` is contiguous float32 [rows, in], blocks divide the
    rows, and all shapes and dtypes fit.

    >>> levels = Levels(None, 4, "none", torch.float32)
    >>> search_scales(torch.tensor([[-8.0, 7.0]]), 2, levels).codes.tolist()
    [[0, 15]]
    """
    _check_levels(levels)
    _check_weight(weight, block_size)
    if start is not None:
        _check_blocks(start, levels, weight.shape, block_size)
    _check_importance(importance, weight)
    search = implementation("refinement", weight.device.type).search_scales
    blocks: Blocks = search(weight, block_size, levels, start, importance)
    return blocks


def residual(weight: torch.Tensor, blocks: Blocks, block_size: int, levels: Levels, out: torch.Tensor) -> torch.Tensor:
    """Squared error float64 [rows] of each row of float32 [rows, in]; the error goes into `out`, float32.

    Raises ValueError when shapes or dtypes do not fit.

    >>> blocks = Blocks(torch.tensor([[8, 10]], dtype=torch.uint8), torch.ones(1, 1), None)
    >>> levels, out = Levels(None, 4, "none", torch.float32), torch.empty(1, 2)
    >>> residual(torch.tensor([[0.5, 2.0]]), blocks, 2, levels, out).tolist(), out.tolist()
    ([0.25], [[0.5, 0.0]])
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
    """Lower the error under H = D − vectors·vectorsᵀ by `sweeps` passes over `blocks`, which change in place.

    D is the diagonal matrix of `importance` float32 [in], finite and not negative; None means ones. `vectors` float32
    [in, r] are √D·V, where columns of V are orthogonal and at most 1 long. The error goes into `out`, float32
    [rows, in].

    A pass goes through the blocks of a row in order. With `fits_scales` a pass first moves scale and bias of a block to
    the least error for the codes, if rounded constants lower the error. (Zero points stay.) Then each code in turn
    moves to the least error given all other codes. No step raises the error: a step whose gain float32 cannot resolve
    is left out. A column almost wholly absorbed by the adapter, or of importance 0, keeps its code; a block with scale
    0 keeps all codes. Rows are independent of order and division; compiled, to the last bit. Results of a row with NaN,
    infinity or numbers whose squares leave the range of float32 are meaningless: the errors of the row are not finite,
    and other rows are unaffected. Raises ValueError when shapes or dtypes do not fit.

    >>> blocks = Blocks(torch.tensor([[8, 10]], dtype=torch.uint8), torch.ones(1, 1), None)
    >>> weight, levels = torch.tensor([[1.0, 2.0]]), Levels(None, 4, "none", torch.float32)
    >>> refined = refine(weight, blocks, 2, levels, torch.zeros(2, 1), sweeps=1, fits_scales=False)
    >>> refined.before.item(), refined.after.item(), blocks.codes.tolist()
    (1.0, 0.0, [[9, 10]])
    """
    _check_levels(levels)
    _check_weight(weight, block_size)
    _check_blocks(blocks, levels, weight.shape, block_size)
    _check_importance(importance, weight)
    if vectors.dtype != torch.float32 or vectors.dim() != 2 or len(vectors) != weight.shape[1]:
        raise ValueError(f"vectors must be float32 [{weight.shape[1]}, r]")
    if out is not None:
        _check("out", out, torch.float32, weight.shape)
    refinement: Refined = implementation("refinement", weight.device.type).refine(
        weight, blocks, block_size, levels, vectors, importance, sweeps, fits_scales, out
    )
    return refinement


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
    """`refine` under any H: `hessian` float32 [in, in], symmetric and positive semidefinite. A pass costs a product of
    [rows, in] and H.

    A column whose diagonal element is not positive keeps its code. Errors have the precision of float32 products; for
    an unchanged row, before equals after. Raises ValueError when shapes or dtypes do not fit.

    >>> blocks = Blocks(torch.tensor([[8, 10]], dtype=torch.uint8), torch.ones(1, 1), None)
    >>> weight, levels = torch.tensor([[1.0, 2.0]]), Levels(None, 4, "none", torch.float32)
    >>> errors = refine_dense(weight, blocks, 2, levels, torch.eye(2), sweeps=1, fits_scales=False)
    >>> errors.before.item(), errors.after.item(), blocks.codes.tolist()
    (1.0, 0.0, [[9, 10]])
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
