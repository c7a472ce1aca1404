"""The definition of the bit stream in plain torch: 8 codes are `bits` bytes, 32 codes are `bits` words.

A pass covers a few rows, so scratch memory does not grow with the tensor. Words are little-endian, as in a safetensors
file, and the machine must be little-endian too.
"""

from __future__ import annotations

import torch

PIECE_NUMEL = 1 << 18  # codes a pass, or one row: 256 KB


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, ceil(n * bits / 32)] of uint8 [rows, n]. See packing/contract.py."""
    rows, n = codes.shape
    n_words = -(-n * bits // 32)
    packed = torch.empty((rows, n_words), dtype=torch.int32, device=codes.device)
    padded_n = -(-n // 32) * 32
    piece = max(PIECE_NUMEL // max(n, 1), 1)
    for start in range(0, rows, piece):
        part = codes[start : start + piece]
        padded = part.new_zeros((part.shape[0], padded_n))
        padded[:, :n] = part
        octets = padded.view(-1, 8)  # [octets, 8 codes]
        stream = octets.new_zeros((octets.shape[0], bits))  # [octets, bits bytes]
        for i in range(8):
            byte, offset = divmod(i * bits, 8)
            stream[:, byte] |= octets[:, i] << offset
            if offset + bits > 8:
                stream[:, byte + 1] |= octets[:, i] >> (8 - offset)
        packed[start : start + piece] = stream.view(-1).view(torch.int32).view(part.shape[0], -1)[:, :n_words]
    return packed


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """uint8 [rows, n] of int32 [rows, ceil(n * bits / 32)]. See packing/contract.py."""
    rows, n_words = packed.shape
    codes = torch.empty((rows, n), dtype=torch.uint8, device=packed.device)
    padded_words = -(-n // 32) * bits
    piece = max(PIECE_NUMEL // max(n, 1), 1)
    for start in range(0, rows, piece):
        part = packed[start : start + piece]
        padded = part.new_zeros((part.shape[0], padded_words))
        padded[:, :n_words] = part
        stream = padded.view(-1).view(torch.uint8).view(-1, bits)  # [octets, bits bytes]
        octets = stream.new_empty((stream.shape[0], 8))  # [octets, 8 codes]
        for i in range(8):
            byte, offset = divmod(i * bits, 8)
            octets[:, i] = stream[:, byte] >> offset
            if offset + bits > 8:
                octets[:, i] |= stream[:, byte + 1] << (8 - offset)
        octets &= 2**bits - 1
        codes[start : start + piece] = octets.view(part.shape[0], -1)[:, :n]
    return codes
