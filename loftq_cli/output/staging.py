"""The output directory, hidden until the result is complete: work happens in a separate folder (place.py), under a
lock, with a journal of finished units. Nobody ever sees a half-written result under the output's name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.watched_file import WatchedFile
from loftq_cli.errors import InputError, StorageError, UsageError
from loftq_cli.output import disk
from loftq_cli.output.checksums import (
    CHECKSUMS,
    Checksums,
    file_sha256,
    files_in,
    foreign_names,
    own_files,
    read_checksums,
)
from loftq_cli.output.journal import Journal, JournalContents, JournalEntry, by_unit, read_journal
from loftq_cli.output.place import Place
from loftq_cli.output.writer import NotDurableError

_SYNC_SECONDS = 2.0  # a power failure costs work of so many seconds and the unit at hand; a kill costs the unit only
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # network file systems without locks answer so


class Staging:
    """A locked staging directory.

    path      the directory to write to; `publish` makes the content visible under the output's name
    entries   journal entries of an interrupted run, by unit
    """

    def __init__(self, output: Path, *, fingerprint: str, overwrite: bool, restart: bool, device: str = "cpu") -> None:
        """Lock the staging directory of `output`.

        fingerprint   hash of the input and of every option with an effect on bytes
        overwrite     True lets the run replace a finished result under the output's name
        restart       True discards an unfinished run
        device        kind of the computing device: another kind takes sums in another order

        A run continues an unfinished run only with the fingerprint and the kind of device of the unfinished run.
        Raises UsageError when `output` is taken or an unfinished run cannot be continued, StorageError when another
        process is writing to `output`.
        """
        self.output, self._fingerprint = output, fingerprint
        self._run = fingerprint if device == "cpu" else f"{fingerprint} {device}"
        self._place = Place.of(output)
        self.path = self._place.result
        self._journal: Journal | None = None
        check_output(output, overwrite=overwrite, hashes=False)
        self._made_parents = disk.make_directories(self._place.root.parent)
        self._lock = _locked(self._place, output)
        try:
            self._place.claim()
            self._place.recover()
            try:
                self._earlier = _check_replaceable(self._place, output, overwrite=overwrite, hashes=True)
            except UsageError:
                self._place.release()
                raise
            self.entries = self._open_journal(restart=restart)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def recording(self, sync: Callable[[], None]) -> Iterator[Callable[[JournalEntry], None]]:
        """Yield a function that adds a finished unit to the journal.

        sync   brings the tensors of finished units to the disk; runs beside the work every few seconds, and once more
               when the block ends

        Raises StorageError when the disk fails; the journal then loses the units without a proven place on the disk.
        """
        journal, running = self._open(), list[Future[None]]()
        since = time.monotonic()

        def make_durable(end: int) -> None:
            try:
                sync()
                journal.sync(end)
            except StorageError:
                journal.cut()
                raise

        def record(entry: JournalEntry) -> None:
            nonlocal since
            if running and running[0].done():
                running.pop().result()
            journal.append(entry)
            if not running and time.monotonic() - since > _SYNC_SECONDS:
                running.append(background.submit(make_durable, journal.end))
                since = time.monotonic()

        with ThreadPoolExecutor(1, "loftq-sync") as background:
            try:
                yield record
            except NotDurableError:
                journal.cut()
                raise
            for future in running:
                future.result()
        make_durable(journal.end)

    def keep_only(self, names: Iterable[str]) -> None:
        """Remove every file but `names`: side files of an earlier run are written again, stray files are not ours."""
        published = set(names)
        for name in files_in(self.path):
            if name not in published:
                disk.remove(self.path / name)

    def publish(
        self, tool: Mapping[str, Any], tensors: Mapping[str, Mapping[str, str]], input_sha256: str | None
    ) -> None:
        """Make everything durable, write checksums.json, and show the result under the output's name.

        tool           name and version of this program
        tensors        relative name of a weight file -> tensor name -> sha256
        input_sha256   hash of the input's numbers; None where nobody asks for the hash later
        """
        journal, result = self._open(), self.path
        files = {name: file_sha256(result / name) for name in files_in(result) if name != CHECKSUMS}
        mark = Checksums(self._fingerprint, input_sha256, files, tensors)
        text = json.dumps({**tool, **mark.to_json()}, indent=2) + "\n"
        disk.write_file(result / CHECKSUMS, text.encode())
        try:
            _sync_tree(result)
        except StorageError:
            journal.cut(to_nothing=True)
            raise
        self._check_earlier_unchanged(self._place.target)
        journal.publish(file_sha256(result / CHECKSUMS))
        self._place.publish(self._check_earlier_unchanged)

    @contextmanager
    def whole(self, tool: Mapping[str, Any]) -> Iterator[Path]:
        """Yield the directory to write into, for a result without units of work.

        The result is published when the block ends. An error in the block removes the directory and the lock.
        """
        try:
            yield self.path
            self.publish(tool, {}, None)
        except BaseException:
            self.discard()
            raise
        finally:
            self.close()

    def refuse(self) -> None:
        """Record that the input or an option ended the run: another command may take the place of the run."""
        self._open().refuse()

    def discard(self) -> None:
        """Remove the staging directory and the directories made above; an earlier result under the output's name stays
        or comes back.
        """
        self._place.recover()
        self._place.clear()
        for directory in reversed(self._made_parents):
            disk.remove_empty(directory)

    def close(self) -> None:
        """Let go of the lock."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _open(self) -> Journal:
        assert self._journal is not None
        return self._journal

    def _check_earlier_unchanged(self, folder: Path) -> None:
        """Raises StorageError when somebody wrote into the earlier result in `folder` during the run."""
        place, known = self._place, {str(file.path.relative_to(self._place.target)): file for file in self._earlier}
        try:
            if folder == place.target:
                _check_replaceable(place, self.output, overwrite=bool(known), hashes=False)
            elif place.moves:  # moving a file changes the times of the file
                _refuse(foreign_names(folder), "changed since the run that made it", self.output)
                return
            else:
                added = [name for name in files_in(folder, links=True) if name not in known]
                _refuse(added, "which the run that made it did not write", self.output)
            for name, file in known.items():
                if not replace(file, path=folder / name).is_unchanged():
                    raise StorageError("changed while it was being replaced", file=file.path)
        except (StorageError, UsageError) as error:
            message = f"{error.message}, and the result would replace it"
            hint = "move what you need out of the output, then run the same command to finish"
            raise StorageError(message, file=error.file, hint=hint) from None

    def _open_journal(self, *, restart: bool) -> dict[str, JournalEntry]:
        place, contents = self._place, read_journal(self._place.journal)
        is_other = contents.fingerprint != self._run
        is_worthless = place.is_published() or not contents.entries or (is_other and contents.is_refused)
        if is_other and not restart and not is_worthless:
            raise UsageError(
                "an unfinished run with another input, other options or another version or device lies beside it",
                file=self.output,
                hint="run the same command as before to continue it, or --restart to start over",
            )
        if restart or is_other or is_worthless:
            place.empty()
            contents = JournalContents()
        disk.make_directory(place.result)
        self._journal = Journal(place.journal, contents)
        if contents.fingerprint is None:
            self._journal.start(self._run)
        # The tensors behind an earlier process's lines may still be in memory only: no line counts as durable yet.
        self._journal.sync(0)
        disk.sync_directory(place.root)
        disk.sync_directory(place.root.parent)
        return by_unit(contents.entries)


