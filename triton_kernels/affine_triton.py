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
from loftq_cli.triton_kernels.affine_form_triton import encode, ends, fit, least_error_ends
from loftq_cli.triton_kernels.codebook_triton import TRITON_DTYPES
from loftq_cli.triton_kernels.launch_triton import cdiv, launch

# Weights a thread: so many that what a group needs once weighs little, and a search still stays in the registers of
# every target. Where groups do not split into loads of 16 bytes a thread has a part of many of them: fewer weights.
THREAD_NUMEL = {"minmax": 64, "mse": 32}
ODD_THREAD_NUMEL = 8
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
    width, tile, num_warps = _tile(group_size, ranges)
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


def _tile(group_size: int, ranges: str) -> tuple[int, int, int]:
    """The power of two that holds a group, how many groups a program takes, and its warps."""
    warp_numel = 32 * (ODD_THREAD_NUMEL if group_size % 16 else THREAD_NUMEL[ranges])
    width = 1 << (group_size - 1).bit_length()
    num_warps = min(max(width // warp_numel, 4), 16)
    return width, max(num_warps * warp_numel // width, 1), num_warps


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
    lowest, highest = ends(values, is_column, OFFSET)
    if TRIALS:
        lowest, highest = least_error_ends(values, is_column, lowest, highest, shifts_ptr, TRIALS, TOP, OFFSET, SCALE)
    scale, offset = fit(lowest, highest, TOP, OFFSET, SCALE)
    codes = encode(values, scale, offset, TOP, OFFSET).to(tl.int32, bitcast=True)
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
