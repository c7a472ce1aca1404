"""Measurements of a conversion, as records and as files: loftq_report.json, and the provenance of the adapter. Equal
conversions give equal bytes, so the files hold no times.
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
    """A quantized layer, as loftq_report.json lists the layer.

    name                 tensor name in the original
    module               name of the linear in the loaded model
    shape                [out, in]
    transposed           whether the original stores [in, out]
    spec                 number format
    bits_per_weight      true bits in the base per weight, constants included
    rank, alpha          of the adapter
    scaling              factor of B·A
    quantization_error   relative Frobenius error of quantizing W alone, a single time
    iteration_errors     relative error with the adapter after each iteration and round, by the cost that `keep_base`
                         mixes; empty without iterations
    best_iteration       the iteration in the result, counted from 1; 0 without iterations
    error                errors of the written base and adapter against W
    output_error         relative error of the layer's outputs on the inputs of a calibration; None without a
                         calibration
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
        """JSON values for the report; sums of squares and the errors derived from the sums are both listed."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["spec"]
        if self.output_error is None:
            del values["output_error"]
        return {**values, **spec_json(self.spec), "error": error_json(self.error)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LayerResult:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for values of a wrong shape."""
        layer = cls(**read_fields(cls, values, without="spec"), spec=spec_from_json(values))
        if any(value < 0 for value in dataclasses.astuple(layer.error)):
            raise RecordError("error has a number below 0")
        return layer


def make_layer_result(
    job: LayerJob,
    error: LayerError,
    quantization_error: float,
    iteration_errors: Sequence[float],
    best_iteration: int,
    output_error: float | None = None,
) -> LayerResult:
    """Return the result of a job of the plan.

    job                  the job
    error                errors of the written base and adapter
    quantization_error   relative error of quantizing W alone
    iteration_errors     relative error after each iteration and round
    best_iteration       the iteration in the result, counted from 1; 0 without iterations
    output_error         relative error of the layer's outputs; None without statistics

    Raises NumericError when an error is not finite: JSON holds finite numbers only.
    """
    error_values = [*dataclasses.astuple(error), quantization_error, *iteration_errors, output_error or 0.0]
    if not all(math.isfinite(value) for value in error_values):
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
    """JSON values of an error: the sums, and the numbers derived from the sums. An infinite ratio is null, because JSON
    has no infinity.

    >>> values = error_json(LayerError(4.0, 1.0, 0.25, max_error=0.1, squared_delta=0.75))
    >>> values["squared_weight"], values["base_error"], values["error"]
    (4.0, 0.5, 0.25)
    """
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
    base_fingerprint: str,
    allocation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """JSON values of loftq_report.json.

    plan               the plan of the conversion
    layers             results of all quantized layers
    notes              sentences to list after the notes of the plan
    source             name of the original
    base_fingerprint   fingerprint of the quantized weights
    allocation         JSON values of the choice of formats and ranks; None without a choice
    """
    return {
        "format_version": 1,
        **TOOL,
        "source": source,
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
    """The root of the mean square of the layers' output errors; None when no layer has an output error.

    >>> mean_output_error([]) is None
    True
    """
    errors = [layer.output_error for layer in layers if layer.output_error is not None]
    return math.sqrt(math.fsum(error**2 for error in errors) / len(errors)) if errors else None


def bits_per_weight(plan: Plan) -> float:
    """True bits in the base per quantized weight of `plan`, constants included."""
    stored = sum(t.nbytes for job in plan.layers for t in job.base_tensors)
    return 8 * stored / sum(job.numel for job in plan.layers)


def read_report(directory: Path) -> tuple[dict[str, Any], list[LayerResult]] | None:
    """Read the report in a converted directory. Returns the JSON values and the layers, or None without a report.

    Raises InputError for a report of an unknown form.

    >>> read_report(Path("no directory")) is None
    True
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
    """The values of loftq_report.json that merge, inspect and `loftq_cli.nn` read."""

    base_fingerprint: str
    adapter_dir: str
    recipe: _Method
    layers: list[Any]


def provenance_json(plan: Plan, *, source: str, base_fingerprint: str) -> dict[str, Any]:
    """JSON values of the side file of an adapter: method, initialization, the name of the original, and the fingerprint
    of the adapter's base.
    """
    init = {} if plan.recipe.init is None else {"init": plan.recipe.init}
    return {
        **TOOL,
        "method": plan.recipe.method,
        **init,
        "source": source,
        "base_fingerprint": base_fingerprint,
    }
