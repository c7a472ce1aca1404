"""Base and adapter become a deployment checkpoint: dequant(Q) + s·B·A in float32, tensor by tensor. A pooled adapter
goes into the offsets of the base's groups. Every adapter tensor is merged, copied or refused; nothing is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Protocol

from loftq_cli.adapter.config import pooling_of
from loftq_cli.adapter.experts.factors import FactorReader
from loftq_cli.errors import LoftqError, QualityError, StorageError
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.merging.inputs import InputSums
from loftq_cli.merging.jobs import EXACT, MergeJobRunner, is_for_gpu, is_recast
from loftq_cli.merging.plan import Merge
from loftq_cli.merging.planner import MergeJob
from loftq_cli.merging.provenance import Provenance, check_contents
from loftq_cli.merging.report import (
    MergedLayer,
    MergeOutcome,
    largest_difference,
    total_lost,
    total_retention,
    write_side_files,
)
from loftq_cli.output.copies import NOT_FINITE, not_finite_note
from loftq_cli.output.journal import JournalEntry
from loftq_cli.output.staged_run import Entries, is_result_complete, run_staged
from loftq_cli.output.writer import OutputFiles
from loftq_cli.quant.gpu_matrix import BESIDE_NUMEL
from loftq_cli.runtime.gpu import SharedDevice, open_device
from loftq_cli.runtime.kernel_choice import choose_kernels
from loftq_cli.runtime.schedule import SMALL_NUMEL, in_turn
from loftq_cli.runtime.workers import Workers

# Below this share, most of the training would be gone from the deployed model. Rounding to bfloat16 lets an update into
# a bfloat16 base survive by 100 % where ||Δ|| is 1 % of ||W||, by 93 % at 0.3 %, by 53 % at 0.1 % and by 6 % at 0.01 %
# (measured; W and Δ normal). Over a base with more digits than bfloat16, rounding is noise that averages out.
LEAST_RETENTION = 0.5


class MergeObserver(Protocol):
    """The methods of `loftq_cli.api.observer.Observer` for a merge."""

    def note(self, text: str) -> None: ...

    def warning(self, text: str) -> None: ...

    def layer_merged(self, layer: MergedLayer) -> None: ...


def is_merge_done(merge: Merge, *, overwrite: bool) -> bool:
    """True when the output directory already holds the complete, undamaged result of `merge`.

    overwrite   whether to replace an earlier result. A finished result then counts as done only beside a left-over
                staging directory: the user repeated the command to continue.

    Raises UsageError when `merge` may not write the output: foreign files stand under the name, or an earlier result
    without `overwrite`.
    """
    return is_result_complete(merge.result, InputSums(merge).hash_job, overwrite=overwrite)


def merge_adapter(
    merge: Merge, observer: MergeObserver, *, overwrite: bool, restart: bool, threads: int = 1, device: str = "cpu"
) -> MergeOutcome:
    """Run all jobs, check the result, and publish the directory. An interrupted run of an equal plan continues.

    observer    hears of notes and merged layers
    overwrite   whether an earlier result under the output's name is replaced
    restart     whether an interrupted run is discarded
    threads     number of threads; the bytes do not depend on the number
    device      see `open_device`. A GPU merges whole matrices and quantizes merged matrices. The order of a GPU's sums
                differs from the processor's, so a weight may be rounded to the neighbour. Vectors, copies and changed
                offsets stay on the processor.

    Raises UsageError for an absent GPU; MismatchError for a fitted adapter on a foreign base, unless forced;
    InputError or NumericError naming a tensor for numbers that cannot be merged; QualityError when quantizing again,
    rounding offsets or rounding to 16 bits erases more than half of the adapter, unless forced. A refused merge leaves
    nothing behind. After an interrupt, or a StorageError, a second run on an equal kind of device continues the merge.
    """
    gpu, device_note = _open_gpu(merge, device)
    sums = InputSums(merge)
    provenance = check_contents(merge.base, merge.provenance, sums.hash_base_tensor, force=merge.options.force)
    for warning in provenance.warnings:
        observer.warning(warning)
    on_processor = [job for job in merge.jobs if gpu is None or not is_for_gpu(merge, job)]
    kernel_note = choose_kernels(sum(job.numel for job in on_processor if job.is_touched or job.matrix is not None))
    notes = _notes(merge, provenance)
    for note in (*notes, kernel_note, device_note):
        if note is not None:
            observer.note(note)
    work = MergeWork(merge, observer, sums, gpu, (*provenance.warnings, *notes))
    kind = "cpu" if gpu is None else gpu.kind
    run_staged(merge.result, work, overwrite=overwrite, restart=restart, threads=threads, device=kind)
    return work.outcome


def _open_gpu(merge: Merge, device: str) -> tuple[SharedDevice | None, str | None]:
    """Open the GPU for the jobs on whole matrices: the GPU or None, and a note about the GPU or None."""
    jobs = [job for job in merge.jobs if is_for_gpu(merge, job)]
    gpu = open_device(device, sum(job.numel for job in jobs))
    if gpu is None:
        return None, None
    if not jobs:
        return None, f"nothing here is for a GPU, and {gpu} not used"
    shared = SharedDevice(gpu)
    return shared, f"computing on {shared}"


def _notes(merge: Merge, provenance: Provenance) -> tuple[str, ...]:
    """Collect the remarks before the first job; `provenance` is from `check_contents`."""
    unused = [f"adapter tensor {name} is not needed: {reason}" for name, reason in merge.unused.items()]
    dense = [f"{job.name} is kept in full precision: {job.note}" for job in merge.jobs if job.note]
    notes = [*provenance.notes, *merge.notes, *unused, *dense]
    pooling, convention = pooling_of(merge.adapter.config), merge.options.pooling
    if pooling is not None and convention not in (None, pooling.convention):
        notes.append(f"merged as pooled by {convention}, and the adapter's config says {pooling.convention}")
    return tuple(notes)


class MergeWork:
    """The steps of a merge, for `run_staged`."""

    def __init__(
        self,
        merge: Merge,
        observer: MergeObserver,
        sums: InputSums,
        gpu: SharedDevice | None,
        notes: tuple[str, ...],
    ) -> None:
        self._merge, self._observer, self._sums, self._gpu, self._notes = merge, observer, sums, gpu, notes
        self._layers: list[MergedLayer] = []
        self._not_finite: list[str] = []

    @property
    def outcome(self) -> MergeOutcome:
        """The layers and notes of all finished jobs."""
        return MergeOutcome(tuple(self._layers), (*self._notes, *self._not_finite))

    def announce(self, text: str) -> None:
        """Tell the observer about the state of the run."""
        self._observer.note(text)

    def run_units(
        self, files: OutputFiles, finished: Entries, workers: Workers
    ) -> Generator[tuple[JournalEntry, bool]]:
        """Run the jobs; yield each journal entry, and whether `finished` held the entry."""
        runner = MergeJobRunner(self._merge, files, FactorReader(self._merge.weights), self._gpu)

        def run(job: MergeJob, sharing: Workers) -> tuple[JournalEntry, bool]:
            entry = finished.get(job.name)
            if entry is not None and entry.input_sha256 == self._sums.hash_job(job.name) and files.hold(entry.outputs):
                return entry, True
            outcome = runner.run(job, sharing)
            if job.is_copied and not is_recast(self._merge, job):
                for name, sha256 in outcome.sums.items():
                    self._sums.remember(name, sha256)
            return JournalEntry(job.name, self._sums.hash_job(job.name), outcome.sums, outcome.result), False

        small_numel = SMALL_NUMEL if self._gpu is None else BESIDE_NUMEL
        return in_turn(self._merge.jobs, run, lambda job: job.numel, workers, small_numel)

    def finish_unit(self, entry: JournalEntry, *, is_resumed: bool) -> None:
        """Collect a merged layer; warn of a copied tensor with NaN or infinite values."""
        if NOT_FINITE in entry.result:
            self._not_finite.append(not_finite_note(entry.unit))
            self._observer.warning(self._not_finite[-1])
        elif entry.result:
            self._layers.append(MergedLayer.from_json(entry.result))
            self._observer.layer_merged(self._layers[-1])

    def check_result(self, files: OutputFiles, entries: Entries, directory: Path, workers: Workers) -> None:
        """Raises QualityError when the result lost most of the adapter, unless the user forces the merge."""
        if not self._merge.options.force:
            _check_retention(self._merge, self._layers)

    def write_side_files(self, directory: Path, entries: Entries) -> None:
        """Write tokenizer, config, index, report and card. Raises StorageError."""
        write_side_files(self._merge, directory, self.outcome)

    def check_inputs_unchanged(self) -> None:
        """Raises StorageError when a weight file of base or adapter changed after planning."""
        self._merge.base.checkpoint.check_unchanged()
        self._merge.weights.check_unchanged()

    def keeps_unfinished(self, error: LoftqError) -> bool:
        """True after a StorageError: a second run can continue. A refused merge would be refused again."""
        return isinstance(error, StorageError)


def _check_retention(merge: Merge, layers: Sequence[MergedLayer]) -> None:
    retained = total_retention([layer for layer in layers if layer.squared_rounding is None])
    if retained is not None and retained < LEAST_RETENTION:
        raise QualityError(
            f"quantized again to {merge.options.requantize}, {retained:.1%} of the adapter would survive",
            file=merge.base.path,
            hint="merge without --requantize, which keeps all of it; or keep base and adapter apart; or --force",
        )
    _check_rounding(merge, layers)
    with_codes = [layer for layer in layers if layer.difference is not None]
    lost, difference = total_lost(with_codes), largest_difference(with_codes)
    # A tiny update may be lost to the precision of float32 itself; no option would keep more.
    if lost is None or difference is None or difference[1] <= EXACT or lost <= 1 - LEAST_RETENTION:
        return
    offsets = "with rounded zero points" if merge.options.round_zeros else "with such offsets"
    message = f"{lost:.1%} of the update would be lost"
    if math.isinf(lost):
        message = f"the base itself would change, by up to {difference[1]:.1e} of its largest weight"
    remedy = "leave out --round-zeros" if merge.options.round_zeros else "leave out --scale-dtype"
    hint = f"float32 offsets keep all of it: {remedy}; or --force"
    raise QualityError(f"{offsets}, {message}", file=merge.base.path, hint=hint)


def _check_rounding(merge: Merge, layers: Sequence[MergedLayer]) -> None:
    """Raises QualityError when rounding to the dtype of the file erases most of the adapter. float32 is the widest
    dtype: no option would keep more. Over a base with more digits than the dtype, an update of a millionth of the
    weights drowns in the noise of rounding, and may be refused as well.
    """
    retained = total_retention([layer for layer in layers if layer.squared_rounding is not None])
    if retained is None or retained >= LEAST_RETENTION or merge.dtype == "float32":
        return
    hint = "keep base and adapter apart; or --force"
    if not LAYOUTS[merge.form.layout].one_dtype:
        hint = f"--dtype float32 keeps all of it; or {hint}"
    message = f"rounded to {merge.dtype}, {retained:.1%} of the adapter would survive"
    raise QualityError(message, file=merge.base.path, hint=hint)
