"""Group-wise integer quantization on a GPU; bits equal affine/reference.py.

A program holds groups in registers. Groups too wide for a program go to the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loftq_cli.triton_kernels.affine import reference as affine_reference
from loftq_cli.triton_kernels.codebook.triton import TRITON_DTYPES, largest_magnitude
from loftq_cli.triton_kernels.launch_triton import cdiv, launch

# Weights a thread: enough that work done once a group weighs little, and few enough for the registers of every target.
# Groups that do not split into loads of 16 bytes spread over threads, so a thread takes fewer weights.
THREAD_NUMEL = 64
ODD_THREAD_NUMEL = 8
DECODED_NUMEL = 4096  # weights a program of `dequantize`
WIDEST = 16384  # widest group of a program, with 16 warps


def quantize(
    groups: torch.Tensor, bits: int, offset: str, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See affine/reference.py."""
    n, group_size = groups.shape
    if group_size > WIDEST:
        return affine_reference.quantize(groups, bits, offset, scale_dtype)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
    scales = torch.empty(n, dtype=scale_dtype, device=groups.device)
    offset_dtype = scale_dtype if offset == "float" else torch.uint8
    offsets = None if offset == "none" else torch.empty(n, dtype=offset_dtype, device=groups.device)
    width, tile, num_warps = _tile(group_size)
    launch(
        _quantize_groups,
        (cdiv(n, tile),),
        groups,
        codes,
        scales,
        scales if offsets is None else offsets,
        n,
        TOP=2**bits - 1,
        OFFSET=offset,
        SCALE=TRITON_DTYPES[scale_dtype],
        GROUP_SIZE=group_size,
        WIDTH=width,
        GROUPS=tile,
        num_warps=num_warps,
    )
    return codes, scales, offsets


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, biases: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """See affine/reference.py."""
    n, group_size = codes.shape
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    offset = "none" if zero_points is None else "int"
    offsets = scales if zero_points is None else zero_points
    if biases is not None:
        offset, offsets = "float", biases
    width = min(1 << (group_size - 1).bit_length(), DECODED_NUMEL)
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


def _tile(group_size: int) -> tuple[int, int, int]:
    """The power of two that holds a group, the groups of a program, and the warps of a program."""
    warp_numel = 32 * (ODD_THREAD_NUMEL if group_size % 16 else THREAD_NUMEL)
    width = 1 << (group_size - 1).bit_length()
    num_warps = min(max(width // warp_numel, 4), 16)
    return width, max(num_warps * warp_numel // width, 1), num_warps


@triton.jit
def ends(values, is_column, OFFSET: tl.constexpr):
    """Ends of the min-max range of each row; an end is NaN where the row holds NaN. Compared as integers, numbers of
    equal sign keep the order of their bits, and NaN lies beyond all numbers.
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
    """Scale and offset of each row as float32, already rounded to the stored dtype; 2^(bits - 1) without offsets."""
    if OFFSET == "none":
        scale = tl.div_rn(highest, tl.full(highest.shape, TOP / 2, tl.float32))
    else:
        scale = tl.div_rn(highest - lowest, tl.full(highest.shape, TOP, tl.float32))
    scale = scale.to(SCALE).to(tl.float32)
    scale = tl.where(scale == 0.0, 1.0, scale)
    if OFFSET == "float":
        offset = lowest.to(SCALE).to(tl.float32)
    elif OFFSET == "int":
        # NaN, from a scale that is not finite, becomes 0: a maximum drops NaN.
        offset = tl.minimum(tl.maximum(tl.div_rn(-lowest, scale), 0.0), TOP)
        offset = (offset + 12582912.0) - 12582912.0
    else:
        offset = tl.full(highest.shape, TOP // 2 + 1, tl.float32)
    return scale, offset


@triton.jit
def _encode(values, scale, offset, TOP: tl.constexpr, OFFSET: tl.constexpr):
    """Codes as uint8. A quotient that is not finite counts as 0 steps.

    Clamping before rounding gives equal codes, because the bounds are whole. Adding 1.5 * 2^23 then rounds half to
    even, and the last bits of the sum are the steps.
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
    codes = (steps + 12582912.0).to(tl.int32, bitcast=True)
    if OFFSET != "float":
        codes += offset.to(tl.int32)[:, None]
    return codes.to(tl.uint8)


@triton.jit
def _quantize_groups(
    groups_ptr,
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    n,
    TOP: tl.constexpr,
    OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group, column = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS), tl.arange(0, WIDTH)[None, :]
    is_group, is_column = group < n, column < GROUP_SIZE
    offsets = group[:, None] * GROUP_SIZE + column
    values = tl.load(groups_ptr + offsets, mask=is_group[:, None] & is_column, other=0.0)
    lowest, highest = ends(values, is_column, OFFSET)
    scale, offset = _fit(lowest, highest, TOP, OFFSET, SCALE)
    tl.store(codes_ptr + offsets, _encode(values, scale, offset, TOP, OFFSET), mask=is_group[:, None] & is_column)
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
            # Subtract in the dtype of the scale, as in the reference; only wide zero points lose digits there.
            steps = (codes - offset.to(stored.dtype).to(tl.float32)).to(stored.dtype).to(tl.float32)
            values = (steps * scale).to(stored.dtype)
    tl.store(values_ptr + offsets, values.to(tl.float32), mask=is_value)
