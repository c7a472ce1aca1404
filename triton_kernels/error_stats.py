"""Error of an approximation against a weight: the contract. One pass, float64 sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq_cli.triton_kernels.backend import implementation


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """Over all elements: sum w^2, sum (w - q)^2, sum (w - (q + d))^2, max |w - (q + d)| and sum d^2."""

    squared_weight: float
    squared_base_error: float
    squared_error: float
    max_error: float
    squared_delta: float


def error_stats(weight: torch.Tensor, decoded: torch.Tensor, delta: torch.Tensor | None = None) -> ErrorSums:
    """The sums for w = weight, q = decoded and d = delta (0 where there is none); q + d is rounded to float32.

    Tensors of one shape, float32 or bfloat16. Raises ValueError when they do not match.
    """
    for tensor in (weight, decoded, delta):
        if tensor is None:
            continue
        if tensor.shape != weight.shape:
            raise ValueError(f"shapes differ: {tuple(weight.shape)} and {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{tensor.dtype} is neither float32 nor bfloat16")
    sums: tuple[float, float, float, float, float] = implementation("error_stats", weight.device.type).sums(
        weight.reshape(-1), decoded.reshape(-1), None if delta is None else delta.reshape(-1)
    )
    return ErrorSums(*sums)
