"""Codebook formats."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loftq_cli.triton_kernels.codebook.contract import codebook_residual, dequantize_codebook, quantize_codebook

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantizing_to_a_codebook() -> None:
    for dtype in FLOATS:
        quantize_codebook(torch.empty(1 << 14, dtype=dtype), "nf4", 64)
    quantize_codebook(torch.empty(1 << 14), "nf4", 64, minus=torch.empty(1 << 14))
    quantize_codebook(torch.empty(1 << 14, dtype=torch.bfloat16), "fp4", 64)
    for block_size in (32, 128, 256, 512, 1024, 2048, 4096):
        quantize_codebook(torch.empty(1 << 14, dtype=torch.bfloat16), "nf4", block_size)


def decoding_a_codebook() -> None:
    packed, absmax = torch.empty(1 << 13, dtype=torch.uint8), torch.empty(1 << 8)
    for dtype in FLOATS:
        dequantize_codebook(packed, absmax, "nf4", 64, 1 << 14, dtype)
    weight, out = torch.empty(1 << 14, dtype=torch.bfloat16), torch.empty(1 << 14, dtype=torch.bfloat16)
    codebook_residual(weight, packed, absmax, "nf4", 64, torch.bfloat16, out)


CALLS: list[Callable[[], None]] = [quantizing_to_a_codebook, decoding_a_codebook]
