"""What a model directory holds: of a converted one, every layer with its error; of a full-precision one, what a
conversion would make of it. Reads only; works without transformers, PEFT or bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loftq_cli.base_model import BaseModel
from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.checkpoint.source import WeightsFile, open_weights_file
from loftq_cli.device import SharedDevice, open_device
from loftq_cli.device_matrix import BESIDE_NUMEL, errors_on, tries_on
from loftq_cli.errors import InputError, MismatchError, NumericError, UsageError
from loftq_cli.kernels import choose_kernels
from loftq_cli.layouts import peft_adapter
from loftq_cli.layouts.layout import StoredMatrix
from loftq_cli.methods.method import METHODS
from loftq_cli.metrics import GroupErrors, LayerError, total_error
from loftq_cli.plan import CopyJob, LayerJob, possible_jobs
from loftq_cli.quant.formats import FORMATS, QuantSpec, make_quantizer, size_of
from loftq_cli.recipe import Recipe
from loftq_cli.report import REPORT_NAME, LayerResult, read_report
from loftq_cli.rows import TensorRows
from loftq_cli.schedule import SMALL_NUMEL, in_turn
from loftq_cli.targets import module_of
from loftq_cli.tensors import WEIGHT_DTYPES, AffineSpec, LoraPair, Pooling, lora_pair
from loftq_cli.workers import Workers, started

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


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of a full-precision checkpoint: what it would become, and its error by quant type."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    becomes: str
    errors: dict[str, LayerError]


def inspect_converted(base: BaseModel, against: Path | None, threads: int = 1, device: str = "cpu") -> Inspection:
    """Every quantized layer of `base`; with `against`, its error recomputed from the files of both, on a GPU where it
    fits that: see `open_device`.

    Raises UsageError for a GPU that is not there, MismatchError when `against` lacks a layer or has it in another
    shape, InputError when the report names a layer that `base` lacks.
    """
    report = read_report(base.folder)
    known = {layer.name: layer for layer in report[1]} if report else {}
    for name in known:
        if name not in base.tensors:
            raise InputError(f"is in {REPORT_NAME} and not in the files", file=base.path, tensor=name)
    adapter = _Adapter.beside(base, report[0]["adapter_dir"] if report else None)
    modules = {name: module_of(loaded) for name, loaded in base.loaded_names().items()}
    names = [name for name in base.tensors if name in base.quantized or name in known]
    rows = [_layer_row(base, name, modules[name], known.get(name), adapter) for name in names]
    if against is not None:
        with BaseModel.open(against) as original:
            name_of = _names_in(original, base)
            gpu = _chosen_device(device, sum(row.numel for row in rows))

            def recompute(row: LayerRow, sharing: Workers) -> LayerRow:
                return _recomputed(base, row, modules[row.name], adapter, (original, name_of), sharing, gpu)

            with started(threads) as workers:
                rows = list(in_turn(rows, recompute, lambda row: row.numel, workers, _small_numel(gpu)))
    errors = [row.error for row in rows if row.error is not None]
    bits = sum(row.bits_per_weight * row.numel for row in rows) / max(1, sum(row.numel for row in rows))
    total = total_error(errors) if errors and len(errors) == len(rows) else None
    return Inspection(tuple(rows), total, bits, against is not None)


def adapter_of(base: BaseModel, names: Iterable[str]) -> dict[str, LoraPair]:
    """The adapter inside a converted directory: its factors for each of the weights called `names` that it is on.

    Raises MismatchError for factors that do not fit the weight.
    """
    report = read_report(base.folder)
    adapter, called = _Adapter.beside(base, report[0]["adapter_dir"] if report else None), base.loaded_names()
    if adapter is None:
        return {}
    pairs = {name: adapter.pair(module_of(called[name]), _matrix_shape(base, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair is not None}


def inspect_checkpoint(
    base: BaseModel, quant_types: Sequence[str], threads: int = 1, device: str = "cpu"
) -> Iterator[TensorRow]:
    """Every tensor of a full-precision checkpoint, in file order; each of `quant_types` is tried on what would be
    quantized, on a GPU where it fits that: see `open_device`.
    """
    for quant_type in quant_types:
        if quant_type not in FORMATS:
            raise UsageError(f"--try {quant_type!r} does not exist", hint=f"one of {', '.join(FORMATS)}")
    formats = {quant_type: _matrices(base, quant_type) for quant_type in quant_types}
    # Rank 1 fits every matrix: the adapter does not matter here.
    jobs = possible_jobs(base.tensors, base.config, Recipe(method="qlora", rank=1))
    if not formats:
        yield from (_tensor_row(base, job, {}) for job in jobs)
        return
    gpu = _chosen_device(device, sum(job.numel * len(formats) for job in jobs if isinstance(job, LayerJob)))

    def look(job: LayerJob | CopyJob, sharing: Workers) -> TensorRow:
        matrices = {t: found[job.name] for t, found in formats.items() if job.name in found}
        return _tensor_row(base, job, _tried(base, job.name, matrices, sharing, gpu) if matrices else {})

    with started(threads) as workers:
        yield from in_turn(jobs, look, lambda job: job.numel, workers, _small_numel(gpu))


def _chosen_device(device: str, work: int) -> SharedDevice | None:
    """The GPU for so many weights; None for the processor, whose kernels are then chosen."""
    gpu = open_device(device, work)
    if gpu is None:
        choose_kernels(work)
    return None if gpu is None else SharedDevice(gpu)


def _small_numel(gpu: SharedDevice | None) -> int:
    return SMALL_NUMEL if gpu is None else BESIDE_NUMEL


def _tensor_row(base: BaseModel, job: LayerJob | CopyJob, errors: dict[str, LayerError]) -> TensorRow:
    ref = base.tensors[job.name]
    becomes = f"copied: {job.reason}" if isinstance(job, CopyJob) else job.matrix.spec.quant_type
    if isinstance(job, LayerJob):
        becomes += f", {size_of(job.matrix.spec)}"
    return TensorRow(job.name, ref.shape, ref.dtype, becomes, errors)


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


def sorted_tensors(rows: Sequence[TensorRow], key: str) -> list[TensorRow]:
    """The same for a full-precision checkpoint; by error of the first quant type that was tried."""
    check_sort_key(key)
    if key == "name":
        return sorted(rows, key=lambda row: row.name)
    if key == "numel":
        return sorted(rows, key=lambda row: -math.prod(row.shape))
    if not any(row.errors for row in rows):
        raise UsageError(f"--sort {key} needs errors", hint="--try nf4 computes them")
    return sorted(rows, key=lambda row: -max((getattr(e, key) for e in [*row.errors.values()][:1]), default=-1.0))


def check_sort_key(key: str) -> None:
    """Raises UsageError for a key that nothing can be sorted by."""
    if key not in SORT_KEYS:
        raise UsageError(f"--sort {key!r} does not exist", hint=f"one of {', '.join(SORT_KEYS)}")


@dataclass(frozen=True)
class _Adapter:
    """The adapter that lies inside a converted directory."""

    weights: WeightsFile
    config_file: Path
    config: dict[str, object]
    alphas: dict[str, int | float]

    @classmethod
    def beside(cls, base: BaseModel, reported: str | None) -> _Adapter | None:
        """The places that methods write to are tried first: a report that was changed cannot hide an adapter."""
        for name in (*(entry.adapter_dir for entry in METHODS.values()), reported or ""):
            directory = base.folder / Path(name).name
            if name and peft_adapter.is_adapter_directory(directory):
                weights = open_weights_file(directory / peft_adapter.WEIGHTS_NAME)
                config_file = directory / peft_adapter.CONFIG_NAME
                config = read_json_object(config_file)
                return cls(weights, config_file, config, _alphas(weights, config, config_file))
        return None

    def rank(self, module: str) -> int | None:
        ref = self.weights.tensors.get(peft_adapter.tensor_names(module)[0])
        return ref.shape[0] if ref is not None and ref.shape else None

    def scaling(self, module: str) -> float | None:
        rank = self.rank(module)
        return peft_adapter.scaling_of(self.config, self.alphas[module], rank) if rank else None

    def pooling(self) -> Pooling | None:
        try:
            return peft_adapter.pooling_of(self.config)
        except ValueError as error:
            raise InputError(str(error), file=self.config_file, hint="convert again") from None

    def pair(self, module: str, shape: tuple[int, int]) -> LoraPair | None:
        scaling, tensors = self.scaling(module), self.weights.tensors
        if scaling is None:
            return None
        name_A, name_B = peft_adapter.tensor_names(module)
        rank, pooling = tensors[name_A].shape[0], self.pooling()
        group_size = pooling.group_size if pooling else 1
        if (
            tensors[name_A].shape != (rank, shape[1] // group_size)
            or shape[1] % group_size
            or name_B not in tensors
            or tensors[name_B].shape != (shape[0], rank)
        ):
            raise MismatchError(f"does not fit a layer of {shape}", file=self.weights.path, tensor=name_A)
        return lora_pair(self.weights.load(name_A), self.weights.load(name_B), scaling, pooling)


def _alphas(weights: WeightsFile, config: dict[str, object], config_file: Path) -> dict[str, int | float]:
    """The alpha of every module that has a lora_A."""
    prefix, suffix = peft_adapter.PREFIX, peft_adapter.tensor_names("")[0].removeprefix(peft_adapter.PREFIX)
    names = [name for name in weights.tensors if name.startswith(prefix) and name.endswith(suffix)]
    try:
        modules = [name.removeprefix(prefix).removesuffix(suffix) for name in names]
        return peft_adapter.values_of(config, "lora_alpha", modules)
    except ValueError as error:
        raise InputError(str(error), file=config_file, hint="convert again") from None


def _layer_row(
    base: BaseModel, name: str, module: str, known: LayerResult | None, adapter: _Adapter | None
) -> LayerRow:
    rank, scaling = (adapter.rank(module), adapter.scaling(module)) if adapter else (None, None)
    error = known.error if known else None
    nbytes = sum(part.nbytes for part in base.parts(name))
    if name in base.quantized:
        shape, spec = base.quantized[name].shape, base.quantized[name].spec
    else:
        assert known is not None  # a dense layer is listed because the report knows it
        shape, spec = _matrix_shape(base, name), known.spec
    return LayerRow(name, shape, spec, 8 * nbytes / math.prod(shape), rank, scaling, error)


def _matrix_shape(base: BaseModel, name: str) -> tuple[int, int]:
    shape = base.matrix_shape(name)
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"is a layer in {REPORT_NAME} and no matrix in the files", file=base.path, tensor=name)
    return (shape[0], shape[1])


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
    adapter: _Adapter | None,
    against: tuple[BaseModel, dict[str, str]],
    workers: Workers,
    gpu: SharedDevice | None,
) -> LayerRow:
    from loftq_cli.metrics import group_errors, layer_error

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
        found = errors_on(gpu, lambda: (_loaded(original, name), base.whole(row.name)), row.numel, pair, group_size)
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


def _matrices(base: BaseModel, quant_type: str) -> dict[str, StoredMatrix]:
    """What a format with its default options would hold, by name; integers as any container could hold them."""
    layout = "dense" if FORMATS[quant_type].is_affine else None
    recipe = Recipe(method="qlora", rank=1, quant_type=quant_type, layout=layout)
    jobs = possible_jobs(base.tensors, base.config, recipe)
    return {job.name: job.matrix for job in jobs if isinstance(job, LayerJob)}


def _tried(
    base: BaseModel, name: str, matrices: Mapping[str, StoredMatrix], workers: Workers, gpu: SharedDevice | None
) -> dict[str, LayerError]:
    """The error that a weight would have as each of `matrices`."""
    from loftq_cli.metrics import layer_error

    quantizers = {t: make_quantizer(matrix.spec, matrix.dtype) for t, matrix in matrices.items()}
    numel = math.prod(base.tensors[name].shape)
    found = None if gpu is None else tries_on(gpu, lambda: _loaded(base, name), numel, quantizers)
    if found is not None:
        return found
    weight, errors = base.rows(name), {}
    for quant_type, quantizer in quantizers.items():
        try:
            quantized = quantizer.quantize(weight, workers=workers)
            errors[quant_type] = layer_error(weight, quantizer.decoded(quantized), None, workers)
        except NumericError as error:
            raise error.at(file=base.tensors[name].file, tensor=name) from None
    return errors


def _loaded(model: BaseModel, name: str) -> TensorRows:
    """A weight in full precision, all of it."""
    weight = model.whole(name)
    assert isinstance(weight, TensorRows)
    return weight
