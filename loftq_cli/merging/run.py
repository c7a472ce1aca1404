"""Base plus adapter to a deployment checkpoint: dequant(Q) + s·B·A in float32, one tensor at a time; or, of a pooled
adapter, into the offsets of the base's groups. Every adapter tensor is merged, copied or refused; nothing is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

from loftq_cli.adapter.config import pooling_of
from loftq_cli.errors import LoftqError, QualityError, StorageError
from loftq_cli.merging.jobs import EXACT, is_for_gpu, is_recast, numel_of, run_job
from loftq_cli.merging.plan import Merge, MergeJob
from loftq_cli.merging.provenance import check_contents
from loftq_cli.merging.report import (
    MergedLayer,
    MergeOutcome,
    largest_difference,
    side_files,
    total_lost,
    total_retention,
    write_side_files,
)
from loftq_cli.output.checksums import fingerprint_of
from loftq_cli.output.copies import NOT_FINITE, not_finite_note
from loftq_cli.output.journal import JournalEntry, outputs_of
from loftq_cli.output.records import TOOL
from loftq_cli.output.side_files import are_copied, nbytes_of
from loftq_cli.output.staging import Staging, check_output, check_space, finished_mark
from loftq_cli.output.writer import OutputFiles
from loftq_cli.quant.gpu_matrix import BESIDE_NUMEL
from loftq_cli.runtime.gpu import SharedDevice, open_device
from loftq_cli.runtime.kernel_choice import choose_kernels
from loftq_cli.runtime.schedule import SMALL_NUMEL, in_turn
from loftq_cli.runtime.workers import Workers, started
from loftq_cli.tensors.headers import OutTensor

LEAST_RETENTION = 0.5  # below this, most of what was trained would be gone from the deployed model


class MergeObserver(Protocol):
    """What a merge tells: the part of `loftq_cli.api.observer.Observer` that it calls."""

    def note(self, text: str) -> None: ...

    def layer_merged(self, layer: MergedLayer) -> None: ...


def is_merge_done(merge: Merge, *, overwrite: bool) -> bool:
    """Whether the output is the complete, undamaged result of this very merge, and nobody wants it replaced.

    Raises UsageError when something else stands there.
    """
    mark = finished_mark(merge.output, merge.fingerprint, overwrite=overwrite)
    if mark is not None and mark.input_sha256 == _InputSums(merge).all() and are_copied(side_files(merge), mark.files):
        return True
    check_output(merge.output, overwrite=overwrite)
    return False


def merge_adapter(
    merge: Merge, observer: MergeObserver, *, overwrite: bool, restart: bool, threads: int = 1, device: str = "cpu"
) -> MergeOutcome:
    """Merge, check, publish. Continues an interrupted run of the same merge; the bytes are the same, with any number of
    threads.

    On a GPU, see `open_device`, matrices are merged with their adapters and quantized again, those that fit it; its
    sums are taken in another order, so that a weight may be rounded to its neighbour. Vectors, copies and adapters that
    go into the offsets of groups stay on the processor.

    Raises UsageError for a GPU that is not there, QualityError when quantizing again, or rounding zero points, erases
    more than half of the adapter, unless forced. What is refused leaves nothing behind; what the disk or the user
    stopped can be continued.
    """
    for_gpu = [job for job in merge.jobs if is_for_gpu(merge, job)]
    found_gpu = open_device(device, sum(numel_of(job) for job in for_gpu))
    gpu = SharedDevice(found_gpu) if found_gpu and for_gpu else None
    sums = _InputSums(merge)
    contents = check_contents(merge.base, merge.provenance, sums.base, force=merge.options.force)
    found = [contents] if contents else []
    notes = (*merge.provenance.notes, *found, *merge.notes, *_unused_notes(merge), *_other_notes(merge))
    rest = [job for job in merge.jobs if gpu is None or not is_for_gpu(merge, job)]
    missing = choose_kernels(sum(numel_of(job) for job in rest if job.is_touched or job.matrix is not None))
    used = (
        f"computing on {gpu}" if gpu else f"nothing here is for a GPU, and {found_gpu} not used" if found_gpu else None
    )
    for note in (*notes, missing, used):
        if note is not None:
            observer.note(note)
    check_space(merge.output, merge.nbytes + nbytes_of(side_files(merge)))
    staging = Staging(merge.output, fingerprint=merge.fingerprint, overwrite=overwrite, restart=restart)
    try:
        if staging.entries:
            observer.note(f"continuing: {len(staging.entries)} of {len(merge.jobs)} tensors are finished; hashing them")
        with started(threads) as workers, OutputFiles(staging.path, _files(merge)) as files:
            layers, entries = _run_jobs(_Runner(merge, files, sums, staging.entries, gpu), staging, observer, workers)
        _check_retention(merge, layers)
        outcome = MergeOutcome(layers, (*notes, *_not_finite_notes(entries)))
        written = files.sums_by_file(outputs_of(entries))
        staging.keep_only(written)
        write_side_files(merge, staging.path, outcome)
        merge.base.checkpoint.check_unchanged()
        merge.adapter.weights.check_unchanged()
        staging.publish(TOOL, written, sums.all())
    except LoftqError as error:
        if not isinstance(error, StorageError):
            staging.discard()
        raise
    finally:
        staging.close()
    return outcome


def _unused_notes(merge: Merge) -> list[str]:
    return [f"adapter tensor {name} is not needed: {why}" for name, why in merge.adapter.unused.items()]


def _other_notes(merge: Merge) -> list[str]:
    notes = [f"{job.name} is kept in full precision: {job.note}" for job in merge.jobs if job.note]
    named, asked = pooling_of(merge.adapter.config), merge.options.pooling
    if named is not None and asked not in (None, named.convention):
        notes.append(f"merged as pooled by {asked}, and the adapter's config says {named.convention}")
    return notes


def _not_finite_notes(entries: Sequence[JournalEntry]) -> list[str]:
    return [not_finite_note(entry.unit) for entry in entries if NOT_FINITE in entry.result]


def _files(merge: Merge) -> dict[str, Sequence[OutTensor]]:
    return {shard.file: shard.tensors for shard in merge.shards}


@dataclass
class _InputSums:
    """The sha256 of the tensors of base and adapter, each hashed once."""

    merge: Merge
    _known: dict[tuple[str, str], str] = field(default_factory=dict)

    def base(self, name: str) -> str:
        """Of a stored tensor of the base."""
        return self._of("base", self.merge.base.checkpoint.sha256, name)

    def of(self, job: MergeJob) -> str:
        """Of everything that a job reads."""
        base, adapter = self.merge.base, self.merge.adapter.weights
        parts = base.parts(job.name) if job.name in base.tensors else []
        factors = [] if job.lora is None else [job.lora.lora_A, job.lora.lora_B]
        bias = None if job.lora_bias is None else job.lora_bias.lora_bias
        read = [name for name in (*factors, bias, job.replacement) if name is not None]
        sums = {f"base {part.name}": self.base(part.name) for part in parts}
        return fingerprint_of(sums | {f"adapter {name}": self._of("adapter", adapter.sha256, name) for name in read})

    def all(self) -> str:
        """Of everything that the merge reads."""
        return fingerprint_of({job.name: self.of(job) for job in self.merge.jobs})

    def remember(self, name: str, sha256: str) -> None:
        """What is known of a tensor of the base that was copied byte by byte."""
        self._known["base", name] = sha256

    def _of(self, side: str, sha256: Callable[[str], str], name: str) -> str:
        if (side, name) not in self._known:
            self._known[side, name] = sha256(name)
        return self._known[side, name]


@dataclass(frozen=True)
class _Runner:
    """Does the jobs of a merge, or keeps what a journal says of them once input and output have been hashed."""

    merge: Merge
    files: OutputFiles
    sums: _InputSums
    entries: Mapping[str, JournalEntry]
    gpu: SharedDevice | None = None

    def run(self, job: MergeJob, workers: Workers) -> tuple[JournalEntry, bool]:
        """What the journal is to say of a job, and whether it said so before."""
        entry = self.entries.get(job.name)
        if entry is not None and entry.input_sha256 == self.sums.of(job) and self.files.hold(entry.outputs):
            return entry, True
        written, result = run_job(self.merge, job, self.files, workers, self.gpu)
        if job.is_copied and not is_recast(self.merge, job):
            for name, sha256 in written.items():
                self.sums.remember(name, sha256)
        return JournalEntry(job.name, self.sums.of(job), written, result), False


def _run_jobs(
    runner: _Runner, staging: Staging, observer: MergeObserver, workers: Workers
) -> tuple[tuple[MergedLayer, ...], list[JournalEntry]]:
    layers: list[MergedLayer] = []
    entries: list[JournalEntry] = []
    small_numel = SMALL_NUMEL if runner.gpu is None else BESIDE_NUMEL
    # The jobs end before the recording does: by then nothing is being written any more.
    with (
        staging.recording(runner.files.sync) as record,
        closing(in_turn(runner.merge.jobs, runner.run, numel_of, workers, small_numel)) as done,
    ):
        for entry, kept in done:
            if not kept:
                record(entry)
            entries.append(entry)
            if NOT_FINITE in entry.result:
                observer.note(not_finite_note(entry.unit))
            elif entry.result:
                layers.append(MergedLayer.from_json(entry.result))
                observer.layer_merged(layers[-1])
    return tuple(layers), entries


def _check_retention(merge: Merge, layers: Sequence[MergedLayer]) -> None:
    retained, lost = total_retention(layers), total_lost(layers)
    if merge.options.force:
        return
    if retained is not None and retained < LEAST_RETENTION:
        raise QualityError(
            f"quantized again to {merge.options.requantize}, {retained:.1%} of the adapter would survive",
            file=merge.base.path,
            hint="merge without --requantize, which keeps all of it; or keep base and adapter apart; or --force",
        )
    difference = largest_difference(layers)
    # What float32 itself cannot hold of a tiny update is no loss that other options would spare.
    if lost is None or difference is None or difference[1] <= EXACT or lost <= 1 - LEAST_RETENTION:
        return
    rounded = "with rounded zero points" if merge.options.round_zeros else "with such offsets"
    what = f"{lost:.1%} of the update would be lost"
    if math.isinf(lost):
        what = f"the base itself would change, by up to {difference[1]:.1e} of its largest weight"
    instead = "leave out --round-zeros" if merge.options.round_zeros else "leave out --scale-dtype"
    hint = f"float32 offsets keep all of it: {instead}; or --force"
    raise QualityError(f"{rounded}, {what}", file=merge.base.path, hint=hint)
