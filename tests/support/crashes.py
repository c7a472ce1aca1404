"""A disk that fails at a chosen operation: the program is killed there, the power goes with what was not yet synced, or
the system reports an error. Stands in for loftq_cli.output.disk, through which everything is written.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from loftq_cli.output import disk

OPERATIONS = (
    *("make_directory", "open_file", "resize", "write_at", "sync"),
    *("sync_directory", "rename", "exchange", "remove", "remove_tree"),
)
SECTOR = 512
_REAL = {name: getattr(disk, name) for name in OPERATIONS}


class Killed(BaseException):
    """The program is gone; nothing that it still tries to do to the disk happens."""


@dataclass
class _DataChange:
    """Bytes of a file that are not on the disk yet, and what was there before."""

    path: Path
    position: int
    before: bytes
    size_before: int


@dataclass
class _NameChange:
    """A name that is not on the disk yet: made, moved, exchanged, or removed (then it is kept in the trash)."""

    kind: str
    path: Path
    other: Path | None = None

    @property
    def parent(self) -> Path | None:
        """The directory whose sync makes it durable."""
        return self.other.parent if self.kind == "removed" and self.other else self.path.parent


@dataclass
class FailingDisk:
    """Counts operations, and at number `at` (from 0) does what `fail` says: "kill", or an errno to report, or "after"
    to kill after the operation.

    Of `only` these operations, if given. With `loses_power`, a kill also takes back what was not synced: data in any
    part and order, and names, all from some moment on or any of them.
    """

    trash: Path
    at: int = -1
    fail: str | int = "kill"
    only: tuple[str, ...] = OPERATIONS
    loses_power: bool = False
    seed: int = 0
    count: int = 0
    log: list[str] = field(default_factory=list)
    is_dead: bool = False
    _data: list[_DataChange] = field(default_factory=list)
    _names: list[_NameChange] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.RLock)

    @contextmanager
    def installed(self) -> Iterator[FailingDisk]:
        """In place of the real one for the length of the block."""
        with pytest.MonkeyPatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(disk, name, self._wrapped(name))
            yield self

    def _wrapped(self, name: str) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            with self._lock:
                if self.is_dead:
                    raise Killed
                self._fail_if_due(name, arguments)
                outcome = getattr(self, f"_{name}")(*arguments)
                if self.fail == "after" and name in self.only and self.count - 1 == self.at:
                    self.is_dead = True
                    raise Killed
                return outcome

        return operation

    def _fail_if_due(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name not in self.only:
            return
        self.count += 1
        self.log.append(f"{name} {arguments if name in ('rename', 'exchange') else arguments[-1]}")
        if self.count - 1 != self.at or self.fail == "after":
            return
        if self.fail != "kill":
            error = OSError(self.fail, os.strerror(int(self.fail)))
            path = next(argument for argument in arguments if isinstance(argument, Path))
            raise disk.storage_error(error, path)
        self.is_dead = True
        dice = random.Random(self.seed)
        if name == "write_at":  # torn
            descriptor, position, data, path = arguments
            self._write_at(descriptor, position, bytes(data)[: dice.randrange(len(data) + 1)], path)
        elif name == "remove_tree":  # half way
            for path in sorted(arguments[0].rglob("*")):
                if path.is_file() and dice.random() < 0.5:
                    self._remove(path)
        if self.loses_power:
            self._lose(dice)
        raise Killed

    def _lose(self, dice: random.Random) -> None:
        for change in reversed(self._data):
            if change.path.exists() and (gone := dice.choice(["nothing", "all", "end"])) != "nothing":
                kept = dice.randrange(0, len(change.before) + 1, SECTOR) if gone == "end" else 0
                with open(change.path, "r+b") as file:
                    file.seek(change.position + kept)
                    file.write(change.before[kept:])
                    if gone == "all":
                        file.truncate(change.size_before)
        since = dice.randrange(len(self._names) + 1)
        lost = self._names[since:] if dice.random() < 0.5 else [name for name in self._names if dice.random() < 0.5]
        for name in reversed(lost):
            if name.kind == "made" and name.path.exists():
                shutil.rmtree(name.path) if name.path.is_dir() else name.path.unlink()
            elif name.kind == "exchanged" and name.path.exists():
                assert name.other is not None
                if name.other.exists():
                    _REAL["exchange"](name.other, name.path)
            elif name.kind in ("moved", "removed") and name.path.exists():
                assert name.other is not None
                if name.other.parent.is_dir() and not name.other.exists():
                    os.rename(name.path, name.other)

    def lose_power(self) -> None:
        """After the end of a program: what it did not sync may be gone."""
        self._lose(random.Random(self.seed))

    def _make_directory(self, path: Path) -> None:
        if not path.exists():
            self._names.append(_NameChange("made", path))
        _REAL["make_directory"](path)

    def _open_file(self, path: Path) -> int:
        if not path.exists():
            self._names.append(_NameChange("made", path))
        return int(_REAL["open_file"](path))

    def _resize(self, descriptor: int, nbytes: int, path: Path) -> None:
        size = os.fstat(descriptor).st_size
        cut = os.pread(descriptor, max(0, size - nbytes), nbytes)
        self._data.append(_DataChange(path, min(size, nbytes), cut, size))
        _REAL["resize"](descriptor, nbytes, path)

    def _write_at(self, descriptor: int, position: int, data: bytes | memoryview, path: Path) -> None:
        size = os.fstat(descriptor).st_size
        before = os.pread(descriptor, len(data), position)
        self._data.append(_DataChange(path, position, before, size))
        _REAL["write_at"](descriptor, position, data, path)

    def _sync(self, descriptor: int, path: Path) -> None:
        _REAL["sync"](descriptor, path)
        self._data = [change for change in self._data if change.path != path]

    def _sync_directory(self, path: Path) -> None:
        _REAL["sync_directory"](path)
        self._names = [name for name in self._names if name.parent != path]

    def _rename(self, old: Path, new: Path) -> None:
        _REAL["rename"](old, new)
        for change in (*self._data, *self._names):
            if change.path == old or old in change.path.parents:
                change.path = new / change.path.relative_to(old)
        self._names.append(_NameChange("moved", new, old))

    def _exchange(self, first: Path, second: Path) -> bool:
        if not _REAL["exchange"](first, second):
            return False
        for change in (*self._data, *self._names):
            for old, new in ((first, second), (second, first)):
                if change.path == old or old in change.path.parents:
                    change.path = new / change.path.relative_to(old)
                    break
        self._names.append(_NameChange("exchanged", second, first))
        return True

    def _remove(self, path: Path) -> None:
        if path.exists():
            self.trash.mkdir(exist_ok=True)
            kept = self.trash / f"{len(os.listdir(self.trash))}"
            os.rename(path, kept)
            self._names.append(_NameChange("removed", kept, path))

    def _remove_tree(self, path: Path) -> None:
        self._remove(path)
