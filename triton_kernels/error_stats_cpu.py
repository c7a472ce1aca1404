"""The error sums compiled for the processor: those of error_stats_reference.py up to the order of float64 additions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loftq_cli.triton_kernels.cpu_compiler import BUFFER_NUMEL, bits_of, kernel, widen


def sums(
    weight: torch.Tensor, decoded: torch.Tensor, delta: torch.Tensor | None
) -> tuple[float, float, float, float, float]:
    """The fields of ErrorSums for flat tensors. See error_stats.py."""
    totals, w, q = np.zeros(5, np.float64), bits_of(weight), bits_of(decoded)
    if delta is None:
        _sums_without_delta(w, q, totals)
        totals[2] = totals[1]
    else:
        _sums(w, q, bits_of(delta), totals)
    squared_weight, squared_base, squared_error, max_error, squared_delta = totals.tolist()
    return squared_weight, squared_base, squared_error, max_error, squared_delta


@kernel(reassociates=True)
def _add_squares(values: Any, differences: Any, totals: Any, first: int, second: int) -> None:
    one = two = 0.0
    for i in range(values.size):
        one += np.float64(values[i]) * np.float64(values[i])
        two += differences[i] * differences[i]
    totals[first] += one
    totals[second] += two


@kernel()
def _largest(magnitudes: Any, largest: Any) -> Any:
    """Of float64 numbers by their bits, which compare like them and put NaN above infinity: it is never lost."""
    for i in range(magnitudes.size):
        largest = max(largest, magnitudes[i] & np.uint64(0x7FFFFFFFFFFFFFFF))
    return largest


@kernel()
def _subtract(w: Any, q: Any, differences: Any) -> None:
    for i in range(differences.size):
        differences[i] = np.float64(w[i]) - np.float64(q[i])


@kernel()
def _sums_without_delta(weight: Any, decoded: Any, totals: Any) -> None:
    w_bits, q_bits = np.empty(BUFFER_NUMEL, np.uint32), np.empty(BUFFER_NUMEL, np.uint32)
    w, q = w_bits.view(np.float32), q_bits.view(np.float32)
    differences, largest = np.empty(BUFFER_NUMEL, np.float64), np.zeros(1, np.uint64)
    for start in range(0, weight.size, BUFFER_NUMEL):
        count = min(BUFFER_NUMEL, weight.size - start)
        widen(weight[start : start + count], w_bits)
        widen(decoded[start : start + count], q_bits)
        _subtract(w, q, differences[:count])
        _add_squares(w[:count], differences, totals, 0, 1)
        largest[0] = _largest(differences[:count].view(np.uint64), largest[0])
    totals[3] = largest.view(np.float64)[0]


@kernel()
def _sums(weight: Any, decoded: Any, delta: Any, totals: Any) -> None:
    w_bits, q_bits = np.empty(BUFFER_NUMEL, np.uint32), np.empty(BUFFER_NUMEL, np.uint32)
    d_bits = np.empty(BUFFER_NUMEL, np.uint32)
    w, q, d = w_bits.view(np.float32), q_bits.view(np.float32), d_bits.view(np.float32)
    differences, largest = np.empty(BUFFER_NUMEL, np.float64), np.zeros(1, np.uint64)
    for start in range(0, weight.size, BUFFER_NUMEL):
        count = min(BUFFER_NUMEL, weight.size - start)
        widen(weight[start : start + count], w_bits)
        widen(decoded[start : start + count], q_bits)
        widen(delta[start : start + count], d_bits)
        _subtract(w, q, differences[:count])
        _add_squares(d[:count], differences, totals, 4, 1)
        for i in range(count):
            q[i] += d[i]
        _subtract(w, q, differences[:count])
        _add_squares(w[:count], differences, totals, 0, 2)
        largest[0] = _largest(differences[:count].view(np.uint64), largest[0])
    totals[3] = largest.view(np.float64)[0]
