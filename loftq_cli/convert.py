"""The conversion: a loop over the jobs of a plan, one tensor in memory at a time. Knows the order of things; the
numbers, the containers and the files are other modules'.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.checkpoint.side_files import copy_side_file, find_side_files
from loftq_cli.checkpoint.source import Checkpoint, open_checkpoint, open_weights_file
from loftq_cli.checkpoint.staging import (
    JournalEntry,
    Staging,
    check_apart,
    check_output,
    check_space,
    finished_fingerprint,
)
from loftq_cli.checkpoint.writer import SafetensorsWriter, storage_error
from loftq_cli.errors import InputError, LoftqError, StorageError, UsageError
from loftq_cli.layouts import peft_adapter
from loftq_cli.metrics import LayerError, relative, total_error
from loftq_cli.plan import CopyJob, LayerJob, Plan, build_plan, source_name
from loftq_cli.recipe import Recipe, recipe_toml
from loftq_cli.report import (
    PROVENANCE_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    TOOL,
    LayerResult,
    dump_json,
    fingerprint_of,
    layer_result,
    model_card,
    provenance_json,
    report_json,
)

if TYPE_CHECKING:
    import torch

_BUILTIN = Path(__file__).parent / "builtin"
_SLAB_NUMEL = 1 << 22  # elements converted at once when a copy changes dtype: 16 MB of float32
_VERIFY_TOLERANCE = 1e-6  # the same sums over the same numbers; only the order of additions could differ


class Observer(Protocol):
    """Who is told how a conversion goes on."""

    def layer_started(self, name: str) -> None: ...

    def layer_done(self, result: LayerResult, *, resumed: bool) -> None: ...

    def phase(self, text: str) -> None: ...


@dataclass(frozen=True)
class Conversion:
    """A conversion that is ready to run: nothing that its headers can tell is wrong with it."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    plan: Plan
    output: Path
    base_model: str

    @property
    def fingerprint(self) -> str:
        """See `Plan.fingerprint`."""
        return self.plan.fingerprint(self.checkpoint.tensors, self.base_model)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished conversion reports."""

    output: Path
    adapter: Path
    layers: tuple[LayerResult, ...]
    total: LayerError
    resumed_layers: int
    verified: bool

    @property
    def quantization_error(self) -> float:
        """Total relative error of quantizing every layer once, with no adapter."""
        squared = math.fsum(layer.quantization_error**2 * layer.error.squared_weight for layer in self.layers)
        return relative(squared, self.total.squared_weight)


def resolve_model(model: str) -> Path:
    """The path that MODEL stands for: itself, or the folder of `builtin:NAME`."""
    if not model.startswith("builtin:"):
        return Path(model)
    known = builtin_models()
    name = model.removeprefix("builtin:")
    if name not in known:
        raise UsageError(f"no built-in model {name!r}", hint=f"there is {', '.join(known)}")
    return _BUILTIN / name


def builtin_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.name for path in _BUILTIN.iterdir() if (path / "config.json").is_file())


def prepare(model: str, output: Path, recipe: Recipe) -> Conversion:
    """Open the source, read its headers and plan. Writes nothing; needs no torch.

    Raises LoftqError for everything that can be known to go wrong before the first number is read.
    """
    path = resolve_model(model)
    checkpoint = open_checkpoint(path)
    check_apart(output, [checkpoint.directory or path])
    config = read_config(checkpoint)
    plan = build_plan(checkpoint.tensors, config, recipe)
    return Conversion(checkpoint, config, plan, output, output.as_posix())


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json beside the weights; empty where there is none."""
    if checkpoint.directory is None or not (checkpoint.directory / "config.json").exists():
        return {}
    return read_json_object(checkpoint.directory / "config.json")


def already_done(conversion: Conversion, *, overwrite: bool) -> bool:
    """Whether the output is the complete, undamaged result of this very conversion, and nobody wants it replaced.

    Raises UsageError when something else stands there.
    """
    if not overwrite and finished_fingerprint(conversion.output) == conversion.fingerprint:
        return True
    check_output(conversion.output, overwrite=overwrite)
    return False


def run(conversion: Conversion, observer: Observer, *, overwrite: bool, restart: bool, verify: bool) -> Outcome:
    """Convert, verify, publish. Continues an interrupted run of the same conversion; the bytes are the same.

    Raises LoftqError; what is under the output's name then is what was there before.
    """
    plan, output = conversion.plan, conversion.output
    check_space(output, plan.base_nbytes + plan.adapter_nbytes)
    staging = Staging(output, fingerprint=conversion.fingerprint, overwrite=overwrite, restart=restart)
    try:
        results, sums, resumed = _run_jobs(conversion, staging, observer)
        if verify:
            observer.phase("verifying what was written")
            _verify(conversion, staging.path, results)
        observer.phase("publishing")
        _write_side_files(conversion, staging.path, results, fingerprint_of(sums))
        conversion.checkpoint.check_unchanged()
        staging.publish(TOOL)
    finally:
        staging.close()
    total = total_error(result.error for result in results)
    return Outcome(output, output / plan.adapter_dir, tuple(results), total, resumed, verify)


