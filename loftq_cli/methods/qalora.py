"""QA-LoRA (Xu et al., arXiv 2309.14717): quantize in groups; the adapter pools the inputs of each group to a single
number. The adapter therefore adds an equal number to all weights of a group, and merges into the zero points.

Beyond the paper, the adapter can start with the mean quantization error of every group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from loftq_cli.methods.alternation import Adapting, alternate, refine_alone
from loftq_cli.methods.lowrank import Solver, make_solver
from loftq_cli.methods.method import Fitting, Initialization, zero_adapter
from loftq_cli.methods.weighting import Weighting, make_weighting
from loftq_cli.quant.formats import Quantizer
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.matrices import LoraPair, lora_pair
from loftq_cli.tensors.rows import Rows, TensorRows, slabs_of
from loftq_cli.tensors.specs import LoraSpec


def initialize(
    weight: Rows,
    quantizer: Quantizer,
    lora: LoraSpec,
    fitting: Fitting,
    *,
    generator: torch.Generator,
    weighting: Weighting | None = None,
    sink: Callable[[slice, torch.Tensor], None] | None = None,
    workers: Workers = SERIAL,
) -> Initialization:
    """Base and pooled adapter of a weight W [out, in]: lora_A [r, in / group_size], lora_B [out, r].

    init "standard"   Q = quantize(W), after `fitting.rounds` rounds if there is a `weighting`; an adapter that adds
                      nothing
    init "residual"   the cheapest step among the alternations and rounds of `fitting`; or, without statistics, the
                      standard start if no step has a lower error than quantizing alone
    `sink` is ignored. Raises NumericError for a residual without a singular value decomposition.
    """
    del sink
    start = zero_adapter(weight, lora, generator)
    if fitting.init != "residual":
        quantized = quantizer.quantize(weight, workers=workers)
        if weighting is None:
            return Initialization(quantized, start)
        return refine_alone(weight, quantizer, quantized, start, fitting, weighting, workers)
    weighting = weighting or make_weighting(None, lora.group_size)
    coordinates = None if weighting.importance is None else weighting
    means = (weight.shape[0], weight.shape[1] // lora.group_size)
    solve = make_solver(fitting.svd, min(lora.rank, *means), means, generator, workers, coordinates)
    dtype = torch.bfloat16 if fitting.svd != "exact" and coordinates is None else torch.float32
    adapting = Adapting(lambda residual: fit_adapter(residual, lora, start, solve, coordinates), solve)
    best = alternate(weight, quantizer, adapting, fitting, weighting, dtype, workers)
    # Weighted iteration errors cannot be compared with the quantization error, a Frobenius norm. A base that counts
    # alone has the quantization error with any adapter.
    is_kept = weighting.importance is not None or fitting.adapter_share == 0.0
    if is_kept or min(best.iteration_errors) < (best.quantization_error or math.inf):
        return best
    return replace(best, quantized=quantizer.quantize(weight, workers=workers), lora=start, best_iteration=0)


def fit_adapter(
    residual: torch.Tensor,
    lora: LoraSpec,
    start: LoraPair,
    solve: Solver,
    weighting: Weighting | None = None,
) -> tuple[LoraPair, float]:
    """The pooled adapter that leaves the least of `residual` R [out, in], in the adapter's dtype; and the gain, the
    amount by which the adapter lowers ||R||², or the cost by `weighting`.

    ||R − D||² = ||R − mean(R)||² + group_size · ||mean(R) − U||² for D with D[o, i] = U[o, k] at every input i of group
    k. U is therefore the best rank-r approximation of the group means. Ranks beyond min(out, groups) keep the rows of
    `start` in lora_A, and zeros in lora_B.
    """
    if weighting is None:
        factors = solve(_group_means(residual, lora.group_size))
        right, gain = factors.right, lora.group_size * factors.gain
    else:
        factors = solve(residual)
        right, gain = weighting.adapter_rows(factors.right), factors.gain
    rank = factors.left.shape[1]
    root = math.sqrt(start.scaling)
    lora_A = start.lora_A.float().clone()
    lora_B = torch.zeros(len(residual), lora.rank, dtype=torch.float32, device=residual.device)
    lora_A[:rank], lora_B[:, :rank] = right / root, factors.left / root
    dtype = getattr(torch, lora.dtype)
    pair = lora_pair(lora_A.to(dtype), lora_B.to(dtype), lora.scaling, lora.pooling)
    return pair, gain


def _group_means(residual: torch.Tensor, group_size: int) -> torch.Tensor:
    """The mean of each group, float32 [out, in / group_size]."""
    means = torch.empty(len(residual), residual.shape[1] // group_size, dtype=torch.float32, device=residual.device)
    for part in slabs_of(TensorRows(residual)):
        groups = residual[part].float().view(-1, means.shape[1], group_size)
        means[part] = groups.mean(dim=2)
        if not bool(torch.isfinite(means[part]).all()):  # the sum overflowed, not the mean
            means[part] = groups.double().mean(dim=2)
    return means
