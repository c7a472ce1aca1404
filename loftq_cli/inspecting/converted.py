"""Every quantized layer of a converted directory, with the error that the report lists or the files show.

Reads only; works without transformers, PEFT or bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loftq_cli.adapter.beside import matrix_shape_of, open_adapter_beside
from loftq_cli.adapter.sorting import LoraTensors
from loftq_cli.adapter.source import AdapterSource
from loftq_cli.conversion.report import LayerResult, read_report
from loftq_cli.errors import InputError, MismatchError, NumericError, UsageError
from loftq_cli.inspecting.devices import check_idle_device, chosen_device, loaded_rows, small_numel
from loftq_cli.model.stored import BaseModel
from loftq_cli.output.records import REPORT_NAME
from loftq_cli.quant.formats import QuantSpec
from loftq_cli.quant.gpu_matrix import errors_on
from loftq_cli.runtime.gpu import SharedDevice
from loftq_cli.runtime.schedule import in_turn
from loftq_cli.runtime.workers import Workers, started
from loftq_cli.tensors.headers import WEIGHT_DTYPES
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.metrics import GroupErrors, LayerError, group_errors, layer_error, total_error

SORT_KEYS = ("name", "error", "base_error", "numel")


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One quantized layer of a converted directory.

    rank, scaling   of the adapter; None without an adapter
    error           as reported or recomputed; None where neither is known
    groups          errors by group, of a recomputed layer in a format with groups
    """

    name: str
    shape: tuple[int, int]
    spec: QuantSpec
    bits_per_weight: float
    rank: int | None
    scaling: float | None
    error: LayerError | None
    groups: GroupErrors | None = None

    @property
    def numel(self) -> int:
        """Weights in the layer."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Inspection:
    """A converted directory. `recomputed` says whether the errors come from the files or from the report."""

    rows: tuple[LayerRow, ...]
    total: LayerError | None
    bits_per_weight: float
    recomputed: bool


def inspect_converted(base: BaseModel, against: Path | None, threads: int = 1, device: str = "cpu") -> Inspection:
    """Every quantized layer of `base`; with `against`, the full-precision checkpoint, errors are recomputed from files.

    device   see `open_device`; a layer that does not fit the GPU is compared on the processor

    Raises UsageError for a GPU that is not there or has nothing to compute, MismatchError when `against` lacks a layer
    or has it in another shape, InputError when the report names a layer that `base` lacks.
    """
    if against is None:
        check_idle_device(device, "--against ORIGINAL")
    report = read_report(base.folder)
    known = {layer.name: layer for layer in report[1]} if report else {}
    for name in known:
        if name not in base.tensors:
            raise InputError(f"is in {REPORT_NAME} and not in the files", file=base.path, tensor=name)
    adapter = open_adapter_beside(base, report[0]["adapter_dir"] if report else None)
    lora = {} if adapter is None else adapter.lora_in(base)
    names = [name for name in base.tensors if name in base.quantized or name in known]
    rows = [_layer_row(base, name, known.get(name), lora.get(name)) for name in names]
    if against is not None:
        with BaseModel.open(against) as original:
            gpu = chosen_device(device, sum(row.numel for row in rows))
            beside = _Original(original, _names_in(original, base), base, adapter, lora)

            def recompute(row: LayerRow, sharing: Workers) -> LayerRow:
                return beside.recompute(row, sharing, gpu)

            with started(threads) as workers:
                rows = list(in_turn(rows, recompute, lambda row: row.numel, workers, small_numel(gpu)))
    errors = [row.error for row in rows if row.error is not None]
    bits = sum(row.bits_per_weight * row.numel for row in rows) / max(1, sum(row.numel for row in rows))
    total = total_error(errors) if errors and len(errors) == len(rows) else None
    return Inspection(tuple(rows), total, bits, against is not None)


def sorted_rows(rows: Sequence[LayerRow], key: str) -> list[LayerRow]:
    """`rows` by name, or the largest "error", "base_error" or "numel" first.

    Raises UsageError for another key, and for one that the rows do not have.
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
    """Raises UsageError for a key that is not among SORT_KEYS."""
    if key not in SORT_KEYS:
        raise UsageError(f"--sort {key!r} does not exist", hint=f"one of {', '.join(SORT_KEYS)}")


def _layer_row(base: BaseModel, name: str, known: LayerResult | None, lora: LoraTensors | None) -> LayerRow:
    rank, scaling = (None, None) if lora is None else (lora.rank, lora.scaling)
    error = known.error if known else None
    nbytes = sum(part.nbytes for part in base.parts(name))
    if name in base.quantized:
        shape, spec = base.quantized[name].shape, base.quantized[name].spec
    else:
        assert known is not None  # a dense layer is listed only where the report lists the layer
        shape, spec = matrix_shape_of(base, name), known.spec
    return LayerRow(name, shape, spec, 8 * nbytes / math.prod(shape), rank, scaling, error)


def _names_in(original: BaseModel, base: BaseModel) -> dict[str, str]:
    """The name in the original of each tensor of `base`. Names are compared as loaded where the files spell names
    differently.
    """
    loaded = {name: key for key, name in original.loaded_names().items()}
    return {
        name: name if name in original.tensors else loaded.get(called, name)
        for name, called in base.loaded_names().items()
    }


@dataclass(frozen=True)
class _Original:
    """The full-precision checkpoint to compare a converted one with.

    model     the full-precision checkpoint
    names     name of each tensor of `base` -> the tensor's name in `model`
    base      the converted checkpoint
    adapter   the adapter inside the converted directory, or None
    lora      name of an adapted weight of `base` -> the tensors of the adapter
    """

    model: BaseModel
    names: dict[str, str]
    base: BaseModel
    adapter: AdapterSource | None
    lora: Mapping[str, LoraTensors]

    def find_weight(self, row: LayerRow) -> str:
        """The name of the layer's weight in the original. Raises MismatchError for a weight that cannot be compared."""
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
        """The layer's adapter. Raises MismatchError for factors that do not fit the layer."""
        if self.adapter is None or row.name not in self.lora:
            return None
        return self.adapter.pair(self.lora[row.name].module, row.shape)

    def recompute(self, row: LayerRow, workers: Workers, gpu: SharedDevice | None) -> LayerRow:
        """`row` with the error of what the files hold, of groups too where the layer's format has groups."""
        base, name = self.base, self.find_weight(row)
        pair = self.load_pair(row)
        group_size = row.spec.group_size_or_none
        if gpu is not None:
            errors = errors_on(
                gpu, lambda: (loaded_rows(self.model, name), base.whole(row.name)), row.numel, pair, group_size
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
