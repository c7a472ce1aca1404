"""The journal of a run: a line with a checksum for every finished unit of work. A torn or foreign line ends the
reading.

A line proves nothing: a resumed run hashes input and output of each unit again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.record_schema import RecordError, read_record
from loftq_cli.checkpoint.watched_file import WatchedFile
from loftq_cli.errors import InputError
from loftq_cli.output import disk

_PUBLISHING, _REFUSED = "#publishing ", "#refused"  # never the name of a unit: a unit has four values


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A finished unit of work: sha256 of the input, of each output tensor, and the measured result."""

    unit: str
    input_sha256: str
    outputs: dict[str, str]
    result: dict[str, Any]


@dataclass(frozen=True, slots=True)
class JournalContents:
    """The whole lines of a journal.

    fingerprint   fingerprint of the run; None for an empty journal
    entries       unit -> entry
    publishing    sha256 of the mark of the complete result, when publication had begun; else None
    is_refused    whether the input or an option ended the run: the run ends so again unless something changes
    nbytes        end of the whole lines of units, in bytes
    """

    fingerprint: str | None = None
    entries: tuple[JournalEntry, ...] = ()
    publishing: str | None = None
    is_refused: bool = False
    nbytes: int = 0


def read_journal(path: Path) -> JournalContents:
    """Read the journal at `path` up to the first torn, foreign or misplaced line; empty without a file.

    Raises StorageError when reading fails.

    >>> read_journal(Path("no such file"))
    JournalContents(fingerprint=None, entries=(), publishing=None, is_refused=False, nbytes=0)
    """
    try:
        file = WatchedFile.open(path, may_be_empty=True)
    except InputError:
        return JournalContents()
    return parse_journal(bytes(file.read(0, file.nbytes)))


def parse_journal(data: bytes) -> JournalContents:
    """Parse the whole lines of `data`. Raises nothing.

    >>> line = b'"fingerprint"'
    >>> parse_journal(_line_hash(line).encode() + b" " + line + b"\\ntorn line").fingerprint
    'fingerprint'
    """
    fingerprint, publishing, is_refused, nbytes = None, None, False, 0
    entries: list[JournalEntry] = []
    for line in data.split(b"\n")[:-1]:  # bytes after the last line end are torn
        value = _value(line)
        if isinstance(value, str) and fingerprint is None:
            fingerprint = value
        elif fingerprint is None:
            break
        elif isinstance(value, str):
            publishing = value.removeprefix(_PUBLISHING) if value.startswith(_PUBLISHING) else None
            is_refused = value == _REFUSED
            break
        elif (entry := _entry(value)) is not None:
            entries.append(entry)
        else:
            break
        nbytes += len(line) + 1
    return JournalContents(fingerprint, tuple(entries), publishing, is_refused, nbytes)


class Journal:
    """A journal open for writing. Lines reach the disk by `sync`, or earlier."""

    def __init__(self, path: Path, contents: JournalContents) -> None:
        """Continue the journal at `path` after the whole lines in `contents`. Raises StorageError."""
        self._path = path
        self._descriptor = disk.open_file(path)
        self._end, self._durable = (
            contents.nbytes,
            0,
        )  # lines of an earlier process may not be on the disk
        self._lock = threading.Lock()
        disk.resize(self._descriptor, self._end, path)

    @property
    def end(self) -> int:
        """End of the lines, in bytes."""
        return self._end

    def start(self, fingerprint: str) -> None:
        """Write the first line: the fingerprint of the run."""
        self._append(fingerprint)

    def append(self, entry: JournalEntry) -> None:
        """Append a finished unit."""
        self._append([entry.unit, entry.input_sha256, entry.outputs, entry.result])

    def publish(self, mark_sha256: str) -> None:
        """Record on the disk: the result with the mark of `mark_sha256` is complete, and publication begins."""
        self._append(_PUBLISHING + mark_sha256)
        self.sync(self._end)

    def refuse(self) -> None:
        """Record that the input or an option ended the run."""
        self._append(_REFUSED)

    def sync(self, end: int) -> None:
        """Bring at least the lines up to `end` to the disk. Raises StorageError."""
        disk.sync(self._descriptor, self._path)
        self._durable = max(self._durable, end)

    def cut(self, *, to_nothing: bool = False) -> None:
        """Cut off lines not known to be on the disk, or all lines: the tensors of the lines may be missing."""
        with self._lock:
            self._durable = 0 if to_nothing else self._durable
            disk.resize(self._descriptor, self._durable, self._path)
            self._end = self._durable

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, value: Any) -> None:
        text = json.dumps(value)
        line = f"{_line_hash(text.encode())} {text}\n".encode()
        with self._lock:
            disk.write_at(self._descriptor, self._end, line, self._path)
            self._end += len(line)


def _value(line: bytes) -> Any:
    """The value of a line; None for a foreign line."""
    checksum, _, text = line.partition(b" ")
    if checksum.decode("latin-1") != _line_hash(text):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _entry(value: Any) -> JournalEntry | None:
    if not isinstance(value, list) or len(value) != 4:
        return None
    try:
        return read_record(JournalEntry, dict(zip(("unit", "input_sha256", "outputs", "result"), value, strict=True)))
    except RecordError:
        return None


def _line_hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def by_unit(entries: Iterable[JournalEntry]) -> dict[str, JournalEntry]:
    """Unit -> entry; the last entry of a unit wins.

    >>> by_unit([JournalEntry("lm_head.weight", "ab12", {}, {})])["lm_head.weight"].input_sha256
    'ab12'
    """
    return {entry.unit: entry for entry in entries}


def outputs_of(entries: Iterable[JournalEntry]) -> dict[str, str]:
    """Tensor name -> sha256 over all units.

    >>> outputs_of([JournalEntry("lm_head.weight", "ab12", {"lm_head.absmax": "cd34"}, {})])
    {'lm_head.absmax': 'cd34'}
    """
    return {name: sha256 for entry in entries for name, sha256 in entry.outputs.items()}
