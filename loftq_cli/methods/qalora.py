"""QA-LoRA (Xu et al., arXiv 2309.14717): quantize in groups; the adapter reads the inputs of a group pooled to one
number, so what it adds is the same for every weight of a group, and merges into the zero points.

Beyond the paper, the adapter can start holding the part of the quantization error that has this form.
"""

from __future__ import annotations

import math

import torch

from loftq_cli.lowrank import truncated_svd
from loftq_cli.methods.method import Initialization, zero_adapter
from loftq_cli.metrics import adapter_delta, relative
from loftq_cli.quant.formats import Quantizer
from loftq_cli.tensors import LoraPair, LoraSpec, lora_pair
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
    """Standard: Q = quantize(W), and the adapter of QLoRA over pooled inputs. Residual: the best of `iterations`
    alternations of Q = quantize(W − Δ) and Δ = the best adapter for W − dequant(Q), by ||W − dequant(Q) − Δ||; the
    zero adapter is kept where none is better.
    """
    del svd
    quantized = quantizer.quantize(weight)
    dequantized = quantizer.dequantize(quantized)
    sums = error_stats(weight, dequantized)
    quantization_error = relative(sums.squared_error, sums.squared_weight)
    pair = zero_adapter(weight, lora, generator)
    best, best_iteration, errors = quantization_error, 0, []
    best_quantized, best_pair = quantized, pair
    for iteration in range(1, iterations + 1 if init == "residual" else 1):
        if iteration > 1:
            quantized = quantizer.quantize(weight - adapter_delta(pair))
            dequantized = quantizer.dequantize(quantized)
        pair = fit_adapter(weight - dequantized, lora, pair)
        sums = error_stats(weight, adapter_delta(pair).add_(dequantized))
        errors.append(relative(sums.squared_error, sums.squared_weight))
        if errors[-1] < best:
            best, best_iteration = errors[-1], iteration
            best_quantized, best_pair = quantized, pair
    return Initialization(best_quantized, best_pair, quantization_error, tuple(errors), best_iteration)


def fit_adapter(residual: torch.Tensor, lora: LoraSpec, start: LoraPair) -> LoraPair:
    """The pooled adapter that leaves the least of `residual` [out, in], balanced, in the adapter's dtype.

    ||R − Δ||² = ||R − mean(R)||² + group_size · ||mean(R) − U||² for Δ that is U[o, k] in all of group k, so U is the
    best rank-r approximation of the group means. Rank beyond that of the means keeps the rows of `start`, lora_B zero.
    """
    out_features = residual.shape[0]
    means = residual.view(out_features, -1, lora.group_size).mean(dim=2)  # [out, groups]
    rank = min(lora.rank, *means.shape)
    left, right = truncated_svd(means, rank)
    root = math.sqrt(start.scaling)
    lora_A, lora_B = start.lora_A.float().clone(), torch.zeros(out_features, lora.rank)
    lora_A[:rank], lora_B[:, :rank] = right / root, left / root
    dtype = getattr(torch, lora.dtype)
    return lora_pair(lora_A.to(dtype), lora_B.to(dtype), lora.scaling, lora.pooling)
