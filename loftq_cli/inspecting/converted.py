"""What a model directory holds: of a converted one, every layer with its error; of a full-precision one, what a
conversion would make of it. Reads only; works without transformers, PEFT or bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loftq_cli.adapter.beside import AdapterBeside, matrix_shape_of
from loftq_cli.conversion.report import LayerResult, read_report
from loftq_cli.errors import InputError, MismatchError, NumericError, UsageError
from loftq_cli.inspecting.devices import check_idle_device, chosen_device, loaded_rows, small_numel
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import module_of
from loftq_cli.output.records import REPORT_NAME
from loftq_cli.quant.formats import QuantSpec
from loftq_cli.quant.gpu_matrix import errors_on
from loftq_cli.runtime.gpu import SharedDevice
from loftq_cli.runtime.schedule import in_turn
from loftq_cli.runtime.workers import Workers, started
from loftq_cli.tensors.headers import WEIGHT_DTYPES
from loftq_cli.tensors.metrics import GroupErrors, LayerError, total_error
from loftq_cli.tensors.specs import AffineSpec

SORT_KEYS = ("name", "error", "base_error", "numel")


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One quantized layer of a converted directory; None where nothing is known."""

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
    """Every quantized layer of `base`; with `against`, its error recomputed from the files of both, on a GPU where it
    fits that: see `open_device`.

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
    adapter = AdapterBeside.beside(base, report[0]["adapter_dir"] if report else None)
    modules = {name: module_of(loaded) for name, loaded in base.loaded_names().items()}
    names = [name for name in base.tensors if name in base.quantized or name in known]
    rows = [_layer_row(base, name, modules[name], known.get(name), adapter) for name in names]
    if against is not None:
        with BaseModel.open(against) as original:
            name_of = _names_in(original, base)
            gpu = chosen_device(device, sum(row.numel for row in rows))

            def recompute(row: LayerRow, sharing: Workers) -> LayerRow:
                return _recomputed(base, row, modules[row.name], adapter, (original, name_of), sharing, gpu)

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
    """Raises UsageError for a key that nothing can be sorted by."""
    if key not in SORT_KEYS:
        raise UsageError(f"--sort {key!r} does not exist", hint=f"one of {', '.join(SORT_KEYS)}")


def _layer_row(
    base: BaseModel, name: str, module: str, known: LayerResult | None, adapter: AdapterBeside | None
) -> LayerRow:
    rank, scaling = (adapter.rank(module), adapter.scaling(module)) if adapter else (None, None)
    error = known.error if known else None
    nbytes = sum(part.nbytes for part in base.parts(name))
    if name in base.quantized:
        shape, spec = base.quantized[name].shape, base.quantized[name].spec
    else:
        assert known is not None  # a dense layer is listed because the report knows it
        shape, spec = matrix_shape_of(base, name), known.spec
    return LayerRow(name, shape, spec, 8 * nbytes / math.prod(shape), rank, scaling, error)


def _names_in(original: BaseModel, base: BaseModel) -> dict[str, str]:
    """The original's name for each tensor of `base`: the same, or the one that is called so once it is loaded."""
    loaded = {name: key for key, name in original.loaded_names().items()}
    return {
        name: name if name in original.tensors else loaded.get(called, name)
        for name, called in base.loaded_names().items()
    }


def _recomputed(
    base: BaseModel,
    row: LayerRow,
    module: str,
    adapter: AdapterBeside | None,
    against: tuple[BaseModel, dict[str, str]],
    workers: Workers,
    gpu: SharedDevice | None,
) -> LayerRow:
    from loftq_cli.tensors.metrics import group_errors, layer_error

    original, name_of = against
    name = name_of[row.name]
    if name not in original.tensors:
        raise MismatchError("is not in the original", file=original.path, tensor=row.name)
    if name in original.quantized or original.tensors[name].dtype not in WEIGHT_DTYPES:
        hint = "--against the full-precision checkpoint"
        raise MismatchError("is not in full precision there", file=original.path, tensor=name, hint=hint)
    if original.matrix_shape(name) != row.shape:
        shapes = f"{original.matrix_shape(name)} in the original and {row.shape} here"
        raise MismatchError(f"is {shapes}", file=original.path, tensor=row.name)
    pair = adapter.pair(module, row.shape) if adapter else None
    group_size = row.spec.group_size if isinstance(row.spec, AffineSpec) else None
    if gpu is not None:
        found = errors_on(gpu, lambda: (loaded_rows(original, name), base.whole(row.name)), row.numel, pair, group_size)
        if found is not None:
            return replace(row, error=found[0], groups=found[1])
    weight, decoded = original.rows(name), base.rows(row.name)
    try:
        error = layer_error(weight, decoded, pair, workers)
    except NumericError as what:
        raise what.at(file=original.path, tensor=name) from None
    for model, amount in ((original, error.squared_weight), (base, error.squared_error)):
        if not math.isfinite(amount):
            raise InputError("holds NaN or infinite values", file=model.path, tensor=row.name)
    if group_size is None:
        return replace(row, error=error)
    return replace(row, error=error, groups=group_errors(weight, decoded, pair, group_size, workers))
