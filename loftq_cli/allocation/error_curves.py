"""What each layer of a plan would lose in other number formats, and how much of that an adapter of each rank could
hold: one quantization of the weight a format, and the singular values of what it leaves. Chooses and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.checkpoint.statistics import Statistics
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

_ROWS = 1024  # whose squares are summed at once
_EXACT_SIDE = 1024  # of a Gram matrix, whose eigenvalues take as long as a few quantizations of its matrix


@dataclass(frozen=True, slots=True)
class ErrorCurve:
    """Squared errors of one layer.

    squared_weight   ||W||²
    squared_errors   by number format, ||W − dequant(Q)||² less what the best adapter of each of the ranks holds of it
    """

    squared_weight: float
    squared_errors: dict[QuantSpec, tuple[float, ...]]


def error_curves(
    checkpoint: Checkpoint,
    layers: Sequence[LayerJob],
    matrices: Mapping[str, Sequence[StoredMatrix]],
    ranks: Mapping[str, Sequence[int]],
    *,
    threads: int = 1,
    statistics: Statistics | None = None,
    observe: Callable[[str], None] = lambda name: None,
) -> dict[str, ErrorCurve]:
    """The curve of each of `layers` by tensor name: in the formats of its `matrices`, for its `ranks`, which ascend; a
    rank of 0 holds nothing. With `statistics` of the layers' inputs, squares are those of outputs. `observe` is told of
    each layer that is done. One layer is in memory, small ones several.

    Raises InputError naming the tensor for a weight that cannot be quantized so.
    """
    choose_kernels(sum(job.numel * len(matrices[job.name]) for job in layers))

    def measure(job: LayerJob, workers: Workers) -> ErrorCurve:
        weight = TensorRows(checkpoint.load(job.name), job.matrix.transposed)
        try:
            return _curve(job, weight, matrices[job.name], ranks[job.name], statistics, workers)
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


def _curve(
    job: LayerJob,
    weight: TensorRows,
    matrices: Sequence[StoredMatrix],
    ranks: Sequence[int],
    statistics: Statistics | None,
    workers: Workers,
) -> ErrorCurve:
    import torch

    from loftq_cli.methods.weighting import make_weighting

    weighting = None
    if statistics is not None and job.name in statistics.names:
        weighting = make_weighting(statistics.load(job.name), 1)

    def weighted(values: torch.Tensor) -> torch.Tensor:
        return values if weighting is None else weighting.rooted(values)

    squared_weight = _squares(weighted(weight.rows(slice(0, weight.shape[0])).float()))
    residual = torch.empty(weight.shape)
    squared_errors = {}
    for matrix in matrices:
        as_other = replace(job, matrix=matrix)
        quantizer = as_other.quantizer(weighting)
        quantizer.residual(weight, quantizer.quantize(weight, workers=workers), residual, workers=workers)
        squared_errors[matrix.spec] = _left_by_rank(weighted(residual), as_other, ranks, workers)
    return ErrorCurve(squared_weight, squared_errors)


def _left_by_rank(residual: torch.Tensor, job: LayerJob, ranks: Sequence[int], workers: Workers) -> tuple[float, ...]:
    """||residual||² less that of its best approximation of each rank; of a pooled adapter, among what that can hold."""
    total, size = _squares(residual), job.lora.group_size
    if not any(ranks):
        return tuple(total for _ in ranks)
    if size > 1:  # equal within a group, so that the best one approximates the means
        residual = residual.view(len(residual), -1, size).mean(dim=2)
    held = [0.0]
    for square in _leading_squares(residual, min(max(ranks), *residual.shape), job, workers):
        held.append(held[-1] + size * square)
    return tuple(max(total - held[min(rank, len(held) - 1)], 0.0) for rank in ranks)


def _leading_squares(matrix: torch.Tensor, count: int, job: LayerJob, workers: Workers) -> list[float]:
    """Squares of the largest singular values, descending: from a Gram matrix, or for large matrices by iteration, which
    finds about a hundredth less.
    """
    import torch

    from loftq_cli.methods.lowrank import make_solver

    if min(matrix.shape) > _EXACT_SIDE:
        found = make_solver("fast", count, matrix.shape, job.generator(), workers)(matrix)
        squares = torch.linalg.vector_norm(found.right.double(), dim=1).pow(4)  # of the rows of √S·Vᵀ
    else:
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        largest = float(wide.abs().max()) or 1.0  # squares of unit numbers are inside float32's range
        unit = wide / largest
        squares = torch.linalg.eigvalsh((unit @ unit.T).double()).flip(0)[:count] * largest**2
    return [max(square, 0.0) for square in squares.tolist()]


def _squares(values: torch.Tensor) -> float:
    """Their sum, in float64."""
    from loftq_cli.triton_kernels.error_stats.contract import error_stats

    parts = (values[start : start + _ROWS] for start in range(0, len(values), _ROWS))
    return math.fsum(error_stats(part, part).squared_weight for part in parts)