def check_output(output: Path, *, overwrite: bool, hashes: bool = True) -> None:
    """Raises UsageError when something irreplaceable stands under `output`. `overwrite` lets a result be replaced, and
    nothing that the run of the result did not write: the files are hashed, unless `hashes` is false.

    >>> check_output(Path("absent"), overwrite=False)
    """
    place = Place.of(output)
    parent = disk.nearest_path(place.target.parent)
    if not parent.is_dir():
        raise UsageError(f"lies below {parent}, which is no directory", file=output, hint="choose another output")
    place.check_owned()
    if place.moves and place.is_half_published():  # a half publication is undone first
        return
    _check_replaceable(place, output, overwrite=overwrite, hashes=hashes)


def _check_replaceable(place: Place, output: Path, *, overwrite: bool, hashes: bool) -> list[WatchedFile]:
    """The files of the result under `output`; none for an absent or empty output, and none without `hashes`.

    Raises UsageError in the cases of `check_output`.
    """
    if not os.path.lexists(output):
        return []
    if not output.is_dir():
        raise UsageError("is not a directory", file=output, hint="choose another output")
    if not place.contents():
        return []
    try:
        mark = read_checksums(place.target)
    except InputError:
        mark = None
    if mark is None:
        raise UsageError(
            "is not empty and not a result of this tool",
            file=output,
            hint="choose another output, or remove it yourself",
        )
    if not overwrite:
        raise UsageError("exists already", file=output, hint="--overwrite replaces it")
    names = [name for name in files_in(place.target, links=True) if not place.is_hidden(name)]
    added = [name for name in names if name not in {*mark.files, CHECKSUMS}]
    _refuse(added, "which the run that made it did not write", output)
    if not hashes:
        return []
    own, changed = own_files(place.target, mark, names)
    _refuse(changed, "changed since the run that made it", output)
    return own


