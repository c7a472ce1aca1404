"""Block-wise codebook quantization compiled for the processor; byte for byte what codebook_reference.py computes.

Only whole blocks are compiled: a short last one goes to the reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loftq_cli.triton_kernels import codebook_reference
from loftq_cli.triton_kernels.cpu_compiler import BUFFER_NUMEL, bits_of, kernel, narrow, round_bfloat16, widen

SMALLEST_ABSMAX = np.float32(codebook_reference.SMALLEST_ABSMAX)


def quantize(
    weight: torch.Tensor,
    minus: torch.Tensor | None,
    table: torch.Tensor,
    block_size: int,
    packed: torch.Tensor,
    absmax: torch.Tensor,
) -> None:
    """See codebook_reference.py."""
    n_blocks = weight.numel() // block_size
    whole = n_blocks * block_size
    thresholds = ((table[:-1] + table[1:]) / 2).numpy()
    bits = bits_of(weight)
    _quantize(
        bits,
        bits if minus is None else bits_of(minus),
        minus is not None,
        thresholds,
        block_size,
        packed.numpy(),
        bits_of(absmax),
        n_blocks,
    )
    if whole < weight.numel():
        tail = None if minus is None else minus[whole:]
        codebook_reference.quantize(weight[whole:], tail, table, block_size, packed[whole // 2 :], absmax[n_blocks:])


def dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, block_size: int, values: torch.Tensor
) -> None:
    """See codebook_reference.py."""
    if values.dtype == torch.float16:  # numba has no half precision
        wide = torch.empty_like(values, dtype=torch.float32)
        dequantize(packed, absmax, table, block_size, wide)
        values.copy_(wide)
        return
    n_blocks = values.numel() // block_size
    whole = n_blocks * block_size
    _dequantize(packed.numpy(), absmax.numpy(), table.numpy(), block_size, bits_of(values[:whole]), n_blocks)
    if whole < values.numel():
        codebook_reference.dequantize(packed[whole // 2 :], absmax[n_blocks:], table, block_size, values[whole:])


def residual(
    weight: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    out: torch.Tensor,
) -> float:
    """See codebook_reference.py."""
    n_blocks = weight.numel() // block_size
    whole = n_blocks * block_size
    squares = 0.0
    if dtype == torch.float16:
        n_blocks = whole = 0
    elif n_blocks:
        squares = _residual(
            bits_of(weight),
            packed.numpy(),
            absmax.numpy(),
            table.numpy(),
            block_size,
            dtype == torch.bfloat16,
            bits_of(out),
            n_blocks,
        )
    if whole < weight.numel():
        squares += codebook_reference.residual(
            weight[whole:], packed[whole // 2 :], absmax[n_blocks:], table, block_size, dtype, out[whole:]
        )
    return squares


@kernel()
def _quantize(
    weight: Any, minus: Any, has_minus: bool, t: Any, block_size: int, packed: Any, absmax: Any, n_blocks: int
) -> None:
    per_pass = max(BUFFER_NUMEL // block_size, 1)  # blocks
    bits, minus_bits = np.empty(per_pass * block_size, np.uint32), np.empty(per_pass * block_size, np.uint32)
    x, d = bits.view(np.float32), minus_bits.view(np.float32)
    codes, values = np.empty(per_pass * block_size, np.uint8), absmax.view(np.float32)
    for first in range(0, n_blocks, per_pass):
        blocks = min(per_pass, n_blocks - first)
        start, count = first * block_size, blocks * block_size
        widen(weight[start : start + count], bits)
        if has_minus:
            widen(minus[start : start + count], minus_bits)
            for i in range(count):
                x[i] -= d[i]
        for block in range(blocks):
            part = slice(block * block_size, (block + 1) * block_size)
            absmax[first + block] = _largest(bits[part])
            _scale(x[part], np.float32(1.0) / max(values[first + block], SMALLEST_ABSMAX))
        _encode(x[:count], t, codes)
        _pack(codes[:count], packed[start // 2 : (start + count) // 2])


@kernel()
def _largest(bits: Any) -> Any:
    """The bits of the largest magnitude: they compare like the numbers, and put NaN above infinity, so none is lost."""
    largest = np.uint32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
    return largest


@kernel()
def _encode(x: Any, t: Any, codes: Any) -> None:
    """How many of the 15 thresholds lie below each element."""
    t0, t1, t2, t3, t4, t5, t6, t7 = t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]
    t8, t9, t10, t11, t12, t13, t14 = t[8], t[9], t[10], t[11], t[12], t[13], t[14]
    for i in range(x.size):
        # A binary search, the same for every element, so that it runs in vectors: one bit of the code a step.
        y = x[i]
        b3 = y > t7
        b2 = y > (t11 if b3 else t3)
        b1 = y > ((t13 if b3 else t5) if b2 else (t9 if b3 else t1))
        low = (t12 if b3 else t4) if b2 else (t8 if b3 else t0)
        high = (t14 if b3 else t6) if b2 else (t10 if b3 else t2)
        b0 = y > (high if b1 else low)
        codes[i] = np.uint8((np.int32(b3) << 3) | (np.int32(b2) << 2) | (np.int32(b1) << 1) | np.int32(b0))


@kernel()
def _pack(codes: Any, packed: Any) -> None:
    for i in range(packed.size):
        packed[i] = np.uint8(codes[2 * i] << 4) | codes[2 * i + 1]


@kernel()
def _decode(packed: Any, absmax: Any, t: Any, block_size: int, codes: Any, values: Any) -> None:
    """The values of whole blocks; `codes` uint32 is scratch of their size."""
    for i in range(packed.size):
        codes[2 * i], codes[2 * i + 1] = packed[i] >> 4, packed[i] & 15
    _look_up(codes[: 2 * packed.size], t, values)
    for block in range(absmax.size):
        _scale(values[block * block_size : (block + 1) * block_size], absmax[block])


@kernel()
def _look_up(codes: Any, t: Any, values: Any) -> None:
    t0, t1, t2, t3, t4, t5, t6, t7 = t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]
    t8, t9, t10, t11, t12, t13, t14, t15 = t[8], t[9], t[10], t[11], t[12], t[13], t[14], t[15]
    for i in range(codes.size):
        # Choices, the same for every element, so that it runs in vectors: reading a table would not.
        c = codes[i]
        b0, b1, b2 = (c & 1) != 0, (c & 2) != 0, (c & 4) != 0
        low_low, low_high = (t1 if b0 else t0), (t3 if b0 else t2)
        mid_low, mid_high = (t5 if b0 else t4), (t7 if b0 else t6)
        low = (mid_high if b1 else mid_low) if b2 else (low_high if b1 else low_low)
        low_low, low_high = (t9 if b0 else t8), (t11 if b0 else t10)
        mid_low, mid_high = (t13 if b0 else t12), (t15 if b0 else t14)
        high = (mid_high if b1 else mid_low) if b2 else (low_high if b1 else low_low)
        values[i] = high if c > 7 else low


@kernel()
def _scale(values: Any, scale: Any) -> None:
    for i in range(values.size):
        values[i] *= scale


@kernel()
def _dequantize(packed: Any, absmax: Any, t: Any, block_size: int, out: Any, n_blocks: int) -> None:
    per_pass = max(BUFFER_NUMEL // block_size, 1)  # blocks
    bits, codes = np.empty(per_pass * block_size, np.uint32), np.empty(per_pass * block_size, np.uint32)
    for first in range(0, n_blocks, per_pass):
        last = min(first + per_pass, n_blocks)
        start, stop = first * block_size, last * block_size
        _decode(packed[start // 2 : stop // 2], absmax[first:last], t, block_size, codes, bits.view(np.float32))
        narrow(bits, out[start:stop])


@kernel(reassociates=True)
def _narrow_sum_of_squares(values: Any) -> Any:
    total = np.float32(0.0)
    for i in range(values.size):
        total += values[i] * values[i]
    return total


@kernel(reassociates=True)
def _wide_sum_of_squares(values: Any) -> float:
    total = 0.0
    for i in range(values.size):
        total += np.float64(values[i]) * np.float64(values[i])
    return total


@kernel()
def _sum_of_squares(values: Any) -> Any:
    """Good to six digits: in float32, which is faster, where its range allows."""
    total = _narrow_sum_of_squares(values)
    if np.float32(1e-25) < total < np.float32(1e35):
        return np.float64(total)
    return _wide_sum_of_squares(values)


@kernel()
def _residual(
    weight: Any, packed: Any, absmax: Any, t: Any, block_size: int, rounds: bool, out: Any, n_blocks: int
) -> float:
    per_pass, squares = max(BUFFER_NUMEL // block_size, 1), 0.0
    bits, decoded_bits = np.empty(per_pass * block_size, np.uint32), np.empty(per_pass * block_size, np.uint32)
    codes = np.empty(per_pass * block_size, np.uint32)
    w, decoded = bits.view(np.float32), decoded_bits.view(np.float32)
    for first in range(0, n_blocks, per_pass):
        last = min(first + per_pass, n_blocks)
        start, stop = first * block_size, last * block_size
        count = stop - start
        _decode(packed[start // 2 : stop // 2], absmax[first:last], t, block_size, codes, decoded)
        if rounds:
            round_bfloat16(decoded_bits[:count])
        widen(weight[start:stop], bits)
        for i in range(count):
            w[i] -= decoded[i]
        squares += _sum_of_squares(w[:count])
        narrow(bits, out[start:stop])
    return squares
