"""The error sums compiled for a processor; only the order of float64 sums differs from error_stats/reference.py."""

from __future__ import annotations

import numpy as np
import torch

from loftq_cli.triton_kernels.cpu_kernels import bits_of, sum_errors, sum_errors_with_delta
from loftq_cli.triton_kernels.error_stats.reference import codebook_sums

__all__ = ["codebook_sums", "sums"]


def sums(
    weight: torch.Tensor, decoded: torch.Tensor, delta: torch.Tensor | None
) -> tuple[float, float, float, float, float]:
    """The fields of ErrorSums for flat tensors. See error_stats/contract.py."""
    totals, w, q = np.zeros(5, np.float64), bits_of(weight), bits_of(decoded)
    if delta is None:
        sum_errors(w, q, totals)
        totals[2] = totals[1]
    else:
        sum_errors_with_delta(w, q, bits_of(delta), totals)
    squared_weight, squared_base, squared_error, max_error, squared_delta = totals.tolist()
    return squared_weight, squared_base, squared_error, max_error, squared_delta
