"""Group-wise integer quantization on a GPU; bit for bit what affine_reference.py computes.

A program holds its groups in registers, the search of a range included. Groups that no program can hold go to the
reference. Errors are summed in float64 too, in another order: that changes a choice only between errors whose sums
agree to 15 digits and are not equal.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from loftq_cli.triton_kernels import affine_reference
from loftq_cli.triton_kernels.codebook_triton import TRITON_DTYPES, largest_magnitude
from loftq_cli.triton_kernels.launch_triton import cdiv, launch

# Weights a thread: what holds them, what is computed of them and a search in registers on every target.
THREAD_NUMEL = {"minmax": 64, "mse": 32}
DECODED_NUMEL = 4096  # weights a program of `dequantize`
WIDEST = 16384  # of the groups that fit a program, with 16 warps


def quantize(
    groups: torch.Tensor, bits: int, offset: str, scale_dtype: torch.dtype, ranges: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See affine_reference.py."""
    n, group_size = groups.shape
    if group_size > WIDEST:
        return affine_reference.quantize(groups, bits, offset, scale_dtype, ranges)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
    scales = torch.empty(n, dtype=scale_dtype, device=groups.device)
    offset_dtype = scale_dtype if offset == "float" else torch.uint8
    offsets = None if offset == "none" else torch.empty(n, dtype=offset_dtype, device=groups.device)
    shifts = search_shifts(1 if offset == "none" else 2, groups.device)
    width = _width(group_size)
    num_warps = max(width // (32 * THREAD_NUMEL[ranges]), 4)
    tile = max(num_warps * 32 * THREAD_NUMEL[ranges] // width, 1)
    launch(
        _quantize_groups,
        (cdiv(n, tile),),
        groups,
        shifts,
        codes,
        scales,
        scales if offsets is None else offsets,
        n,
        TOP=2**bits - 1,
        OFFSET=offset,
        SCALE=TRITON_DTYPES[scale_dtype],
        TRIALS=len(shifts) if ranges == "mse" else 0,
        GROUP_SIZE=group_size,
        WIDTH=width,
        GROUPS=tile,
        num_warps=num_warps,
    )
    return codes, scales, offsets


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, biases: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """See affine_reference.py."""
    n, group_size = codes.shape
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    offset = "none" if zero_points is None else "int"
    offsets = scales if zero_points is None else zero_points
    if biases is not None:
        offset, offsets = "float", biases
    width = min(_width(group_size), DECODED_NUMEL)
    tile, parts = DECODED_NUMEL // width, cdiv(group_size, width)
    launch(
        _dequantize_groups,
        (cdiv(n, tile) * parts,),
        codes.contiguous(),
        scales.contiguous(),
        offsets.contiguous(),
        values,
        n,
        MIDDLE=2 ** (bits - 1),
        OFFSET=offset,
        GROUP_SIZE=group_size,
        PARTS=parts,
        WIDTH=width,
        GROUPS=tile,
    )
    return values


@cache
def search_shifts(n_ends: int, device: torch.device) -> torch.Tensor:
    """float32 [trials, 3], each range that "mse" tries after the first: what it adds to the factor of the low end and
    of the high end, and 1 where a round begins. With one end the first column repeats the second.
    """
    rows = []
    for shifts in affine_reference.search_rounds(n_ends):
        for i, shift in enumerate(shifts):
            ends = shift.view(-1).tolist()
            rows.append([ends[0], ends[-1], float(i == 0)])
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _width(group_size: int) -> int:
    """The power of two that holds a group."""
    return 1 << (group_size - 1).bit_length()


@triton.jit
def _ends(values, is_column, OFFSET: tl.constexpr):
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
def _fit(lowest, highest, TOP: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr):
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
def _encode(values, scale, offset, TOP: tl.constexpr, OFFSET: tl.constexpr):
    """1.5 * 2^23 + the whole steps from the zero point or the bias, float32: rounded half to even, and the last bits
    are the steps. What is not finite counts as 0 steps.

    To clamp before is the same, the bounds being whole, and lets rounding be an addition.
    """
    if OFFSET == "float":
        steps = tl.div_rn(values - offset[:, None], scale[:, None])
        steps = tl.where(tl.abs(steps) < float("inf"), steps, 0.0)
        steps = tl.minimum(tl.maximum(steps, 0.0), TOP)
    else:
        # Of finite weights by a finite scale all quotients are finite; otherwise all are 0 or NaN, which a maximum drops.
        is_finite = tl.abs(scale) < float("inf")
        least = tl.where(is_finite, -offset, 0.0)
        steps = tl.div_rn(values, scale[:, None])
        steps = tl.minimum(tl.maximum(steps, least[:, None]), tl.where(is_finite, least + TOP, 0.0)[:, None])
    return steps + 12582912.0


@triton.jit
def _squared_error(values, is_column, lowest, highest, TOP: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr):
    """float64, of each row when it is quantized to the range. See affine_reference.py."""
    scale, offset = _fit(lowest, highest, TOP, OFFSET, SCALE)
    steps = _encode(values, scale, offset, TOP, OFFSET) - 12582912.0
    if OFFSET == "float":
        difference = tl.where(is_column, values - (steps * scale[:, None] + offset[:, None]), 0.0)
    else:
        difference = values - (steps * scale[:, None]).to(SCALE).to(tl.float32)  # 0 where there is no column
    return tl.sum((difference * difference).to(tl.float64), axis=1)


@triton.jit
def _least_error_ends(
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
    least = _squared_error(values, is_column, lowest, highest, TOP, OFFSET, SCALE)
    low = tl.full(lowest.shape, 1.0, tl.float32)
    high = low
    before_low, before_high = low, high
    for trial in range(TRIALS):
        begins = tl.load(shifts_ptr + trial * 3 + 2) != 0.0
        before_low, before_high = tl.where(begins, low, before_low), tl.where(begins, high, before_high)
        tried_low = before_low + tl.load(shifts_ptr + trial * 3)
        tried_high = before_high + tl.load(shifts_ptr + trial * 3 + 1)
        end_low, end_high = centre + tried_low * reach_low, centre + tried_high * reach_high
        error = _squared_error(values, is_column, end_low, end_high, TOP, OFFSET, SCALE)
        is_less = error < least
        least = tl.where(is_less, error, least)
        low, high = tl.where(is_less, tried_low, low), tl.where(is_less, tried_high, high)
        lowest, highest = tl.where(is_less, end_low, lowest), tl.where(is_less, end_high, highest)
    return lowest, highest


@triton.jit
def _quantize_groups(
    groups_ptr,
    shifts_ptr,
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    n,
    TOP: tl.constexpr,
    OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
    TRIALS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group, column = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS), tl.arange(0, WIDTH)[None, :]
    is_group, is_column = group < n, column < GROUP_SIZE
    offsets = group[:, None] * GROUP_SIZE + column
    values = tl.load(groups_ptr + offsets, mask=is_group[:, None] & is_column, other=0.0)
    lowest, highest = _ends(values, is_column, OFFSET)
    if TRIALS:
        lowest, highest = _least_error_ends(values, is_column, lowest, highest, shifts_ptr, TRIALS, TOP, OFFSET, SCALE)
    scale, offset = _fit(lowest, highest, TOP, OFFSET, SCALE)
    codes = _encode(values, scale, offset, TOP, OFFSET).to(tl.int32, bitcast=True)
    if OFFSET != "float":
        codes += offset.to(tl.int32)[:, None]
    tl.store(codes_ptr + offsets, codes.to(tl.uint8), mask=is_group[:, None] & is_column)
    tl.store(scales_ptr + group, scale.to(SCALE), mask=is_group)
    if OFFSET != "none":
        tl.store(offsets_ptr + group, offset.to(offsets_ptr.dtype.element_ty), mask=is_group)


@triton.jit
def _dequantize_groups(
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    values_ptr,
    n,
    MIDDLE: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group = (tl.program_id(0) // PARTS).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    column = (tl.program_id(0) % PARTS * WIDTH + tl.arange(0, WIDTH))[None, :]
    is_group = group < n
    is_value = is_group[:, None] & (column < GROUP_SIZE)
    offsets = group[:, None] * GROUP_SIZE + column
    codes = tl.load(codes_ptr + offsets, mask=is_value, other=0).to(tl.float32)
    stored = tl.load(scales_ptr + group, mask=is_group, other=0.0)
    scale = stored.to(tl.float32)[:, None]
    if OFFSET == "none":
        values = ((codes - MIDDLE) * scale).to(stored.dtype)
    else:
        offset = tl.load(offsets_ptr + group, mask=is_group, other=0).to(tl.float32)[:, None]
        if OFFSET == "float":
            values = codes * scale + offset
        else:
            # In the dtype of the scale, as in the reference; only wide zero points can lose something in it.
            steps = (codes - offset.to(stored.dtype).to(tl.float32)).to(stored.dtype).to(tl.float32)
            values = (steps * scale).to(stored.dtype)
    tl.store(values_ptr + offsets, values.to(tl.float32), mask=is_value)
