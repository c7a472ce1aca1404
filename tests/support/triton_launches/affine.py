"""Integer formats."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loftq_cli.triton_kernels.affine.contract import dequantize_affine, quantize_affine


def quantizing_to_integers() -> None:
    """The bits are a number in the code, so one of them stands for all."""
    weight = torch.empty(16, 1024)
    quantize_affine(weight, 4, 64, symmetric=True, scale_dtype="float16")
    quantize_affine(weight, 4, 64, symmetric=False, scale_dtype="bfloat16")
    quantize_affine(weight, 3, 64, symmetric=False, scale_dtype="bfloat16", zero_point="float")
    quantize_affine(weight, 4, 1024, symmetric=False, scale_dtype="float32", zero_point="float")
    quantize_affine(weight, 4, 16, symmetric=False, scale_dtype="bfloat16")
    quantize_affine(torch.empty(4, 12288), 8, 12288, symmetric=False, scale_dtype="float32")


def decoding_integers() -> None:
    codes, constants = torch.empty(16, 1024, dtype=torch.uint8), torch.empty(16, 16, dtype=torch.bfloat16)
    dequantize_affine(codes, constants, None, 4, 64)
    dequantize_affine(codes, constants.half(), torch.empty(16, 16, dtype=torch.uint8), 4, 64)
    dequantize_affine(codes, constants, None, 4, 64, biases=constants)


CALLS: list[Callable[[], None]] = [quantizing_to_integers, decoding_integers]
