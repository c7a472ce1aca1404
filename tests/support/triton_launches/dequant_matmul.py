"""Products with a codebook matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loftq_cli.triton_kernels.dequant_matmul.contract import dequant_matmul, dequant_matmul_input_gradient

MATRIX = ("nf4", 64, (128, 128), torch.bfloat16)


def multiplying() -> None:
    """The tile of few tokens and that of many; half precision and float32; with an adapter and without."""
    codes = torch.empty(1 << 13, dtype=torch.uint8), torch.empty(1 << 8)
    factors = torch.empty(16, 128), torch.empty(128, 16)
    for operation in (dequant_matmul, dequant_matmul_input_gradient):
        operation(torch.empty(64, 128, dtype=torch.bfloat16), *codes, *MATRIX, *factors, 2.0)
        operation(torch.empty(64, 128), *codes, *MATRIX)
        operation(torch.empty(1, 128, dtype=torch.bfloat16), *codes, *MATRIX)
    dequant_matmul(torch.empty(1, 128), *codes, *MATRIX, *factors, 2.0)


CALLS: list[Callable[[], None]] = [multiplying]
