"""The definition of the error sums in plain torch, in cache-sized pieces so that float64 copies stay small."""

from __future__ import annotations

import math

import torch

PIECE_NUMEL = 1 << 18  # 2 MB of float64


def sums(
    weight: torch.Tensor, decoded: torch.Tensor, delta: torch.Tensor | None
) -> tuple[float, float, float, float, float]:
    """The fields of ErrorSums for flat tensors. See error_stats.py."""
    squared_weight = squared_base = squared_error = max_error = squared_delta = 0.0
    for start in range(0, weight.numel(), PIECE_NUMEL):
        part = slice(start, start + PIECE_NUMEL)
        w, q = weight[part].double(), decoded[part]
        squared_weight += float(torch.dot(w, w))
        difference = w - q
        squared_base += float(torch.dot(difference, difference))
        if delta is not None:
            d = delta[part].double()
            squared_delta += float(torch.dot(d, d))
            difference = w - (q.float() + delta[part].float())
            squared_error += float(torch.dot(difference, difference))
        largest = float(difference.abs().max())
        max_error = largest if largest > max_error or math.isnan(largest) else max_error  # NaN is never lost
    return squared_weight, squared_base, squared_base if delta is None else squared_error, max_error, squared_delta
