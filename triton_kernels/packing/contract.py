"""Codes as a dense bit stream in 32-bit words: the contract. Element i of a row sits at bit i * bits of the row, low
bits first, so a code can straddle two words; the words of compressed-tensors (>= 0.19) and GPTQ checkpoints.
"""

from __future__ import annotations

import torch

from loftq_cli.triton_kernels.backend import implementation


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, ceil(n * bits / 32)] of uint8 [rows, n]; the bits after the last code are 0. Strides are free: to
    pack down the columns, hand in the transpose.

    Raises ValueError unless `codes` is uint8 with two dimensions, 1 <= bits <= 8 and, on a CPU, every code is below
    2^bits. Elsewhere the words of a row with a greater one mean nothing.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError("codes must be uint8 with two dimensions")
    # Elsewhere the check would wait for the device, for codes of our own quantizers, which fit.
    if codes.device.type == "cpu" and codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit {bits} bits")
    packed: torch.Tensor = implementation("packing", codes.device.type).pack(codes, bits)
    return packed


def unpack_rows(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """uint8 [rows, n], the inverse of `pack_rows`; what follows the last code is ignored. Strides are free.

    Raises ValueError unless `packed` is int32 [rows, ceil(n * bits / 32)] and 1 <= bits <= 8.
    """
    _check_bits(bits)
    n_words = -(-n * bits // 32)
    if n < 0 or packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] != n_words:
        raise ValueError(f"packed must be int32 with two dimensions and {n_words} columns")
    codes: torch.Tensor = implementation("packing", packed.device.type).unpack(packed, bits, n)
    return codes


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError("bits must be 1 to 8")
