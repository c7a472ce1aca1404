"""Error of an approximation against a weight: the contract. One pass, float64 sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq_cli.triton_kernels.backend import implementation


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """sum (w - a)^2, sum w^2 and max |w - a| over all elements."""

    squared_error: float
    squared_weight: float
    max_error: float


def error_stats(weight: torch.Tensor, approximation: torch.Tensor) -> ErrorSums:
    """The error sums of two float32 tensors of one shape. Raises ValueError when they do not match."""
    if weight.shape != approximation.shape:
        raise ValueError(f"shapes differ: {tuple(weight.shape)} and {tuple(approximation.shape)}")
    squared_error, squared_weight, max_error = implementation("error_stats", weight.device.type).sums(
        weight.reshape(-1), approximation.reshape(-1)
    )
    return ErrorSums(squared_error, squared_weight, max_error)
