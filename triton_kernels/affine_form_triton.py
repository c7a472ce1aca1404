"""What integer codes mean, and the search of a range, in Triton: `Form` of affine_reference.py, step by step.

A tile is float32 [groups, columns], 0 where `is_column` says that there is none; what a group has once is [groups].
"""

from __future__ import annotations

import triton
import triton.language as tl

from loftq_cli.triton_kernels.codebook_triton import largest_magnitude


@triton.jit
def ends(values, is_column, OFFSET: tl.constexpr):
    """The ends of the min-max range of each row, one of them NaN where the row holds one: as integers, numbers of one
    sign are in the order of their bits, and NaN is beyond all.
    """
    bits = values.to(tl.int32, bitcast=True)
    if OFFSET == "none":
        highest = largest_magnitude(values)
        lowest = highest
    elif OFFSET == "int":
        highest = tl.maximum(tl.max(bits, axis=1), 0).to(tl.float32, bitcast=True)
        lowest = -tl.maximum(tl.max(bits ^ -0x80000000, axis=1), 0).to(tl.float32, bitcast=True)
    else:
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        last = tl.max(tl.where(is_column, ordered, -0x80000000), axis=1)
        first = tl.min(tl.where(is_column, ordered, 0x7FFFFFFF), axis=1)
        highest = (last ^ ((last >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        lowest = (first ^ ((first >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        lowest = tl.where(highest == highest, lowest, highest)  # the bias is NaN too
    return lowest, highest


@triton.jit
def fit(lowest, highest, TOP: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr):
    """Scale and offset of each row, float32 numbers that their dtypes hold. Without offsets that is 2^(bits - 1)."""
    if OFFSET == "none":
        scale = tl.div_rn(highest, tl.full(highest.shape, TOP / 2, tl.float32))
    else:
        scale = tl.div_rn(highest - lowest, tl.full(highest.shape, TOP, tl.float32))
    scale = scale.to(SCALE).to(tl.float32)
    scale = tl.where(scale == 0.0, 1.0, scale)
    if OFFSET == "float":
        offset = lowest.to(SCALE).to(tl.float32)
    elif OFFSET == "int":
        # NaN, from a scale that is not finite, becomes 0: a maximum drops it.
        offset = tl.minimum(tl.maximum(tl.div_rn(-lowest, scale), 0.0), TOP)
        offset = (offset + 12582912.0) - 12582912.0
    else:
        offset = tl.full(highest.shape, TOP // 2 + 1, tl.float32)
    return scale, offset


@triton.jit
def encode(values, scale, offset, TOP: tl.constexpr, OFFSET: tl.constexpr):
    """1.5 * 2^23 + the whole steps from the zero point or the bias, float32: rounded half to even, and the last bits
    are the steps. What is not finite counts as 0 steps.

    To clamp before is the same, the bounds being whole, and lets rounding be an addition.
    """
    if OFFSET == "float":
        steps = tl.div_rn(values - offset[:, None], scale[:, None])
        steps = tl.where(tl.abs(steps) < float("inf"), steps, 0.0)
        steps = tl.minimum(tl.maximum(steps, 0.0), TOP)
    else:
        # Finite weights by a finite scale are finite; otherwise all quotients are 0 or NaN, which a maximum drops.
        is_finite = tl.abs(scale) < float("inf")
        least = tl.where(is_finite, -offset, 0.0)
        steps = tl.div_rn(values, scale[:, None])
        steps = tl.minimum(tl.maximum(steps, least[:, None]), tl.where(is_finite, least + TOP, 0.0)[:, None])
    return steps + 12582912.0


@triton.jit
def squared_error(values, is_column, lowest, highest, TOP: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr):
    """float64, of each row when it is quantized to the range. See affine_reference.py."""
    scale, offset = fit(lowest, highest, TOP, OFFSET, SCALE)
    steps = encode(values, scale, offset, TOP, OFFSET) - 12582912.0
    if OFFSET == "float":
        difference = tl.where(is_column, values - (steps * scale[:, None] + offset[:, None]), 0.0)
    else:
        difference = values - (steps * scale[:, None]).to(SCALE).to(tl.float32)  # 0 where there is no column
    return tl.sum((difference * difference).to(tl.float64), axis=1)


@triton.jit
def least_error_ends(
    values,
    is_column,
    lowest,
    highest,
    shifts_ptr,
    TRIALS: tl.constexpr,
    TOP: tl.constexpr,
    OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
):
    """The ends with the least squared error among those that affine.py documents; the earliest of equals."""
    centre = (lowest + highest) * 0.5 if OFFSET == "float" else tl.zeros_like(lowest)
    reach_low, reach_high = lowest - centre, highest - centre
    least = squared_error(values, is_column, lowest, highest, TOP, OFFSET, SCALE)
    low = tl.full(lowest.shape, 1.0, tl.float32)
    high = low
    before_low, before_high = low, high
    for trial in range(TRIALS):
        begins = tl.load(shifts_ptr + trial * 3 + 2) != 0.0
        before_low, before_high = tl.where(begins, low, before_low), tl.where(begins, high, before_high)
        tried_low = before_low + tl.load(shifts_ptr + trial * 3)
        tried_high = before_high + tl.load(shifts_ptr + trial * 3 + 1)
        end_low, end_high = centre + tried_low * reach_low, centre + tried_high * reach_high
        error = squared_error(values, is_column, end_low, end_high, TOP, OFFSET, SCALE)
        is_less = error < least
        least = tl.where(is_less, error, least)
        low, high = tl.where(is_less, tried_low, low), tl.where(is_less, tried_high, high)
        lowest, highest = tl.where(is_less, end_low, lowest), tl.where(is_less, end_high, highest)
    return lowest, highest
