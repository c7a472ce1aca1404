"""One job of a plan: a tensor comes in, its outputs go to their places, and a journal entry says what was done.

The order of jobs and publishing are convert.py's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loftq_cli.adapter import config as adapter_config
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.checkpoint.statistics import Statistics
from loftq_cli.conversion.report import layer_result
from loftq_cli.errors import InputError, LoftqError, is_memory_shortage, memory_shortage
from loftq_cli.layouts.layout import load_layout
from loftq_cli.methods.method import METHODS, Initialization, load_method
from loftq_cli.output.copies import NOT_FINITE, WatchedChunks, is_intact, recast_chunks
from loftq_cli.output.journal import JournalEntry
from loftq_cli.output.writer import OutputFiles, tensor_bytes
from loftq_cli.planning.jobs import CopyJob, LayerJob
from loftq_cli.runtime.workers import Workers, beside
from loftq_cli.tensors.metrics import LayerError, is_finite, layer_error
from loftq_cli.tensors.rows import Rows, TensorRows, stored_rows

if TYPE_CHECKING:
    import torch

    from loftq_cli.methods.weighting import Weighting


_WHOLE_NUMEL = 1 << 20  # weights: 4 MB in float32


@dataclass(frozen=True, slots=True)
class LoadedMatrix:
    """A weight as it is stored, and the sha256 of its bytes; of a job that reads by itself, nothing."""

    stored: torch.Tensor | None = None
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Converted:
    """What is to be written of a layer, what is said of it, and the sha256 of what is `written` already; or the entry
    of a job that was done before.
    """

    tensors: Mapping[str, torch.Tensor]
    input_sha256: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)
    entry: JournalEntry | None = None


class JobRunner:
    """The three steps of the jobs of a plan: read a tensor, compute, write what comes of it into its places. A job that
    a journal says is done is not done again, once its input and its output have been hashed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        files: OutputFiles,
        entries: Mapping[str, JournalEntry],
        statistics: Statistics | None = None,
    ) -> None:
        self._checkpoint, self._files, self._entries = checkpoint, files, entries
        self._statistics = statistics

    def load(self, job: LayerJob | CopyJob, *, for_gpu: bool = False) -> LoadedMatrix | JournalEntry:
        """The weight of a layer, in pinned memory if it is `for_gpu`; nothing where it is read a few rows at a time;
        the entry of a job that is done.
        """
        entry = self._entries.get(job.name)
        if entry is not None and is_intact(self._checkpoint, entry, self._files):
            return entry
        if isinstance(job, CopyJob) or (not for_gpu and is_streamed(job)):
            return LoadedMatrix()
        try:
            stored = self._checkpoint.load(job.name, pinned=for_gpu)
        except (MemoryError, RuntimeError) as error:
            raise self.named(error, job) from None
        return LoadedMatrix(stored, hashlib.sha256(tensor_bytes(stored)).hexdigest())

    def compute(self, job: LayerJob | CopyJob, found: LoadedMatrix | JournalEntry, workers: Workers) -> Converted:
        """The tensors to write, and what they are worth.

        Raises InputError naming the tensor when its numbers cannot be quantized or stored.
        """
        if isinstance(found, JournalEntry):
            return Converted({}, entry=found)
        if isinstance(job, CopyJob):
            return Converted({})
        try:
            if found.stored is None:
                return self._stream(job, workers)
            return self.converted(job, TensorRows(found.stored, job.matrix.transposed), found.sha256, workers)
        except (LoftqError, MemoryError, RuntimeError) as error:
            raise self.named(error, job) from None

    def converted(self, job: LayerJob, weight: Rows, sha256: str, workers: Workers) -> Converted:
        """What the method makes of a weight, wherever that lies."""
        from loftq_cli.methods.weighting import make_weighting, output_error

        weighting = None
        if self._statistics is not None and job.name in self._statistics.names:
            weighting = make_weighting(self._statistics.load(job.name), job.lora.group_size, weight.device)
        initial = _initialize(job, weight, weighting, None, workers)
        decoded = job.quantizer().decoded(initial.quantized)
        lost = None if weighting is None else output_error(weighting, weight, decoded, initial.lora, workers)
        return self.described(job, initial, layer_error(weight, decoded, initial.lora, workers), sha256, lost)

    def described(
        self, job: LayerJob, initial: Initialization, error: LayerError, sha256: str, lost: float | None = None
    ) -> Converted:
        """The tensors to write of a layer and what is said of it; `lost` is the error of its outputs, if known."""
        return Converted(_packed(job, initial), sha256, _result(job, initial, error, lost))

    def write(self, job: LayerJob | CopyJob, made: Converted) -> tuple[JournalEntry, bool]:
        """Put it into its places. What the journal is to say, and whether it said so before."""
        if made.entry is not None:
            return made.entry, True
        if isinstance(job, CopyJob):
            return self._copy(job), False
        written = {name: self._files[name].write(name, tensor) for name, tensor in made.tensors.items()}
        return JournalEntry(job.name, made.input_sha256, {**made.written, **written}, dict(made.result)), False

    def named(self, error: Exception, job: LayerJob) -> Exception:
        """What stopped a job, with the tensor's name."""
        if is_memory_shortage(error):
            error = memory_shortage()
        if isinstance(error, LoftqError) and not error.tensor:
            return error.at(file=self._checkpoint.tensors[job.name].file, tensor=job.name)
        return error

    def _copy(self, job: CopyJob) -> JournalEntry:
        checkpoint, name = self._checkpoint, job.output.name
        dtype = checkpoint.tensors[job.name].dtype
        digest = hashlib.sha256()
        if job.output.dtype == dtype:
            chunks = checkpoint.chunks(job.name)
        else:
            chunks = recast_chunks(checkpoint, job.name, job.output.dtype, digest)
        watched = WatchedChunks(chunks, job.output.dtype)
        sha256 = self._files[name].write_chunks(name, watched)
        # Of the same dtype, what comes out is what went in.
        input_sha256 = sha256 if job.output.dtype == dtype else digest.hexdigest()
        return JournalEntry(job.name, input_sha256, {name: sha256}, {} if watched.are_finite else {NOT_FINITE: True})

    def _stream(self, job: LayerJob, workers: Workers) -> Converted:
        """A layer of which only a few rows are in memory: they are read, and their codes written, one after the other;
        then both are read again, for the error of what the file holds.
        """
        lying = load_layout(job.layout).code_rows(job.matrix)
        assert lying is not None
        checkpoint, file = self._checkpoint, self._files[lying.name]
        weight = stored_rows(checkpoint.load_rows, job.name, job.matrix.shape)
        place = file.place(lying.name)

        def put(part: slice, codes: torch.Tensor) -> None:
            place.append(tensor_bytes(lying.pack(codes)))

        with beside(lambda: checkpoint.sha256(job.name), workers) as input_sha256:
            initial = _initialize(job, weight, None, put, workers)
            decoded = job.quantizer().decoded(initial.quantized, lying.reader(file.load_rows))
            error = layer_error(weight, decoded, initial.lora, workers)
            tensors = _packed(job, initial)
            return Converted(tensors, input_sha256(), _result(job, initial, error), written={lying.name: place.close()})


