"""Measurements of a conversion, as records and as files: loftq_report.json, and the provenance of the adapter. Equal
conversions give equal bytes, so the files hold no times.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.checkpoint.record_schema import AtLeast, NonNegative, PositiveInt, RecordError, read_fields, read_record
from loftq_cli.conversion.measuring import Measured
from loftq_cli.errors import InputError, NumericError
from loftq_cli.methods.method import DEFAULT_METHOD, METHODS, STARTS, Initialization
from loftq_cli.output.records import REPORT_NAME, TOOL
from loftq_cli.planning.jobs import LayerJob
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.recipe import Recipe
from loftq_cli.planning.recipe_files import recipe_json
from loftq_cli.quant.formats import QuantSpec, spec_from_json, spec_json
from loftq_cli.tensors.metrics import LayerError, relative, total_error

# A base alone with an error above so many errors of plain rounding needs the adapter. At 3 and 4 bits, the KL of
# tiny-llama from the original grows with the square of the error, so at 1.5 a base loses 2.25 times as much as plain
# rounding. Measured, error · KL, both in multiples of plain rounding: the paper's fit 1.19 · 1.5 (NF4) and 1.17 · 1.4
# (INT2); the joint fit from zero 1.35 · 1.8 (NF4), 1.21 · 2.2 (INT3) and 1.09 · 3.0 (INT2); with statistics 1.22 · 1.5
# (outputs, NF4); the principal start 6.5 · 370 (NF4), 3.2 · 55 (INT3) and 1.53 · 11 (INT2). The error of a principal
# start lies in the largest directions of the weights and costs more than errors of a rounding: without errors of
# outputs, the base of a principal start may not be worse than plain rounding at all.
WORST_BASE, WORST_PRINCIPAL_BASE = 1.5, 1.0

# The share of the cost that a base needs to be a model by itself, measured: see configs/README.md.
_GOOD_SHARE = 0.3

if TYPE_CHECKING:
    from loftq_cli.activations.text_pass import TextPass
    from loftq_cli.activations.text_sources import TextSource


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
    iteration_errors     relative error with the adapter after each iteration and round, by the cost that `keep_base`
                         mixes; empty without iterations
    best_iteration       the iteration in the result, counted from 1; 0 without iterations
    error                errors against W of the written base alone, and of base and adapter together
    plain_error          relative Frobenius error of plain rounding in the format of the base: constants of the largest
                         weights, no adapter; None where plain rounding is impossible, and in reports of old versions
    plain_output_error   relative error of the layer's outputs on the inputs of a calibration, after plain rounding;
                         None without a calibration, where plain rounding is impossible, and in reports of old versions
    base_output_error    of the outputs of the written base alone; None without a calibration and in old reports
    output_error         of the outputs of base and adapter together; None without a calibration
    experts              number of experts, whose errors count as a single long vector; None for a weight alone
    expert_errors        error of base and adapter of each expert
    weights              names of the weights of the experts in the base
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
    iteration_errors: tuple[NonNegative, ...]
    best_iteration: Annotated[int, AtLeast(0)]
    error: LayerError
    plain_error: NonNegative | None = None
    plain_output_error: NonNegative | None = None
    base_output_error: NonNegative | None = None
    output_error: NonNegative | None = None
    experts: PositiveInt | None = None
    expert_errors: tuple[NonNegative, ...] | None = None
    weights: tuple[str, ...] | None = None

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Names of the weights in the base."""
        return (self.name,) if self.weights is None else self.weights

    def to_json(self) -> dict[str, Any]:
        """JSON values for the report, without unknown errors; sums of squares and the errors derived from the sums are
        both listed.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values = {name: value for name, value in values.items() if name != "spec" and value is not None}
        return {**values, **spec_json(self.spec), "error": error_json(self.error)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LayerResult:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for values of a wrong shape."""
        layer = cls(**read_fields(cls, values, without="spec"), spec=spec_from_json(values))
        if any(value < 0 for value in dataclasses.astuple(layer.error)):
            raise RecordError("error has a number below 0")
        return layer


