"""The alternation of LoftQ (Li et al., arXiv 2310.08659, Algorithm 1), for any kind of adapter: quantize what the
adapter does not hold, fit the adapter to what quantization lost, repeat. Everything is about what a loader computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from loftq_cli.methods.method import Initialization
from loftq_cli.metrics import adapter_delta, relative
from loftq_cli.quant.formats import QuantizedTensor, Quantizer
from loftq_cli.tensors import LoraPair
from loftq_cli.triton_kernels.error_stats import error_stats


@dataclass(frozen=True, slots=True)
class _Iterate:
    """One iteration: the base, its adapter, s·B·A of it, and the relative errors without and with it."""

    quantized: QuantizedTensor
    pair: LoraPair
    delta: torch.Tensor
    base_error: float
    error: float


def alternate(
    weight: torch.Tensor, quantizer: Quantizer, fit: Callable[[torch.Tensor], LoraPair], iterations: int
) -> Initialization:
    """The best of `iterations` alternations by ||W − dequant(Q) − s·B·A||; `fit` gives the best adapter of a residual.

    Where a step would raise the error, as the ranges of integer formats can at 2 bits, the groups that quantizing again
    takes away from their target stay as they were: then no step raises it. Peak memory: four float32 matrices of the
    size of `weight`.
    """
    current = _iterate(weight, quantizer, quantizer.quantize(weight), fit)
    best = Initialization(current.quantized, current.pair, current.base_error, (), 1)
    errors = [current.error]
    for iteration in range(2, iterations + 1):
        target = weight - current.delta
        previous, last_error = current.quantized, current.error
        del current  # its matrix of s·B·A is not needed beside the next one
        new = quantizer.quantize(target)
        current = _iterate(weight, quantizer, new, fit)
        if current.error > last_error and (kept := quantizer.keep_nearer(target, previous, new)) is not new:
            current = _iterate(weight, quantizer, kept, fit)
        if current.error < min(errors):
            best = replace(best, quantized=current.quantized, lora=current.pair, best_iteration=iteration)
        errors.append(current.error)
    return replace(best, iteration_errors=tuple(errors))


def _iterate(
    weight: torch.Tensor, quantizer: Quantizer, quantized: QuantizedTensor, fit: Callable[[torch.Tensor], LoraPair]
) -> _Iterate:
    dequantized = quantizer.dequantize(quantized)
    base = error_stats(weight, dequantized)
    pair = fit(weight - dequantized)
    delta = adapter_delta(pair)
    sums = error_stats(weight, dequantized.add_(delta))
    errors = (relative(x.squared_error, x.squared_weight) for x in (base, sums))
    return _Iterate(quantized, pair, delta, *errors)
