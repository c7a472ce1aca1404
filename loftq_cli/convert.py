"""The conversion: the jobs of a plan, in order, then proof and publication. Knows the order of things; the
numbers, the containers and the files are other modules'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from loftq_cli.allocation import Allocation, allocate
from loftq_cli.candidates import Options, Target
from loftq_cli.checkpoint.checksums import CHECKSUMS
from loftq_cli.checkpoint.journal import JournalEntry, outputs_of
from loftq_cli.checkpoint.safetensors_file import is_tensor_name
from loftq_cli.checkpoint.side_files import are_copied, copy_side_files, nbytes_of, side_file_copies
from loftq_cli.checkpoint.source import Checkpoint, open_checkpoint, open_weights_file
from loftq_cli.checkpoint.staging import Staging, check_apart, check_output, check_space, finished_mark
from loftq_cli.checkpoint.statistics import Statistics, open_statistics
from loftq_cli.checkpoint.writer import OutputFiles
from loftq_cli.device import Device, open_device
from loftq_cli.errors import MismatchError, StorageError, UsageError
from loftq_cli.jobs import NOT_FINITE, JobRunner, is_streamed, not_finite_note
from loftq_cli.kernels import choose_kernels
from loftq_cli.layouts import peft_adapter
from loftq_cli.metrics import LayerError, relative, total_error
from loftq_cli.model_files import index_json, write_texts
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
    model_card,
    provenance_json,
    report_json,
)
from loftq_cli.rows import TensorRows
from loftq_cli.schedule import Steps, in_order
from loftq_cli.workers import Workers, started

_BUILTIN = Path(__file__).parent / "builtin"
_OWN_FILES = {RECIPE_NAME, REPORT_NAME, PROVENANCE_NAME, CHECKSUMS}  # of a source that is a result itself
_VERIFY_TOLERANCE = 1e-6  # the same sums over the same numbers; only the order of additions could differ


class Observer(Protocol):
    """Who is told how a conversion goes on."""

    def layer_started(self, name: str) -> None: ...

    def layer_done(self, result: LayerResult, *, resumed: bool) -> None: ...

    def phase(self, text: str) -> None: ...


@dataclass(frozen=True)
class Conversion:
    """A conversion that is ready to run: nothing that its headers can tell is wrong with it. `allocation` says how its
    formats and ranks were chosen, where they were.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    plan: Plan
    output: Path
    base_model: str
    statistics: Statistics | None = None
    allocation: Allocation | None = None

    @property
    def side_files(self) -> dict[str, Path]:
        """The small files that are copied, by the names of their copies; what the result has of its own is not."""
        return side_file_copies(self.checkpoint.directory, leave=_OWN_FILES)

    @property
    def fingerprint(self) -> str:
        """See `Plan.fingerprint`."""
        statistics = None if self.statistics is None else self.statistics.sha256
        return self.plan.fingerprint(self.checkpoint.tensors, self.base_model, statistics)


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
    checkpoint = _opened(model, output)
    plan, statistics = _planned(checkpoint, recipe)
    return Conversion(checkpoint, checkpoint.config(), plan, output, output.as_posix(), statistics)


def prepare_within(
    model: str,
    output: Path,
    recipe: Recipe,
    target: Target,
    *,
    threads: int = 1,
    observe: Callable[[str, int, int], None],
) -> Conversion:
    """The same with number formats and ranks chosen within a target; see `allocate`. Reads every weight, on the
    processor.
    """
    checkpoint = _opened(model, output)
    statistics = None
    if recipe.calibration is not None:  # of this model, before any weight is read
        widest = build_plan(checkpoint.tensors, checkpoint.config(), Options(recipe, target).widest)
        statistics, _ = _statistics(Path(recipe.calibration), widest)
    found = allocate(checkpoint, recipe, target, statistics, threads=threads, observe=observe)
    plan, statistics = _planned(checkpoint, found.recipe)
    return Conversion(checkpoint, checkpoint.config(), plan, output, output.as_posix(), statistics, found)


def _opened(model: str, output: Path) -> Checkpoint:
    path = resolve_model(model)
    if not is_tensor_name(str(output)):  # the adapter's config has the name of its base
        raise UsageError("is not a name that can be written as text (UTF-8)", file=output, hint="choose another output")
    checkpoint = open_checkpoint(path)
    check_apart(output, [checkpoint.directory or path, *checkpoint.files])
    return checkpoint


def _planned(checkpoint: Checkpoint, recipe: Recipe) -> tuple[Plan, Statistics | None]:
    """The plan, and the statistics that its recipe names."""
    plan = build_plan(checkpoint.tensors, checkpoint.config(), recipe)
    if recipe.calibration is None:
        return plan, None
    statistics, notes = _statistics(Path(recipe.calibration), plan)
    return replace(plan, notes=(*plan.notes, *notes)), statistics


