"""The definition of the search for block constants, and of refinement, in plain torch: all rows at once, column after
column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

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

_TINY = 1e-38  # smaller numbers have lost digits already, and a reciprocal may overflow


@dataclass(frozen=True, slots=True)
class Constants:
    """Constants of blocks [n, 1] in float32, rounded as stored; zero points are 0 where levels have none."""

    scale: torch.Tensor
    zero: torch.Tensor
    bias: torch.Tensor

    def where(self, mask: torch.Tensor, alternative: Constants) -> Constants:
        """The constants where `mask` [n, 1] is true, `alternative` elsewhere."""
        pairs = ((self.scale, alternative.scale), (self.zero, alternative.zero), (self.bias, alternative.bias))
        return Constants(*(torch.where(mask, constant, replacement) for constant, replacement in pairs))

    def flattened(self) -> Constants:
        """Constants with a block a row."""
        return Constants(self.scale.reshape(-1, 1), self.zero.reshape(-1, 1), self.bias.reshape(-1, 1))


def search_scales(
    weight: torch.Tensor, block_size: int, levels: Levels, start: Blocks | None, importance: torch.Tensor | None
) -> Blocks:
    """See refinement/contract.py."""
    blocks = weight.reshape(-1, block_size)
    if importance is not None:
        importance = block_importance(importance, block_size).repeat(len(weight), 1)  # [n, block_size]
    ranges = list(_ranges(blocks, levels, factors_of(levels, start)))
    candidates = [] if start is None else [_stored(start, levels).flattened()]
    best, error = ranges[0], torch.tensor(torch.inf)
    for tried in candidates + ranges:
        new_error = _squared_error(blocks, tried, levels, importance)
        is_less = (new_error < error) & torch.isfinite(tried.scale) & (tried.scale != 0.0)
        if start is not None and levels.table is not None:
            is_less &= ~torch.isfinite(error)
        best, error = tried.where(is_less, best), torch.where(is_less, new_error, error)
    for step in range(REFITS if start is None else WARM_REFITS):
        tried = _refitted(blocks, best, levels, importance, moves_zero=step % 2 == 0)
        new_error = _squared_error(blocks, tried, levels, importance)
        best, error = tried.where(new_error < error, best), torch.minimum(new_error, error)
    is_finite = torch.isfinite(blocks).all(dim=1, keepdim=True)
    best = Constants(torch.where(is_finite, best.scale, torch.nan), best.zero, best.bias)
    codes = encode(blocks, best, levels).nan_to_num_(0.0).to(torch.uint8)
    shape = (weight.shape[0], weight.shape[1] // block_size)
    offset = {"none": None, "int": best.zero.to(torch.uint8), "float": best.bias.to(levels.scale_dtype)}[levels.offset]
    scales = best.scale.to(levels.scale_dtype).view(shape)
    return Blocks(codes.view(weight.shape), scales, None if offset is None else offset.view(shape))


def _ranges(blocks: torch.Tensor, levels: Levels, factors: tuple[float, ...]) -> Iterator[Constants]:
    """Candidate constants of a search, the whole range first."""
    top, lowest, highest = 2**levels.bits - 1, blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)
    largest, nothing = torch.maximum(-lowest, highest), torch.zeros_like(lowest)
    if levels.offset == "int":
        lowest, highest = lowest.clamp(max=0.0), highest.clamp(min=0.0)
    for factor in factors:
        if levels.offset == "none":
            scale = largest * factor if levels.table is not None else largest * factor / (top / 2)
        else:
            scale = (highest - lowest) * factor / top
        scale = _rounded(scale, levels)
        if levels.table is None:
            scale = torch.where(scale == 0.0, 1.0, scale)
        zero, bias = nothing, nothing
        if levels.offset == "int":
            zero = (-lowest * factor / scale).round_().clamp_(0, top)
        elif levels.offset == "float":
            centre = (lowest + highest) / 2
            bias = _rounded(centre + (lowest - centre) * factor, levels)
        elif levels.table is None:
            zero = nothing + 2 ** (levels.bits - 1)
        yield Constants(scale, zero, bias)


def _squared_error(
    blocks: torch.Tensor, constants: Constants, levels: Levels, importance: torch.Tensor | None
) -> torch.Tensor:
    """float32 [n, 1], in units of the largest squared magnitude of the block."""
    values = decode(encode(blocks, constants, levels), constants, levels)
    squares = ((blocks - values) * _inverse(blocks.abs().amax(dim=1, keepdim=True))).square_()
    return _weighted(squares, importance).sum(dim=1, keepdim=True)


def _weighted(numbers: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    return numbers if importance is None else numbers * importance


def _mean(numbers: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    if importance is None:
        return numbers.mean(dim=1, keepdim=True)
    return _inner(numbers, importance) / importance.sum(dim=1, keepdim=True)


def _refitted(
    blocks: torch.Tensor, constants: Constants, levels: Levels, importance: torch.Tensor | None, *, moves_zero: bool
) -> Constants:
    """Constants of least squared error for the codes under `constants`; unchanged where no better constants exist."""
    codes = encode(blocks, constants, levels)
    level = codes - constants.zero if levels.table is None else levels.table[codes.int()]
    largest = blocks.abs().amax(dim=1, keepdim=True)
    unit = blocks * _inverse(largest)
    weighted_unit = _weighted(unit, importance)
    zero, bias = constants.zero, constants.bias
    if levels.offset != "none" and (levels.offset == "float" or moves_zero):
        mean, unit_mean = _mean(level, importance), _mean(unit, importance)
        slope = _inner(weighted_unit, level - mean) / _inner(_weighted(level - mean, importance), level - mean)
        start = unit_mean - slope * mean  # value at level 0 of the line through the weights
        bias = _rounded(start * largest, levels)
        if levels.offset == "int":
            moved_zero = (zero - start / slope).round_().clamp_(0, 2**levels.bits - 1)
            level, zero, bias = level + zero - moved_zero, moved_zero, constants.bias
    if levels.offset != "float":
        slope = _inner(weighted_unit, level) / _inner(_weighted(level, importance), level)
    scale = _rounded(slope * largest, levels)
    is_usable = torch.isfinite(scale) & torch.isfinite(bias) & torch.isfinite(zero)
    is_usable &= (scale != 0.0) if levels.is_signed else (scale > 0.0)
    return Constants(scale, zero, bias).where(is_usable, constants)


def _rounded(constants: torch.Tensor, levels: Levels) -> torch.Tensor:
    return constants.to(levels.scale_dtype).float()


def _inverse(numbers: torch.Tensor) -> torch.Tensor:
    return torch.where(numbers.abs() < _TINY, 0.0, 1.0 / numbers)


def residual(weight: torch.Tensor, blocks: Blocks, levels: Levels, out: torch.Tensor) -> torch.Tensor:
    """See refinement/contract.py."""
    values = decode(blocks.codes.view(*blocks.scales.shape, -1), _stored(blocks, levels), levels)
    out[:] = weight - values.view(weight.shape)
    return out.double().square().sum(dim=1)


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
    """See refinement/contract.py."""
    shape = (*blocks.scales.shape, block_size)
    if importance is None:
        importance = torch.ones_like(weight[0])
    values = decode(blocks.codes.view(shape), _stored(blocks, levels), levels).view(weight.shape)
    before = _errors(weight, values, vectors, importance)
    m = (weight - values) @ vectors  # [rows, r]
    for _ in range(sweeps):
        for block in range(shape[1]):
            part = slice(block * block_size, (block + 1) * block_size)
            if fits_scales:
                _fit(weight[:, part], values[:, part], blocks, block, levels, vectors[part], importance[part], m)
            constants = _stored(blocks, levels, block)
            for j in range(part.start, part.stop):
                value, v = values[:, j, None], vectors[j]
                h = importance[j] - v @ v
                if h > LEAST_WEIGHT * importance[j]:
                    slope = (weight[:, j, None] - value) * importance[j] - (m @ v)[:, None]
                    m -= _descend(value, blocks.codes[:, j, None], constants, levels, slope, h) * v
    if out is not None:
        out[:] = weight - values
    return Refined(before, _errors(weight, values, vectors, importance), (weight - values) @ vectors)


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
    """See refinement/contract.py."""
    shape = (*blocks.scales.shape, block_size)
    values = decode(blocks.codes.view(shape), _stored(blocks, levels), levels).view(weight.shape)
    error = weight - values
    before = _dense_errors(error, hessian)
    for _ in range(sweeps):
        for block in range(shape[1]):
            part = slice(block * block_size, (block + 1) * block_size)
            if fits_scales:
                fit_dense(error, values[:, part], blocks, block, levels, hessian[part])
                error[:, part] = weight[:, part] - values[:, part]
            constants = _stored(blocks, levels, block)
            for j in range(part.start, part.stop):
                if hessian[j, j] > 0.0:
                    slope = (error @ hessian[:, j])[:, None]
                    _descend(values[:, j, None], blocks.codes[:, j, None], constants, levels, slope, hessian[j, j])
                    error[:, j] = weight[:, j] - values[:, j]
    if out is not None:
        out[:] = error
    return RowErrors(before, _dense_errors(error, hessian))


def _descend(
    value: torch.Tensor,
    code: torch.Tensor,
    constants: Constants,
    levels: Levels,
    slope: torch.Tensor,
    h: torch.Tensor,
) -> torch.Tensor:
    """Move codes and values of a column [rows, 1] to the least error, where the error falls; return the steps of the
    values. `slope` [rows, 1] is half of the derivative of the error by a step, negated; `h` is the weight of a step.
    """
    codes = encode(value + slope / h, constants, levels)
    step = decode(codes, constants, levels) - value
    # A step d changes the error by d·(d·h − 2·slope).
    lowers = (step * slope.sign() > 0) & (step.abs() * h < 2.0 * WORTHWHILE * slope.abs())
    step.masked_fill_(~lowers, 0.0)
    code[lowers] = codes[lowers].to(torch.uint8)
    value += step
    return step


@dataclass(frozen=True, slots=True)
class Products:
    """Inner products under H for the block of each row, [rows, 1]: of `linear` (values without bias) and of ones with
    the error, with each other and with themselves; and of `linear` with itself under the diagonal D above H.
    """

    linear_error: torch.Tensor
    ones_error: torch.Tensor
    linear_ones: torch.Tensor
    linear_linear: torch.Tensor
    ones_ones: torch.Tensor
    bound: torch.Tensor


def _fit(
    weight: torch.Tensor,
    values: torch.Tensor,
    blocks: Blocks,
    block: int,
    levels: Levels,
    vectors: torch.Tensor,
    importance: torch.Tensor,
    m: torch.Tensor,
) -> None:
    """Fit the constants of the block of each row [rows, block_size]; `m` follows."""
    linear = values - _stored(blocks, levels, block).bias
    error, weighted_linear = (weight - values) * importance, linear * importance
    projected, ones = linear @ vectors, vectors.sum(dim=0)  # [rows, r], [r]
    bound = _inner(weighted_linear, linear)
    products = Products(
        _inner(linear, error) - _inner(projected, m),
        error.sum(dim=1, keepdim=True) - (m @ ones)[:, None],
        weighted_linear.sum(dim=1, keepdim=True) - (projected @ ones)[:, None],
        bound - _inner(projected, projected),
        importance.sum() - ones @ ones,
        bound,
    )
    factor, shift = _fitted(blocks, block, levels, products)
    values += factor * linear + shift
    m -= factor * projected + shift * ones


def fit_dense(
    error: torch.Tensor, values: torch.Tensor, blocks: Blocks, block: int, levels: Levels, hessian: torch.Tensor
) -> None:
    """`_fit` for errors [rows, in], with the rows of `hessian` that belong to the block."""
    linear = values - _stored(blocks, levels, block).bias
    within = hessian[:, block * values.shape[1] :][:, : values.shape[1]]
    weighted, slopes = linear @ within, error @ hessian.T
    products = Products(
        _inner(linear, slopes),
        slopes.sum(dim=1, keepdim=True),
        weighted.sum(dim=1, keepdim=True),
        _inner(linear, weighted),
        within.sum(),
        _inner(linear * within.diagonal(), linear),
    )
    factor, shift = _fitted(blocks, block, levels, products)
    values += factor * linear + shift


def _fitted(blocks: Blocks, block: int, levels: Levels, products: Products) -> tuple[torch.Tensor, torch.Tensor]:
    """Move scale and bias of the block of each row to the least error for the codes, where the error falls: values
    become bias' + (values − bias)·scale' / scale. Return the added multiples of `linear` and of ones.
    """
    old, right, square = _stored(blocks, levels, block), products.linear_error, products.linear_linear
    right_bias, mixed, square_bias = products.ones_error, products.linear_ones, products.ones_ones
    is_usable = square > LEAST_WEIGHT * products.bound
    if levels.offset == "float":
        determinant = square * square_bias - mixed * mixed
        is_usable &= determinant > LEAST_WEIGHT * square * square_bias
        factor = (right * square_bias - right_bias * mixed) / determinant
        shift = (right_bias * square - right * mixed) / determinant
    else:
        factor, shift = right / square, torch.zeros_like(right)
    scale = (old.scale * (1.0 + factor)).to(levels.scale_dtype).float()
    bias = (old.bias + shift).to(levels.scale_dtype).float()
    factor, shift = (scale - old.scale) / old.scale, bias - old.bias
    change = factor * (factor * square - 2.0 * right) + shift * (
        shift * square_bias - 2.0 * right_bias + 2.0 * factor * mixed
    )
    accepted = is_usable & (change < 0.0) & (torch.isfinite(scale) & (scale != 0.0))
    if not levels.is_signed:
        accepted &= scale > 0.0
    changed_rows = accepted[:, 0]
    blocks.scales[changed_rows, block] = scale[changed_rows, 0].to(levels.scale_dtype)
    if levels.offset == "float" and blocks.offsets is not None:
        blocks.offsets[changed_rows, block] = bias[changed_rows, 0].to(levels.scale_dtype)
    return factor.where(accepted, 0.0), shift.where(accepted, 0.0)


def encode(values: torch.Tensor, constants: Constants, levels: Levels) -> torch.Tensor:
    """Codes of the nearest values to [n, columns], as float32. Ties take the lower level of a table, the even step of
    integers.
    """
    steps = (values - constants.bias) * _inverse(constants.scale)
    if levels.table is None:
        return (steps.round_() + constants.zero).clamp_(0, 2**levels.bits - 1)
    thresholds = (levels.table[:-1] + levels.table[1:]) / 2
    codes = torch.zeros_like(steps)
    for threshold in thresholds:
        codes += steps > threshold
    return codes


def decode(codes: torch.Tensor, constants: Constants, levels: Levels) -> torch.Tensor:
    """float32 values of codes [n, columns], before the rounding of a loader."""
    level = codes - constants.zero if levels.table is None else levels.table[codes.int()]
    return level * constants.scale + constants.bias


def _stored(blocks: Blocks, levels: Levels, block: int | None = None) -> Constants:
    """Constants [rows, blocks, 1], or constants of a single block in each row, [rows, 1]."""
    part = slice(None) if block is None else block
    scale = blocks.scales[:, part].float()[..., None]
    nothing = torch.zeros_like(scale)
    if blocks.offsets is None:
        return Constants(scale, nothing if levels.table is not None else nothing + 2 ** (levels.bits - 1), nothing)
    offset = blocks.offsets[:, part].float()[..., None]
    return Constants(scale, offset, nothing) if levels.offset == "int" else Constants(scale, nothing, offset)


def _inner(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one * other).sum(dim=1, keepdim=True)


def _errors(
    weight: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor, importance: torch.Tensor
) -> torch.Tensor:
    """Squared errors under H, float64 [rows]."""
    error = (weight - values).double()
    return (error.square() * importance).sum(dim=1) - (error @ vectors.double()).square().sum(dim=1)


def _dense_errors(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    widened = error.double()
    return _inner(widened @ hessian.double(), widened)[:, 0]
