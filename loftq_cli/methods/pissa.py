"""QPiSSA (Meng et al., arXiv 2404.02948): lora_A and lora_B start as the principal part of the weights, and the base is
the quantized rest. With more than one iteration, as in the authors' code: the adapter becomes the principal part of
what the base does not hold, and the base is quantized again.
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
    s·B·A = that of W − dequant(Q), and Q again. The iteration of the least error is returned.

    The factors are balanced: √S stands in both. The scaling s is divided out of the factors, and Q is quantized beside
    lora_A and lora_B as they are stored. Peak memory: one residual in float32, and the quantized matrix twice.
    """
    del sink, weighting
    solve = make_solver(fitting.svd, lora.rank, weight.shape, generator, workers)
    residual = torch.empty(weight.shape, device=weight.device)
    alone = quantizer.quantize(weight, workers=workers)
    squared_alone = quantizer.residual(weight, alone, residual, workers=workers)
    del alone
    for part in slabs_of(weight):
        residual[part] = weight.rows(part)
    squared_weight = _squares(weight, residual, None, workers)
    best, least, best_iteration, errors = None, math.inf, 0, list[float]()
    for iteration in range(1, fitting.iterations + 1):
        pair, _ = fit_adapter(residual, lora, solve)
        update = delta_rows(pair)
        quantized = quantizer.quantize(weight, minus=update, workers=workers)
        quantizer.residual(weight, quantized, residual, workers=workers)
        squared = _squares(weight, residual, update, workers)
        errors.append(relative(squared, squared_weight))
        # Sums differ in their last digits between kernels: which of two equal iterations is returned must not.
        if best is None or squared < (1 - TIE) * least:
            best, least, best_iteration = (quantized, pair), squared, iteration
    assert best is not None
    return Initialization(*best, relative(squared_alone, squared_weight), tuple(errors), best_iteration)


def _squares(
    weight: Rows, residual: torch.Tensor, update: Callable[[slice], torch.Tensor] | None, workers: Workers
) -> float:
    """||residual||², or ||residual − update||², a few rows at a time."""

    def squares(part: slice) -> float:
        rows = residual[part]
        if update is None:
            return error_stats(rows, rows).squared_weight
        return error_stats(rows, update(part)).squared_base_error

    return math.fsum(workers.map(squares, slabs_of(weight)))
