"""Integer formats."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loftq_cli.triton_kernels.affine import dequantize_affine, quantize_affine


def quantizing_to_integers() -> None:
    """The bits are a number in the code, so one of them stands for all."""
    weight = torch.empty(16, 1024)
    for ranges in ("minmax", "mse"):
        quantize_affine(weight, 4, 64, symmetric=True, scale_dtype="float16", ranges=ranges)
        quantize_affine(weight, 4, 64, symmetric=False, scale_dtype="bfloat16", ranges=ranges)
        quantize_affine(weight, 3, 64, symmetric=False, scale_dtype="bfloat16", zero_point="float", ranges=ranges)
        quantize_affine(weight, 4, 1024, symmetric=False, scale_dtype="float32", zero_point="float", ranges=ranges)
    quantize_affine(weight, 4, 16, symmetric=False, scale_dtype="bfloat16", ranges="mse")
    quantize_affine(torch.empty(4, 12288), 8, 12288, symmetric=False, scale_dtype="float32", ranges="mse")


def decoding_integers() -> None:
    codes, constants = torch.empty(16, 1024, dtype=torch.uint8), torch.empty(16, 16, dtype=torch.bfloat16)
    dequantize_affine(codes, constants, None, 4, 64)
    dequantize_affine(codes, constants.half(), torch.empty(16, 16, dtype=torch.uint8), 4, 64)
    dequantize_affine(codes, constants, None, 4, 64, biases=constants)


CALLS: list[Callable[[], None]] = [quantizing_to_integers, decoding_integers]
