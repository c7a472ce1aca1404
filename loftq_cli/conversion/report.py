"""What a conversion measured, as records and as the files that ship with it: loftq_report.json, the provenance of the
adapter, the model card. The same conversion gives the same bytes, so there are no times in them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.checkpoint.record_schema import AtLeast, NonNegative, PositiveInt, RecordError, read_fields, read_record
from loftq_cli.errors import InputError, NumericError
from loftq_cli.output.records import REPORT_NAME, TOOL
from loftq_cli.planning.jobs import LayerJob
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.recipe_files import recipe_json
from loftq_cli.quant.formats import QuantSpec, spec_from_json, spec_json
from loftq_cli.tensors.metrics import LayerError, total_error


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One quantized layer. `quantization_error` is that of quantizing W alone; `error` is of what was written, and
    `output_error` of its outputs, relative, on the inputs of a calibration; None without one.
    """

    name: str
    module: str
    shape: tuple[PositiveInt, PositiveInt]
    transposed: bool
    spec: QuantSpec
    bits_per_weight: NonNegative
    rank: PositiveInt
    alpha: NonNegative
    scaling: NonNegative
    quantization_error: NonNegative
    iteration_errors: tuple[NonNegative, ...]
    best_iteration: Annotated[int, AtLeast(0)]
    error: LayerError
    output_error: NonNegative | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values; the derived errors stand beside the sums they come from."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["spec"]
        if self.output_error is None:
            del values["output_error"]
        return {**values, **spec_json(self.spec), "error": error_json(self.error)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LayerResult:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for values of another shape."""
        layer = cls(**read_fields(cls, values, without="spec"), spec=spec_from_json(values))
        if any(value < 0 for value in dataclasses.astuple(layer.error)):
            raise RecordError("error has a number below 0")
        return layer


def layer_result(
    job: LayerJob,
    error: LayerError,
    quantization_error: float,
    iteration_errors: Sequence[float],
    best_iteration: int,
    output_error: float | None = None,
) -> LayerResult:
    """The result of one job of the plan. Raises NumericError for an error that is not finite: no report holds one."""
    measured = [*dataclasses.astuple(error), quantization_error, *iteration_errors, output_error or 0.0]
    if not all(math.isfinite(value) for value in measured):
        raise NumericError("its values with the adapter are too large for float32", hint="--method qlora")
    return LayerResult(
        name=job.name,
        module=job.module,
        shape=job.matrix.shape,
        transposed=job.matrix.transposed,
        spec=job.matrix.spec,
        bits_per_weight=round(job.bits_per_weight, 4),
        rank=job.lora.rank,
        alpha=job.lora.alpha,
        scaling=job.lora.scaling,
        quantization_error=quantization_error,
        iteration_errors=tuple(iteration_errors),
        best_iteration=best_iteration,
        error=error,
        output_error=output_error,
    )


def error_json(error: LayerError) -> dict[str, float | None]:
    """The sums of an error and what follows from them; an infinite ratio is null, since JSON has no infinity."""
    derived = {
        "base_error": error.base_error,
        "error": error.error,
        "sqnr_db": error.sqnr_db,
        "delta_norm": error.delta_norm,
    }
    finite = {name: value if value < float("inf") else None for name, value in derived.items()}
    return {**dataclasses.asdict(error), **finite}


def report_json(
    plan: Plan,
    layers: Sequence[LayerResult],
    notes: Sequence[str] = (),
    *,
    source: str,
    base_model: str,
    base_fingerprint: str,
    allocation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """loftq_report.json. `notes` come after the plan's; `allocation` says how formats and ranks were chosen."""
    return {
        "format_version": 1,
        **TOOL,
        "source": source,
        "base_model": base_model,
        "base_fingerprint": base_fingerprint,
        "adapter_dir": plan.adapter_dir,
        "recipe": recipe_json(plan.recipe),
        "dtype": plan.dtype,
        "totals": {
            "layers": len(layers),
            "weights": sum(job.numel for job in plan.layers),
            "bits_per_weight": round(bits_per_weight(plan), 4),
            "base_nbytes": plan.base_nbytes,
            "adapter_nbytes": plan.adapter_nbytes,
            **error_json(total_error(layer.error for layer in layers)),
            **({} if (lost := mean_output_error(layers)) is None else {"output_error": lost}),
        },
        **({} if allocation is None else {"allocation": allocation}),
        "layers": [layer.to_json() for layer in layers],
        "copied": [{"name": job.name, "reason": job.reason} for job in plan.copies],
        "notes": [*plan.notes, *notes],
    }


def mean_output_error(layers: Sequence[LayerResult]) -> float | None:
    """The root of the mean square of the layers' output errors; None without a calibration."""
    errors = [layer.output_error for layer in layers if layer.output_error is not None]
    return math.sqrt(math.fsum(error**2 for error in errors) / len(errors)) if errors else None


def bits_per_weight(plan: Plan) -> float:
    """True bits of all quantized weights, constants included."""
    stored = sum(t.nbytes for job in plan.layers for t in job.base_tensors)
    return 8 * stored / sum(job.numel for job in plan.layers)


def read_report(directory: Path) -> tuple[dict[str, Any], list[LayerResult]] | None:
    """The report in a converted directory and its layers; None where there is none.

    Raises InputError for a report that is not one of ours.
    """
    path = directory / REPORT_NAME
    if not path.is_file():
        return None
    values = read_json_object(path)
    try:
        read_record(_Report, values)
        return values, [LayerResult.from_json(layer) for layer in values["layers"]]
    except (KeyError, TypeError, ValueError) as error:
        detail = f": {error}" if isinstance(error, RecordError) else ""
        raise InputError(f"is not a report of this tool{detail}", file=path, hint="convert again") from None


@dataclass(frozen=True, slots=True)
class _Method:
    method: str


@dataclass(frozen=True, slots=True)
class _Report:
    """The values of loftq_report.json that other commands read."""

    base_fingerprint: str
    base_model: str
    adapter_dir: str
    recipe: _Method
    layers: list[Any]


def provenance_json(plan: Plan, *, base_model: str, base_fingerprint: str) -> dict[str, Any]:
    """The side file of an adapter: which base it was fitted to."""
    init = {} if plan.recipe.init is None else {"init": plan.recipe.init}
    return {
        **TOOL,
        "method": plan.recipe.method,
        **init,
        "base_model": base_model,
        "base_fingerprint": base_fingerprint,
    }
