"""The errors of a layer and of a model under three names: plain rounding of the same format, this base alone, and base
and adapter together. Weights are always measured, outputs where there are statistics of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loftq_cli.errors import NumericError
from loftq_cli.methods.method import Initialization
from loftq_cli.planning.jobs import LayerJob
from loftq_cli.quant.formats import SCALES
from loftq_cli.runtime.workers import Workers
from loftq_cli.tensors.metrics import LayerError, layer_error
from loftq_cli.tensors.rows import Rows

if TYPE_CHECKING:
    import torch

    from loftq_cli.methods.weighting import OutputErrors


@dataclass(frozen=True, slots=True)
class Measured:
    """The errors of a layer.

    error         errors of the base, and of base and adapter together, against W
    plain_error   relative Frobenius error of plain rounding; None where the format holds the base and not the weight
    outputs       errors of the layer's outputs; None without statistics
    """

    error: LayerError
    plain_error: float | None
    outputs: OutputErrors | None = None


def measure_layer(
    job: LayerJob,
    weight: Rows,
    initial: Initialization,
    decoded: Rows,
    statistic: torch.Tensor | None,
    workers: Workers,
    *,
    holds_codes: bool = True,
) -> Measured:
    """Measure base and adapter of a layer, and plain rounding beside the two.

    weight        W [out, in]
    initial       base and adapter
    decoded       dequant(Q) [out, in], the values of a loader
    statistic     H, the mean of x·xᵀ over inputs x of a text [in, in], or the diagonal [in]; None without a text
    holds_codes   whether the codes of plain rounding may be in memory at once

    Plain rounding costs a quantization and a comparison, unless the method has begun with plain rounding, or has
    returned plain rounding as the base.
    """
    error = layer_error(weight, decoded, initial.lora, workers)
    plain_error = known_plain_error(job, initial, error)
    plain = None
    if plain_error is None or statistic is not None:
        plain_error, plain = _round_plainly(job, weight, plain_error, workers, holds_codes=holds_codes)
    if statistic is None:
        return Measured(error, plain_error)
    from loftq_cli.methods.weighting import output_errors

    return Measured(error, plain_error, output_errors(statistic, weight, plain, decoded, initial.lora, workers))


def known_plain_error(job: LayerJob, initial: Initialization, error: LayerError) -> float | None:
    """The error of plain rounding, if the method has measured the error or has returned plain rounding as the base;
    None otherwise: for searched constants, and for codes moved by statistics.
    """
    if job.procedure.scales != SCALES[0]:
        return None
    if initial.quantization_error is not None:
        return initial.quantization_error
    is_refined = job.procedure.is_calibrated and job.procedure.fitting.rounds > 0
    return None if is_refined else error.base_error


def _round_plainly(
    job: LayerJob, weight: Rows, plain_error: float | None, workers: Workers, *, holds_codes: bool
) -> tuple[float | None, Rows | None]:
    """Error and rows of plain rounding; `plain_error` is the error, if known. (None, None) for a weight without a form
    in the format: a search for constants and an adapter can give such a weight a form.
    """
    from loftq_cli.quant.plain import round_plainly

    matrix = job.matrix
    try:
        plain = round_plainly(weight, matrix.spec, matrix.dtype, holds_codes=holds_codes, workers=workers)
        if plain_error is None:
            plain_error = layer_error(weight, plain, None, workers).base_error
    except NumericError:
        return None, None
    return plain_error, plain
