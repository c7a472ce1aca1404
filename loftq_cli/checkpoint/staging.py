"""The output directory, hidden until it is complete: work happens in `.NAME.partial` beside it, under a lock, with a
journal of finished units; publication is one rename. Nobody ever sees a half-written result under its own name.

Beside a mount point, or where the parent may not be written, there is no such place: there it is `.partial` inside, and
publication moves file by file, the config and then the checksums last.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint import disk
from loftq_cli.checkpoint.checksums import CHECKSUMS, Checksums, file_sha256, files_in, read_checksums
from loftq_cli.checkpoint.journal import Journal, JournalContents, JournalEntry, by_unit, read_journal
from loftq_cli.errors import InputError, StorageError, UsageError

_JOURNAL, _RESULT, _REPLACED = ".journal", "result", "replaced"
_NO_CONTENT = {".partial", "lost+found"}  # in a directory that is a mount point
_SYNC_SECONDS = 2.0  # of work that a power failure may cost beside the unit at hand; a kill costs only that one
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of network file systems that are mounted without them
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a result is made.

    target   the directory that it becomes, links resolved
    root     the hidden directory, which is locked; what is written is in its `result`
    moves    whether publication moves file by file
    """

    target: Path
    root: Path
    moves: bool

    @property
    def result(self) -> Path:
        return self.root / _RESULT

    @property
    def replaced(self) -> Path:
        return self.root / _REPLACED

    @property
    def journal(self) -> Path:
        return self.root / _JOURNAL

    def is_published(self) -> bool:
        """Whether the hidden directory is what a run left behind that died after its publication."""
        if not read_journal(self.journal).is_publishing:
            return False
        return not (self.result / CHECKSUMS).exists() if self.moves else not self.result.exists()

    def is_left_over(self) -> bool:
        """Whether there is a hidden directory, and nothing of use in it."""
        return self.root.is_dir() and (self.is_published() or read_journal(self.journal).fingerprint is None)

    def is_half_published(self) -> bool:
        """Whether a run died while it published: what stands under the output's name may be a part of its result."""
        return read_journal(self.journal).is_publishing and not self.is_published()


