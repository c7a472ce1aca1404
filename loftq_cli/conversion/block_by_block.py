"""A conversion while a text runs through the model: for each block, the inputs are measured, the layers are converted
and written, and the text leaves the block through the converted layers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from loftq_cli.activations.text_pass import TextPass
from loftq_cli.adapter.config import tensor_names
from loftq_cli.layouts.layout import load_layout
from loftq_cli.layouts.stored_tensors import StoredTensors
from loftq_cli.output.journal import JournalEntry
from loftq_cli.output.writer import OutputFiles, tensor_bytes
from loftq_cli.planning.jobs import CopyJob, LayerJob
from loftq_cli.planning.plan import Plan
from loftq_cli.tensors.headers import TensorRef
from loftq_cli.tensors.matrices import lora_pair
from loftq_cli.tensors.metrics import delta_rows

if TYPE_CHECKING:
    import torch

Job: TypeAlias = LayerJob | CopyJob
RunJobs: TypeAlias = Callable[[Sequence[Job]], Generator[tuple[JournalEntry, bool]]]


@dataclass
class BlockStatistics:
    """The statistics of the inputs of the block in work, for `JobRunner`."""

    _means: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """Names of the weights with a statistic."""
        return frozenset(self._means)

    @property
    def is_measured(self) -> bool:
        """True: the inputs are inputs of the model on a text."""
        return True

    def load(self, name: str) -> torch.Tensor:
        """The mean of x·xᵀ over the inputs x of a weight, float32 [in, in]."""
        return self._means[name]

    def put(self, means: Mapping[str, torch.Tensor]) -> None:
        """Take over the statistics of the next block, and drop the statistics of the last block."""
        self._means = means


def convert_block_by_block(
    plan: Plan,
    text: TextPass,
    statistics: BlockStatistics,
    finished: Mapping[str, JournalEntry],
    run_jobs: RunJobs,
    effective: Callable[[LayerJob], torch.Tensor],
) -> Generator[tuple[JournalEntry, bool]]:
    """Run the jobs of a plan. Yields the journal entry of each job, and whether `finished` held the entry: copies
    first, then layers in the order of the model, in the end layers that the model does not show as modules.

    text         the text, ready to run
    statistics   receives the statistics of each block before the jobs of the block run
    finished     entries of an interrupted run by job, all intact
    run_jobs     runs jobs with the statistics of the moment
    effective    the matrix [out, in] of a written layer, base and adapter, as a loader computes the matrix
    """
    jobs = {job.name: job for job in plan.layers}
    yield from ((entry, True) for entry in finished.values())
    yield from run_jobs([job for job in plan.copies if job.name not in finished])
    unfinished = jobs.keys() - finished.keys()
    if unfinished:
        for block in text.blocks():
            todo = [job for job in plan.layers if job.name in block.names & unfinished]
            if todo:
                statistics.put(block.measure())
                yield from run_jobs(todo)
            unfinished -= block.names
            if not unfinished:
                break
            if text.options.sequential:
                for name in sorted(block.names):
                    if not jobs[name].experts:  # the text leaves the block through the original experts
                        block.replace(name, effective(jobs[name]))
    rest = [job for job in plan.layers if job.name in unfinished]
    statistics.put({})
    yield from run_jobs(rest)


@dataclass(frozen=True)
class WrittenLayers:
    """Layers in output files, while further layers are still unwritten.

    plan     the plan of the conversion
    config   config.json of the base
    files    the files of the result, by tensor name
    path     the directory of the files, for errors
    """

    plan: Plan
    config: Mapping[str, Any]
    files: OutputFiles
    path: Path

    def effective(self, job: LayerJob) -> torch.Tensor:
        """The matrix of a written layer: dequant(Q) + s·B·A, float32 [out, in]."""
        stored = self._stored
        layout = load_layout(job.layout)
        if layout.row.stores_codes:
            matrix = layout.unpack(job.matrix, stored).decoded().rows(slice(0, job.matrix.shape[0])).float()
        else:
            matrix = stored.load(job.base_tensors[0].name).float()
            matrix = matrix.T.contiguous() if job.matrix.transposed else matrix
        lora_A, lora_B = (self._load(name) for name in tensor_names(job.module))
        pair = lora_pair(lora_A, lora_B, job.lora.scaling, job.lora.pooling)
        return matrix + delta_rows(pair)(slice(0, len(matrix)))

    @cached_property
    def _stored(self) -> StoredTensors:
        tensors = [tensor for shard in self.plan.shards for tensor in shard.tensors]
        refs = {t.name: TensorRef(t.name, t.dtype, t.shape, self.path) for t in tensors}
        family = self.plan.family
        return StoredTensors(
            refs,
            self.config,
            self.plan.dtype,
            self._load,
            lambda name, start, stop: self.files[name].load_rows(name, start, stop),
            lambda name: bytes(tensor_bytes(self._load(name))),
            self.path,
            lambda name: family.loaded_name(name, refs),
        )

    def _load(self, name: str) -> torch.Tensor:
        return self.files[name].load(name)
