"""The results of the API's functions, with all figures of the command line's output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.activations.comparison import Comparison
from loftq_cli.allocation.allocation import Allocation
from loftq_cli.conversion.report import LayerResult, ModelErrors
from loftq_cli.errors import QualityError, UsageError
from loftq_cli.inspecting.converted import LayerRow
from loftq_cli.inspecting.dense import TensorRow
from loftq_cli.merging.report import MergedLayer
from loftq_cli.planning.jobs import CopyJob, LayerJob, ModelShares
from loftq_cli.planning.recipe import Recipe
from loftq_cli.tensors.headers import OutTensor
from loftq_cli.tensors.metrics import LayerError


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A weight file of the plan: `name` inside the output, bytes, and number of tensors."""

    name: str
    nbytes: int
    tensors: int


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """The plan of `quantize`, made from headers and configs alone.

    output           the directory
    recipe           every option, settled
    dtype            of the tensors in full precision
    jobs             a job for each tensor of the source, in order: a LayerJob quantizes, a CopyJob copies
    files            weight files of the base
    adapter          the weight file of the adapter
    base_nbytes      of all tensors of the base
    adapter_nbytes   of all tensors of the adapter
    peak_nbytes      about how much memory the conversion takes
    bits_per_weight  true bits of a quantized weight, constants included
    notes            sentences about unexpected facts
    code_files       files of the result with code of the original, which loaders run with trust_remote_code
    allocation       the choice of formats and ranks under a target; None without a target
    already_done     True if the output holds the complete, undamaged result of the plan
    """

    output: Path
    recipe: Recipe
    dtype: str
    jobs: tuple[LayerJob | CopyJob, ...]
    files: tuple[PlannedFile, ...]
    adapter: PlannedFile
    base_nbytes: int
    adapter_nbytes: int
    peak_nbytes: int
    bits_per_weight: float
    notes: tuple[str, ...]
    code_files: tuple[str, ...]
    allocation: Allocation | None
    already_done: bool

    @property
    def layers(self) -> tuple[LayerJob, ...]:
        """The jobs of the quantized weights."""
        return tuple(job for job in self.jobs if isinstance(job, LayerJob))

    @property
    def copies(self) -> tuple[CopyJob, ...]:
        """The jobs of the copied tensors."""
        return tuple(job for job in self.jobs if isinstance(job, CopyJob))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of base and adapter."""
        return self.base_nbytes + self.adapter_nbytes

    @property
    def shares(self) -> ModelShares:
        """How much of the model is quantized, experts apart, and the bits over all parameters."""
        return ModelShares.of(self.jobs)


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """The result of `quantize`: places, sizes, and errors against the original.

    output              the directory, for transformers
    adapter             the directory of the adapter inside `output`, for PEFT
    plan                sizes, recipe, jobs
    layers              every quantized layer with its errors
    total               the error of all layers together: `total.base_error` of the base alone, `total.error` of base
                        and adapter
    plain_error         relative error of plain rounding in the formats of the base, with no adapter; None if unknown
    plain_output_error  relative error of the layers' outputs on the text of a calibration after plain rounding; None
                        without a calibration, and if unknown
    base_output_error   of the outputs of the base alone; likewise
    output_error        of the outputs of base and adapter; likewise
    resumed_layers      number of layers from an interrupted run
    verified            True if the call read the result back and confirmed the reported errors
    notes               sentences about unexpected facts: NaN and infinite values in copied tensors, and a base that is
                        no model without its adapter
    already_done        True if an earlier call wrote the result; then the figures come from the report in `output`
    """

    output: Path
    adapter: Path
    plan: QuantizePlan
    layers: tuple[LayerResult, ...]
    total: LayerError
    plain_error: float | None
    plain_output_error: float | None
    base_output_error: float | None
    output_error: float | None
    resumed_layers: int
    verified: bool
    notes: tuple[str, ...]
    already_done: bool


@dataclass(frozen=True, slots=True)
class MergePlan:
    """The plan of `merge`, made from headers and configs alone.

    output        the directory
    dtype         of the tensors in full precision
    layout        the container of the merged weights
    requantize    the number format of weights after quantizing again; None without quantizing again
    form          the form in a word: the number format, else the container of codes, else the dtype
    tensors       every tensor of the result
    layers        number of layers under the adapter
    nbytes        of all tensors
    notes         sentences about the checks of base and adapter
    code_files    files of the result with code of the base, which loaders run with trust_remote_code
    already_done  True if the output holds the complete, undamaged result of the plan
    """

    output: Path
    dtype: str
    layout: str
    requantize: str | None
    form: str
    tensors: tuple[OutTensor, ...]
    layers: int
    nbytes: int
    notes: tuple[str, ...]
    code_files: tuple[str, ...]
    already_done: bool


@dataclass(frozen=True, slots=True)
class MergeResult:
    """The result of `merge`, and how much of the adapter is in the result.

    output               the directory
    plan                 sizes, container, tensors
    layers               every merged layer; empty with `already_done`
    retention            surviving share of the adapter in the stored numbers, after quantizing again or rounding to the
                         dtype; None where all layers keep their codes
    lost                 distance of the stored numbers from base plus adapter, over the size of the update: the part
                         beyond the groups' offsets, infinite for a zero update, or the rounding to the dtype; None
                         with `requantize`
    max_difference       largest difference of a weight from base plus adapter; None where the merge keeps no codes
    relative_difference  largest difference of a layer over the largest weight of the layer; None likewise
    notes                sentences about the checks of base and adapter
    already_done         True if an earlier call wrote the result; then no layer is measured
    """

    output: Path
    plan: MergePlan
    layers: tuple[MergedLayer, ...]
    retention: float | None
    lost: float | None
    max_difference: float | None
    relative_difference: float | None
    notes: tuple[str, ...]
    already_done: bool


@dataclass(frozen=True, slots=True)
class WorstError:
    """The tensor of the largest relative error, and the error."""

    tensor: str
    error: float


@dataclass(frozen=True, slots=True)
class ConvertedInspection:
    """A converted directory.

    path             the directory
    layers           the quantized layers, sorted; the first `top` of the layers where `top` is set
    layer_count      number of all quantized layers
    total            the error of all layers together; None where the error of a layer is unknown
    plain_error      relative error of plain rounding in the formats of the base, of all layers together; None where the
                     error of a layer is unknown
    reported         errors of all layers together, with errors of the outputs on the text of a calibration, as in the
                     report; None without a report
    bits_per_weight  true bits of a quantized weight, constants included
    recomputed       True if the errors come from the files, False if from the report of the conversion
    worst            the largest error of a layer; None where all errors are unknown
    outputs          errors of the outputs of layers and model on a text; None without `reference`
    """

    path: Path
    layers: tuple[LayerRow, ...]
    layer_count: int
    total: LayerError | None
    plain_error: float | None
    reported: ModelErrors | None
    bits_per_weight: float
    recomputed: bool
    worst: WorstError | None
    outputs: Comparison | None


@dataclass(frozen=True, slots=True)
class CheckpointInspection:
    """A full-precision checkpoint.

    path          the directory or weight file
    tensors       the tensors, sorted; the first `top` of the tensors where `top` is set
    tensor_count  number of all tensors
    nbytes        of all tensors
    totals        quant type -> the error of all weights together, for each of `try_`
    worst         the largest error of a weight with a quant type of `try_`; None without `try_`
    """

    path: Path
    tensors: tuple[TensorRow, ...]
    tensor_count: int
    nbytes: int
    totals: Mapping[str, LayerError]
    worst: WorstError | None


def check_errors(inspection: ConvertedInspection | CheckpointInspection, fail_above: float) -> None:
    """Raises QualityError where an error is above `fail_above`, UsageError where no error is known.

    >>> worst = WorstError("lm_head.weight", 0.5)
    >>> inspection = CheckpointInspection(Path("model"), (), tensor_count=0, nbytes=0, totals={}, worst=worst)
    >>> check_errors(inspection, fail_above=0.4)
    Traceback (most recent call last):
    loftq_cli.errors.QualityError: tensor lm_head.weight: error 0.5000 is above 0.4 (--fail-above)
    """
    worst = inspection.worst
    if worst is None:
        raise UsageError("--fail-above has no error to compare with", hint="--against ORIGINAL or --try TYPE gives one")
    if not worst.error <= fail_above:
        raise QualityError(f"error {worst.error:.4f} is above {fail_above:g}", tensor=worst.tensor, hint="--fail-above")