class Staging:
    """A locked staging directory: `path` is where to write, `entries` what is finished already by unit, `publish` makes
    it visible, `close` lets go of the lock.
    """

    def __init__(self, output: Path, *, fingerprint: str, overwrite: bool, restart: bool) -> None:
        """Raises UsageError when `output` is taken, and StorageError when another process is writing it.

        `fingerprint` stands for the input and every option that affects bytes: an unfinished run with another one
        is not continued, and `restart` discards it.
        """
        self.output, self._fingerprint = output, fingerprint
        self._place = _place_of(output)
        self.path = self._place.result
        self._journal: Journal | None = None
        check_output(output, overwrite=overwrite)
        self._lock = _locked(self._place, output)
        try:
            _recover(self._place)
            check_output(output, overwrite=overwrite)
            self.entries = self._open_journal(restart=restart)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def recording(self, sync: Callable[[], None]) -> Iterator[Callable[[JournalEntry], None]]:
        """What adds a finished unit to the journal. `sync` brings what units wrote to the disk; it runs beside the work
        every few seconds, and once more when the block ends.

        Raises StorageError when the disk fails. What may not be on it then is taken back out of the journal.
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
            yield record
            for future in running:
                future.result()
        make_durable(journal.end)

    def keep_only(self, names: Iterable[str]) -> None:
        """Remove every file but these: what an earlier run wrote beside them is written again, or is not ours."""
        kept = set(names)
        for name in files_in(self.path):
            if name not in kept:
                disk.remove(self.path / name)

    def publish(
        self, tool: Mapping[str, Any], tensors: Mapping[str, Mapping[str, str]], input_sha256: str | None
    ) -> None:
        """Make everything durable, write the checksums (with `tool`'s values beside them), and show the result.

        `tensors`: relative name of a weight file -> tensor name -> sha256.
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
        journal.publish()
        if self._place.moves:
            _move_in(self._place)
        else:
            _rename_in(self._place)
        _clear(self._place)

    @contextmanager
    def whole(self, tool: Mapping[str, Any]) -> Iterator[Path]:
        """The directory to write into, for what is made in one go: published when the block ends, and gone, with its
        lock, when it raises.
        """
        try:
            yield self.path
            self.publish(tool, {}, None)
        except BaseException:
            self.discard()
            raise
        finally:
            self.close()

    def discard(self) -> None:
        """Remove what was written; what stood under the output's name stays or comes back."""
        _recover(self._place)
        _clear(self._place)

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

    def _open_journal(self, *, restart: bool) -> dict[str, JournalEntry]:
        place, found = self._place, read_journal(self._place.journal)
        is_other = found.fingerprint != self._fingerprint
        is_worthless = place.is_published() or not found.entries
        if is_other and not restart and not is_worthless:
            raise UsageError(
                "an unfinished run with another input, other options or another version lies beside it",
                file=self.output,
                hint="run the same command as before to continue it, or --restart to start over",
            )
        if restart or is_other or is_worthless:
            for path in list(place.root.iterdir()):
                disk.remove_tree(path) if path.is_dir() and not path.is_symlink() else disk.remove(path)
            found = JournalContents()
        disk.make_directory(place.result)
        self._journal = Journal(place.journal, found)
        if found.fingerprint is None:
            self._journal.start(self._fingerprint)
        self._journal.sync(self._journal.end)
        disk.sync_directory(place.root)
        disk.sync_directory(place.root.parent)
        return by_unit(found.entries)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises UsageError when something stands under `output` that a result may not replace."""
    place = _place_of(output)
    if not place.target.parent.is_dir():
        hint = f"mkdir -p {place.target.parent}"
        raise UsageError("its parent directory does not exist", file=output, hint=hint)
    if not os.path.lexists(output) or place.is_half_published():  # that is undone first
        return
    if not output.is_dir():
        raise UsageError("is not a directory", file=output, hint="choose another output")
    if not _contents(place):
        return
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
    known = {*mark.files, CHECKSUMS}
    found = (name for name in files_in(place.target) if not (place.moves and name.startswith(".partial/")))
    added = [name for name in found if name not in known]
    if added:
        more = f" and {len(added) - 3} more files" if len(added) > 3 else ""
        what = f"holds {', '.join(added[:3])}{more}, which the run that made it did not write"
        raise UsageError(what, file=output, hint="move what you need out of it, or choose another output")


def finished_mark(output: Path, fingerprint: str, *, overwrite: bool) -> Checksums | None:
    """The completeness mark of the result under `output`, when it is that of `fingerprint` and every file of it is as
    it was written. What its run may have left behind after publishing it is removed.

    One that is to be replaced counts only where its run left something behind: then this run continues that one.
    """
    if overwrite and not _place_of(output).is_left_over():
        return None
    try:
        mark = read_checksums(output)
        # In this order: a result of something else is not worth reading through.
        if mark is None or mark.fingerprint != fingerprint:
            return None
        if any(file_sha256(output / name) != expected for name, expected in mark.files.items()):
            return None
    except (InputError, StorageError):
        return None
    _sweep(output)
    return mark


def check_apart(output: Path, inputs: Iterable[Path]) -> None:
    """Raises UsageError when `output` is, contains or lies inside one of `inputs`."""
    target = Path(os.path.realpath(output))
    for path in inputs:
        source = Path(os.path.realpath(path))
        if target == source or target in source.parents or source in target.parents:
            raise UsageError(
                f"the output may not be, contain or lie inside the input {path}", file=output, hint="write elsewhere"
            )


def check_space(output: Path, nbytes: int) -> None:
    """Raises StorageError when the file system of `output` has less than `nbytes` free, beside what an unfinished run
    has taken of it already.
    """
    place = _place_of(output)
    taken = sum(os.lstat(place.root / name).st_blocks * 512 for name in files_in(place.root))
    free = shutil.disk_usage(place.root.parent).free
    if free + taken < nbytes:
        raise StorageError(
            f"needs {(nbytes - taken) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free",
            file=output,
            hint="free some space or write elsewhere",
        )


def _place_of(output: Path) -> _Place:
    target = Path(os.path.realpath(output))
    moves = target.is_dir() and (_is_mount(target) or not os.access(target.parent, os.W_OK | os.X_OK))
    return _Place(target, target / ".partial" if moves else target.parent / f".{target.name}.partial", moves)


def _is_mount(path: Path) -> bool:
    """Whether another file system, or another part of the same one, is mounted there."""
    if os.path.ismount(path):
        return True
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return False
    points = (re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), line.split()[4]) for line in lines)
    return os.fsencode(path) in points  # of the same file system, ismount sees none


def _contents(place: _Place) -> list[str]:
    ignored = _NO_CONTENT if place.moves else set()
    return [name for name in os.listdir(place.target) if name not in ignored]


def _locked(place: _Place, output: Path) -> int:
    """A descriptor that holds the lock. It is on the hidden directory itself and goes with the process: there is no
    stale lock to clean up.
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
            what, hint = "another loftq process is writing it", "wait for it, or choose another output"
        elif isinstance(error, FileNotFoundError):
            what, hint = "another loftq process has just finished it", "run again"
        else:
            raise disk.storage_error(error, place.root) from None
        raise StorageError(what, file=output, hint=hint) from None


def _sweep(output: Path) -> None:
    """Remove what a run left behind that died after publishing."""
    place = _place_of(output)
    if not place.is_left_over():
        return
    try:
        lock = _locked(place, output)
    except StorageError:
        return
    try:
        _clear(place)
    finally:
        os.close(lock)


def _recover(place: _Place) -> None:
    """Undo a publication that was interrupted: what stood there before stands there again."""
    if place.is_published():
        return
    if place.moves:
        if place.is_half_published():
            _move_back(place)
    elif place.replaced.exists() and not os.path.lexists(place.target):
        disk.rename(place.replaced, place.target)


def _clear(place: _Place) -> None:
    disk.remove_tree(place.root)
    disk.sync_directory(place.root.parent)


def _rename_in(place: _Place) -> None:
    is_replacing = place.target.exists() and any(place.target.iterdir())
    if is_replacing:
        disk.remove_tree(place.replaced)
        disk.rename(place.target, place.replaced)
        disk.sync_directory(place.root)
    try:
        disk.rename(place.result, place.target)  # an empty directory gives way
    except BaseException:
        _recover(place)
        raise
    disk.sync_directory(place.target.parent)


def _move_in(place: _Place) -> None:
    before = read_checksums(place.target)
    if before is not None:
        disk.make_directory(place.replaced)
        disk.sync_directory(place.root)
        _take_out(_top_names(before), place.target, place.replaced)
    _bring_in(os.listdir(place.result), place.result, place.target)


def _move_back(place: _Place) -> None:
    if (mark := read_checksums(place.result)) is not None:
        came = [name for name in _top_names(mark) if not (place.result / name).exists()]
        _take_out([name for name in came if (place.target / name).exists()], place.target, place.result)
    if place.replaced.is_dir():
        _bring_in(os.listdir(place.replaced), place.replaced, place.target)
        disk.remove_tree(place.replaced)


def _top_names(mark: Checksums) -> list[str]:
    """What a result has in its folder."""
    return [CHECKSUMS, *{name.partition("/")[0] for name in mark.files}]


def _take_out(names: Iterable[str], source: Path, target: Path) -> None:
    """Move a result's files, the mark and the config first: nothing loads a folder without its config."""
    for kind in (2, 1, 0):
        _move([name for name in names if _rank(name) == kind], source, target)


def _bring_in(names: Iterable[str], source: Path, target: Path) -> None:
    """Move a result's files, the config and the mark last."""
    for kind in (0, 1, 2):
        _move([name for name in names if _rank(name) == kind], source, target)


def _rank(name: str) -> int:
    return {"config.json": 1, CHECKSUMS: 2}.get(name, 0)


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    """Move files, and return when that is on the disk."""
    for name in sorted(names):
        disk.rename(source / name, target / name)
    disk.sync_directory(target)
    disk.sync_directory(source)


def _sync_tree(directory: Path) -> None:
    for name in files_in(directory):
        descriptor = disk.open_file(directory / name)
        try:
            disk.sync(descriptor, directory / name)
        finally:
            os.close(descriptor)
    for folder, _, _ in os.walk(directory, topdown=False):
        disk.sync_directory(Path(folder))
