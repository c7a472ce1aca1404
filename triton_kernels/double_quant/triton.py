"""Double quantization on a GPU, without waiting for the GPU.

The offset is the float64 mean rounded once; the reference adds in float32. Given equal offsets, bits equal
double_quant/reference.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loftq_cli.triton_kernels.codebook.triton import largest_magnitude
from loftq_cli.triton_kernels.double_quant.reference import nearest_entry
from loftq_cli.triton_kernels.launch_triton import cdiv, launch

TAKES_STACKS = True
PROGRAM_NUMEL = 1024  # constants a program: 8 a thread, because constants are few and each needs a gather


def quantize(
    absmax: torch.Tensor, code_map: torch.Tensor, nested_block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See double_quant/reference.py."""
    return quantize_around(absmax.mean(dim=-1, dtype=torch.float64).float(), absmax, code_map, nested_block_size)


def quantize_around(
    offset: torch.Tensor, absmax: torch.Tensor, code_map: torch.Tensor, nested_block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See double_quant/reference.py."""
    n = absmax.shape[-1]
    n_nested = cdiv(n, nested_block_size)
    codes = torch.empty(absmax.shape, dtype=torch.uint8, device=absmax.device)
    nested_absmax = torch.empty((*absmax.shape[:-1], n_nested), dtype=torch.float32, device=absmax.device)
    width, blocks = _tile(nested_block_size)
    launch(
        _quantize_constants,
        (cdiv(n_nested, blocks), offset.numel()),
        absmax,
        offset,
        nearest_entry(code_map),
        codes,
        nested_absmax,
        n,
        BLOCK_SIZE=nested_block_size,
        WIDTH=width,
        BLOCKS=blocks,
    )
    return codes, nested_absmax, offset


def dequantize(
    codes: torch.Tensor,
    nested_absmax: torch.Tensor,
    code_map: torch.Tensor,
    offset: torch.Tensor,
    nested_block_size: int,
) -> torch.Tensor:
    """See double_quant/reference.py."""
    n = codes.shape[-1]
    absmax = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    width, blocks = _tile(nested_block_size)
    launch(
        _dequantize_constants,
        (cdiv(nested_absmax.shape[-1], blocks), offset.numel()),
        codes.contiguous(),
        nested_absmax.contiguous(),
        code_map.contiguous(),
        offset.contiguous(),
        absmax,
        n,
        BLOCK_SIZE=nested_block_size,
        WIDTH=width,
        BLOCKS=blocks,
    )
    return absmax


def _tile(block_size: int) -> tuple[int, int]:
    """The power of two that holds a nested block, and the nested blocks of a program."""
    width = 1 << (block_size - 1).bit_length()
    return width, max(PROGRAM_NUMEL // width, 1)


@triton.jit
def _quantize_constants(
    absmax_ptr,
    offset_ptr,
    nearest_ptr,
    codes_ptr,
    nested_absmax_ptr,
    n,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block, column = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, WIDTH)[None, :]
    stack = tl.program_id(1).to(tl.int64)
    at = block[:, None] * BLOCK_SIZE + column
    is_constant = (column < BLOCK_SIZE) & (at < n)
    is_block = block * BLOCK_SIZE < n
    at += stack * n
    block += stack * tl.cdiv(n, BLOCK_SIZE)
    constants = tl.load(absmax_ptr + at, mask=is_constant, other=0.0)
    centred = tl.where(is_constant, constants - tl.load(offset_ptr + stack), 0.0)
    largest = largest_magnitude(centred)
    is_used = largest > 0.0  # neither 0 nor NaN
    reciprocal = tl.where(is_used, tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), largest), 0.0)
    scaled = centred * reciprocal[:, None]
    scaled = tl.where(scaled == scaled, tl.minimum(tl.maximum(scaled, -1.0), 1.0), 0.0)
    cell = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).to(tl.int32)
    codes = tl.load(nearest_ptr + cell, mask=is_constant & is_used[:, None], other=0)
    tl.store(codes_ptr + at, codes, mask=is_constant)
    tl.store(nested_absmax_ptr + block, largest, mask=is_block)


@triton.jit
def _dequantize_constants(
    codes_ptr,
    nested_absmax_ptr,
    code_map_ptr,
    offset_ptr,
    absmax_ptr,
    n,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block, column = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, WIDTH)[None, :]
    stack = tl.program_id(1).to(tl.int64)
    at = block[:, None] * BLOCK_SIZE + column
    is_constant = (column < BLOCK_SIZE) & (at < n)
    is_block = block * BLOCK_SIZE < n
    at += stack * n
    block += stack * tl.cdiv(n, BLOCK_SIZE)
    codes = tl.load(codes_ptr + at, mask=is_constant, other=0)
    entry = tl.load(code_map_ptr + codes.to(tl.int32), mask=is_constant, other=0.0)
    scale = tl.load(nested_absmax_ptr + block, mask=is_block, other=0.0)
    tl.store(absmax_ptr + at, entry * scale[:, None] + tl.load(offset_ptr + stack), mask=is_constant)