def is_streamed(job: LayerJob) -> bool:
    """Whether only a few rows of a weight are in memory at once: where each is looked at once, and codes lie row after
    row. A small weight is read whole, which is faster.
    """
    procedure = job.procedure
    if not METHODS[procedure.method].streams or procedure.is_calibrated or job.numel <= _WHOLE_NUMEL:
        return False
    return load_layout(job.layout).code_rows(job.matrix) is not None


def _initialize(
    job: LayerJob,
    weight: Rows,
    weighting: Weighting | None,
    sink: Callable[[slice, torch.Tensor], None] | None,
    workers: Workers,
) -> Initialization:
    return load_method(job.procedure.method)(
        weight,
        job.quantizer(weighting),
        job.lora,
        job.procedure.fitting,
        generator=job.generator(),
        weighting=weighting,
        sink=sink,
        workers=workers,
    )


def _packed(job: LayerJob, initial: Initialization) -> dict[str, torch.Tensor]:
    """The tensors to write. Raises InputError for what would not be finite."""

    tensors = load_layout(job.layout).pack(job.matrix, initial.quantized)
    tensors |= adapter_config.pack(job.module, initial.lora)
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise InputError(
                f"{name} would not be finite in {str(tensor.dtype).removeprefix('torch.')}",
                hint="--adapter-dtype float32 holds more" if "lora_" in name else "--exclude it",
            )
    return tensors


def _result(
    job: LayerJob, initial: Initialization, error: LayerError, output_error: float | None = None
) -> dict[str, Any]:
    alone = error.base_error if initial.quantization_error is None else initial.quantization_error
    return layer_result(job, error, alone, initial.iteration_errors, initial.best_iteration, output_error).to_json()
