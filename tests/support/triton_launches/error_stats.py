"""Error sums."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loftq_cli.triton_kernels.error_stats.contract import codebook_error_sums, error_stats

SHAPE = (128, 128)
BFLOAT16 = torch.bfloat16


def measuring_an_approximation() -> None:
    weight = torch.empty(SHAPE, dtype=BFLOAT16)
    error_stats(torch.empty(SHAPE), torch.empty(SHAPE))
    error_stats(weight, weight, torch.empty(SHAPE))


def measuring_codes_and_an_adapter() -> None:
    codes = torch.empty(1 << 13, dtype=torch.uint8), torch.empty(1 << 8)
    weight, factors = torch.empty(SHAPE, dtype=BFLOAT16), (torch.empty(16, 128), torch.empty(128, 16))
    codebook_error_sums(weight, *codes, "nf4", 64, BFLOAT16)
    codebook_error_sums(weight, *codes, "nf4", 64, BFLOAT16, *factors, 2.0)


CALLS: list[Callable[[], None]] = [measuring_an_approximation, measuring_codes_and_an_adapter]
