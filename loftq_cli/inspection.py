"""What a model directory holds: of a converted one, every layer with its error; of a full-precision one, what a
conversion would make of it. Reads only; works without transformers, PEFT or bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.base_model import BaseModel
from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.checkpoint.source import WeightsFile, open_weights_file
from loftq_cli.errors import MismatchError, UsageError
from loftq_cli.layouts import peft_adapter
from loftq_cli.methods.method import METHODS
from loftq_cli.metrics import LayerError, total_error
from loftq_cli.plan import LayerJob, possible_jobs
from loftq_cli.quant.formats import FORMATS, make_quantizer
from loftq_cli.recipe import Recipe
from loftq_cli.report import LayerResult, read_report
from loftq_cli.targets import module_of
from loftq_cli.tensors import CodebookSpec

if TYPE_CHECKING:
    from loftq_cli.tensors import LoraPair

SORT_KEYS = ("name", "error", "base_error", "numel")


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One quantized layer of a converted directory; None where nothing is known."""

    name: str
    shape: tuple[int, int]
    quant_type: str
    block_size: int
    double_quant: bool
    bits_per_weight: float
    rank: int | None
    scaling: float | None
    error: LayerError | None

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


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of a full-precision checkpoint: what it would become, and its error by quant type."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    becomes: str
    errors: dict[str, LayerError]


def inspect_converted(base: BaseModel, against: Path | None) -> Inspection:
    """Every quantized layer of `base`; with `against`, its error recomputed from the files of both.

    Raises MismatchError when `against` lacks a layer or has it in another shape.
    """
    report = read_report(base.path)
    known = {layer.name: layer for layer in report[1]} if report else {}
    adapter = _Adapter.beside(base, report[0]["adapter_dir"] if report else None)
    names = [name for name in base.tensors if name in base.quantized or name in known]
    rows = [_layer_row(base, name, known.get(name), adapter) for name in names]
    if against is not None:
        with BaseModel.open(against) as original:
            rows = [_recomputed(base, row, adapter, original) for row in rows]
    errors = [row.error for row in rows if row.error is not None]
    bits = sum(row.bits_per_weight * row.numel for row in rows) / max(1, sum(row.numel for row in rows))
    total = total_error(errors) if errors and len(errors) == len(rows) else None
    return Inspection(tuple(rows), total, bits, against is not None)


def inspect_checkpoint(base: BaseModel, quant_types: Sequence[str]) -> Iterator[TensorRow]:
    """Every tensor of a full-precision checkpoint, in file order; each of `quant_types` is tried on what would be
    quantized, one tensor in memory at a time.
    """
    for quant_type in quant_types:
        if quant_type not in FORMATS:
            raise UsageError(f"--try {quant_type!r} does not exist", hint=f"one of {', '.join(FORMATS)}")
    # Rank 1 fits every matrix: the adapter does not matter here.
    for job in possible_jobs(base.tensors, base.config, Recipe(method="qlora", rank=1)):
        ref = base.tensors[job.name]
        if isinstance(job, LayerJob):
            spec = job.matrix.spec
            becomes = f"{spec.codebook}, block {spec.block_size}"
            errors = {quant_type: _tried(base, job, quant_type) for quant_type in quant_types}
        else:
            becomes, errors = f"copied: {job.reason}", {}
        yield TensorRow(job.name, ref.shape, ref.dtype, becomes, errors)


def sorted_rows(rows: Sequence[LayerRow], key: str) -> list[LayerRow]:
    """`rows` by name, or by the largest first of "error", "base_error" or "numel". Raises UsageError for others."""
    if key not in SORT_KEYS:
        raise UsageError(f"--sort {key!r} does not exist", hint=f"one of {', '.join(SORT_KEYS)}")
    if key == "name":
        return sorted(rows, key=lambda row: row.name)
    if key == "numel":
        return sorted(rows, key=lambda row: -row.numel)
    return sorted(rows, key=lambda row: -getattr(row.error, key) if row.error else 0.0)


@dataclass(frozen=True)
class _Adapter:
    """The adapter that lies inside a converted directory."""

    weights: WeightsFile
    config: dict[str, object]

    @classmethod
    def beside(cls, base: BaseModel, folder: str | None) -> _Adapter | None:
        known = [folder] if folder else [entry.adapter_dir for entry in METHODS.values()]
        for name in known:
            directory = base.path / Path(name).name
            if peft_adapter.is_adapter_directory(directory):
                weights = open_weights_file(directory / peft_adapter.WEIGHTS_NAME)
                return cls(weights, read_json_object(directory / peft_adapter.CONFIG_NAME))
        return None

    def rank(self, module: str) -> int | None:
        ref = self.weights.tensors.get(peft_adapter.tensor_names(module)[0])
        return None if ref is None else ref.shape[0]

    def scaling(self, module: str) -> float | None:
        rank = self.rank(module)
        return None if not rank else peft_adapter.scaling_of(self.config, module, rank)

    def pair(self, module: str) -> LoraPair | None:
        from loftq_cli.tensors import LoraPair

        scaling = self.scaling(module)
        if scaling is None:
            return None
        name_A, name_B = peft_adapter.tensor_names(module)
        return LoraPair(self.weights.load(name_A), self.weights.load(name_B), scaling)


def _module(base: BaseModel, name: str) -> str:
    return base.family.loaded_name(module_of(name), [module_of(other) for other in base.tensors])


def _layer_row(base: BaseModel, name: str, known: LayerResult | None, adapter: _Adapter | None) -> LayerRow:
    module = known.module if known else _module(base, name)
    if name in base.quantized:
        spec, shape = base.stored_spec(name)
    else:
        assert known is not None  # a dense layer is listed because the report knows it
        spec, shape = CodebookSpec(known.quant_type, known.block_size, known.double_quant), known.shape
    nbytes = sum(base.tensors[part].nbytes for part in base.parts(name))
    return LayerRow(
        name=name,
        shape=shape,
        quant_type=spec.codebook,
        block_size=spec.block_size,
        double_quant=spec.double_quant,
        bits_per_weight=8 * nbytes / math.prod(shape),
        rank=adapter.rank(module) if adapter else None,
        scaling=adapter.scaling(module) if adapter else None,
        error=known.error if known else None,
    )


def _recomputed(base: BaseModel, row: LayerRow, adapter: _Adapter | None, original: BaseModel) -> LayerRow:
    from loftq_cli.metrics import layer_error

    if row.name not in original.tensors:
        raise MismatchError("is not in the original", file=original.path, tensor=row.name)
    weight = original.matrix(row.name)
    if tuple(weight.shape) != row.shape:
        raise MismatchError(
            f"is {tuple(weight.shape)} in the original and {row.shape} here", file=original.path, tensor=row.name
        )
    pair = adapter.pair(_module(base, row.name)) if adapter else None
    return replace(row, error=layer_error(weight, base.matrix(row.name), pair))


def _tried(base: BaseModel, job: LayerJob, quant_type: str) -> LayerError:
    from loftq_cli.metrics import layer_error

    weight = base.matrix(job.name)
    quantizer = make_quantizer(replace(job.matrix.spec, codebook=quant_type), job.matrix.dtype)
    return layer_error(weight, quantizer.dequantize(quantizer.quantize(weight)), None)
