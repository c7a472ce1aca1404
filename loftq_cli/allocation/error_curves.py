"""Errors of each layer of a plan in several number formats, with the best adapter of each rank: a format costs a
quantization of the weight and the singular values of the residual. Chooses and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.checkpoint.statistics import InputStatistics
from loftq_cli.errors import LoftqError
from loftq_cli.layouts.layout import StoredMatrix
from loftq_cli.planning.jobs import LayerJob
from loftq_cli.quant.formats import QuantSpec
from loftq_cli.runtime.kernel_choice import choose_kernels
from loftq_cli.runtime.schedule import in_turn
from loftq_cli.runtime.workers import Workers, started
from loftq_cli.tensors.rows import TensorRows

if TYPE_CHECKING:
    import torch

_ROWS = 1024  # rows in a partial sum of squares
_EXACT_SIDE = 1024  # side of a Gram matrix; eigenvalues then take as long as a few quantizations of the weight


@dataclass(frozen=True, slots=True)
class ErrorCurve:
    """Squared errors of a layer. Statistics of the inputs turn each ||E||² into tr(E·H·Eᵀ), H = E[x·xᵀ].

    squared_weight   ||W||²
    squared_errors   number format -> for each rank, ||W − dequant(Q)||² less the part in the best adapter of the rank
    """

    squared_weight: float
    squared_errors: dict[QuantSpec, tuple[float, ...]]


def measure_error_curves(
    checkpoint: Checkpoint,
    layers: Sequence[LayerJob],
    matrices: Mapping[str, Sequence[StoredMatrix]],
    ranks: Mapping[str, Sequence[int]],
    *,
    threads: int = 1,
    statistics: InputStatistics | None = None,
    observe: Callable[[str], None] = lambda name: None,
) -> dict[str, ErrorCurve]:
    """Measure the error curve of each of `layers`. Returns the curves by tensor name.

    checkpoint   the original
    layers       jobs of a plan; memory holds a single large layer, or several small layers
    matrices     tensor name -> the matrix in each number format to measure
    ranks        tensor name -> ranks of adapters, ascending; an adapter of rank 0 holds nothing
    threads      number of threads; the curves are equal with any number
    statistics   of the layers' inputs: squares are then of errors of outputs; None, or no entry: of errors of weights
    observe      receives the name of each finished layer

    Raises InputError naming the tensor when a weight does not fit a number format.
    """
    choose_kernels(sum(job.numel * len(matrices[job.name]) for job in layers))

    def measure(job: LayerJob, workers: Workers) -> ErrorCurve:
        weight = TensorRows(checkpoint.load(job.name), job.matrix.transposed)
        try:
            return _measure_curve(job, weight, matrices[job.name], ranks[job.name], statistics, workers)
        except LoftqError as error:
            if error.tensor:
                raise
            raise error.at(file=checkpoint.tensors[job.name].file, tensor=job.name) from None

    curves = {}
    with started(threads) as workers:
        for job, curve in zip(layers, in_turn(layers, measure, lambda job: job.numel, workers), strict=True):
            curves[job.name] = curve
            observe(job.name)
    return curves


def _measure_curve(
    job: LayerJob,
    weight: TensorRows,
    matrices: Sequence[StoredMatrix],
    ranks: Sequence[int],
    statistics: InputStatistics | None,
    workers: Workers,
) -> ErrorCurve:
    import torch

    from loftq_cli.methods.weighting import make_weighting

    weighting = None
    if statistics is not None and job.name in statistics.names:
        weighting = make_weighting(statistics.load(job.name), 1)

    def weigh(values: torch.Tensor) -> torch.Tensor:
        return values if weighting is None else weighting.rooted(values)

    squared_weight = _sum_squares(weigh(weight.rows(slice(0, weight.shape[0])).float()))
    residual = torch.empty(weight.shape, dtype=torch.float32)
    squared_errors = {}
    for matrix in matrices:
        matrix_job = replace(job, matrix=matrix)
        quantizer = matrix_job.quantizer(weighting)
        quantizer.residual(weight, quantizer.quantize(weight, workers=workers), residual, workers=workers)
        squared_errors[matrix.spec] = _subtract_adapters(weigh(residual), matrix_job, ranks, workers)
    return ErrorCurve(squared_weight, squared_errors)


def _subtract_adapters(
    residual: torch.Tensor, job: LayerJob, ranks: Sequence[int], workers: Workers
) -> tuple[float, ...]:
    """For each rank, ||residual||² less the square of the best approximation of the rank. `residual` is [out, in]; the
    approximations of a pooled adapter are constant within each group of inputs.
    """
    total, size = _sum_squares(residual), job.lora.group_size
    if not any(ranks):
        return tuple(total for _ in ranks)
    if size > 1:  # constant within a group, the best update approximates the means of groups
        residual = residual.view(len(residual), -1, size).mean(dim=2)
    adapter_squares = [0.0]  # by rank
    for square in _compute_leading_squares(residual, min(max(ranks), *residual.shape), job, workers):
        adapter_squares.append(adapter_squares[-1] + size * square)
    most = len(adapter_squares) - 1
    return tuple(max(total - adapter_squares[min(rank, most)], 0.0) for rank in ranks)


def _compute_leading_squares(matrix: torch.Tensor, count: int, job: LayerJob, workers: Workers) -> list[float]:
    """The `count` largest squared singular values, descending: from a Gram matrix, or by iteration when both sides
    exceed _EXACT_SIDE. Iteration finds about a hundredth less.
    """
    import torch

    from loftq_cli.methods.lowrank import make_solver

    if min(matrix.shape) > _EXACT_SIDE:
        factors = make_solver("fast", count, matrix.shape, job.generator(), workers)(matrix)
        squares = torch.linalg.vector_norm(factors.right.double(), dim=1).pow(4)  # rows of √S·Vᵀ have norms √S
    else:
        oriented = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T  # [short side, long side]
        largest = float(oriented.abs().max()) or 1.0  # squares of unit numbers are inside float32's range
        unit = oriented / largest
        squares = torch.linalg.eigvalsh((unit @ unit.T).double()).flip(0)[:count] * largest**2
    return [max(square, 0.0) for square in squares.tolist()]


def _sum_squares(values: torch.Tensor) -> float:
    """The sum of the squares of float32 `values` [rows, columns], in float64."""
    from loftq_cli.triton_kernels.error_stats.contract import error_stats

    parts = (values[start : start + _ROWS] for start in range(0, len(values), _ROWS))
    return math.fsum(error_stats(part, part).squared_weight for part in parts)
