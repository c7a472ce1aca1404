"""Block-wise codebook quantization compiled for a processor; bytes equal codebook/reference.py.

Compiled loops cover whole blocks; a short last block goes to the reference.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from loftq_cli.triton_kernels.codebook import reference as codebook_reference
from loftq_cli.triton_kernels.cpu_kernels import bits_of, decode_blocks, quantize_blocks, residual_of_blocks


def quantize(
    weight: torch.Tensor,
    minus: torch.Tensor | None,
    table: torch.Tensor,
    block_size: int,
    packed: torch.Tensor,
    absmax: torch.Tensor,
) -> None:
    """See codebook/reference.py."""
    weight, minus = _readable(weight), None if minus is None else _readable(minus)
    n_blocks = weight.numel() // block_size
    numel_in_blocks = n_blocks * block_size
    thresholds = ((table[:-1] + table[1:]) / 2).numpy()
    bits = bits_of(weight)
    quantize_blocks(
        bits,
        bits if minus is None else bits_of(minus),
        minus is not None,
        thresholds,
        block_size,
        packed.numpy(),
        bits_of(absmax),
        n_blocks,
    )
    if numel_in_blocks < weight.numel():
        tail = None if minus is None else minus[numel_in_blocks:]
        codebook_reference.quantize(
            weight[numel_in_blocks:], tail, table, block_size, packed[numel_in_blocks // 2 :], absmax[n_blocks:]
        )


def dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, block_size: int, values: torch.Tensor
) -> None:
    """See codebook/reference.py."""
    if values.dtype == torch.float16:  # numba has no half precision
        widened = torch.empty_like(values, dtype=torch.float32)
        dequantize(packed, absmax, table, block_size, widened)
        values.copy_(widened)
        return
    n_blocks = values.numel() // block_size
    numel_in_blocks = n_blocks * block_size
    decode_blocks(
        packed[: numel_in_blocks // 2].numpy(),
        absmax[:n_blocks].numpy(),
        table.numpy(),
        _pairs(table),
        block_size,
        bits_of(values[:numel_in_blocks]),
    )
    if numel_in_blocks < values.numel():
        codebook_reference.dequantize(
            packed[numel_in_blocks // 2 :], absmax[n_blocks:], table, block_size, values[numel_in_blocks:]
        )


def residual(
    weight: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    out: torch.Tensor,
) -> float:
    """See codebook/reference.py."""
    n_blocks = weight.numel() // block_size
    numel_in_blocks = n_blocks * block_size
    squares = 0.0
    if torch.float16 in (weight.dtype, dtype, out.dtype):
        n_blocks = numel_in_blocks = 0
    elif n_blocks:
        squares = residual_of_blocks(
            bits_of(weight[:numel_in_blocks]),
            packed[: numel_in_blocks // 2].numpy(),
            absmax[:n_blocks].numpy(),
            table.numpy(),
            _pairs(table),
            block_size,
            dtype == torch.bfloat16,
            bits_of(out[:numel_in_blocks]),
        )
    if numel_in_blocks < weight.numel():
        squares += codebook_reference.residual(
            weight[numel_in_blocks:],
            packed[numel_in_blocks // 2 :],
            absmax[n_blocks:],
            table,
            block_size,
            dtype,
            out[numel_in_blocks:],
        )
    return squares


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """Widen float16 to float32: numba has no half precision."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


@lru_cache(maxsize=4)  # keyed by identity: the contract passes a cached table
def _pairs(table: torch.Tensor) -> np.ndarray[Any, Any]:
    """uint64 [256]: both float32 values of each byte of codes."""
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1)
    values: np.ndarray[Any, Any] = pairs.numpy().view(np.uint64).reshape(-1)
    return values
