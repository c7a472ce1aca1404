"""Codes as a dense bit stream in 32-bit words: the contract.

Element i of a row starts at bit i * bits of the row, low bits first, so a code can straddle two words.
compressed-tensors (>= 0.19) and GPTQ checkpoints store such words.
"""

from __future__ import annotations

import torch

from loftq_cli.triton_kernels.backend import implementation


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 [rows, n] into int32 [rows, ceil(n * bits / 32)]; bits after the last code are 0.

    Strides are free: pass the transpose to pack down the columns.
    Raises ValueError unless `codes` is uint8 with two dimensions, 1 <= bits <= 8 and, on a CPU, every code is below
    2^bits. On a GPU a greater code makes the words of the row meaningless.

    >>> pack_rows(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist()
    [[801]]
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError("codes must be uint8 with two dimensions")
    # On a GPU the check would wait for the device; codes there come from quantizers of this package.
    if codes.device.type == "cpu" and codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit {bits} bits")
    packed: torch.Tensor = implementation("packing", codes.device.type).pack(codes, bits)
    return packed


def unpack_rows(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Unpack uint8 [rows, n], the inverse of `pack_rows`; bits after the last code are ignored. Strides are free.

    Raises ValueError unless `packed` is int32 [rows, ceil(n * bits / 32)] and 1 <= bits <= 8.

    >>> unpack_rows(torch.tensor([[801]], dtype=torch.int32), 4, 3).tolist()
    [[1, 2, 3]]
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
