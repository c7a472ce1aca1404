"""The output directory, hidden until it is complete: work happens in `.NAME.partial` beside it, under a lock, with a
journal of finished layers; publication is one rename. Nobody ever sees a half-written result under its own name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.checkpoint.writer import storage_error
from loftq_cli.errors import InputError, LoftqError, StorageError, UsageError

CHECKSUMS = "checksums.json"  # the completeness mark: written last, names every other file
_JOURNAL = ".journal"


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One finished unit of work: what went in, what came out (tensor name -> sha256), and what was measured."""

    unit: str
    input_sha256: str
    outputs: dict[str, str]
    result: dict[str, Any]


class Staging:
    """A locked staging directory: `path` is where to write, `publish` names it, `close` lets go of the lock."""

    def __init__(self, output: Path, *, fingerprint: str, overwrite: bool, restart: bool) -> None:
        """Raises UsageError when `output` is taken, and StorageError when another process is writing it.

        `fingerprint` stands for the input and every option that affects bytes: an unfinished run with another one
        is not continued, and `restart` discards it.
        """
        self.output = Path(os.path.abspath(output))
        self.path = self.output.parent / f".{self.output.name}.partial"
        self._replaced = self.output.parent / f".{self.output.name}.replaced"
        self._fingerprint = fingerprint
        self._fd = -1
        if not self._replaced.exists():
            check_output(output, overwrite=overwrite)
        try:
            self._lock()
            self._recover()
            check_output(output, overwrite=overwrite)
            self.entries = self._open_journal(restart=restart)
        except OSError as error:
            self.close()
            raise storage_error(error, self.path) from None
        except LoftqError:
            self.close()
            raise

    def record(self, entry: JournalEntry) -> None:
        """Append a finished unit to the journal."""
        line = json.dumps([entry.unit, entry.input_sha256, entry.outputs, entry.result])
        with open(self.path / _JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(f"{_line_hash(line)} {line}\n")

    def publish(self, tool: dict[str, Any]) -> None:
        """Make everything durable, write the checksums (with `tool`'s values beside them), and rename into place."""
        try:
            files = [p for p in sorted(self.path.rglob("*")) if p.is_file() and p.name not in (_JOURNAL, CHECKSUMS)]
            sums = {p.relative_to(self.path).as_posix(): file_sha256(p) for p in files}
            mark = {**tool, "fingerprint": self._fingerprint, "files": sums}
            (self.path / CHECKSUMS).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")
            (self.path / _JOURNAL).unlink(missing_ok=True)
            for path in [*files, self.path / CHECKSUMS, *(p for p in self.path.rglob("*") if p.is_dir()), self.path]:
                _sync(path)
            if self.output.exists():
                os.rename(self.output, self._replaced)
            os.rename(self.path, self.output)
            _sync(self.output.parent)
            shutil.rmtree(self._replaced, ignore_errors=True)
        except OSError as error:
            raise storage_error(error, self.output) from None

    @contextmanager
    def whole(self, tool: dict[str, Any]) -> Iterator[Path]:
        """The directory to write into: published when the block ends, and gone, with its lock, when it raises."""
        published = False
        try:
            yield self.path
            self.publish(tool)
            published = True
        finally:
            if not published:
                shutil.rmtree(self.path, ignore_errors=True)
            self.close()

    def close(self) -> None:
        """Let go of the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lock(self) -> None:
        # The lock is on the directory itself and goes with the process: there is no stale lock to clean up.
        self.path.mkdir(exist_ok=True)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                "another loftq process is writing it", file=self.output, hint="wait for it, or choose another output"
            ) from None
        if not os.path.samestat(os.fstat(self._fd), os.stat(self.path)):
            raise StorageError("another loftq process has just finished it", file=self.output, hint="run again")

    def _recover(self) -> None:
        """Undo the first half of a replacement that was interrupted between its two renames."""
        if self._replaced.exists():
            if self.output.exists():
                shutil.rmtree(self._replaced)
            else:
                os.rename(self._replaced, self.output)

    def _open_journal(self, *, restart: bool) -> dict[str, JournalEntry]:
        journal = self.path / _JOURNAL
        lines = [] if restart or not journal.exists() else _valid_lines(journal)
        if lines and lines[0] != self._fingerprint:
            raise UsageError(
                "an unfinished run with another input, other options or another version lies beside it",
                file=self.output,
                hint="run the same command as before to continue it, or --restart to start over",
            )
        if not lines:
            for path in self.path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            lines = [self._fingerprint]
        text = (json.dumps(line) for line in lines)
        journal.write_text("".join(f"{_line_hash(line)} {line}\n" for line in text), encoding="utf-8")
        return {line[0]: JournalEntry(*line) for line in lines[1:]}


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises UsageError when something stands under `output` that a result may not replace."""
    parent = Path(os.path.abspath(output)).parent
    if not parent.is_dir():
        raise UsageError("its parent directory does not exist", file=output, hint=f"mkdir -p {parent}")
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise UsageError("is not a directory", file=output, hint="choose another output")
    if not any(output.iterdir()):
        return
    if not (output / CHECKSUMS).is_file():
        raise UsageError(
            "is not empty and not a result of this tool",
            file=output,
            hint="choose another output, or remove it yourself",
        )
    if not overwrite:
        raise UsageError("exists already", file=output, hint="--overwrite replaces it")


def finished_mark(output: Path, fingerprint: str) -> dict[str, Any] | None:
    """The completeness mark of the result under `output`, when it is that of `fingerprint` and every file of it is as
    it was written.
    """
    try:
        mark = read_json_object(output / CHECKSUMS)
        files = mark["files"]
        # In this order: a result of something else is not worth reading through.
        if mark["fingerprint"] == fingerprint and all(
            file_sha256(output / name) == expected for name, expected in files.items()
        ):
            return mark
    except (InputError, StorageError, OSError, KeyError, AttributeError):
        pass
    return None


def check_apart(output: Path, inputs: list[Path]) -> None:
    """Raises UsageError when `output` is, contains or lies inside one of `inputs`."""
    target = Path(os.path.realpath(output))
    for path in inputs:
        source = Path(os.path.realpath(path))
        if target == source or target in source.parents or source in target.parents:
            raise UsageError(
                f"the output may not be, contain or lie inside the input {path}", file=output, hint="write elsewhere"
            )


def check_space(output: Path, nbytes: int) -> None:
    """Raises StorageError when the file system of `output` has less than `nbytes` free."""
    free = shutil.disk_usage(Path(os.path.abspath(output)).parent).free
    if free < nbytes:
        raise StorageError(
            f"needs {nbytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free", file=output, hint="write elsewhere"
        )


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _valid_lines(journal: Path) -> list[Any]:
    """The values of the journal's lines up to the first torn or foreign one."""
    values = []
    for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
        checksum, _, text = line.partition(" ")
        if checksum != _line_hash(text):
            break
        values.append(json.loads(text))
    return values


def _line_hash(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()[:16]


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
