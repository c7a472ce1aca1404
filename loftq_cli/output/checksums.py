"""checksums.json, the completeness mark of a result: the sha256 of every file beside the mark, and of every tensor.

Callers decide how to react to a mismatch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.checkpoint.record_schema import RecordError, Sha256, read_record
from loftq_cli.checkpoint.watched_file import WatchedFile
from loftq_cli.errors import InputError, StorageError

CHECKSUMS = "checksums.json"
_TOOL = "loftq-cli"


@dataclass(frozen=True, slots=True)
class Checksums:
    """The completeness mark of a result.

    fingerprint    hash of the input headers and of every option with an effect on bytes
    input_sha256   hash of the input numbers; None if not recorded
    files          relative name -> sha256 of the file
    tensors        relative name of a weight file -> tensor name -> sha256 of the bytes
    """

    fingerprint: str
    input_sha256: str | None
    files: Mapping[str, Sha256]
    tensors: Mapping[str, Mapping[str, Sha256]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The values of checksums.json, without tool and version."""
        inputs = {} if self.input_sha256 is None else {"input_sha256": self.input_sha256}
        return {**inputs, "fingerprint": self.fingerprint, "files": dict(self.files), "tensors": dict(self.tensors)}


def read_checksums(directory: Path) -> Checksums | None:
    """Read the completeness mark in `directory`; None without a mark.

    Raises InputError for a mark of a foreign tool, and for a name outside the directory.

    >>> import tempfile
    >>> read_checksums(Path(tempfile.mkdtemp())) is None
    True
    """
    path = directory / CHECKSUMS
    if not os.path.lexists(path):
        return None
    values = read_json_object(path)
    try:
        checksums = read_record(Checksums, {"input_sha256": None, **values})
    except RecordError:
        checksums = None
    is_ours = (
        checksums is not None
        and values.get("tool") == _TOOL
        and all(_is_relative(name) for name in checksums.files)
        and checksums.files.keys() >= checksums.tensors.keys()
    )
    if not is_ours:
        raise InputError("is not a list of checksums of this tool", file=path, hint="convert again")
    return checksums


def file_sha256(path: Path) -> str:
    """sha256 of a regular file, hexadecimal. Raises InputError for a missing file, StorageError when reading fails.

    >>> _ = Path("empty.txt").write_text("")
    >>> file_sha256(Path("empty.txt"))[:8]
    'e3b0c442'
    """
    file = WatchedFile.open(path, may_be_empty=True)
    return file.sha256(0, file.nbytes)


def own_files(directory: Path, mark: Checksums, names: Iterable[str]) -> tuple[list[WatchedFile], list[str]]:
    """Hash the files called `names`. Returns the files with the sha256 in the mark, under watch from before the hash
    on, and the names of the other files. The mark itself has no sha256.

    >>> _ = Path("notes.txt").write_text("mine")
    >>> own_files(Path(), Checksums("fingerprint", None, {"notes.txt": "0" * 64}), ["notes.txt"])
    ([], ['notes.txt'])
    """
    own, others = list[WatchedFile](), list[str]()
    for name in names:
        try:
            file = WatchedFile.open(directory / name, may_be_empty=True)
            is_own = name == CHECKSUMS or file.sha256(0, file.nbytes) == mark.files.get(name)
        except (InputError, StorageError):
            is_own = False
        if is_own:
            own.append(file)
        else:
            others.append(name)
    return own, others


def foreign_names(directory: Path) -> list[str]:
    """Names of the files in a result that the run of the result did not write, or that changed; all names without a
    completeness mark.

    >>> Path("result").mkdir()
    >>> _ = Path("result/notes.txt").write_text("mine")
    >>> foreign_names(Path("result"))
    ['notes.txt']
    """
    names = files_in(directory, links=True)
    try:
        mark = read_checksums(directory)
    except InputError:
        mark = None
    return names if mark is None else own_files(directory, mark, names)[1]


def files_in(directory: Path, *, links: bool = False) -> list[str]:
    """Relative names of all files below `directory`, sorted; with `links`, links to directories too.

    >>> Path("model").mkdir()
    >>> _ = Path("model/config.json").write_text("{}")
    >>> files_in(Path("model"))
    ['config.json']
    """
    names = []
    for root, folders, file_names in os.walk(directory):
        linked = [name for name in folders if links and os.path.islink(os.path.join(root, name))]
        names += [(Path(root) / name).relative_to(directory).as_posix() for name in (*file_names, *linked)]
    return sorted(names)


def _is_relative(name: str) -> bool:
    """True if `name` is a normalized relative path inside the directory."""
    parts = name.split("/")
    return "\0" not in name and all(part not in ("", ".", "..") for part in parts)


def fingerprint_of(sums: Mapping[str, str]) -> str:
    """A single hash for a set of tensors, from tensor name -> sha256.

    >>> fingerprint_of({"b": "2", "a": "1"}) == fingerprint_of({"a": "1", "b": "2"})
    True
    """
    return hashlib.sha256("".join(f"{sums[name]} {name}\n" for name in sorted(sums)).encode()).hexdigest()