def _statistics(path: Path, plan: Plan) -> tuple[Statistics, list[str]]:
    """The statistics of the layers' inputs, and what has to be said of layers that text does not reach, as those of
    images. Raises MismatchError for statistics of another model.
    """
    statistics = open_statistics(path)
    missing = [job.name for job in plan.layers if job.name not in statistics.names]
    hint = "loftq calibrate this model"
    if len(missing) == len(plan.layers):
        raise MismatchError("has no statistics there", file=path, tensor=missing[0], hint=hint)
    for job in plan.layers:
        found = job.matrix.shape[1] if job.name in missing else statistics.in_features(job.name)
        if found != job.matrix.shape[1]:
            what = f"has {job.matrix.shape[1]} inputs, and statistics of {found}"
            raise MismatchError(what, file=path, tensor=job.name, hint=hint)
    if not missing:
        return statistics, []
    return statistics, [f"{len(missing)} layers have no statistics, and all of their weights count the same"]


def already_done(conversion: Conversion, *, overwrite: bool) -> bool:
    """Whether the output is the complete, undamaged result of this very conversion, and nobody wants it replaced.

    Raises UsageError when something else stands there.
    """
    mark = finished_mark(conversion.output, conversion.fingerprint, overwrite=overwrite)
    # The fingerprint covers headers and options; whether the weights are the same, only their bytes can tell.
    if mark is not None:
        names = [job.name for job in conversion.plan.jobs]
        inputs = fingerprint_of({name: conversion.checkpoint.sha256(name) for name in names})
        if mark.input_sha256 == inputs and are_copied(conversion.side_files, mark.files):
            return True
    check_output(conversion.output, overwrite=overwrite)
    return False


def run(
    conversion: Conversion,
    observer: Observer,
    *,
    overwrite: bool,
    restart: bool,
    verify: bool,
    threads: int = 1,
    device: str = "cpu",
    max_memory: int | None = None,
) -> Outcome:
    """Convert, verify, publish. Continues an interrupted run of the same conversion; the bytes are the same, with any
    number of threads. A GPU, see `open_device`, takes sums in another order: its adapters differ in their last digits.

    Raises LoftqError; what is under the output's name then is what was there before.
    """
    plan, output = conversion.plan, conversion.output
    gpu = open_device(device, plan.work, max_memory)
    missing = choose_kernels(plan.work) if gpu is None else None
    for said in (missing, None if gpu is None else f"computing on {gpu}"):
        if said is not None:
            observer.phase(said)
    check_space(output, plan.base_nbytes + plan.adapter_nbytes + nbytes_of(conversion.side_files))
    kind = "cpu" if gpu is None else gpu.device.type
    staging = Staging(output, fingerprint=conversion.fingerprint, overwrite=overwrite, restart=restart, device=kind)
    try:
        if staging.entries:
            observer.phase(f"continuing: {len(staging.entries)} of {len(plan.jobs)} tensors are finished; hashing them")
        with started(threads) as workers, _output_files(plan, staging.path) as files:
            results, entries, resumed = _run_jobs(conversion, staging, files, observer, workers, gpu)
            if verify:
                observer.phase("verifying what was written")
                if gpu is None:
                    _verify(conversion, staging.path, results, workers)
                else:
                    _verify_bytes(files, entries, staging.path, workers)
            sums = files.sums_by_file(outputs_of(entries.values()))
        observer.phase("publishing")
        staging.keep_only(sums)
        _write_side_files(conversion, staging.path, results, entries)
        conversion.checkpoint.check_unchanged()
        inputs = {name: entry.input_sha256 for name, entry in entries.items()}
        staging.publish(TOOL, sums, fingerprint_of(inputs))
    finally:
        staging.close()
    total = total_error(result.error for result in results)
    return Outcome(output, output / plan.adapter_dir, tuple(results), total, resumed, verify)


def _output_files(plan: Plan, directory: Path) -> OutputFiles:
    adapter = {f"{plan.adapter_dir}/{peft_adapter.WEIGHTS_NAME}": plan.adapter_tensors}
    return OutputFiles(directory, {shard.file: shard.tensors for shard in plan.shards} | adapter)