def make_layer_result(job: LayerJob, initial: Initialization | None, measured: Measured) -> LayerResult:
    """Return the result of a job of the plan: base and adapter are `initial`, with the errors in `measured`. `initial`
    is None for experts, which have iterations of their own. Raises NumericError when an error is not finite.
    """
    outputs = {} if measured.outputs is None else dataclasses.asdict(measured.outputs)
    iteration_errors = () if initial is None else initial.iteration_errors
    errors = [*dataclasses.astuple(measured.error), measured.plain_error, *iteration_errors, *outputs.values()]
    if not all(error is None or math.isfinite(error) for error in errors):
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
        iteration_errors=iteration_errors,
        best_iteration=0 if initial is None else initial.best_iteration,
        error=measured.error,
        plain_error=measured.plain_error,
        **outputs,
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
    text: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """JSON values of loftq_report.json.

    plan               the plan of the conversion
    layers             results of all quantized layers
    notes              sentences to list after the notes of the plan
    source             name of the original
    base_fingerprint   fingerprint of the quantized weights
    allocation         JSON values of the choice of formats and ranks; None without a choice
    text               JSON values of the text that the model read; None without a text
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
            **plan.shares.to_json(),
            "base_nbytes": plan.base_nbytes,
            "adapter_nbytes": plan.adapter_nbytes,
            **ModelErrors.of(layers).to_json(),
        },
        **({} if allocation is None else {"allocation": allocation}),
        **({} if text is None else {"text": text}),
        "layers": [layer.to_json() for layer in layers],
        "copied": [{"name": job.name, "reason": job.reason} for job in plan.copies],
        "notes": [*plan.notes, *notes, *([] if (note := base_note(plan.recipe, layers)) is None else [note])],
    }


def text_json(source: TextSource, text: TextPass) -> dict[str, Any]:
    """JSON values of the text that the model read: the kind, the files, and the numbers of tokens."""
    windows = text.windows
    return {
        "kind": source.kind,
        "files": source.files_json(),
        "tokens": windows.tokens,
        "windows": windows.count,
        "context": windows.longest,
        "sequential": text.options.sequential,
        "token_ids_sha256": text.sha256,
    }


def unread_notes(layers: Sequence[LayerResult]) -> list[str]:
    """A note about the layers without statistics of a text: text does not reach a vision tower, for example.

    >>> unread_notes([])
    []
    """
    unread = [layer.name for layer in layers if layer.output_error is None]
    ending = " and others" if len(unread) > 1 else ""
    message = f"{len(unread)} layers read no text, and all of their weights count the same: "
    return [f"{message}{unread[0]}{ending}"] if unread else []


@dataclass(frozen=True, slots=True)
class ModelErrors:
    """The errors of all quantized layers together, under the names of `LayerResult`.

    error                errors of the weights of all layers as a single long vector; `error.base_error` is the error of
                         the base alone, `error.error` of base and adapter
    plain_error          of the weights after plain rounding; None where the number of a layer is unknown
    plain_output_error   of the outputs after plain rounding: the root of the mean square over the layers with errors of
                         outputs; None where the number of a layer is unknown, and without a calibration
    base_output_error    of the outputs of the base alone, likewise
    output_error         of the outputs of base and adapter, likewise
    """

    error: LayerError
    plain_error: float | None
    plain_output_error: float | None
    base_output_error: float | None
    output_error: float | None

    @classmethod
    def of(cls, layers: Sequence[LayerResult]) -> ModelErrors:
        """The errors of a model with `layers`, the results of all quantized layers."""
        error = total_error(layer.error for layer in layers)
        with_outputs = [layer for layer in layers if layer.output_error is not None]
        return cls(
            error,
            total_plain_error((layer.plain_error, layer.error) for layer in layers),
            root_mean_square([layer.plain_output_error for layer in with_outputs]),
            root_mean_square([layer.base_output_error for layer in with_outputs]),
            root_mean_square([layer.output_error for layer in with_outputs]),
        )

    def to_json(self) -> dict[str, float | None]:
        """JSON values, without unknown errors."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "error"}
        return {**error_json(self.error), **{name: value for name, value in values.items() if value is not None}}

    def base_needs_adapter(self, *, is_principal: bool) -> bool:
        """Whether the base alone is too much worse than plain rounding to be a model: by the errors of the outputs if
        known, else by the errors of the weights; False where neither is known. See `WORST_BASE`.

        is_principal   whether the adapter starts as the principal part of the weights
        """
        if self.plain_output_error is not None and self.base_output_error is not None:
            return self.base_output_error > WORST_BASE * self.plain_output_error
        worst = WORST_PRINCIPAL_BASE if is_principal else WORST_BASE
        return self.plain_error is not None and self.error.base_error > worst * self.plain_error