def _run_jobs(
    conversion: Conversion, staging: Staging, observer: Observer
) -> tuple[list[LayerResult], dict[str, str], int]:
    """Every job of the plan; returns the layers' results, the sha256 of their base tensors, and how many were kept."""
    plan = conversion.plan
    files = _Files(plan, staging.path)
    results: list[LayerResult] = []
    sums: dict[str, str] = {}
    resumed = 0
    try:
        for job in plan.jobs:
            if isinstance(job, LayerJob):
                observer.layer_started(job.name)
            entry = staging.entries.get(job.name)
            kept = entry is not None and _is_intact(conversion.checkpoint, entry, files)
            if entry is None or not kept:
                entry = _run_job(conversion, job, files)
                staging.record(entry)
            if isinstance(job, LayerJob):
                results.append(LayerResult.from_json(entry.result))
                sums |= {tensor.name: entry.outputs[tensor.name] for tensor in job.base_tensors}
                resumed += kept
                observer.layer_done(results[-1], resumed=kept)
        files.close(sync=True)
    finally:
        files.close(sync=False)
    return results, sums, resumed


class _Files:
    """All output files of a plan, open for writing; a tensor finds its file by its name."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        (directory / plan.adapter_dir).mkdir(exist_ok=True)
        self._writers = [SafetensorsWriter(directory / shard.file, shard.tensors) for shard in plan.shards]
        adapter = SafetensorsWriter(directory / plan.adapter_dir / peft_adapter.WEIGHTS_NAME, plan.adapter_tensors)
        by_file = {writer.path.name: writer for writer in self._writers}
        self._writer_of = {name: by_file[file] for name, file in plan.shard_of.items()}
        self._writer_of |= {tensor.name: adapter for tensor in plan.adapter_tensors}
        self._writers.append(adapter)

    def __getitem__(self, name: str) -> SafetensorsWriter:
        return self._writer_of[name]

    def close(self, *, sync: bool) -> None:
        for writer in self._writers:
            writer.close(sync=sync)


def _run_job(conversion: Conversion, job: LayerJob | CopyJob, files: _Files) -> JournalEntry:
    if isinstance(job, CopyJob):
        digest = hashlib.sha256()
        chunks = _copied_chunks(conversion.checkpoint, job, digest)
        written = {job.output.name: files[job.output.name].write_chunks(job.output.name, chunks)}
        return JournalEntry(job.name, digest.hexdigest(), written, {})
    file = conversion.checkpoint.tensors[job.name].file
    try:
        tensors, result, input_sha256 = _quantize_layer(conversion, job)
    except LoftqError as error:
        raise error if error.tensor else error.at(file=file, tensor=job.name) from None
    written = {name: files[name].write(name, tensor) for name, tensor in tensors.items()}
    return JournalEntry(job.name, input_sha256, written, result.to_json())


def _quantize_layer(conversion: Conversion, job: LayerJob) -> tuple[dict[str, torch.Tensor], LayerResult, str]:
    """The tensors to write, what they are worth, and the sha256 of the weight they come from."""
    import torch

    from loftq_cli.checkpoint.writer import tensor_bytes
    from loftq_cli.layouts.layout import load_layout
    from loftq_cli.methods.method import load_method
    from loftq_cli.metrics import layer_error
    from loftq_cli.quant.formats import make_quantizer

    recipe = conversion.plan.recipe
    stored = conversion.checkpoint.load(job.name)
    input_sha256 = hashlib.sha256(tensor_bytes(stored)).hexdigest()
    weight = as_matrix(stored, transposed=job.matrix.transposed)
    del stored
    quantizer = make_quantizer(job.matrix.spec, job.matrix.dtype)
    initial = load_method(recipe.method)(
        weight,
        quantizer,
        job.lora,
        iterations=recipe.iterations,
        svd=recipe.svd,
        generator=torch.Generator().manual_seed(_seed(recipe.seed, job.name)),
    )
    tensors = load_layout(recipe.layout).pack(job.matrix, initial.quantized)
    tensors |= peft_adapter.pack(job.module, initial.lora)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{name} would not be finite in {str(tensor.dtype).removeprefix('torch.')}",
                hint="a wider dtype holds it: --adapter-dtype float32",
            )
    error = layer_error(weight, quantizer.dequantize(initial.quantized), initial.lora)
    result = layer_result(job, error, initial.quantization_error, initial.iteration_errors, initial.best_iteration)
    return tensors, result, input_sha256


def as_matrix(stored: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """A stored weight as contiguous float32 [out, in]."""
    return (stored.T if transposed else stored).float().contiguous()


def _seed(seed: int, name: str) -> int:
    """A seed for one tensor: the order of the jobs cannot change what is drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def _copied_chunks(checkpoint: Checkpoint, job: CopyJob, digest: Any) -> Iterator[memoryview]:
    """The bytes of a copied tensor, in pieces; `digest` takes in what was read."""
    ref = checkpoint.tensors[job.name]
    if job.output.dtype == ref.dtype:
        for chunk in checkpoint.chunks(job.name):
            digest.update(chunk)
            yield chunk
        return
    yield from recast_chunks(checkpoint, job.name, job.output.dtype, digest)


