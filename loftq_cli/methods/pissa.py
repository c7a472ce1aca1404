"""QPiSSA (Meng et al., arXiv 2404.02948): lora_A and lora_B start as the principal part of W, and the base is the
quantized difference. Each further iteration, as in the authors' code, refits the adapter to the principal part of
W − dequant(Q) and quantizes again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from loftq_cli.methods.alternation import TIE
from loftq_cli.methods.loftq import fit_adapter
from loftq_cli.methods.lowrank import make_solver
from loftq_cli.methods.method import Fitting, Initialization
from loftq_cli.methods.weighting import Weighting
from loftq_cli.quant.formats import Quantizer
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.metrics import delta_rows, relative
from loftq_cli.tensors.rows import Rows, slabs_of
from loftq_cli.tensors.specs import LoraSpec
from loftq_cli.triton_kernels.error_stats.contract import error_stats


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
    """s·B·A = the rank-r approximation of W [out, in], and Q = quantize(W − s·B·A); then `fitting.iterations` − 1 times
    s·B·A = the rank-r approximation of W − dequant(Q), and Q = quantize(W − s·B·A). The iteration with the least error
    is returned.

    The factors are balanced: √S stands in both, and √s is divided out of each. Q is quantized with the stored, rounded
    lora_A and lora_B. `weighting` and `sink` are ignored. Peak memory: a float32 residual, and the quantized matrix
    twice. Raises NumericError for a residual without a singular value decomposition.
    """
    del sink, weighting
    solve = make_solver(fitting.svd, lora.rank, weight.shape, generator, workers)
    residual = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    alone = quantizer.quantize(weight, workers=workers)
    squared_alone = quantizer.residual(weight, alone, residual, workers=workers)
    del alone
    for part in slabs_of(weight):
        residual[part] = weight.rows(part)
    squared_weight = _sum_squares(weight, residual, None, workers)
    best, least, best_iteration, errors = None, math.inf, 0, list[float]()
    for iteration in range(1, fitting.iterations + 1):
        pair, _ = fit_adapter(residual, lora, solve)
        update = delta_rows(pair)
        quantized = quantizer.quantize(weight, minus=update, workers=workers)
        quantizer.residual(weight, quantized, residual, workers=workers)
        squared = _sum_squares(weight, residual, update, workers)
        errors.append(relative(squared, squared_weight))
        # Kernels differ in the last digits of sums; the choice between equal iterations must not depend on the kernel.
        if best is None or squared < (1 - TIE) * least:
            best, least, best_iteration = (quantized, pair), squared, iteration
    assert best is not None
    return Initialization(*best, relative(squared_alone, squared_weight), tuple(errors), best_iteration)


def _sum_squares(
    weight: Rows, residual: torch.Tensor, update: Callable[[slice], torch.Tensor] | None, workers: Workers
) -> float:
    """||residual||², or ||residual − update||², a few rows at a time."""

    def squares(part: slice) -> float:
        rows = residual[part]
        if update is None:
            return error_stats(rows, rows).squared_weight
        return error_stats(rows, update(part)).squared_base_error

    return math.fsum(workers.map(squares, slabs_of(weight)))