def total_plain_error(layers: Iterable[tuple[float | None, LayerError]]) -> float | None:
    """The relative error of plain rounding of all layers as a single long vector, from `plain_error` and the further
    errors of each layer; None without layers, and where the number of a layer is unknown.

    >>> heavy, light = LayerError(3.0, 1.0, 1.0, 0.5, 0.0), LayerError(1.0, 1.0, 1.0, 0.5, 0.0)
    >>> total_plain_error([(1.0, heavy), (0.5, light)]), total_plain_error([(1.0, heavy), (None, light)])
    (0.9013878188659973, None)
    """
    pairs = list(layers)
    squares = [plain**2 * error.squared_weight for plain, error in pairs if plain is not None]
    if not pairs or len(squares) < len(pairs):
        return None
    return relative(math.fsum(squares), math.fsum(error.squared_weight for _, error in pairs))


def root_mean_square(errors: Sequence[float | None]) -> float | None:
    """The root of the mean square; None without errors, and where an error is None.

    >>> root_mean_square([1.0, None])
    """
    squares = [error**2 for error in errors if error is not None]
    return math.sqrt(math.fsum(squares) / len(squares)) if squares and len(squares) == len(errors) else None


def plain_name(specs: Iterable[QuantSpec]) -> str:
    """The name of plain rounding in the formats of some layers.

    >>> from loftq_cli.tensors.specs import CodebookSpec
    >>> plain_name([CodebookSpec("nf4", 64)]), plain_name([CodebookSpec("nf4", 64), CodebookSpec("fp4", 64)])
    ('plain NF4', 'plain rounding')
    """
    names = {spec.quant_type for spec in specs}
    return f"plain {names.pop().upper()}" if len(names) == 1 else "plain rounding"


def base_note(recipe: Recipe, layers: Sequence[LayerResult]) -> str | None:
    """The sentence about a base that needs the adapter: the errors, the uses that fail, and the remedy; None for a base
    that is a model by itself.

    recipe   the recipe of the conversion
    layers   results of all quantized layers
    """
    errors = ModelErrors.of(layers)
    if not errors.base_needs_adapter(is_principal=recipe.is_principal):
        return None
    base, plain, of_what = errors.error.base_error, errors.plain_error, "weights"
    if errors.plain_output_error is not None and errors.base_output_error is not None:
        base, plain, of_what = errors.base_output_error, errors.plain_output_error, "outputs"
    return (
        f"this base is no model without its adapter: the error of the {of_what} is {base:.4f} for the base alone and "
        f"{plain:.4f} for {plain_name(layer.spec for layer in layers)}. Serving the base alone, disable_adapter(), a "
        "fresh LoRA on the base and lora_dropout compute with the base alone. Converted with "
        f"{_base_remedy(recipe)}, the base is a model by itself"
    )


def _base_remedy(recipe: Recipe) -> str:
    """The options, beside the options of the conversion, that make the base of `recipe` count. A principal start is
    replaced: the base of a principal start lacks the principal part of the weights with any share.
    """
    fitting = recipe.fitting
    if "keep_base" not in METHODS[recipe.method].inits[recipe.init].takes:
        return f"--method {DEFAULT_METHOD} --keep-base {_GOOD_SHARE}"
    is_zero = fitting.start == STARTS[0]
    shares = [] if fitting.keep_base >= _GOOD_SHARE else [f"--keep-base {_GOOD_SHARE}"]
    if is_zero and not shares:
        return f"--keep-base {(1.0 + fitting.keep_base) / 2:g}"
    return " ".join([*shares, *([] if is_zero else ["--start zero"])])


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
