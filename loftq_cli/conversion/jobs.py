"""A job of a plan: a tensor is read, output tensors are written into files, and a journal entry lists the outputs.

run.py decides the order of jobs, and publishes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loftq_cli.adapter import config as adapter_config
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.checkpoint.statistics import InputStatistics
from loftq_cli.conversion.experts import ExpertConversion, check_finite
from loftq_cli.conversion.measuring import Measured, measure_layer
from loftq_cli.conversion.report import make_layer_result
from loftq_cli.errors import LoftqError, is_memory_shortage, memory_shortage
from loftq_cli.layouts.layout import load_layout
from loftq_cli.methods.method import METHODS, Initialization
from loftq_cli.output.copies import NOT_FINITE, WatchedChunks, is_intact, recast_chunks
from loftq_cli.output.journal import JournalEntry
from loftq_cli.output.writer import OutputFiles, tensor_bytes
from loftq_cli.planning.jobs import CopyJob, LayerJob, input_sha256
from loftq_cli.runtime.workers import Workers, beside
from loftq_cli.tensors.rows import Rows, TensorRows, stored_rows

if TYPE_CHECKING:
    import torch


WHOLE_NUMEL = 1 << 20  # weights of the largest matrix that is never streamed: 4 MB in float32


@dataclass(frozen=True, slots=True)
class LoadedMatrix:
    """A weight for `compute`; empty for a job that reads tensors in `compute` or `write`.

    stored   the weight as stored in the original
    sha256   hash of the stored bytes
    """

    stored: torch.Tensor | None = None
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Converted:
    """The outputs of a job. A finished job has an `entry` and no outputs.

    tensors        output tensors to write, by name
    input_sha256   sha256 of the weight's stored bytes
    result         the layer's JSON values in the report
    written        sha256 of each output tensor already in a file, by name
    entry          the journal entry of a job finished in an interrupted run; None for a job to do
    """

    tensors: Mapping[str, torch.Tensor]
    input_sha256: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)
    entry: JournalEntry | None = None


class JobRunner:
    """The three steps of the jobs of a plan: read a tensor, compute, write output tensors into files. A job in the
    journal is skipped after a check: the hashes of input and outputs have to be equal to the hashes in the journal.

    checkpoint   the original
    files        the files of the result, by tensor name
    entries      journal entries of an interrupted run, by job
    statistics   of the layers' inputs; None without a calibration
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        files: OutputFiles,
        entries: Mapping[str, JournalEntry],
        statistics: InputStatistics | None = None,
    ) -> None:
        self._checkpoint, self._files, self._entries = checkpoint, files, entries
        self._statistics = statistics

    def load(self, job: LayerJob | CopyJob, *, for_gpu: bool = False) -> LoadedMatrix | JournalEntry:
        """Read the weight of a layer, into pinned memory with `for_gpu`. Returns the journal entry of a finished job,
        and an empty LoadedMatrix for a copy and for a weight read a few rows at a time.

        Raises MemoryShortage naming the tensor when the weight does not fit memory.
        """
        entry = self._entries.get(job.name)
        if entry is not None and is_intact(lambda: input_sha256(self._checkpoint.sha256, job), entry, self._files):
            return entry
        if isinstance(job, CopyJob) or job.experts or (not for_gpu and is_streamed(job)):
            return LoadedMatrix()
        try:
            stored = self._checkpoint.load(job.name, pinned=for_gpu)
        except (MemoryError, RuntimeError) as error:
            raise self.name_error(error, job) from None
        return LoadedMatrix(stored, hashlib.sha256(tensor_bytes(stored)).hexdigest())

    def compute(self, job: LayerJob | CopyJob, loaded: LoadedMatrix | JournalEntry, workers: Workers) -> Converted:
        """Compute the output tensors and the errors of a layer; `loaded` comes from `load`.

        Raises InputError naming the tensor when numbers cannot be quantized or stored.
        """
        if isinstance(loaded, JournalEntry):
            return Converted({}, entry=loaded)
        if isinstance(job, CopyJob):
            return Converted({})
        try:
            if job.experts:
                return self.convert_experts(job, workers)
            if loaded.stored is None:
                return self._stream(job, workers)
            return self.convert_layer(job, TensorRows(loaded.stored, job.matrix.transposed), loaded.sha256, workers)
        except (LoftqError, MemoryError, RuntimeError) as error:
            raise self.name_error(error, job) from None

    def convert_layer(self, job: LayerJob, weight: Rows, sha256: str, workers: Workers) -> Converted:
        """Convert a weight [out, in] on the weight's device; `sha256` is the hash of the stored bytes.

        Raises InputError when numbers cannot be quantized or stored.
        """
        from loftq_cli.methods.weighting import make_weighting

        weighting = None
        if self._statistics is not None and job.name in self._statistics.names:
            weighting = make_weighting(self._statistics.load(job.name), job.lora.group_size, weight.device)
        initial = job.initialize(weight, weighting, None, workers)
        decoded = job.quantizer().decoded(initial.quantized)
        measured = measure_layer(job, weight, initial, decoded, self._measured_inputs(job), workers)
        return self.describe_layer(job, initial, measured, sha256)

    def convert_experts(self, job: LayerJob, workers: Workers, device: torch.device | str = "cpu") -> Converted:
        """Convert the experts of a layer on a device: codes and constants are written expert by expert.

        Raises InputError when numbers cannot be quantized or stored.
        """
        from loftq_cli.methods.weighting import make_weighting

        weighting = None
        if self._statistics is not None and job.name in self._statistics.names:
            weighting = make_weighting(self._statistics.load(job.name), job.lora.group_size, device)
        conversion = ExpertConversion(job, self._checkpoint, self._files, weighting, self._measured_inputs(job), device)
        written = conversion.run(workers)
        return Converted(written.adapter, written.input_sha256, written.result.to_json(), written=written.sums)

    def _measured_inputs(self, job: LayerJob) -> torch.Tensor | None:
        """The statistic of a layer's inputs, for errors of the outputs; None for inputs of no text. A file is read once
        more here, so that the fit holds no second copy.
        """
        statistics = self._statistics
        is_known = statistics is not None and statistics.is_measured and job.name in statistics.names
        return statistics.load(job.name) if statistics is not None and is_known else None

    def describe_layer(self, job: LayerJob, initial: Initialization, measured: Measured, sha256: str) -> Converted:
        """Pack base and adapter of a layer, and describe the errors. Raises InputError when a tensor or an error is not
        finite.
        """
        return Converted(_pack(job, initial), sha256, make_layer_result(job, initial, measured).to_json())

    def write(self, job: LayerJob | CopyJob, converted: Converted) -> tuple[JournalEntry, bool]:
        """Write the output tensors of a job. Returns the journal entry, and whether the entry was in the journal."""
        if converted.entry is not None:
            return converted.entry, True
        if isinstance(job, CopyJob):
            return self._copy(job), False
        sums = {name: self._files[name].write(name, tensor) for name, tensor in converted.tensors.items()}
        sums = {**converted.written, **sums}
        return JournalEntry(job.name, converted.input_sha256, sums, dict(converted.result)), False

    def name_error(self, error: Exception, job: LayerJob) -> Exception:
        """Return the error that stopped a job, with file and tensor; a lack of memory becomes MemoryShortage."""
        if is_memory_shortage(error):
            error = memory_shortage()
        if isinstance(error, LoftqError) and not error.tensor:
            return error.at(file=self._checkpoint.tensors[job.sources[0]].file, tensor=job.sources[0])
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
        # Equal dtypes mean equal bytes of input and output.
        input_sha256 = sha256 if job.output.dtype == dtype else digest.hexdigest()
        return JournalEntry(job.name, input_sha256, {name: sha256}, {} if watched.are_finite else {NOT_FINITE: True})

    def _stream(self, job: LayerJob, workers: Workers) -> Converted:
        """Convert a layer with only a few rows in memory. A first pass reads rows and writes codes; a second pass reads
        rows and codes again, for the error of the codes in the file.
        """
        code_rows = load_layout(job.layout).code_rows(job.matrix)
        assert code_rows is not None
        checkpoint, file = self._checkpoint, self._files[code_rows.name]
        weight = stored_rows(checkpoint.load_rows, job.name, job.matrix.shape)
        place = file.place(code_rows.name)

        def put(part: slice, codes: torch.Tensor) -> None:
            place.append(tensor_bytes(code_rows.pack(codes)))

        with beside(lambda: checkpoint.sha256(job.name), workers) as input_sha256:
            initial = job.initialize(weight, None, put, workers)
            decoded = job.quantizer().decoded(initial.quantized, code_rows.reader(file.load_rows))
            measured = measure_layer(job, weight, initial, decoded, None, workers, holds_codes=False)
            tensors, result = _pack(job, initial), make_layer_result(job, initial, measured).to_json()
            return Converted(tensors, input_sha256(), result, written={code_rows.name: place.close()})


def is_streamed(job: LayerJob) -> bool:
    """Whether a job on the processor holds only a few rows of the weight at once: the method looks at each row a single
    time, without statistics, and the container stores codes row after row. A small weight is faster in a single read,
    and experts are read one by one.

    >>> import loftq_cli as loftq
    >>> is_streamed(loftq.quantize("builtin:tiny-llama", "base", rank=8, dry_run=True).layers[0])
    False
    """
    procedure, is_small = job.procedure, job.numel <= WHOLE_NUMEL
    if not METHODS[procedure.method].streams or procedure.is_calibrated or is_small or job.experts:
        return False
    return load_layout(job.layout).code_rows(job.matrix) is not None


def _pack(job: LayerJob, initial: Initialization) -> dict[str, torch.Tensor]:
    """Pack base and adapter into output tensors, by name. Raises InputError when a tensor would not be finite."""
    tensors = load_layout(job.layout).pack(job.matrix, initial.quantized)
    tensors |= adapter_config.pack(job.module, initial.lora)
    for again, planned in zip(job.library_tensors, job.adapter_tensors, strict=bool(job.library_tensors)):
        tensors[again.name] = tensors[planned.name]
    check_finite(tensors)
    return tensors