def _run_jobs(
    conversion: Conversion,
    staging: Staging,
    files: OutputFiles,
    observer: Observer,
    workers: Workers,
    gpu: Device | None,
) -> tuple[list[LayerResult], dict[str, JournalEntry], int]:
    """Every job of the plan; returns the layers' results, all journal entries, and how many layers were kept."""
    plan = conversion.plan
    results: list[LayerResult] = []
    entries: dict[str, JournalEntry] = {}
    resumed = 0
    runner = JobRunner(conversion.checkpoint, plan.recipe, files, staging.entries, conversion.statistics)

    def announce(job: LayerJob | CopyJob) -> None:
        if isinstance(job, LayerJob):
            observer.layer_started(job.name)

    def finished() -> Generator[tuple[JournalEntry, bool]]:
        if gpu is None:
            steps = Steps(runner.load, runner.compute, runner.write)
            return in_order(plan.jobs, steps, lambda job: job.numel, workers, announce)
        from loftq_cli.device_jobs import DeviceRunner, run_on_device

        return run_on_device(DeviceRunner(runner, gpu, plan.recipe), plan.jobs, workers.threads, announce)

    # The jobs end before the recording does: by then nothing is being written any more.
    with staging.recording(files.sync) as record, closing(finished()) as done:
        for job, (entry, kept) in zip(plan.jobs, done, strict=True):
            if not kept:
                record(entry)
            entries[job.name] = entry
            if isinstance(job, LayerJob):
                results.append(LayerResult.from_json(entry.result))
                resumed += kept
                observer.layer_done(results[-1], resumed=kept)
            elif NOT_FINITE in entry.result:
                observer.phase(f"note: {not_finite_note(job.name)}")
    return results, entries, resumed


def _base_fingerprint(plan: Plan, entries: Mapping[str, JournalEntry]) -> str:
    """One hash for all quantized weights of the base: what an adapter of it belongs to."""
    tensors = ((job.name, tensor.name) for job in plan.layers for tensor in job.base_tensors)
    return fingerprint_of({tensor: entries[name].outputs[tensor] for name, tensor in tensors})


def _verify(conversion: Conversion, directory: Path, results: Sequence[LayerResult], workers: Workers) -> None:
    """Read every layer back as a loader would, and compare its error with the reported one.

    Raises StorageError naming the first tensor for which they differ.
    """
    from loftq_cli.base_model import BaseModel
    from loftq_cli.metrics import layer_error
    from loftq_cli.tensors import lora_pair

    plan = conversion.plan
    checkpoint = conversion.checkpoint
    adapter = open_weights_file(directory / plan.adapter_dir / peft_adapter.WEIGHTS_NAME)
    config = plan.model_config(conversion.config)
    with BaseModel.of_shards(directory, [shard.file for shard in plan.shards], config) as base:
        for job, result in zip(plan.layers, results, strict=True):
            if is_streamed(plan.recipe, job):  # its error is that of what was read back already
                continue
            weight = TensorRows(checkpoint.load(job.name), job.matrix.transposed)
            name_A, name_B = peft_adapter.tensor_names(job.module)
            pair = lora_pair(adapter.load(name_A), adapter.load(name_B), job.lora.scaling, job.lora.pooling)
            on_disk = layer_error(weight, base.rows(job.name), pair, workers).error
            if not abs(on_disk - result.error.error) <= _VERIFY_TOLERANCE * max(1.0, on_disk):
                raise StorageError(
                    f"has error {on_disk:.6f} as read back, {result.error.error:.6f} was computed",
                    file=directory,
                    tensor=job.name,
                    hint="the disk or the memory is faulty",
                )


def _verify_bytes(files: OutputFiles, entries: Mapping[str, JournalEntry], directory: Path, workers: Workers) -> None:
    """Read everything back and compare it with what was to be written: the errors that are reported are of that.

    Raises StorageError naming the first tensor for which they differ.
    """
    sums = outputs_of(entries.values())
    for (name, sha256), found in zip(sums.items(), workers.map(lambda n: files[n].sha256(n), sums), strict=True):
        if found != sha256:
            raise StorageError(
                "is not as it was written when it is read back",
                file=directory,
                tensor=name,
                hint="the disk or the memory is faulty",
            )


def _write_side_files(
    conversion: Conversion, directory: Path, results: Sequence[LayerResult], entries: Mapping[str, JournalEntry]
) -> None:
    plan, base_model = conversion.plan, conversion.base_model
    source, base_fingerprint = source_name(conversion.checkpoint.path), _base_fingerprint(plan, entries)
    notes = [not_finite_note(job.name) for job in plan.copies if NOT_FINITE in entries[job.name].result]
    copy_side_files(conversion.side_files, directory)
    allocation = None if conversion.allocation is None else conversion.allocation.to_json()
    texts = {
        f"{plan.adapter_dir}/{peft_adapter.CONFIG_NAME}": dump_json(plan.adapter_config(base_model)),
        f"{plan.adapter_dir}/{PROVENANCE_NAME}": dump_json(
            provenance_json(plan, base_model=base_model, base_fingerprint=base_fingerprint)
        ),
        "README.md": model_card(plan, results, source=source, base_model=base_model),
        RECIPE_NAME: recipe_toml(plan.recipe),
        REPORT_NAME: dump_json(
            report_json(
                plan,
                results,
                notes,
                source=source,
                base_model=base_model,
                base_fingerprint=base_fingerprint,
                allocation=allocation,
            )
        ),
    }
    if len(plan.shards) > 1:
        texts["model.safetensors.index.json"] = index_json(plan.shard_of, plan.base_nbytes)
    config = plan.model_config(conversion.config)
    if config:
        texts["config.json"] = dump_json(config)
    write_texts(directory, texts)
