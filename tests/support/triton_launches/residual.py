"""The passes of LoftQ."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loftq_cli.triton_kernels.residual.contract import (
    CodedStack,
    quantize_difference,
    residual_product,
    transposed_residual_product,
)


def alternating() -> None:
    for rank, dtype, block_size in ((64, torch.bfloat16, 64), (16, torch.float32, 32), (300, torch.float16, 256)):
        weight = torch.empty(2, 512, 1024, dtype=dtype)
        packed, absmax = quantize_difference(
            weight, torch.empty(2, 512, rank), torch.empty(2, rank, 1024), "nf4", block_size
        )
        coded = CodedStack(packed, absmax, "nf4", block_size, torch.bfloat16)
        residual_product(weight, coded, torch.empty(2, 1024, rank))
        transposed_residual_product(weight, coded, torch.empty(2, 512, rank))


CALLS: list[Callable[[], None]] = [alternating]
