"""Merging."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loftq_cli.triton_kernels.merging.contract import merge_codebook, retention_sums

SHAPE = (128, 128)


def merging_an_adapter() -> None:
    codes = torch.empty(1 << 13, dtype=torch.uint8), torch.empty(1 << 8)
    factors = torch.empty(16, 128), torch.empty(128, 16)
    for out_dtype in (torch.bfloat16, torch.float32):
        merge_codebook(*codes, "nf4", 64, SHAPE, torch.bfloat16, *factors, 2.0, out_dtype)


def measuring_what_survives() -> None:
    retention_sums(torch.empty(SHAPE), torch.empty(SHAPE, dtype=torch.bfloat16), torch.empty(SHAPE))


CALLS: list[Callable[[], None]] = [merging_an_adapter, measuring_what_survives]
