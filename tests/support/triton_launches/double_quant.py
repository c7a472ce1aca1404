"""Block constants."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loftq_cli.triton_kernels.double_quant.contract import double_dequantize, double_quantize, dynamic_map


def quantizing_constants() -> None:
    codes, nested_absmax, offset = double_quantize(torch.empty(1 << 14), 256)
    double_dequantize(codes, nested_absmax, dynamic_map(), offset, 256)


CALLS: list[Callable[[], None]] = [quantizing_constants]
