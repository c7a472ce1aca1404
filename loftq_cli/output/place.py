"""The folder of a result in the making, and the publication: the folder lies beside the output, and a single rename
makes the result visible. An earlier result and the new one exchange their names, so that the output is never absent;
where the system cannot exchange, the earlier result moves into the folder first. An earlier result is removed when
nobody can write into it by its name any more, and nobody has. A marker tells the folder from folders of other owners.

A mount point, or a parent without write permission, rules a rename out. The result is then made in `.partial` inside
the output, and publication moves file by file, config.json and then the checksums last. No file of a result is read
here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.checkpoint.watched_file import HIDDEN_INSIDE, REPLACED, WatchedFile, hidden_folder
from loftq_cli.errors import InputError, LoftqError, UsageError
from loftq_cli.output import disk
from loftq_cli.output.checksums import CHECKSUMS, Checksums, file_sha256, foreign_names, read_checksums
from loftq_cli.output.journal import read_journal

_JOURNAL, _RESULT, _MARKER = ".journal", "result", ".loftq-cli"
_DISCARDED = "discarded"  # an earlier result, known to hold nothing of anybody else
_MARKER_TEXT = b"""An unfinished result of loftq-cli. The same command completes the result and removes the folder.
Never delete the folder while `replaced` in the folder holds the only copy of an earlier result.
"""
_HIDDEN = re.compile(r"\.(.+\.)?partial")
_NO_CONTENT = {HIDDEN_INSIDE, "lost+found"}  # an empty mount point may hold the names
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Place:
    """The directories of a result in the making.

    target   the final directory of the result, links resolved
    root     the hidden, locked directory; the folder `result` inside holds the written files
    moves    True if publication moves file by file
    """

    target: Path
    root: Path
    moves: bool

    @classmethod
    def of(cls, output: Path, mounts: Path = _MOUNTS) -> Place:
        """The place for the path `output` as typed by a user; the file `mounts` lists all mount points."""
        target = Path(os.path.realpath(output))
        moves = target.is_dir() and (_is_mount(target, mounts) or not os.access(target.parent, os.W_OK | os.X_OK))
        return cls(target, target / HIDDEN_INSIDE if moves else hidden_folder(target), moves)

    @property
    def result(self) -> Path:
        """The folder of the written files."""
        return self.root / _RESULT

    @property
    def replaced(self) -> Path:
        """The folder of the previous contents of the output until the result is visible."""
        return self.root / REPLACED

    @property
    def journal(self) -> Path:
        """The journal of finished units."""
        return self.root / _JOURNAL

    def check_owned(self) -> None:
        """Raises UsageError when something else has the name of the hidden directory."""
        if not self._is_owned():
            message = "has the name of the folder for an unfinished result, and this tool did not make it"
            raise UsageError(message, file=self.root, hint="rename it, or choose another output")

    def claim(self) -> None:
        """Mark the hidden directory, before anything else is in the directory. Raises UsageError for a directory of
        another owner, StorageError when the disk fails.
        """
        self.check_owned()
        if self._marker() == _MARKER_TEXT:
            return
        path = self.root / _MARKER
        with disk.written_file(path) as descriptor:
            disk.write_at(descriptor, 0, _MARKER_TEXT, path)
            disk.sync(descriptor, path)
        disk.sync_directory(self.root)

    def is_published(self) -> bool:
        """True if a run died after publication and left the hidden directory."""
        publishing = read_journal(self.journal).publishing
        return publishing is not None and self._is_result_gone(publishing)

    def is_half_published(self) -> bool:
        """True if a run died during publication, so an output with moved files may hold a part of a result."""
        publishing = read_journal(self.journal).publishing
        return publishing is not None and not self._is_result_gone(publishing)

    def is_left_over(self) -> bool:
        """True if the hidden directory exists, is ours, and holds nothing of use."""
        if not self.root.is_dir() or not self._is_owned():
            return False
        return read_journal(self.journal).fingerprint is None or self.is_published()

    def _is_result_gone(self, publishing: str) -> bool:
        """True if nothing is left to publish. `publishing` is the sha256 of the mark of the new result: after an
        exchange, the folder of the result holds the earlier result.
        """
        if self.moves:
            return not (self.result / CHECKSUMS).exists()
        if self.replaced.exists() or not self.result.exists():
            return not self.result.exists()
        try:
            return file_sha256(self.result / CHECKSUMS) != publishing
        except InputError:
            return True

    def _is_owned(self) -> bool:
        """True for an absent or empty directory, and for a directory with a marker or a journal of this tool. Before
        the marker is whole, no second file is in the directory.
        """
        if not os.path.lexists(self.root):
            return True
        if self.root.is_symlink() or not self.root.is_dir():
            return False
        try:
            names, marker = os.listdir(self.root), self._marker()
        except OSError:
            return True  # the lock fails too, and reports the reason
        if not names or marker == _MARKER_TEXT or read_journal(self.journal).fingerprint is not None:
            return True
        return names == [_MARKER] and marker is not None and _MARKER_TEXT.startswith(marker.rstrip(b"\0"))

    def _marker(self) -> bytes | None:
        """The first bytes of the marker; None without a marker."""
        try:
            file = WatchedFile.open(self.root / _MARKER, may_be_empty=True)
            return bytes(file.read(0, min(file.nbytes, len(_MARKER_TEXT) + 1)))
        except LoftqError:
            return None

    def contents(self) -> list[str]:
        """Names of the files in the output."""
        ignored = _NO_CONTENT if self.moves else set()
        return [name for name in os.listdir(self.target) if name not in ignored]

    def is_hidden(self, name: str) -> bool:
        """True if a relative name below `target` belongs to an unfinished result."""
        return self.moves and name.startswith(f"{HIDDEN_INSIDE}/")

    def publish(self, check: Callable[[Path], None]) -> None:
        """Make the complete result visible; the journal records the start. Then remove the hidden directory.

        check   called with the folder of the earlier result as soon as the folder no longer has the output's name;
                raises LoftqError when somebody wrote into the folder, and the earlier result comes back
        """
        if self.moves:
            _move_in(self, check)
        else:
            _rename_in(self, check)
        self.clear()

    def recover(self) -> None:
        """Undo an interrupted publication: restore the previous contents of the output."""
        if self.is_published():
            return
        if self.moves:
            if self.is_half_published():
                _move_back(self)
        elif self.replaced.exists() and not os.path.lexists(self.target):
            disk.rename(self.replaced, self.target)

    def empty(self) -> None:
        """Remove everything in the hidden directory but the marker, the journal last.

        Raises UsageError when a run died before it could look for files of somebody else in the earlier result.
        """
        if not self.moves and self.result.is_dir() and self.is_published() and (names := foreign_names(self.result)):
            message = f"holds {', '.join(names[:3])}, which came into an earlier result while a run replaced it"
            hint = "move what you need out of the folder, then give the same command again"
            raise UsageError(message, file=self.result, hint=hint)
        names = [name for name in os.listdir(self.root) if name != _MARKER]
        for name in sorted(names, key=lambda name: (name == _JOURNAL, name)):
            path = self.root / name
            disk.remove_tree(path) if path.is_dir() and not path.is_symlink() else disk.remove(path)

    def release(self) -> None:
        """Remove the hidden directory unless the directory holds more than the marker."""
        if os.listdir(self.root) == [_MARKER]:
            self.clear()

    def clear(self) -> None:
        """Remove the hidden directory, the marker last: whatever a crash leaves has an owner."""
        if self.root.is_dir():
            self.empty()
            disk.sync_directory(self.root)
            disk.remove_tree(self.root)
        disk.sync_directory(self.root.parent)


def is_unfinished(directory: Path) -> bool:
    """True if `directory` is a hidden directory or the result inside.

    >>> Path("unfinished").mkdir()
    >>> is_unfinished(Path("unfinished"))
    False
    >>> (Path("unfinished") / _JOURNAL).touch()
    >>> is_unfinished(Path("unfinished"))
    True
    """
    absolute = Path(os.path.abspath(directory))
    return any(map(_HIDDEN.fullmatch, (absolute.name, absolute.parent.name))) or os.path.lexists(directory / _JOURNAL)


def _is_mount(path: Path, mounts: Path) -> bool:
    """True if `path` is a mount point, bind mounts included."""
    if os.path.ismount(path):
        return True
    try:
        lines = mounts.read_bytes().splitlines()
    except OSError:
        return False
    points = (re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), line.split()[4]) for line in lines)
    return os.fsencode(path) in points  # ismount misses bind mounts within a file system


def _rename_in(place: Place, check: Callable[[Path], None]) -> None:
    is_replacing = place.target.exists() and any(place.target.iterdir())
    if is_replacing:
        disk.remove_tree(place.replaced)
        if disk.exchange(place.result, place.target):
            _sync_names(place)
            try:
                check(place.result)
                disk.rename(place.result, place.root / _DISCARDED)
            except LoftqError:
                disk.exchange(place.result, place.target)
                _sync_names(place)
                raise
            disk.sync_directory(place.root)
            return
        disk.rename(place.target, place.replaced)
        disk.sync_directory(place.root)
    try:
        if is_replacing:
            check(place.replaced)
        disk.rename(place.result, place.target)  # rename replaces an empty directory
    except BaseException:
        place.recover()
        raise
    disk.sync_directory(place.target.parent)


def _sync_names(place: Place) -> None:
    """Return when exchanged names are on the disk."""
    disk.sync_directory(place.target.parent)
    disk.sync_directory(place.root)


def _move_in(place: Place, check: Callable[[Path], None]) -> None:
    before = read_checksums(place.target)
    if before is not None:
        disk.make_directory(place.replaced)
        disk.sync_directory(place.root)
        names = [name for name in _top_names(before) if os.path.lexists(place.target / name)]
        _take_out(names, place.target, place.replaced)
        try:
            check(place.replaced)
        except LoftqError:
            _move_back(place)
            raise
    _bring_in(os.listdir(place.result), place.result, place.target)


def _move_back(place: Place) -> None:
    if (mark := read_checksums(place.result)) is not None:
        came = [name for name in _top_names(mark) if not (place.result / name).exists()]
        _take_out([name for name in came if (place.target / name).exists()], place.target, place.result)
    if place.replaced.is_dir():
        _bring_in(os.listdir(place.replaced), place.replaced, place.target)
        disk.remove_tree(place.replaced)


def _top_names(mark: Checksums) -> list[str]:
    """Top-level names of a result."""
    return [CHECKSUMS, *{name.partition("/")[0] for name in mark.files}]


def _take_out(names: Iterable[str], source: Path, target: Path) -> None:
    """Move files of a result out, mark and config first: no loader takes a folder without a config."""
    for kind in (2, 1, 0):
        _move([name for name in names if _rank(name) == kind], source, target)


def _bring_in(names: Iterable[str], source: Path, target: Path) -> None:
    """Move files of a result in, config and mark last."""
    for kind in (0, 1, 2):
        _move([name for name in names if _rank(name) == kind], source, target)


def _rank(name: str) -> int:
    return {"config.json": 1, CHECKSUMS: 2}.get(name, 0)


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    """Move files, and return when the moves are on the disk."""
    for name in sorted(names):
        disk.rename(source / name, target / name)
    disk.sync_directory(target)
    disk.sync_directory(source)
