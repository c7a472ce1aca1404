"""QA-LoRA (Xu et al., arXiv 2309.14717): quantize in groups; the adapter reads the inputs of a group pooled to one
number, so what it adds is the same for every weight of a group, and merges into the zero points.

Beyond the paper, the adapter can start holding the part of the quantization error that has this form.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from loftq_cli.lowrank import Solver, make_solver
from loftq_cli.methods.alternation import alternate
from loftq_cli.methods.method import Initialization, zero_adapter
from loftq_cli.metrics import relative
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
    alternations with the best adapter of this form, or the standard start where none is better.
    """
    start = zero_adapter(weight, lora, generator)
    if init == "residual":
        means = (weight.shape[0], weight.shape[1] // lora.group_size)
        solve = make_solver(svd, min(lora.rank, *means), means, generator)
        found = alternate(weight, quantizer, lambda residual: fit_adapter(residual, lora, start, solve), iterations)
        if min(found.iteration_errors) < found.quantization_error:
            return found
        return replace(found, quantized=quantizer.quantize(weight), lora=start, best_iteration=0)
    quantized = quantizer.quantize(weight)
    sums = error_stats(weight, quantizer.dequantize(quantized))
    return Initialization(quantized, start, relative(sums.squared_error, sums.squared_weight), (), 0)


def fit_adapter(residual: torch.Tensor, lora: LoraSpec, start: LoraPair, solve: Solver) -> LoraPair:
    """The pooled adapter that leaves the least of `residual` [out, in], balanced, in the adapter's dtype.

    ||R − Δ||² = ||R − mean(R)||² + group_size · ||mean(R) − U||² for Δ that is U[o, k] in all of group k, so U is the
    best rank-r approximation of the group means. Rank beyond that of the means keeps the rows of `start`, lora_B zero.
    """
    out_features = residual.shape[0]
    means = residual.view(out_features, -1, lora.group_size).mean(dim=2)  # [out, groups]
    left, right = solve(means)
    rank = left.shape[1]
    root = math.sqrt(start.scaling)
    lora_A, lora_B = start.lora_A.float().clone(), torch.zeros(out_features, lora.rank)
    lora_A[:rank], lora_B[:, :rank] = right / root, left / root
    dtype = getattr(torch, lora.dtype)
    return lora_pair(lora_A.to(dtype), lora_B.to(dtype), lora.scaling, lora.pooling)