def _refuse(names: list[str], reason: str, output: Path) -> None:
    """Raises UsageError when a result has files of somebody else."""
    if names:
        more = f" and {len(names) - 3} more files" if len(names) > 3 else ""
        hint = "move what you need out of it, or choose another output"
        raise UsageError(f"holds {', '.join(names[:3])}{more}, {reason}", file=output, hint=hint)


def finished_mark(output: Path, fingerprint: str, *, overwrite: bool) -> Checksums | None:
    """The completeness mark of the result under `output`; None unless the result has the `fingerprint` and every file
    has the listed sha256. The leftover staging directory of a finished run is removed.

    `overwrite` counts a result only beside a leftover staging directory: the user typed the command to continue the
    run.
    """
    if overwrite and not Place.of(output).is_left_over():
        return None
    try:
        mark = read_checksums(output)
        # The fingerprint comes first: a result of another input is not worth reading through.
        if mark is None or mark.fingerprint != fingerprint:
            return None
        if any(file_sha256(output / name) != expected for name, expected in mark.files.items()):
            return None
    except (InputError, StorageError):
        return None
    _sweep(output)
    return mark


def check_apart(output: Path, inputs: Iterable[Path]) -> None:
    """Raises UsageError when `output` is, contains or lies inside a path of `inputs`.

    >>> check_apart(Path("base"), [Path("model")])
    >>> check_apart(Path("model/base"), [Path("model")])
    Traceback (most recent call last):
    loftq_cli.errors.UsageError: ...
    """
    target = Path(os.path.realpath(output))
    for path in inputs:
        source = Path(os.path.realpath(path))
        if target == source or target in source.parents or source in target.parents:
            raise UsageError(
                f"the output may not be, contain or lie inside the input {path}", file=output, hint="write elsewhere"
            )


def check_space(output: Path, nbytes: int) -> None:
    """Raises StorageError when the file system of `output` has less than `nbytes` free. The space of an unfinished run
    counts as free.

    >>> check_space(Path("base"), 0)
    """
    place = Place.of(output)
    staged_nbytes = sum(os.lstat(place.root / name).st_blocks * 512 for name in files_in(place.root))
    free = shutil.disk_usage(disk.nearest_path(place.root.parent)).free
    if free + staged_nbytes < nbytes:
        raise StorageError(
            f"needs {(nbytes - staged_nbytes) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free",
            file=output,
            hint="free some space or write elsewhere",
        )


def _locked(place: Place, output: Path) -> int:
    """A descriptor with the lock on the hidden directory. The lock ends with the process, so nobody has to clean up a
    stale lock.
    """
    disk.make_directory(place.root)
    try:
        descriptor = os.open(place.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise disk.storage_error(error, place.root) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        if not os.path.samestat(os.fstat(descriptor), os.stat(place.root)):
            raise FileNotFoundError
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            message, hint = "another loftq process is writing it", "wait for it, or choose another output"
        elif isinstance(error, FileNotFoundError):
            message, hint = "another loftq process has just finished it", "run again"
        else:
            raise disk.storage_error(error, place.root) from None
        raise StorageError(message, file=output, hint=hint) from None


def _sweep(output: Path) -> None:
    """Remove the staging directory of a run with a crash after publishing."""
    place = Place.of(output)
    if not place.is_left_over():
        return
    try:
        lock = _locked(place, output)
    except StorageError:
        return
    try:
        place.clear()
    finally:
        os.close(lock)


def _sync_tree(directory: Path) -> None:
    for name in files_in(directory):
        descriptor = disk.open_file(directory / name)
        try:
            disk.sync(descriptor, directory / name)
        finally:
            os.close(descriptor)
    for folder, _, _ in os.walk(directory, topdown=False):
        disk.sync_directory(Path(folder))
