"""Where a result is made, and how it becomes visible: beside the output, and by one rename.

Where the output is a mount point, or its parent may not be written, that cannot be: there it is made in `.partial`
inside, and publication moves file by file, the config and then the checksums last. Looks into no file of a result.
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
_NO_CONTENT = {HIDDEN_INSIDE, "lost+found"}  # in a directory that is a mount point
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a result is made.

    target   the directory that it becomes, links resolved
    root     the hidden directory, which is locked; what is written is in its `result`
    moves    whether publication moves file by file
    """

    target: Path
    root: Path
    moves: bool

    @classmethod
    def of(cls, output: Path, mounts: Path = _MOUNTS) -> Place:
        """The place of what a user calls `output`; the file `mounts` lists what is mounted where."""
        target = Path(os.path.realpath(output))
        moves = target.is_dir() and (_is_mount(target, mounts) or not os.access(target.parent, os.W_OK | os.X_OK))
        hidden = target / HIDDEN_INSIDE if moves else target.parent / f".{target.name}.partial"
        return cls(target, hidden, moves)

    @property
    def result(self) -> Path:
        """What is written."""
        return self.root / _RESULT

    @property
    def replaced(self) -> Path:
        """What stood under the output's name, until the result stands there."""
        return self.root / _REPLACED

    @property
    def journal(self) -> Path:
        """What is finished."""
        return self.root / _JOURNAL

    def is_published(self) -> bool:
        """Whether the hidden directory is what a run left behind that died after its publication."""
        return self._is_result_gone() and read_journal(self.journal).is_publishing

    def is_half_published(self) -> bool:
        """Whether a run died while it published: what stands under the output's name may be a part of its result."""
        return not self._is_result_gone() and read_journal(self.journal).is_publishing

    def is_left_over(self) -> bool:
        """Whether there is a hidden directory, and nothing of use in it."""
        if not self.root.is_dir():
            return False
        found = read_journal(self.journal)
        return found.fingerprint is None or (found.is_publishing and self._is_result_gone())

    def _is_result_gone(self) -> bool:
        """Whether nothing is left to publish: the result itself is moved, or, file by file, its mark as the last."""
        return not (self.result / CHECKSUMS if self.moves else self.result).exists()

    def contents(self) -> list[str]:
        """Names of what stands under the output's name."""
        ignored = _NO_CONTENT if self.moves else set()
        return [name for name in os.listdir(self.target) if name not in ignored]

    def is_hidden(self, name: str) -> bool:
        """Whether a file with this relative name below `target` belongs to an unfinished result."""
        return self.moves and name.startswith(f"{HIDDEN_INSIDE}/")

    def publish(self) -> None:
        """Show the result, which is complete and on the disk, as the journal is to say; then remove the hidden
        directory.
        """
        if self.moves:
            _move_in(self)
        else:
            _rename_in(self)
        self.clear()

    def recover(self) -> None:
        """Undo a publication that was interrupted: what stood there before stands there again."""
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
    """Whether `directory` is a hidden one, or the result in it."""
    whole = Path(os.path.abspath(directory))
    return any(map(_HIDDEN.fullmatch, (whole.name, whole.parent.name))) or os.path.lexists(directory / _JOURNAL)


def _is_mount(path: Path, mounts: Path) -> bool:
    """Whether another file system, or another part of the same one, is mounted there."""
    if os.path.ismount(path):
        return True
    try:
        lines = mounts.read_bytes().splitlines()
    except OSError:
        return False
    points = (re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), line.split()[4]) for line in lines)
    return os.fsencode(path) in points  # of the same file system, ismount sees none


def _rename_in(place: Place) -> None:
    is_replacing = place.target.exists() and any(place.target.iterdir())
    if is_replacing:
        disk.remove_tree(place.replaced)
        disk.rename(place.target, place.replaced)
        disk.sync_directory(place.root)
    try:
        disk.rename(place.result, place.target)  # an empty directory gives way
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
