"""The definition of the error sums in plain torch, in cache-sized pieces so that float64 copies stay small."""

from __future__ import annotations

import torch

PIECE_NUMEL = 1 << 18  # 2 MB of float64


def sums(weight: torch.Tensor, approximation: torch.Tensor) -> tuple[float, float, float]:
    """(sum (w - a)^2, sum w^2, max |w - a|) of two flat tensors. See error_stats.py."""
    squared_error = squared_weight = max_error = 0.0
    for start in range(0, weight.numel(), PIECE_NUMEL):
        w = weight[start : start + PIECE_NUMEL].double()
        difference = w - approximation[start : start + PIECE_NUMEL]
        squared_error += float(torch.dot(difference, difference))
        squared_weight += float(torch.dot(w, w))
        max_error = max(max_error, float(difference.abs().max()))
    return squared_error, squared_weight, max_error