def recast_chunks(checkpoint: Checkpoint, name: str, dtype: str, digest: Any) -> Iterator[memoryview]:
    """The bytes of a floating-point tensor in another dtype, a slab of rows at a time.

    Raises InputError when a finite number becomes infinite.
    """
    import torch

    from loftq_cli.checkpoint.writer import tensor_bytes

    ref = checkpoint.tensors[name]
    rows = ref.shape[0] if ref.shape else 1
    step = max(1, _SLAB_NUMEL * rows // max(ref.numel, 1))
    for start in range(0, rows, step):
        slab = checkpoint.load_rows(name, start, min(start + step, rows)) if ref.shape else checkpoint.load(name)
        digest.update(tensor_bytes(slab))
        cast = slab.to(getattr(torch, dtype))
        if not torch.equal(torch.isfinite(cast), torch.isfinite(slab)):
            raise InputError(f"has numbers too large for {dtype}", file=ref.file, tensor=name)
        yield tensor_bytes(cast)


def _is_intact(checkpoint: Checkpoint, entry: JournalEntry, files: _Files) -> bool:
    """Whether a finished unit can be kept: its input and its output are re-hashed, existence proves nothing."""
    digest = hashlib.sha256()
    for chunk in checkpoint.chunks(entry.unit):
        digest.update(chunk)
    if digest.hexdigest() != entry.input_sha256:
        return False
    return all(files[name].sha256(name) == sha256 for name, sha256 in entry.outputs.items())


def _verify(conversion: Conversion, directory: Path, results: Sequence[LayerResult]) -> None:
    """Read every layer back as a loader would, and compare its error with the reported one.

    Raises StorageError naming the first tensor for which they differ.
    """
    from loftq_cli.base_model import BaseModel
    from loftq_cli.metrics import layer_error
    from loftq_cli.tensors import LoraPair

    plan = conversion.plan
    checkpoint = conversion.checkpoint
    adapter = open_weights_file(directory / plan.adapter_dir / peft_adapter.WEIGHTS_NAME)
    with BaseModel.of_shards(directory, [shard.file for shard in plan.shards], plan.family) as base:
        for job, result in zip(plan.layers, results, strict=True):
            weight = as_matrix(checkpoint.load(job.name), transposed=job.matrix.transposed)
            name_A, name_B = peft_adapter.tensor_names(job.module)
            pair = LoraPair(adapter.load(name_A), adapter.load(name_B), job.lora.scaling)
            on_disk = layer_error(weight, base.matrix(job.name), pair).error
            if not abs(on_disk - result.error.error) <= _VERIFY_TOLERANCE * max(1.0, on_disk):
                raise StorageError(
                    f"has error {on_disk:.6f} as read back, {result.error.error:.6f} was computed",
                    file=directory,
                    tensor=job.name,
                    hint="the disk or the memory is faulty",
                )


def _write_side_files(
    conversion: Conversion, directory: Path, results: Sequence[LayerResult], base_fingerprint: str
) -> None:
    plan, base_model = conversion.plan, conversion.base_model
    source = source_name(conversion.checkpoint.path)
    if conversion.checkpoint.directory is not None:
        for path in find_side_files(conversion.checkpoint.directory)[0]:
            target = Path("SOURCE_README.md") if path == Path("README.md") else path
            copy_side_file(conversion.checkpoint.directory / path, directory / target)
    texts = {
        f"{plan.adapter_dir}/{peft_adapter.CONFIG_NAME}": dump_json(plan.adapter_config(base_model)),
        f"{plan.adapter_dir}/{PROVENANCE_NAME}": dump_json(
            provenance_json(plan, base_model=base_model, base_fingerprint=base_fingerprint)
        ),
        "README.md": model_card(plan, results, source=source, base_model=base_model),
        RECIPE_NAME: recipe_toml(plan.recipe),
        REPORT_NAME: dump_json(
            report_json(plan, results, source=source, base_model=base_model, base_fingerprint=base_fingerprint)
        ),
    }
    if len(plan.shards) > 1:
        texts["model.safetensors.index.json"] = index_json(plan.shard_of, plan.base_nbytes)
    config = plan.model_config(conversion.config)
    if config:
        texts["config.json"] = dump_json(config)
    write_texts(directory, texts)


def write_texts(directory: Path, texts: Mapping[str, str]) -> None:
    """Write small files by relative name. Raises StorageError."""
    for name, text in texts.items():
        try:
            (directory / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise storage_error(error, directory / name) from None


def index_json(shard_of: Mapping[str, str], total_nbytes: int) -> str:
    """model.safetensors.index.json."""
    return dump_json({"metadata": {"total_size": total_nbytes}, "weight_map": dict(sorted(shard_of.items()))})
