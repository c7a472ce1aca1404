"""The bit stream on a GPU; bits equal packing/reference.py.

A step covers four codes: together 4 to 32 bits, so the bits lie in a word or in two neighbouring words.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl

from loftq_cli.triton_kernels.launch_triton import cdiv, launch

PROGRAM_NUMEL = 4096  # codes a program: 32 a thread with 4 warps, two loads of 16 bytes


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """See packing/reference.py."""
    rows, n = codes.shape
    n_words = cdiv(n * bits, 32)
    packed = torch.empty((rows, n_words), dtype=torch.int32, device=codes.device)
    words = bits // gcd(bits, 32)
    codes = codes if n < 2 or codes.stride(1) == 1 else codes.contiguous()
    if codes.is_contiguous() and n * bits % 32 == 0:
        rows, n, n_words = 1, rows * n, rows * n_words  # whole words end each row
    parts = cdiv(n, PROGRAM_NUMEL)
    launch(
        _pack,
        (rows * parts,),
        codes,
        packed,
        n,
        n_words,
        codes.stride(0) if rows > 1 else n,
        parts,
        BITS=bits,
        UNIT_WORDS=words,
        UNIT_CODES=32 * words // bits,
        UNITS=PROGRAM_NUMEL * bits // (32 * words),
    )
    return packed


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """See packing/reference.py."""
    rows, n_words = packed.shape
    codes = torch.empty((rows, n), dtype=torch.uint8, device=packed.device)
    packed = packed if n_words < 2 or packed.stride(1) == 1 else packed.contiguous()
    if packed.is_contiguous() and n * bits % 32 == 0:
        rows, n, n_words = 1, rows * n, rows * n_words
    parts = cdiv(n, PROGRAM_NUMEL)
    launch(
        _unpack,
        (rows * parts,),
        packed,
        codes,
        n,
        n_words,
        packed.stride(0) if rows > 1 else n_words,
        parts,
        BITS=bits,
        CODES=PROGRAM_NUMEL,
    )
    return codes


@triton.jit
def _pack(
    codes_ptr,
    packed_ptr,
    n,
    n_words,
    row_stride,
    parts,
    BITS: tl.constexpr,
    UNIT_WORDS: tl.constexpr,
    UNIT_CODES: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Pack units; a unit is the fewest codes that fill whole words."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    first = (tl.program_id(0) % parts).to(tl.int64) * UNITS
    i = first * UNIT_CODES + tl.arange(0, UNITS * UNIT_CODES)
    codes = tl.load(codes_ptr + row * row_stride + i, mask=i < n, other=0).to(tl.uint32)
    fours = tl.reshape(codes, [UNITS * UNIT_CODES // 4, 4]) << (tl.arange(0, 4) * BITS)[None, :]
    fours = tl.reshape(tl.sum(fours, axis=1), [UNITS, UNIT_CODES // 4])
    bit = (tl.arange(0, UNIT_CODES // 4) * (4 * BITS))[None, :]
    for word in tl.static_range(UNIT_WORDS):
        shift = bit - 32 * word
        left = tl.where((shift >= 0) & (shift < 32), fours << (shift & 31), 0)
        right = tl.where((shift < 0) & (shift > -32), fours >> (-shift & 31), 0)
        at = (first + tl.arange(0, UNITS)) * UNIT_WORDS + word
        words = tl.sum(left | right, axis=1).to(tl.int32, bitcast=True)
        tl.store(packed_ptr + row * n_words + at, words, mask=at < n_words)


@triton.jit
def _unpack(packed_ptr, codes_ptr, n, n_words, row_stride, parts, BITS: tl.constexpr, CODES: tl.constexpr):
    row = (tl.program_id(0) // parts).to(tl.int64)
    first = (tl.program_id(0) % parts).to(tl.int64) * CODES
    packed_ptr += row * row_stride
    if 32 % BITS == 0:
        at = first * BITS // 32 + tl.arange(0, CODES * BITS // 32)
        words = tl.load(packed_ptr + at, mask=at < n_words, other=0).to(tl.uint32, bitcast=True)
        codes = words[:, None] >> (tl.arange(0, 32 // BITS) * BITS)[None, :]
    else:
        bit = (first + tl.arange(0, CODES // 4) * 4) * BITS
        at, shift = bit >> 5, (bit & 31).to(tl.uint32)
        words = tl.load(packed_ptr + at, mask=at < n_words, other=0).to(tl.uint32, bitcast=True)
        follows = (shift + 4 * BITS > 32) & (at + 1 < n_words)
        later = tl.load(packed_ptr + at + 1, mask=follows, other=0).to(tl.uint32, bitcast=True)
        fours = (words >> shift) | (later << 1 << (31 - shift))  # a shift by 32 would mean nothing
        codes = fours[:, None] >> (tl.arange(0, 4) * BITS)[None, :]
    codes = tl.reshape(codes & (2**BITS - 1), [CODES]).to(tl.uint8)
    i = first + tl.arange(0, CODES)
    tl.store(codes_ptr + row * n + i, codes, mask=i < n)
