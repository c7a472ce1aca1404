"""The conversion: the jobs of a plan, in order, then proof and publication. Knows the order of things; the
numbers, the containers and the files are other modules'.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loftq_cli.adapter import config as adapter_config
from loftq_cli.conversion.jobs import JobRunner
from loftq_cli.conversion.model_card import model_card
from loftq_cli.conversion.prepare import Conversion
from loftq_cli.conversion.readback import verify_bytes, verify_layers
from loftq_cli.conversion.report import LayerResult, provenance_json, report_json
from loftq_cli.output.checksums import fingerprint_of
from loftq_cli.output.copies import NOT_FINITE, not_finite_note
from loftq_cli.output.journal import JournalEntry, outputs_of
from loftq_cli.output.records import (
    PROVENANCE_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    TOOL,
    dump_json,
    index_json,
    source_name,
    write_texts,
)
from loftq_cli.output.side_files import copy_side_files, nbytes_of
from loftq_cli.output.staging import Staging, check_space
from loftq_cli.output.writer import OutputFiles
from loftq_cli.planning.jobs import CopyJob, LayerJob
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.recipe_files import recipe_toml
from loftq_cli.runtime.gpu import Device, open_device
from loftq_cli.runtime.kernel_choice import choose_kernels
from loftq_cli.runtime.schedule import Steps, in_order
from loftq_cli.runtime.workers import Workers, started
from loftq_cli.tensors.metrics import LayerError, relative, total_error


class ConversionObserver(Protocol):
    """Who is told how a conversion goes on."""

    def layer_started(self, name: str) -> None: ...

    def layer_done(self, result: LayerResult, *, resumed: bool) -> None: ...

    def phase(self, text: str) -> None: ...


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


def convert_checkpoint(
    conversion: Conversion,
    observer: ConversionObserver,
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
                    verify_layers(conversion, staging.path, results, workers)
                else:
                    verify_bytes(files, entries, staging.path, workers)
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
    adapter = {f"{plan.adapter_dir}/{adapter_config.WEIGHTS_NAME}": plan.adapter_tensors}
    return OutputFiles(directory, {shard.file: shard.tensors for shard in plan.shards} | adapter)


def _run_jobs(
    conversion: Conversion,
    staging: Staging,
    files: OutputFiles,
    observer: ConversionObserver,
    workers: Workers,
    gpu: Device | None,
) -> tuple[list[LayerResult], dict[str, JournalEntry], int]:
    """Every job of the plan; returns the layers' results, all journal entries, and how many layers were kept."""
    plan = conversion.plan
    results: list[LayerResult] = []
    entries: dict[str, JournalEntry] = {}
    resumed = 0
    runner = JobRunner(conversion.checkpoint, files, staging.entries, conversion.statistics)

    def announce(job: LayerJob | CopyJob) -> None:
        if isinstance(job, LayerJob):
            observer.layer_started(job.name)

    def finished() -> Generator[tuple[JournalEntry, bool]]:
        if gpu is None:
            steps = Steps(runner.load, runner.compute, runner.write)
            return in_order(plan.jobs, steps, lambda job: job.numel, workers, announce)
        from loftq_cli.conversion.gpu_jobs import DeviceRunner, run_on_device

        return run_on_device(DeviceRunner(runner, gpu), plan.jobs, workers.threads, announce)

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


def _write_side_files(
    conversion: Conversion, directory: Path, results: Sequence[LayerResult], entries: Mapping[str, JournalEntry]
) -> None:
    plan, base_model = conversion.plan, conversion.base_model
    source, base_fingerprint = source_name(conversion.checkpoint.path), _base_fingerprint(plan, entries)
    notes = [not_finite_note(job.name) for job in plan.copies if NOT_FINITE in entries[job.name].result]
    copy_side_files(conversion.side_files, directory)
    allocation = None if conversion.allocation is None else conversion.allocation.to_json()
    texts = {
        f"{plan.adapter_dir}/{adapter_config.CONFIG_NAME}": dump_json(plan.adapter_config(base_model)),
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
