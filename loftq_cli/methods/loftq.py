"""LoftQ (Li et al., arXiv 2310.08659, Algorithm 1): quantize what the adapter does not hold, fit the adapter to what
quantization lost, and repeat. Everything is about what a loader computes: dequant(Q) + s·B·A.
"""

from __future__ import annotations

import math

import torch

from loftq_cli.lowrank import truncated_svd
from loftq_cli.methods.method import Initialization
from loftq_cli.metrics import adapter_delta, relative
from loftq_cli.quant.formats import Quantizer
from loftq_cli.tensors import LoraPair, LoraSpec
from loftq_cli.triton_kernels.error_stats import error_stats


def initialize(
    weight: torch.Tensor,
    quantizer: Quantizer,
    lora: LoraSpec,
    *,
    iterations: int,
    svd: str,
    init: str | None,
    generator: torch.Generator,
) -> Initialization:
    """The best of `iterations` alternations by ||W − dequant(Q) − s·B·A||; see `Initialization`.

    The loop sees what will be stored: constants after double quantization and in their dtype, lora_A and lora_B in
    theirs, and the scaling divided out of them. Peak memory: four float32 matrices of the size of `weight`.
    """
    del svd, init, generator  # "exact" is the one solver, and nothing is drawn
    best: tuple[float, int] = (math.inf, 0)
    errors: list[float] = []
    quantization_error = 0.0
    delta: torch.Tensor | None = None
    for iteration in range(1, iterations + 1):
        quantized = quantizer.quantize(weight if delta is None else weight - delta)
        dequantized = quantizer.dequantize(quantized)
        if iteration == 1:
            sums = error_stats(weight, dequantized)
            quantization_error = relative(sums.squared_error, sums.squared_weight)
        pair = fit_adapter(weight - dequantized, lora)
        delta = adapter_delta(pair)
        sums = error_stats(weight, dequantized.add_(delta))
        errors.append(relative(sums.squared_error, sums.squared_weight))
        if errors[-1] < best[0] or not best[1]:
            best = (errors[-1], iteration)
            best_quantized, best_pair = quantized, pair
    return Initialization(best_quantized, best_pair, quantization_error, tuple(errors), best[1])


def fit_adapter(residual: torch.Tensor, lora: LoraSpec) -> LoraPair:
    """The adapter with s·B·A = the best rank-r approximation of `residual`, balanced, in the adapter's dtype."""
    left, right = truncated_svd(residual, lora.rank)
    # Both public implementations fit B·A and forget s, which most loaders then multiply by: the gain is lost.
    root = math.sqrt(lora.scaling)
    dtype = getattr(torch, lora.dtype)
    return LoraPair(lora_A=(right / root).to(dtype), lora_B=(left / root).to(dtype), scaling=lora.scaling)
