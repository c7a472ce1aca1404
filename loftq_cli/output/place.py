"""The folder of a result in the making, and the publication: the folder lies beside the output, and a single rename
makes the result visible.

A mount point, or a parent without write permission, rules a rename out. The result is then made in `.partial` inside
the output, and publication moves file by file, config.json and then the checksums last. No file of a result is read
here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.output import disk
from loftq_cli.output.checksums import CHECKSUMS, Checksums, read_checksums
from loftq_cli.output.journal import read_journal

_JOURNAL, _RESULT, _REPLACED = ".journal", "result", "replaced"
HIDDEN_INSIDE = ".partial"
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
        hidden = target / HIDDEN_INSIDE if moves else target.parent / f".{target.name}.partial"
        return cls(target, hidden, moves)

    @property
    def result(self) -> Path:
        """The folder of the written files."""
        return self.root / _RESULT

    @property
    def replaced(self) -> Path:
        """The folder of the previous contents of the output until the result is visible."""
        return self.root / _REPLACED

    @property
    def journal(self) -> Path:
        """The journal of finished units."""
        return self.root / _JOURNAL

    def is_published(self) -> bool:
        """True if a run died after publication and left the hidden directory."""
        return self._is_result_gone() and read_journal(self.journal).is_publishing

    def is_half_published(self) -> bool:
        """True if a run died during publication, so the output may hold a part of a result."""
        return not self._is_result_gone() and read_journal(self.journal).is_publishing

    def is_left_over(self) -> bool:
        """True if the hidden directory exists and holds nothing of use."""
        if not self.root.is_dir():
            return False
        journal = read_journal(self.journal)
        return journal.fingerprint is None or (journal.is_publishing and self._is_result_gone())

    def _is_result_gone(self) -> bool:
        """True if nothing is left to publish: the result, or the last file of the result (the mark), has moved."""
        return not (self.result / CHECKSUMS if self.moves else self.result).exists()

    def contents(self) -> list[str]:
        """Names of the files in the output."""
        ignored = _NO_CONTENT if self.moves else set()
        return [name for name in os.listdir(self.target) if name not in ignored]

    def is_hidden(self, name: str) -> bool:
        """True if a relative name below `target` belongs to an unfinished result."""
        return self.moves and name.startswith(f"{HIDDEN_INSIDE}/")

    def publish(self) -> None:
        """Make the complete result visible; the journal records the start. Then remove the hidden directory."""
        if self.moves:
            _move_in(self)
        else:
            _rename_in(self)
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

    def clear(self) -> None:
        """Remove the hidden directory."""
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


def _rename_in(place: Place) -> None:
    is_replacing = place.target.exists() and any(place.target.iterdir())
    if is_replacing:
        disk.remove_tree(place.replaced)
        disk.rename(place.target, place.replaced)
        disk.sync_directory(place.root)
    try:
        disk.rename(place.result, place.target)  # rename replaces an empty directory
    except BaseException:
        place.recover()
        raise
    disk.sync_directory(place.target.parent)


def _move_in(place: Place) -> None:
    before = read_checksums(place.target)
    if before is not None:
        disk.make_directory(place.replaced)
        disk.sync_directory(place.root)
        _take_out(_top_names(before), place.target, place.replaced)
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
