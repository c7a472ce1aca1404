"""The only way from a plan to a result: units of work run under a lock and a journal, and the result is published
whole. Quantizing and merging define a unit; the order of changes to the disk is here.

1. A complete result is kept, see `is_result_complete`.
2. The disk has to have space; the hidden directory is locked and laid out.
3. Units run in order; a journal lists each finished unit.
4. The result is checked, files of earlier runs are removed, and side files are written.
5. The inputs have to be unchanged; then checksums are written and the result becomes visible.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from loftq_cli.errors import LoftqError, StorageError
from loftq_cli.output.checksums import fingerprint_of
from loftq_cli.output.journal import JournalEntry, outputs_of
from loftq_cli.output.records import TOOL
from loftq_cli.output.side_files import are_copied, nbytes_of
from loftq_cli.output.staging import Staging, check_output, check_space, finished_mark
from loftq_cli.output.writer import OutputFiles
from loftq_cli.runtime.workers import Workers, started
from loftq_cli.tensors.headers import OutTensor

Entries: TypeAlias = Mapping[str, JournalEntry]


@dataclass(frozen=True, slots=True)
class PlannedResult:
    """A result directory as headers alone foretell the directory.

    output        the directory
    fingerprint   hash of the input's headers and of every option with an effect on bytes
    units         names of the units of work, in order
    files         relative name of a weight file -> the file's tensors
    side_files    relative name of a copy -> the small file to copy
    remote_code   whether copied configs keep the names of custom code
    metadata      relative name of a weight file -> further metadata of the file's header
    """

    output: Path
    fingerprint: str
    units: tuple[str, ...]
    files: Mapping[str, Sequence[OutTensor]]
    side_files: Mapping[str, Path]
    remote_code: bool = True
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors and side files."""
        weights = sum(tensor.nbytes for tensors in self.files.values() for tensor in tensors)
        return weights + nbytes_of(self.side_files)


class StagedWork(Protocol):
    """The steps of a run with a difference between quantizing and merging."""

    def announce(self, text: str) -> None:
        """Tell the observer about the state of the run."""

    def run_units(
        self, files: OutputFiles, finished: Entries, workers: Workers
    ) -> Generator[tuple[JournalEntry, bool]]:
        """Yield the journal entry of each unit, in the order of the plan, and whether `finished` held the entry.

        finished   entries of an interrupted run by unit; input and output of a unit are hashed before an entry counts
        """
        ...

    def finish_unit(self, entry: JournalEntry, *, is_resumed: bool) -> None:
        """Collect the result of a unit in the journal."""

    def check_result(self, files: OutputFiles, entries: Entries, directory: Path, workers: Workers) -> None:
        """Refuse to publish a bad result in `directory`. Raises LoftqError."""

    def write_side_files(self, directory: Path, entries: Entries) -> None:
        """Write everything beside the weights. Raises StorageError."""

    def check_inputs_unchanged(self) -> None:
        """Raises StorageError when an input file changed after opening."""

    def keeps_unfinished(self, error: LoftqError) -> bool:
        """True if a later run may continue after `error`; otherwise the staging directory is removed."""
        ...


def is_result_complete(planned: PlannedResult, hash_input: Callable[[str], str], *, overwrite: bool) -> bool:
    """True if the output is the complete, undamaged result of the plan, and nobody wants a replacement.

    hash_input   gives the sha256 of the input numbers of a unit: the fingerprint covers headers and options only

    Raises UsageError when something else stands under the output's name.
    """
    mark = finished_mark(planned.output, planned.fingerprint, overwrite=overwrite)
    if mark is not None:
        inputs = fingerprint_of({unit: hash_input(unit) for unit in planned.units})
        copied = are_copied(planned.side_files, mark.files, remote_code=planned.remote_code)
        if mark.input_sha256 == inputs and copied:
            return True
    check_output(planned.output, overwrite=overwrite)
    return False


def run_staged(
    planned: PlannedResult,
    work: StagedWork,
    *,
    overwrite: bool,
    restart: bool,
    threads: int = 1,
    device: str = "cpu",
) -> None:
    """Run all units and publish the result; continue an interrupted run of the same plan unless `restart`.

    device   kind of the device ("cpu", "cuda"): a run is continued on an equal kind only

    Raises LoftqError; the output's name then stands for the previous contents, as before the run. Where the input or an
    option is the reason, the same command continues the run, and any other command starts over: the remedy in the error
    may be another option.
    """
    check_space(planned.output, planned.nbytes)
    staging = Staging(
        planned.output, fingerprint=planned.fingerprint, overwrite=overwrite, restart=restart, device=device
    )
    try:
        if staging.entries:
            finished, total = len(staging.entries), len(planned.units)
            work.announce(f"continuing: {finished} of {total} tensors are finished; hashing them")
        with started(threads) as workers, OutputFiles(staging.path, planned.files, planned.metadata) as files:
            entries = _run_units(work, staging, files, workers)
            work.check_result(files, entries, staging.path, workers)
            tensor_sums = files.sums_by_file(outputs_of(entries.values()))
        staging.keep_only(tensor_sums)
        work.write_side_files(staging.path, entries)
        work.check_inputs_unchanged()
        inputs = fingerprint_of({unit: entry.input_sha256 for unit, entry in entries.items()})
        staging.publish(TOOL, tensor_sums, inputs)
    except LoftqError as error:
        if not work.keeps_unfinished(error):
            staging.discard()
        elif not isinstance(error, StorageError):
            staging.refuse()
        raise
    finally:
        staging.close()


def _run_units(work: StagedWork, staging: Staging, files: OutputFiles, workers: Workers) -> dict[str, JournalEntry]:
    """Run every unit, and record each unit without an entry of an earlier run."""
    entries: dict[str, JournalEntry] = {}
    # The units end before the recording does: no write is under way during the last sync.
    with (
        staging.recording(files.sync) as record,
        closing(work.run_units(files, staging.entries, workers)) as results,
    ):
        for entry, is_resumed in results:
            if not is_resumed:
                record(entry)
            entries[entry.unit] = entry
            work.finish_unit(entry, is_resumed=is_resumed)
    return entries
