"""Proof that the files hold the computed numbers: written layers are read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.adapter.config import AdaptedModule
from loftq_cli.adapter.expert_factors import Factors, expert_of, turned
from loftq_cli.adapter.source import AdapterSource, open_planned_adapter
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.conversion.experts import ExpertReader
from loftq_cli.conversion.jobs import is_streamed
from loftq_cli.conversion.prepare import Conversion
from loftq_cli.conversion.report import LayerResult
from loftq_cli.errors import StorageError
from loftq_cli.output.journal import JournalEntry, outputs_of
from loftq_cli.output.writer import OutputFiles
from loftq_cli.planning.jobs import LayerJob
from loftq_cli.runtime.workers import Workers
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.rows import TensorRows

if TYPE_CHECKING:
    from loftq_cli.model.stored import BaseModel

_VERIFY_TOLERANCE = 1e-6  # relative: equal numbers are summed twice, and the order of additions may differ


def verify_layers(conversion: Conversion, directory: Path, results: Sequence[LayerResult], workers: Workers) -> None:
    """Read every layer back like a loader, and compare the error with the reported error. Streamed layers are left out,
    since the reported error of a streamed layer is already of codes from the file.

    conversion   the conversion
    directory    the directory of base and adapter
    results      the reported result of each layer, in the order of the plan
    workers      threads for sums

    Raises StorageError naming the first layer whose errors differ.
    """
    from loftq_cli.model.stored import BaseModel
    from loftq_cli.tensors.metrics import layer_error

    plan = conversion.plan
    checkpoint = conversion.checkpoint
    modules = [AdaptedModule(job.module, job.matrix.shape, job.lora) for job in plan.layers if not job.experts]
    adapter = open_planned_adapter(directory / plan.adapter_dir, modules)
    config = plan.model_config(conversion.config)
    with BaseModel.of_shards(directory, [shard.file for shard in plan.shards], config) as base:
        for job, result in zip(plan.layers, results, strict=True):
            if is_streamed(job):
                continue
            if job.experts:
                _verify_experts(checkpoint, base, adapter, job, result, workers)
                continue
            weight = TensorRows(checkpoint.load(job.name), job.matrix.transposed)
            pair = adapter.pair(job.module, job.matrix.shape)
            on_disk = layer_error(weight, base.rows(job.name), pair, workers).error
            _compare(on_disk, result.error.error, directory, job.name)


def _compare(on_disk: float, computed: float, directory: Path, name: str) -> None:
    if not abs(on_disk - computed) <= _VERIFY_TOLERANCE * max(1.0, on_disk):
        raise StorageError(
            f"has error {on_disk:.6f} as read back, {computed:.6f} was computed",
            file=directory,
            tensor=name,
            hint="the disk or the memory is faulty",
        )


def _verify_experts(
    checkpoint: Checkpoint,
    base: BaseModel,
    adapter: AdapterSource,
    job: LayerJob,
    result: LayerResult,
    workers: Workers,
) -> None:
    """Read the experts of a layer back, and compare the error of each with the reported error."""
    import torch

    from loftq_cli.tensors.metrics import layer_error

    reader, load = ExpertReader(checkpoint, job.experts), adapter.weights.load
    joined = Factors(*(load(tensor.name) for tensor in job.adapter_tensors)) if job.is_parameter else None
    for number, (matrix, computed) in enumerate(zip(reader.matrices(), result.expert_errors or (), strict=True)):
        expert = job.experts[number]
        if expert.stored:
            parts = [base.rows(part.name).rows(slice(0, part.shape[0])) for part in expert.stored]
            decoded = torch.cat(parts)
        else:
            stored = base.checkpoint.load_rows(job.base_tensors[0].name, number, number + 1)[0]
            decoded = stored.T if expert.parts[0].transposed else stored
        if joined is not None:
            pair = expert_of(joined, len(job.experts), number)
            pair = turned(pair) if job.is_turned else pair
        else:
            assert expert.adapter_names is not None  # every expert is a module
            pair = Factors(*map(load, expert.adapter_names))
        lora = LoraPair(pair.lora_A.contiguous(), pair.lora_B.contiguous(), job.lora.scaling)
        on_disk = layer_error(TensorRows(matrix[1]), TensorRows(decoded), lora, workers).error
        _compare(on_disk, computed, base.path, f"{job.name}.{number}")


def verify_bytes(files: OutputFiles, entries: Mapping[str, JournalEntry], directory: Path, workers: Workers) -> None:
    """Read every tensor back, and compare the sha256 with the journal's.

    files       the files of the result, by tensor name
    entries     journal entries by job
    directory   the directory of the result, for errors
    workers     threads, each for a tensor at a time

    Raises StorageError naming the first tensor whose bytes differ.
    """
    sums = outputs_of(entries.values())
    sums_on_disk = workers.map(lambda name: files[name].sha256(name), sums)
    for (name, sha256), sha256_on_disk in zip(sums.items(), sums_on_disk, strict=True):
        if sha256_on_disk != sha256:
            raise StorageError(
                "is not as it was written when it is read back",
                file=directory,
                tensor=name,
                hint="the disk or the memory is faulty",
            )
