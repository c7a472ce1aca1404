"""Every quantized layer of a converted directory, with the error from the report or from the files.

Nothing is written; transformers, PEFT and bitsandbytes are not needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loftq_cli.adapter.beside import matrix_shape_of, open_adapter_beside
from loftq_cli.adapter.experts.factors import load_pair
from loftq_cli.adapter.experts.planned import lora_with_experts
from loftq_cli.adapter.sorting import LoraTensors
from loftq_cli.adapter.source import AdapterSource
from loftq_cli.conversion.report import LayerResult, ModelErrors, read_report, total_plain_error
from loftq_cli.errors import InputError, MismatchError, NumericError, UsageError
from loftq_cli.inspecting.devices import load_weight, open_inspection_device, small_numel
from loftq_cli.merging.provenance import check_provenance
from loftq_cli.model.stored import BaseModel
from loftq_cli.output.records import REPORT_NAME
from loftq_cli.quant.formats import QuantSpec, make_quantizer
from loftq_cli.quant.gpu_matrix import errors_on, tries_on
from loftq_cli.runtime.gpu import SharedDevice
from loftq_cli.runtime.schedule import SMALL_NUMEL, in_turn
from loftq_cli.runtime.workers import Workers, started
from loftq_cli.tensors.headers import WEIGHT_DTYPES
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.metrics import GroupErrors, LayerError, group_errors, layer_error, total_error

SORT_KEYS = ("name", "error", "base_error", "numel")


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A quantized layer of a converted directory.

    name                 tensor name of the weight
    shape                [out, in]
    spec                 number format
    bits_per_weight      stored bits of codes and constants, divided by the number of weights
    rank, scaling        rank and scaling of the adapter; None without an adapter
    error                reported or recomputed error; None without a report and without an original
    groups               errors by group, for a recomputed layer in a number format with groups; otherwise None
    plain_error          relative error of plain rounding in the format of the layer, reported or recomputed like
                         `error`; None where unknown
    plain_output_error   reported relative error of the layer's outputs after plain rounding; None where unknown
    base_output_error    of the outputs of the base alone; likewise
    output_error         of the outputs of base and adapter; likewise
    """

    name: str
    shape: tuple[int, int]
    spec: QuantSpec
    bits_per_weight: float
    rank: int | None
    scaling: float | None
    error: LayerError | None
    groups: GroupErrors | None = None
    plain_error: float | None = None
    plain_output_error: float | None = None
    base_output_error: float | None = None
    output_error: float | None = None

    @property
    def numel(self) -> int:
        """Number of weights in the layer."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Inspection:
    """The layers of a converted directory.

    rows              every quantized layer
    total             error of all layers together; None when the error of a layer is unknown
    plain_error       relative error of plain rounding of all layers together; None when a layer's is unknown
    reported          errors of all layers together as in the report; None without a report
    bits_per_weight   mean over all weights of all layers
    recomputed        whether the errors come from the files; otherwise from the report
    """

    rows: tuple[LayerRow, ...]
    total: LayerError | None
    plain_error: float | None
    reported: ModelErrors | None
    bits_per_weight: float
    recomputed: bool


def inspect_converted(base: BaseModel, against: Path | None, threads: int = 1, device: str = "cpu") -> Inspection:
    """Read the errors of every quantized layer in `base` from the report, or recompute the errors from the files.

    base      the converted directory
    against   the original checkpoint in full precision: recompute every error; None reads the report
    threads   number of threads to compute with
    device    see `open_device`; the processor compares a layer too large for the GPU

    Raises UsageError for an absent GPU; MismatchError when `against` lacks a layer, or holds a layer quantized or in a
    different shape, and for a fitted adapter of another base; InputError when `base` lacks a layer of the report, or a
    weight holds NaN.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> inspect_converted(BaseModel.open(resolve_model("builtin:tiny-llama")), None).rows
    ()
    """
    report = read_report(base.folder)
    layers = report[1] if report else []
    reported = {layer.name: layer for layer in layers if layer.experts is None}
    groups = [layer for layer in layers if layer.experts is not None] if against is None else []
    of_groups = {name for layer in groups for name in layer.stored_names}
    for name in (name for layer in layers for name in layer.stored_names):
        if name not in base.tensors:
            raise InputError(f"is in {REPORT_NAME} and not in the files", file=base.path, tensor=name)
    adapter = open_adapter_beside(base, report[0]["adapter_dir"] if report else None)
    if adapter is not None:
        check_provenance(base, adapter.path, adapter.config, force=False)
    lora = {} if adapter is None else lora_with_experts(base, adapter)
    names = [n for n in base.tensors if (n in base.quantized or n in reported) and n not in of_groups]
    rows = [_layer_row(base, name, reported.get(name), lora.get(name)) for name in names]
    rows += [_expert_row(layer) for layer in groups]
    if against is not None:
        with BaseModel.open(against) as original:
            gpu = open_inspection_device(device, sum(row.numel for row in rows))
            beside = _Original(original, _original_names(original, base), base, adapter, lora)

            def recompute(row: LayerRow, sharing: Workers) -> LayerRow:
                return beside.recompute(row, sharing, gpu)

            with started(threads) as workers:
                rows = list(in_turn(rows, recompute, lambda row: row.numel, workers, small_numel(gpu)))
    errors = [row.error for row in rows if row.error is not None]
    bits = sum(row.bits_per_weight * row.numel for row in rows) / max(1, sum(row.numel for row in rows))
    total = total_error(errors) if errors and len(errors) == len(rows) else None
    plain = None if total is None else total_plain_error((row.plain_error, row.error) for row in rows if row.error)
    errors_in_report = ModelErrors.of(report[1]) if report else None
    return Inspection(tuple(rows), total, plain, errors_in_report, bits, against is not None)


def sorted_rows(rows: Sequence[LayerRow], key: str) -> list[LayerRow]:
    """Sort `rows` by name, or by "error", "base_error" or "numel" with the largest first.

    Raises UsageError for a key outside SORT_KEYS, and for a sort by error when a row has no error.

    >>> from loftq_cli.tensors.specs import CodebookSpec
    >>> shapes = {"b": (4, 8), "a": (4, 4)}
    >>> rows = [LayerRow(name, shape, CodebookSpec(), 4.5, None, None, None) for name, shape in shapes.items()]
    >>> [row.name for row in sorted_rows(rows, "name")], [row.name for row in sorted_rows(rows, "numel")]
    (['a', 'b'], ['b', 'a'])
    """
    check_sort_key(key)
    if key == "name":
        return sorted(rows, key=lambda row: row.name)
    if key == "numel":
        return sorted(rows, key=lambda row: -row.numel)
    if not all(row.error for row in rows):
        raise UsageError(f"--sort {key} needs errors", hint="--against ORIGINAL computes them")
    return sorted(rows, key=lambda row: -getattr(row.error, key))


def check_sort_key(key: str) -> None:
    """Raises UsageError for a key outside SORT_KEYS.

    >>> check_sort_key("size")
    Traceback (most recent call last):
    loftq_cli.errors.UsageError: --sort 'size' does not exist (one of name, error, base_error, numel)
    """
    if key not in SORT_KEYS:
        raise UsageError(f"--sort {key!r} does not exist", hint=f"one of {', '.join(SORT_KEYS)}")


def _layer_row(base: BaseModel, name: str, reported: LayerResult | None, lora: LoraTensors | None) -> LayerRow:
    rank, scaling = (None, None) if lora is None else (lora.rank, lora.scaling)
    error = reported.error if reported else None
    nbytes = sum(part.nbytes for part in base.parts(name))
    if name in base.quantized:
        shape, spec = base.quantized[name].shape, base.quantized[name].spec
    else:
        assert reported is not None  # every dense layer comes from the report
        shape, spec = matrix_shape_of(base, name), reported.spec
    row = LayerRow(name, shape, spec, 8 * nbytes / math.prod(shape), rank, scaling, error)
    if reported is None:
        return row
    return replace(
        row,
        plain_error=reported.plain_error,
        plain_output_error=reported.plain_output_error,
        base_output_error=reported.base_output_error,
        output_error=reported.output_error,
    )


def _expert_row(layer: LayerResult) -> LayerRow:
    """The row of the experts of a layer in a report: the matrices of all experts, one below the other."""
    shape = (layer.shape[0] * (layer.experts or 1), layer.shape[1])
    return LayerRow(
        layer.name,
        shape,
        layer.spec,
        layer.bits_per_weight,
        layer.rank,
        layer.scaling,
        layer.error,
        plain_error=layer.plain_error,
        plain_output_error=layer.plain_output_error,
        base_output_error=layer.base_output_error,
        output_error=layer.output_error,
    )


def _original_names(original: BaseModel, base: BaseModel) -> dict[str, str]:
    """Map each tensor name in `base` to the name in the original. Names in the loaded model connect files with
    different spellings.
    """
    stored_names = {loaded_name: name for name, loaded_name in original.loaded_names().items()}
    return {
        name: name if name in original.tensors else stored_names.get(loaded_name, name)
        for name, loaded_name in base.loaded_names().items()
    }


@dataclass(frozen=True)
class _Original:
    """The original checkpoint of a comparison.

    model     the original in full precision
    names     tensor name in `base` -> tensor name in `model`
    base      the converted directory
    adapter   the adapter inside the converted directory; None without
    lora      name of an adapted weight of `base` -> the tensors of the adapter
    """

    model: BaseModel
    names: dict[str, str]
    base: BaseModel
    adapter: AdapterSource | None
    lora: Mapping[str, LoraTensors]

    def find_weight(self, row: LayerRow) -> str:
        """The name of the layer's weight in the original.

        Raises MismatchError when the original lacks the weight, or holds the weight quantized or in a different shape.
        """
        model, name = self.model, self.names[row.name]
        if name not in model.tensors:
            raise MismatchError("is not in the original", file=model.path, tensor=row.name)
        if name in model.quantized or model.tensors[name].dtype not in WEIGHT_DTYPES:
            hint = "--against the full-precision checkpoint"
            raise MismatchError("is not in full precision there", file=model.path, tensor=name, hint=hint)
        if model.matrix_shape(name) != row.shape:
            shapes = f"{model.matrix_shape(name)} in the original and {row.shape} here"
            raise MismatchError(f"is {shapes}", file=model.path, tensor=row.name)
        return name

    def load_pair(self, row: LayerRow) -> LoraPair | None:
        """Load the layer's adapter; None without. Raises MismatchError when the factors do not fit the layer."""
        if self.adapter is None or row.name not in self.lora:
            return None
        return load_pair(self.adapter, self.lora[row.name], row.shape)

    def recompute(self, row: LayerRow, workers: Workers, gpu: SharedDevice | None) -> LayerRow:
        """`row` with the errors of the files, and with errors by group for a number format with groups.

        Raises InputError or NumericError naming the tensor for NaN and infinite values.
        """
        name, pair = self.find_weight(row), self.load_pair(row)
        row = replace(row, plain_error=self._measure_plain(row, name, workers, gpu))
        base, group_size = self.base, row.spec.group_size_or_none
        if gpu is not None:
            errors = errors_on(
                gpu, lambda: (load_weight(self.model, name), base.whole(row.name)), row.numel, pair, group_size
            )
            if errors is not None:
                return replace(row, error=errors[0], groups=errors[1])
        weight, decoded = self.model.rows(name), base.rows(row.name)
        try:
            error = layer_error(weight, decoded, pair, workers)
        except NumericError as numeric:
            raise numeric.at(file=self.model.path, tensor=name) from None
        for model, amount in ((self.model, error.squared_weight), (base, error.squared_error)):
            if not math.isfinite(amount):
                raise InputError("holds NaN or infinite values", file=model.path, tensor=row.name)
        if group_size is None:
            return replace(row, error=error)
        return replace(row, error=error, groups=group_errors(weight, decoded, pair, group_size, workers))

    def _measure_plain(self, row: LayerRow, name: str, workers: Workers, gpu: SharedDevice | None) -> float | None:
        """The relative error of plain rounding of the original weight `name` in the format of the layer; None for a
        weight without a form in the format.
        """
        stored = self.base.quantized.get(row.name)
        dtype = self.base.tensors[row.name].dtype if stored is None else stored.dtype
        if gpu is not None:
            quantizers = {"plain": make_quantizer(row.spec, dtype)}
            errors = tries_on(gpu, lambda: load_weight(self.model, name), row.numel, quantizers)
            if errors is not None:
                return errors["plain"].base_error
        from loftq_cli.quant.plain import round_plainly

        weight = self.model.rows(name)
        try:
            plain = round_plainly(weight, row.spec, dtype, holds_codes=row.numel <= SMALL_NUMEL, workers=workers)
            error = layer_error(weight, plain, None, workers).base_error
        except NumericError:
            return None
        return error if math.isfinite(error) else None
