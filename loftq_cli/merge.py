"""Base plus adapter to a deployment checkpoint: dequant(Q) + s·B·A in float32, one tensor at a time. Every adapter
tensor is merged, copied or refused; nothing is dropped.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loftq_cli.adapter_source import AdapterSource, LoraTensors, open_adapter
from loftq_cli.base_model import BaseModel
from loftq_cli.checkpoint.side_files import copy_side_file, find_side_files
from loftq_cli.checkpoint.staging import Staging, check_apart, check_output, check_space
from loftq_cli.checkpoint.writer import SafetensorsWriter
from loftq_cli.convert import index_json, recast_chunks, write_texts
from loftq_cli.errors import InputError, MismatchError, NumericError, QualityError, UsageError
from loftq_cli.layouts.layout import ModelFacts, StoredMatrix, load_layout
from loftq_cli.plan import Shard, pack_shards, source_name
from loftq_cli.provenance import Provenance, check_contents, check_provenance
from loftq_cli.quant.formats import FORMATS, make_quantizer
from loftq_cli.recipe import parse_size
from loftq_cli.report import RECIPE_NAME, REPORT_NAME, TOOL, dump_json
from loftq_cli.targets import module_of
from loftq_cli.tensors import MODEL_DTYPES, CodebookSpec, OutTensor

if TYPE_CHECKING:
    import torch

MERGE_REPORT_NAME = "loftq_merge_report.json"
LEAST_RETENTION = 0.5  # below this, most of what was trained would be gone from the deployed model
_OURS = {REPORT_NAME, RECIPE_NAME, MERGE_REPORT_NAME, "checksums.json", "README.md"}


@dataclass(frozen=True, slots=True)
class MergeJob:
    """One tensor of the base (or a new one), and what becomes of it.

    name          of the base's tensor; for a weight that is stored quantized, all its parts together
    lora          the adapter to add, if any
    lora_bias     the adapter's tensor that is added to this bias, with its scaling
    replacement   the adapter's tensor that takes its place, if any
    matrix        how it is quantized again, if it is
    outputs       what is written
    """

    name: str
    lora: LoraTensors | None
    lora_bias: LoraTensors | None
    replacement: str | None
    matrix: StoredMatrix | None
    outputs: tuple[OutTensor, ...]


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """One merged weight. `retention` is the share of s·B·A that survives quantizing again; None where that is not done.

    squared_delta and retained are the sums it comes from: ||Δ||² and <what changed, Δ>.
    """

    name: str
    rank: int
    scaling: float
    squared_weight: float
    squared_delta: float
    retained: float | None

    @property
    def retention(self) -> float | None:
        """<requantized − base, Δ> / <Δ, Δ> (1 for an adapter that adds nothing)."""
        return None if self.retained is None else retention(self.retained, self.squared_delta)

    @property
    def relative_delta(self) -> float:
        """||Δ|| / ||dequant(Q)||."""
        return math.sqrt(self.squared_delta / self.squared_weight) if self.squared_weight else 0.0


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How to merge. `dtype` of None is the model's own."""

    dtype: str | None = None
    requantize: str | None = None
    max_shard_size: str = "5GB"
    force: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in MODEL_DTYPES:
            raise UsageError(f"--dtype {self.dtype!r} does not exist", hint=f"one of {', '.join(MODEL_DTYPES)}")
        if self.requantize is not None and self.requantize not in FORMATS:
            raise UsageError(f"--requantize {self.requantize!r} does not exist", hint=f"one of {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Merge:
    """A merge that is ready to run: base and adapter fit together as far as their headers tell."""

    base: BaseModel
    adapter: AdapterSource
    output: Path
    options: MergeOptions
    dtype: str
    jobs: tuple[MergeJob, ...]
    shards: tuple[Shard, ...]
    provenance: Provenance

    @property
    def nbytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(t.nbytes for job in self.jobs for t in job.outputs)

    @property
    def fingerprint(self) -> str:
        """A hash of the options and of both inputs' headers."""
        refs = [*self.base.tensors.values(), *self.adapter.weights.tensors.values()]
        headers = [[ref.name, ref.dtype, ref.shape] for ref in refs]
        options = [self.options.dtype, self.options.requantize, self.options.max_shard_size]
        values = [TOOL, options, self.dtype, dict(self.adapter.config), headers]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Observer(Protocol):
    """Who is told how a merge goes on."""

    def layer_merged(self, layer: MergedLayer) -> None: ...


def prepare(base_path: Path, adapter_path: Path, output: Path, options: MergeOptions, *, overwrite: bool) -> Merge:
    """Open both inputs and plan. Reads no numbers and writes nothing.

    Raises MismatchError when the adapter does not fit the base, naming the tensor.
    """
    base = BaseModel.open(base_path)
    adapter = open_adapter(adapter_path)
    check_apart(output, [base.path, adapter.path])
    provenance = check_provenance(base, adapter.path, adapter.config, force=options.force)
    model_dtype = base.family.dtype(base.tensors.values())
    dtype = options.dtype or model_dtype
    jobs = tuple(_jobs(base, adapter, options, dtype))
    shards = pack_shards([job.outputs for job in jobs], parse_size(options.max_shard_size))
    check_output(output, overwrite=overwrite)
    return Merge(base, adapter, output, options, dtype, jobs, shards, provenance)


def run(merge: Merge, observer: Observer, *, overwrite: bool) -> tuple[MergedLayer, ...]:
    """Merge, check, publish. Returns the merged layers.

    Raises QualityError when quantizing again erases more than half of the adapter, unless forced.
    """
    check_contents(merge.base, merge.provenance, force=merge.options.force)
    check_space(merge.output, merge.nbytes)
    staging = Staging(merge.output, fingerprint=merge.fingerprint, overwrite=overwrite, restart=True)
    try:
        layers = _run_jobs(merge, staging, observer)
        if merge.options.requantize and not merge.options.force:
            try:
                _check_retention(merge, layers)
            except QualityError:
                staging.discard()
                raise
        _write_side_files(merge, staging.path, layers)
        assert merge.base.checkpoint is not None
        merge.base.checkpoint.check_unchanged()
        merge.adapter.weights.check_unchanged()
        staging.publish(TOOL)
    finally:
        staging.close()
    return layers


def total_retention(layers: Sequence[MergedLayer]) -> float | None:
    """The share of the whole adapter that survives; None where nothing was quantized again."""
    measured = [layer for layer in layers if layer.retained is not None]
    if not measured:
        return None
    return retention(math.fsum(x.retained or 0.0 for x in measured), math.fsum(x.squared_delta for x in measured))


def retention(retained: float, squared_delta: float) -> float:
    """<change, Δ> / <Δ, Δ>; an adapter that adds nothing loses nothing."""
    return retained / squared_delta if squared_delta else 1.0


def _jobs(base: BaseModel, adapter: AdapterSource, options: MergeOptions, dtype: str) -> Iterator[MergeJob]:
    """A job for every base tensor, in order, then for every new one. Raises MismatchError for leftovers."""
    parts = {part for name in base.quantized for part in base.parts(name)} - base.quantized
    modules = [module_of(name) for name in base.tensors if name not in parts]
    lora, whole = dict(adapter.lora), dict(adapter.whole)
    biases = {f"{module}.bias": entry for module, entry in lora.items() if entry.lora_bias}
    for name in base.tensors:
        if name in parts:
            continue
        loaded = base.family.loaded_name(name, modules)
        entry = lora.pop(module_of(loaded), None) if name.endswith(".weight") else None
        if entry is not None:
            _check_shapes(base, name, adapter, entry)
        replacement = whole.pop(loaded, None)
        if replacement is not None:
            _check_replacement(base, name, adapter, replacement, entry)
        yield _job(base, name, entry, biases.pop(loaded, None), replacement, options, dtype)
    file = adapter.weights.path
    if lora:
        raise MismatchError("its module is not in the base", file=file, tensor=next(iter(lora.values())).lora_A)
    if biases:
        raise MismatchError(
            "its module has no bias in the base", file=file, tensor=next(iter(biases.values())).lora_bias
        )
    for loaded, name in whole.items():
        if module_of(loaded) not in (adapter.config.get("modules_to_save") or []) and not _is_saved(adapter, loaded):
            raise MismatchError("is left over: the base has no such tensor", file=file, tensor=name)
        ref = adapter.weights.tensors[name]
        yield MergeJob(loaded, None, None, name, None, (OutTensor(loaded, _cast(ref.dtype, dtype), ref.shape),))


def _job(
    base: BaseModel,
    name: str,
    lora: LoraTensors | None,
    lora_bias: LoraTensors | None,
    replacement: str | None,
    options: MergeOptions,
    dtype: str,
) -> MergeJob:
    ref, module = base.tensors[name], module_of(name)
    if name not in base.quantized and (lora is None or lora.is_embedding or options.requantize is None):
        stored = _cast(ref.dtype, dtype) if lora or lora_bias or replacement or options.dtype else ref.dtype
        return MergeJob(name, lora, lora_bias, replacement, None, (OutTensor(name, stored, ref.shape),))
    transposed = base.family.is_transposed(module)
    if name in base.quantized:
        spec, shape = base.stored_spec(name)
    else:
        spec, shape = CodebookSpec(), (ref.shape[1], ref.shape[0]) if transposed else (ref.shape[0], ref.shape[1])
    if options.requantize is None:
        stored_shape = shape[::-1] if transposed else shape
        return MergeJob(name, lora, lora_bias, replacement, None, (OutTensor(name, dtype, stored_shape),))
    layout = load_layout("bitsandbytes")
    fit = layout.fit(replace(spec, codebook=options.requantize), shape)
    if fit.spec is None:
        return MergeJob(name, lora, lora_bias, replacement, None, (OutTensor(name, dtype, ref.shape),))
    matrix = StoredMatrix(name, shape, fit.spec, dtype, transposed)
    return MergeJob(name, lora, lora_bias, replacement, matrix, layout.planned(matrix))


def _cast(stored: str, dtype: str) -> str:
    """The dtype of a copied tensor: numbers of a model dtype follow the model's."""
    return dtype if stored in MODEL_DTYPES else stored


def _is_saved(adapter: AdapterSource, loaded: str) -> bool:
    """Whether `modules_to_save` names a module that holds the tensor `loaded`."""
    return any(f".{saved}." in f".{loaded}" for saved in adapter.config.get("modules_to_save") or [])


def _check_shapes(base: BaseModel, name: str, adapter: AdapterSource, entry: LoraTensors) -> None:
    ref, module = base.tensors[name], module_of(name)
    if name in base.quantized:
        shape: tuple[int, ...] = base.stored_spec(name)[1]
    else:
        shape = ref.shape[::-1] if base.family.is_transposed(module) or entry.is_embedding else ref.shape
    tensors = adapter.weights.tensors
    adapted = (tensors[entry.lora_B].shape[0], tensors[entry.lora_A].shape[1])
    if adapted != shape:
        raise MismatchError(
            f"adapts a matrix of {adapted}, and {name} is {shape}", file=adapter.weights.path, tensor=entry.lora_B
        )
    if entry.is_embedding and base.family.ties_embeddings():
        raise MismatchError(
            "adapts an embedding whose weight the head shares: merged, it would change the head too",
            file=adapter.weights.path,
            tensor=entry.lora_B,
        )


def _check_replacement(
    base: BaseModel, name: str, adapter: AdapterSource, replacement: str, entry: LoraTensors | None
) -> None:
    shape = base.stored_spec(name)[1] if name in base.quantized else base.tensors[name].shape
    found = adapter.weights.tensors[replacement].shape
    if found != shape:
        raise MismatchError(
            f"is {found}, and the base has {shape}",
            file=adapter.weights.path,
            tensor=replacement,
            hint="resize the base's embeddings first",
        )
    if entry is not None:
        raise MismatchError("is saved whole and adapted as well", file=adapter.weights.path, tensor=replacement)


def _run_jobs(merge: Merge, staging: Staging, observer: Observer) -> tuple[MergedLayer, ...]:
    writers = {shard.file: SafetensorsWriter(staging.path / shard.file, shard.tensors) for shard in merge.shards}
    writer_of = {tensor.name: writers[shard.file] for shard in merge.shards for tensor in shard.tensors}
    layers = []
    try:
        for job in merge.jobs:
            layer = _run_job(merge, job, writer_of)
            if layer is not None:
                layers.append(layer)
                observer.layer_merged(layer)
        for writer in writers.values():
            writer.close(sync=True)
    finally:
        for writer in writers.values():
            writer.close(sync=False)
    return tuple(layers)


def _run_job(merge: Merge, job: MergeJob, writer_of: Mapping[str, SafetensorsWriter]) -> MergedLayer | None:
    output = job.outputs[0]
    writer = writer_of[output.name]
    if job.replacement is not None:
        writer.write(output.name, _finite(merge, job, merge.adapter.weights.load(job.replacement), output.dtype))
    elif job.lora is not None or job.matrix is not None or job.name in merge.base.quantized:
        try:
            tensors, layer = _merged(merge, job)
        except NumericError as error:
            raise error.at(file=merge.base.tensors[job.name].file, tensor=job.name) from None
        for name, tensor in tensors.items():
            writer_of[name].write(name, tensor)
        return layer
    elif job.lora_bias is not None and job.lora_bias.lora_bias is not None:
        bias = merge.adapter.weights.load(job.lora_bias.lora_bias).float() * job.lora_bias.scaling
        writer.write(output.name, _finite(merge, job, merge.base.load(job.name).float() + bias, output.dtype))
    elif output.dtype == merge.base.tensors[job.name].dtype:
        assert merge.base.checkpoint is not None
        writer.write_chunks(output.name, merge.base.checkpoint.chunks(job.name))
    else:
        assert merge.base.checkpoint is not None
        chunks = recast_chunks(merge.base.checkpoint, job.name, output.dtype, hashlib.sha256())
        writer.write_chunks(output.name, chunks)
    return None


def _merged(merge: Merge, job: MergeJob) -> tuple[dict[str, torch.Tensor], MergedLayer | None]:
    """The tensors to write for one weight, and what merging it did."""
    from loftq_cli.triton_kernels.error_stats import error_stats

    base, entry = merge.base, job.lora
    weight = base.matrix(job.name)
    if entry is not None and entry.is_embedding:
        weight = weight.T.contiguous()
    layer, delta = None, None
    squared_weight = error_stats(weight, weight).squared_weight
    merged = weight
    if entry is not None:
        lora_A, lora_B = merge.adapter.weights.load(entry.lora_A), merge.adapter.weights.load(entry.lora_B)
        delta = (lora_B.float() @ lora_A.float()).mul_(entry.scaling)
        merged = weight + delta
        squared_delta = error_stats(delta, delta).squared_weight
        layer = MergedLayer(job.name, lora_A.shape[0], entry.scaling, squared_weight, squared_delta, None)
    if job.matrix is None:
        if base.family.is_transposed(module_of(job.name)) or (entry is not None and entry.is_embedding):
            merged = merged.T.contiguous()
        return {job.name: _finite(merge, job, merged, job.outputs[0].dtype)}, layer
    quantizer = make_quantizer(job.matrix.spec, job.matrix.dtype)
    quantized = quantizer.quantize(merged)
    tensors = load_layout("bitsandbytes").pack(job.matrix, quantized)
    if layer is not None and delta is not None:
        change = quantizer.dequantize(quantized).sub_(weight)
        layer = replace(layer, retained=float((change.double() * delta).sum()))
    return tensors, layer


def _finite(merge: Merge, job: MergeJob, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """`tensor` in `dtype`. Raises InputError when it is not finite there."""
    import torch

    cast = tensor.to(getattr(torch, dtype)).contiguous()
    if not bool(torch.isfinite(cast).all()):
        raise InputError(
            f"merged, it is not finite in {dtype}", file=merge.base.path, tensor=job.name, hint="--dtype float32"
        )
    return cast


def _check_retention(merge: Merge, layers: Sequence[MergedLayer]) -> None:
    total = total_retention(layers)
    if total is not None and total < LEAST_RETENTION:
        raise QualityError(
            f"quantized again to {merge.options.requantize}, {total:.1%} of the adapter would survive",
            file=merge.base.path,
            hint="merge without --requantize, keep the adapter apart, or --force",
        )


def _write_side_files(merge: Merge, directory: Path, layers: Sequence[MergedLayer]) -> None:
    base, folder = merge.base, merge.base.checkpoint.directory if merge.base.checkpoint else None
    if folder is not None:
        for path in find_side_files(folder)[0]:
            if path.as_posix() not in _OURS:
                copy_side_file(folder / path, directory / path)
    report = {
        **TOOL,
        "base": source_name(base.path),
        "adapter": source_name(merge.adapter.path),
        "dtype": merge.dtype,
        "requantize": merge.options.requantize,
        "notes": list(merge.provenance.notes),
        "retention": total_retention(layers),
        "layers": [layer_json(layer) for layer in layers],
    }
    texts = {MERGE_REPORT_NAME: dump_json(report), "README.md": _model_card(merge)}
    if len(merge.shards) > 1:
        shard_of = {tensor.name: shard.file for shard in merge.shards for tensor in shard.tensors}
        texts["model.safetensors.index.json"] = index_json(shard_of, merge.nbytes)
    if base.config:
        texts["config.json"] = dump_json(_model_config(merge))
    write_texts(directory, texts)


def layer_json(layer: MergedLayer) -> dict[str, Any]:
    """One merged layer as JSON values."""
    return {
        "name": layer.name,
        "rank": layer.rank,
        "scaling": layer.scaling,
        "relative_delta": layer.relative_delta,
        "retention": layer.retention,
    }


def _model_config(merge: Merge) -> dict[str, Any]:
    config = {key: value for key, value in merge.base.config.items() if key not in ("dtype", "torch_dtype")}
    config["dtype"] = merge.dtype
    requantized = [job for job in merge.jobs if job.matrix is not None]
    if not requantized:
        return config
    modules = [module_of(job.name) for job in merge.jobs]
    quantized = [merge.base.family.loaded_name(module_of(job.name), modules) for job in requantized]
    kept = [
        merge.base.family.loaded_name(module_of(job.name), modules)
        for job in merge.jobs
        if job.matrix is None and job.name.endswith(".weight") and len(job.outputs[0].shape) == 2
    ]
    assert requantized[0].matrix is not None
    facts = ModelFacts(merge.dtype, requantized[0].matrix.spec, quantized, kept)
    return load_layout("bitsandbytes").model_config(config, facts)


def _model_card(merge: Merge) -> str:
    form = f"quantized again to {merge.options.requantize}" if merge.options.requantize else f"dense, {merge.dtype}"
    return (
        f"# {source_name(merge.base.path)} merged with {source_name(merge.adapter.path)}\n\n"
        f"{form}; merged in float32 by loftq-cli. `{MERGE_REPORT_NAME}` lists every merged layer.\n"
    )
