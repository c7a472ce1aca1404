"""Proof that the files hold what was computed: everything that was written is read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loftq_cli.adapter import config as adapter_config
from loftq_cli.checkpoint.source import open_weights_file
from loftq_cli.conversion.jobs import is_streamed
from loftq_cli.conversion.prepare import Conversion
from loftq_cli.conversion.report import LayerResult
from loftq_cli.errors import StorageError
from loftq_cli.output.journal import JournalEntry, outputs_of
from loftq_cli.output.writer import OutputFiles
from loftq_cli.runtime.workers import Workers
from loftq_cli.tensors.rows import TensorRows

_VERIFY_TOLERANCE = 1e-6  # the same sums over the same numbers; only the order of additions could differ


def verify_layers(conversion: Conversion, directory: Path, results: Sequence[LayerResult], workers: Workers) -> None:
    """Read every layer back as a loader would, and compare its error with the reported one.

    Raises StorageError naming the first tensor for which they differ.
    """
    from loftq_cli.model.stored import BaseModel
    from loftq_cli.tensors.matrices import lora_pair
    from loftq_cli.tensors.metrics import layer_error

    plan = conversion.plan
    checkpoint = conversion.checkpoint
    adapter = open_weights_file(directory / plan.adapter_dir / adapter_config.WEIGHTS_NAME)
    config = plan.model_config(conversion.config)
    with BaseModel.of_shards(directory, [shard.file for shard in plan.shards], config) as base:
        for job, result in zip(plan.layers, results, strict=True):
            if is_streamed(job):  # its error is that of what was read back already
                continue
            weight = TensorRows(checkpoint.load(job.name), job.matrix.transposed)
            name_A, name_B = adapter_config.tensor_names(job.module)
            pair = lora_pair(adapter.load(name_A), adapter.load(name_B), job.lora.scaling, job.lora.pooling)
            on_disk = layer_error(weight, base.rows(job.name), pair, workers).error
            if not abs(on_disk - result.error.error) <= _VERIFY_TOLERANCE * max(1.0, on_disk):
                raise StorageError(
                    f"has error {on_disk:.6f} as read back, {result.error.error:.6f} was computed",
                    file=directory,
                    tensor=job.name,
                    hint="the disk or the memory is faulty",
                )


def verify_bytes(files: OutputFiles, entries: Mapping[str, JournalEntry], directory: Path, workers: Workers) -> None:
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
