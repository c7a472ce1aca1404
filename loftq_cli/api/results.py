"""What the functions of the API give back: everything that the command line prints, as numbers and records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.activations.comparison import Comparison
from loftq_cli.allocation.allocation import Allocation
from loftq_cli.conversion.report import LayerResult
from loftq_cli.errors import QualityError, UsageError
from loftq_cli.inspecting.converted import LayerRow
from loftq_cli.inspecting.dense import TensorRow
from loftq_cli.merging.report import MergedLayer
from loftq_cli.planning.jobs import CopyJob, LayerJob
from loftq_cli.planning.recipe import Recipe
from loftq_cli.tensors.headers import OutTensor
from loftq_cli.tensors.metrics import LayerError


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One weight file that will be written: its name inside the output, its bytes, and how many tensors it holds."""

    name: str
    nbytes: int
    tensors: int


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """What `quantize` will do, as headers and configs alone decide.

    output           the directory
    recipe           every option, settled
    dtype            of the model's tensors that are not quantized
    jobs             for each tensor of the source, in order: how it is quantized, or why it is copied
    files            weight files of the base
    adapter          the weight file of the adapter
    base_nbytes      of all tensors of the base
    adapter_nbytes   of all tensors of the adapter
    peak_nbytes      about how much memory the conversion takes
    bits_per_weight  true bits of a quantized weight, constants included
    notes            what a user may not expect
    allocation       how formats and ranks were chosen under a target; None without one
    already_done     whether the output holds the undamaged result of this very plan
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
    allocation: Allocation | None
    already_done: bool

    @property
    def layers(self) -> tuple[LayerJob, ...]:
        """The weights that are quantized."""
        return tuple(job for job in self.jobs if isinstance(job, LayerJob))

    @property
    def copies(self) -> tuple[CopyJob, ...]:
        """The tensors that are copied."""
        return tuple(job for job in self.jobs if isinstance(job, CopyJob))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of base and adapter."""
        return self.base_nbytes + self.adapter_nbytes


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What `quantize` wrote, and how close it is to the original.

    output              the directory, which transformers loads
    adapter             the directory of the adapter inside it, which PEFT loads
    plan                what was planned: sizes, recipe, jobs
    layers              every quantized layer with its errors
    total               the error of all layers together
    quantization_error  relative error of quantizing every layer once, with no adapter
    output_error        relative error of the layers' outputs on the text of a calibration; None without one
    resumed_layers      how many layers an interrupted run had done before
    verified            whether this call read the result back and found the reported errors in it
    already_done        whether an earlier call had written all of it; then the figures come from its report
    """

    output: Path
    adapter: Path
    plan: QuantizePlan
    layers: tuple[LayerResult, ...]
    total: LayerError
    quantization_error: float
    output_error: float | None
    resumed_layers: int
    verified: bool
    already_done: bool


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What `merge` will do, as headers and configs alone decide.

    output        the directory
    dtype         of the model's tensors that are not quantized
    layout        the container of the merged weights
    requantize    the number format of weights that are quantized again; None without
    form          the number format, the container or the dtype, whichever says most
    tensors       every tensor that is written
    layers        how many layers the adapter changes
    nbytes        of all tensors
    notes         what was checked about base and adapter, and what could not be
    already_done  whether the output holds the undamaged result of this very plan
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
    already_done: bool


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What `merge` wrote, and how much of the adapter is in it.

    output               the directory
    plan                 what was planned: sizes, container, tensors
    layers               every merged layer; none where an earlier call had merged them
    retention            share of the adapter that survives quantizing again; None where nothing was
    lost                 share of the update that the groups' offsets do not hold, infinite for an update of nothing;
                         None where no codes were kept
    max_difference       largest difference of a weight from base and adapter; None where no codes were kept
    relative_difference  the same, of the largest weight of its layer
    notes                what was checked about base and adapter, and what could not be
    already_done         whether an earlier call had written all of it: then nothing was measured
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
    """The largest relative error that was found, and the tensor that has it."""

    tensor: str
    error: float


@dataclass(frozen=True, slots=True)
class ConvertedInspection:
    """A converted directory.

    path             the directory
    layers           the quantized layers, sorted; only the first ones where `top` asks for it
    layer_count      how many quantized layers there are
    total            the error of all layers together; None where the error of one is not known
    bits_per_weight  true bits of a quantized weight, constants included
    recomputed       whether the errors come from the files, or else from the report of the conversion
    worst            the largest error of a layer; None where no error is known
    outputs          errors of what layers and model give on a text; None without a reference
    """

    path: Path
    layers: tuple[LayerRow, ...]
    layer_count: int
    total: LayerError | None
    bits_per_weight: float
    recomputed: bool
    worst: WorstError | None
    outputs: Comparison | None


@dataclass(frozen=True, slots=True)
class CheckpointInspection:
    """A full-precision checkpoint.

    path          the directory or weight file
    tensors       the tensors, sorted; only the first ones where `top` asks for it
    tensor_count  how many tensors there are
    nbytes        of all tensors
    totals        by quant type that was tried, the error of all weights together
    worst         the largest error of a weight with any of the quant types; None where none was tried
    """

    path: Path
    tensors: tuple[TensorRow, ...]
    tensor_count: int
    nbytes: int
    totals: Mapping[str, LayerError]
    worst: WorstError | None


def check_errors(inspection: ConvertedInspection | CheckpointInspection, fail_above: float) -> None:
    """Raises QualityError where an error is above `fail_above`, UsageError where no error is known."""
    worst = inspection.worst
    if worst is None:
        raise UsageError("--fail-above has no error to compare with", hint="--against ORIGINAL or --try TYPE gives one")
    if not worst.error <= fail_above:
        raise QualityError(f"error {worst.error:.4f} is above {fail_above:g}", tensor=worst.tensor, hint="--fail-above")
