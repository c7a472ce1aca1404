"""What is damaged in a directory or a weight file: every problem, not the first only. Reads each byte, a megabyte at a
time, and compares it with the checksums that ship with a result. Repairs nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loftq_cli.adapter.config import WEIGHTS_NAME
from loftq_cli.checkpoint.source import MODEL_FILES, WeightsFile, faults, open_checkpoint, open_weights_file
from loftq_cli.errors import InputError, LoftqError
from loftq_cli.inspecting.consistency import Opened, is_behind_link, open_all, recorded_fingerprints
from loftq_cli.inspecting.findings import Findings, Problem, Verification
from loftq_cli.model.stored import BaseModel
from loftq_cli.output.checksums import CHECKSUMS, Checksums, file_sha256, files_in, fingerprint_of, read_checksums
from loftq_cli.output.place import HIDDEN_INSIDE, is_unfinished
from loftq_cli.output.records import MERGE_REPORT_NAME, REPORT_NAME
from loftq_cli.runtime.workers import Workers, started
from loftq_cli.tensors.headers import TensorRef
from loftq_cli.tensors.metrics import is_finite

_WITH_NUMBERS = ("float", "bfloat", "complex")  # dtypes that can hold NaN


def verify(path: Path, threads: int = 1, tell: Callable[[Problem], None] = lambda problem: None) -> Verification:
    """Everything that is wrong with the directory or weight file `path`. `tell` hears of each problem as it is found;
    those that headers and configs show come first, before torch is imported.

    Raises InputError or StorageError where there is nothing under that name; what is found there is not raised.
    """
    if not os.path.exists(path):
        open_checkpoint(path)  # says what is wrong with the name
    if not path.is_dir():
        return _verify_file(path, threads, tell)
    found = Findings(path, tell)
    if is_unfinished(path):
        found.problem("is an unfinished result: the command that began it completes it")
        return found.verification(has_checksums=False)
    sums = _checksums(found)
    opened = open_all(found, sums.files if sums else {})
    numbers = _Numbers(found, opened, sums)
    if sums is not None or numbers.tensors:
        with started(threads) as workers:
            differing = set() if sums is None else _check_files(found, sums, workers)
            numbers.check(workers)
            _check_constants(found, opened.base, workers)
        if sums is not None:
            numbers.compare(sums, differing)
            _note_unlisted(found, sums)
        _check_fingerprints(found, opened, numbers.sha256)
    found.files |= opened.files()
    return found.verification(has_checksums=sums is not None)


def _verify_file(path: Path, threads: int, tell: Callable[[Problem], None]) -> Verification:
    """A weight file by itself; the config beside it, if any, tells which of its tensors are weights."""
    found = Findings(path.parent, tell)
    for error in faults(path):
        found.error(error)
    if found.is_clean:
        base = Findings(path.parent, lambda problem: None).attempt(BaseModel.open, path)
        numbers = _Numbers(found, Opened(base, {path.name: open_weights_file(path)}, None, ()), None)
        if numbers.tensors:
            with started(threads) as workers:
                numbers.check(workers)
    found.files.add(path.name)
    return replace(found.verification(has_checksums=False), path=path)


def _checksums(found: Findings) -> Checksums | None:
    sums = found.attempt(read_checksums, found.directory)
    if sums is None and found.is_clean:
        for name in (REPORT_NAME, MERGE_REPORT_NAME, HIDDEN_INSIDE):
            if os.path.lexists(found.directory / name):
                found.problem(f"holds {name} and no {CHECKSUMS}, which is written last: it is incomplete")
    return sums


def _check_files(found: Findings, sums: Checksums, workers: Workers) -> set[str]:
    """The listed weight files whose sha256 is another, and whose tensors are listed one by one. Other files that
    differ, or cannot be read, are problems at once.
    """

    def look(name: str) -> str | LoftqError:
        try:
            if is_behind_link(found.directory, name):
                raise InputError("lies behind a link to another folder", file=found.directory / name)
            return file_sha256(found.directory / name)
        except LoftqError as error:
            return error

    differing = set()
    for name, sha256 in zip(sums.files, workers.map(look, sums.files), strict=True):
        found.files.add(name)
        if isinstance(sha256, LoftqError):
            found.error(sha256)
        elif sha256 != sums.files[name]:
            differing.add(name)
            # Of a file that is known to be damaged, or whose tensors will be compared, more can be said than this.
            if not sums.tensors.get(name) and not found.has_named(name):
                found.problem(f"does not have the sha256 that {CHECKSUMS} lists", name)
    return differing


@dataclass(frozen=True, slots=True)
class _Look:
    """One tensor to read, and whether to hash it."""

    file: str
    ref: TensorRef
    reader: WeightsFile
    hashes: bool


class _Numbers:
    """The tensors of all weight files, each read once."""

    def __init__(self, found: Findings, opened: Opened, sums: Checksums | None) -> None:
        listed: Mapping[str, Mapping[str, str]] = sums.tensors if sums else {}
        covered = set(opened.fingerprinted())
        self._found, self._opened = found, opened
        self._weights = opened.weight_names()
        self._model = {path.name for path in opened.base.checkpoint.files} if opened.base else set()
        self.tensors = [
            _Look(file, ref, reader, name in listed.get(file, {}) or (file in self._model and name in covered))
            for file, reader in opened.weights.items()
            for name, ref in reader.tensors.items()
            if ref.alias_of is None
        ]
        self.sha256: dict[tuple[str, str], str] = {}

    def check(self, workers: Workers) -> None:
        """Read them: their sha256, and a problem or a note for each that is not finite."""
        for look, result in zip(self.tensors, workers.map(_looked_at, self.tensors), strict=True):
            self._found.tensors += 1
            if isinstance(result, LoftqError):
                self._found.error(result)
                continue
            sha256, count = result
            if look.hashes:
                self.sha256[look.file, look.ref.name] = sha256
            if count:
                self._tell_of(look, f"holds {count} NaN or infinite value{'s' * (count > 1)}")

    def compare(self, sums: Checksums, differing: set[str]) -> None:
        """A problem for each tensor that is not the listed one, or else for the header of a file that differs."""
        for file, listed in sums.tensors.items():
            if not listed or file not in self._opened.weights:
                continue
            there = self._opened.weights[file].tensors
            wrong = {name: "does not have its sha256" for name in there if name in listed}
            wrong = {name: what for name, what in wrong.items() if self.sha256.get((file, name)) != listed[name]}
            wrong |= {name: "is missing" for name in listed if name not in there}
            wrong |= {name: "is not part of the result" for name in there if name not in listed}
            for name, what in wrong.items():
                if file in differing:
                    self._found.problem(what, file, name)
                else:
                    self._found.problem(f"{what}, and its file {file} has", CHECKSUMS, name)
            if file in differing and not wrong and not self._found.has_named(file):
                self._found.problem("its header is not the one that was written, its tensors are", file)

    def _tell_of(self, look: _Look, what: str) -> None:
        self._found.not_finite += 1
        is_adapter = Path(look.file).name == WEIGHTS_NAME
        if is_adapter or (look.file in self._model and look.ref.name in self._weights):
            self._found.problem(what, look.file, look.ref.name)
        else:
            self._found.note(f"{what}; it is copied as it is", look.file, look.ref.name)


def _looked_at(look: _Look) -> tuple[str, int] | LoftqError:
    """The sha256 of a tensor, and how many of its numbers are NaN or infinite."""
    digest, count = hashlib.sha256(), 0
    has_numbers = look.ref.dtype.startswith(_WITH_NUMBERS)
    if not has_numbers and not look.hashes:
        return "", 0
    try:
        for chunk in look.reader.chunks(look.ref.name):
            if look.hashes:
                digest.update(chunk)
            if has_numbers:
                count += _not_finite(chunk, look.ref.dtype)
    except LoftqError as error:
        return error
    return digest.hexdigest(), count


def _not_finite(chunk: memoryview, dtype: str) -> int:
    import torch

    values: torch.Tensor = torch.frombuffer(chunk, dtype=getattr(torch, dtype))
    if values.is_complex():
        values = torch.view_as_real(values)
    elif values.element_size() == 1:  # torch compares no 8-bit floats
        values = values.float()
    return 0 if is_finite(values) else int((~torch.isfinite(values)).sum())


def _check_constants(found: Findings, base: BaseModel | None, workers: Workers) -> None:
    """A problem for each quantized weight whose constants no quantizer writes."""
    if base is None:
        return

    def look(name: str) -> LoftqError | None:
        try:
            base.check_constants(name)
        except LoftqError as error:
            return error
        return None

    for error in workers.map(look, base.quantized):
        if error is not None:
            found.error(error)


def _check_fingerprints(found: Findings, opened: Opened, sha256: Mapping[tuple[str, str], str]) -> None:
    """A problem for each record that belongs to other weights; where these are damaged, nothing can be said."""
    base = opened.base
    names = opened.fingerprinted()
    if base is None or not names or any(found.has_named(path.name) for path in base.checkpoint.files):
        return
    refs = base.checkpoint.tensors
    sums = {name: sha256.get((refs[name].file.name, name), "") for name in names}
    for file, recorded in recorded_fingerprints(found, opened):
        if recorded != fingerprint_of(sums):
            found.problem("is of other quantized weights than those here (base_fingerprint)", file)


def _note_unlisted(found: Findings, sums: Checksums) -> None:
    for name in files_in(found.directory):
        if name in sums.files or name == CHECKSUMS:
            continue
        if name in MODEL_FILES:
            found.problem("is not part of the result, and loaders take it for its weights", name)
        else:
            found.note("is not part of the result", name)
