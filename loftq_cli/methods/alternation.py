"""The alternation of LoftQ (Li et al., arXiv 2310.08659, Algorithm 1), for any kind of adapter: quantize what the
adapter does not hold, fit the adapter to what quantization lost, repeat. Everything is about what a loader computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from loftq_cli.lowrank import product_dtype
from loftq_cli.methods.method import Initialization
from loftq_cli.metrics import delta_rows, relative
from loftq_cli.quant.formats import QuantizedTensor, Quantizer
from loftq_cli.rows import Rows, slabs_of
from loftq_cli.tensors import LoraPair
from loftq_cli.triton_kernels.error_stats import error_stats
from loftq_cli.workers import SERIAL, Workers

TIE = 1e-9  # of a squared error

# The best adapter of a residual [out, in], and by how much it lowers the squared error.
Fit = Callable[[torch.Tensor], tuple[LoraPair, float]]


def alternate(
    weight: Rows,
    quantizer: Quantizer,
    fit: Fit,
    iterations: int,
    dtype: torch.dtype,
    workers: Workers = SERIAL,
) -> Initialization:
    """The best of `iterations` alternations by ||W − dequant(Q) − s·B·A||; the residual is held in `dtype`.

    Where a step would raise the error, as the ranges of integer formats can at 2 bits, the groups that quantizing again
    takes away from their target stay as they were: then no step raises it. With a bfloat16 residual, the errors of the
    iterations are those of an adapter in float32, and good to four digits. Peak memory: the residual, and the quantized
    matrix twice.
    """
    loop = _Alternation(weight, quantizer, fit, dtype, workers)
    squared_weight = loop.squared_weight()
    current = loop.step(quantizer.quantize(weight, workers=workers))
    best = Initialization(current.quantized, current.pair, relative(current.squared_base_error, squared_weight), (), 1)
    squared_errors = [current.squared_error]
    for iteration in range(2, iterations + 1):
        previous, update = current, loop.update(current.pair)
        current = loop.step(quantizer.quantize(weight, minus=update, workers=workers))
        if current.squared_error > previous.squared_error and quantizer.keep_nearer(
            weight, update, previous.quantized, current.quantized, workers=workers
        ):
            current = loop.step(current.quantized)
        # Sums differ in their last digits between kernels: which of equals is returned must not depend on that.
        if current.squared_error < (1 - TIE) * min(squared_errors):
            best = replace(best, quantized=current.quantized, lora=current.pair, best_iteration=iteration)
        squared_errors.append(current.squared_error)
    return replace(best, iteration_errors=tuple(relative(error, squared_weight) for error in squared_errors))


@dataclass(frozen=True, slots=True)
class _Step:
    """One iteration: the base, its adapter, and ||W − dequant(Q)||² without and with it."""

    quantized: QuantizedTensor
    pair: LoraPair
    squared_base_error: float
    squared_error: float


class _Alternation:
    """What all steps share: above all, the memory of the residual."""

    def __init__(self, weight: Rows, quantizer: Quantizer, fit: Fit, dtype: torch.dtype, workers: Workers) -> None:
        self._weight, self._quantizer, self._fit, self._workers = weight, quantizer, fit, workers
        self._residual = torch.empty(weight.shape, dtype=dtype, device=weight.device)

    def step(self, quantized: QuantizedTensor) -> _Step:
        """A quantized matrix with the adapter of what it lost."""
        squared = self._quantizer.residual(self._weight, quantized, self._residual, workers=self._workers)
        pair, gain = self._fit(self._residual)
        if self._residual.dtype == torch.float32:
            return _Step(quantized, pair, squared, self._measured(pair))
        return _Step(quantized, pair, squared, max(squared - gain, 0.0))

    def _measured(self, pair: LoraPair) -> float:
        rows_of, residual = self.update(pair), self._residual

        def squares(part: slice) -> float:
            return error_stats(residual[part], rows_of(part)).squared_base_error

        return math.fsum(self._workers.map(squares, slabs_of(self._weight)))

    def update(self, pair: LoraPair) -> Callable[[slice], torch.Tensor]:
        """What gives rows of s·B·A."""
        return delta_rows(pair, product_dtype(self._residual))

    def squared_weight(self) -> float:
        """||W||²."""

        def squares(part: slice) -> float:
            rows = self._weight.rows(part)
            return error_stats(rows, rows).squared_weight

        return math.fsum(self._workers.map(squares, slabs_of(self._weight)))
