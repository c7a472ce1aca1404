"""The definition of the error sums in plain torch, in cache-sized pieces so that float64 copies stay small."""

from __future__ import annotations

import math

import torch

from loftq_cli.triton_kernels.codebook import reference as codebook_reference

PIECE_NUMEL = 1 << 18  # 2 MB of float64


def sums(
    weight: torch.Tensor, decoded: torch.Tensor, delta: torch.Tensor | None
) -> tuple[float, float, float, float, float]:
    """The fields of ErrorSums for flat tensors. See error_stats/contract.py."""
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
        max_error = largest if largest > max_error or math.isnan(largest) else max_error  # a NaN always wins
    return squared_weight, squared_base, squared_base if delta is None else squared_error, max_error, squared_delta


def codebook_sums(
    weight: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """float64 [7] for a matrix. See error_stats/contract.py. Peak memory: the decoded matrix in `dtype`, and a few
    rows.
    """
    decoded = torch.empty(weight.numel(), dtype=dtype, device=weight.device)
    codebook_reference.dequantize(packed, absmax, table, block_size, decoded)
    totals, rows = weight.new_zeros(7, dtype=torch.float64), max(PIECE_NUMEL // max(weight.shape[1], 1), 1)
    for start in range(0, len(weight) if weight.numel() else 0, rows):
        part = slice(start, start + rows)
        w, q = weight[part].float(), decoded.view(weight.shape)[part].float()
        d = torch.zeros_like(w)
        if lora_A is not None and lora_B is not None:
            d = (lora_B[part].float() @ lora_A.float()) * scaling
        approximation = q + d
        squares = [x.double().square().sum() for x in (w, w.double() - q, w.double() - approximation, d)]
        largest = torch.maximum(totals[3], (w.double() - approximation).abs().amax())  # a NaN always wins
        counts = [(w.sign() * approximation.sign() < 0).sum(), ((w != 0) & (approximation == 0)).sum()]
        totals += torch.stack((*squares[:3], torch.zeros_like(largest), squares[3], *counts))
        totals[3] = largest
    return totals
