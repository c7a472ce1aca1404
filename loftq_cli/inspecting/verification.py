"""Finds the damage of a directory or a weight file: every problem, not the first only.

Each byte is read, a megabyte at a time, and compared with the checksums of the result. Nothing is repaired.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loftq_cli.adapter.config import WEIGHTS_NAME
from loftq_cli.checkpoint.source import MODEL_FILES, WeightsFile, faults, open_checkpoint, open_weights_file
from loftq_cli.checkpoint.watched_file import HIDDEN_INSIDE
from loftq_cli.errors import InputError, LoftqError
from loftq_cli.inspecting.consistency import OpenedDirectory, is_behind_link, open_directory, recorded_fingerprints
from loftq_cli.inspecting.findings import Findings, Problem, Verification
from loftq_cli.inspecting.loader_check import check_loader
from loftq_cli.model.stored import BaseModel
from loftq_cli.output.checksums import CHECKSUMS, Checksums, file_sha256, files_in, fingerprint_of, read_checksums
from loftq_cli.output.place import is_unfinished
from loftq_cli.output.records import MERGE_REPORT_NAME, REPORT_NAME
from loftq_cli.runtime.workers import Workers, started
from loftq_cli.tensors.headers import FLOAT_PREFIXES, TensorRef
from loftq_cli.tensors.metrics import is_finite, real_values


def verify(path: Path, threads: int = 1, tell: Callable[[Problem], None] = lambda problem: None) -> Verification:
    """Check the directory or weight file `path`, and report every problem.

    threads   number of threads for hashing
    tell      hears of each problem at once; problems of headers and configs come first, before torch is imported

    Raises InputError or StorageError when `path` does not exist. Damage is a result, never an error.
    """
    if not os.path.exists(path):
        open_checkpoint(path)  # raises the error for an absent path
    if not path.is_dir():
        return _verify_file(path, threads, tell)
    findings = Findings(path, tell)
    if is_unfinished(path):
        findings.add_problem("is an unfinished result: the command that began it completes it")
        return findings.summarize(has_checksums=False)
    sums = _find_checksums(findings)
    opened = open_directory(findings, sums.files if sums else {})
    numbers = _Numbers(findings, opened, sums)
    if sums is not None or numbers.tensors:
        with started(threads) as workers:
            differing = set() if sums is None else _check_files(findings, sums, workers)
            numbers.check(workers)
            _check_constants(findings, opened.base, workers)
        if sums is not None:
            numbers.compare(sums, differing)
            _note_unlisted(findings, sums)
        _check_fingerprints(findings, opened, numbers.sha256)
    if opened.base is not None and not any(findings.has_problem_with(name) for name in opened.files()):
        check_loader(findings, opened.base, opened.sources)
    findings.files |= opened.files()
    return findings.summarize(has_checksums=sums is not None)


def _verify_file(path: Path, threads: int, tell: Callable[[Problem], None]) -> Verification:
    """Check a single weight file. A config.json beside the file tells weights from further tensors."""
    findings = Findings(path.parent, tell)
    for error in faults(path):
        findings.add_error(error)
    if findings.is_clean:
        base = Findings(path.parent, lambda problem: None).attempt(BaseModel.open, path)
        numbers = _Numbers(findings, OpenedDirectory(base, {path.name: open_weights_file(path)}, None, ()), None)
        if numbers.tensors:
            with started(threads) as workers:
                numbers.check(workers)
    findings.files.add(path.name)
    return replace(findings.summarize(has_checksums=False), path=path)


def _find_checksums(findings: Findings) -> Checksums | None:
    sums = findings.attempt(read_checksums, findings.directory)
    if sums is None and findings.is_clean:
        for name in (REPORT_NAME, MERGE_REPORT_NAME, HIDDEN_INSIDE):
            if os.path.lexists(findings.directory / name):
                findings.add_problem(f"holds {name} and no {CHECKSUMS}, which is written last: it is incomplete")
    return sums


def _check_files(findings: Findings, sums: Checksums, workers: Workers) -> set[str]:
    """Hash every file in the checksums; return the names of the files with a wrong sha256.

    A wrong file without sums for its tensors is a problem at once, and so is an unreadable file.
    """

    def look(name: str) -> str | LoftqError:
        try:
            if is_behind_link(findings.directory, name):
                raise InputError("lies behind a link to another folder", file=findings.directory / name)
            return file_sha256(findings.directory / name)
        except LoftqError as error:
            return error

    differing = set()
    for name, sha256 in zip(sums.files, workers.map(look, sums.files), strict=True):
        findings.files.add(name)
        if isinstance(sha256, LoftqError):
            findings.add_error(sha256)
        elif sha256 != sums.files[name]:
            differing.add(name)
            # A file with a problem already, or with sums for the tensors, gets a sharper message.
            if not sums.tensors.get(name) and not findings.has_problem_with(name):
                findings.add_problem(f"does not have the sha256 that {CHECKSUMS} lists", name)
    return differing


@dataclass(frozen=True, slots=True)
class _TensorRead:
    """The work on a tensor.

    file     relative name of the weight file
    ref      header of the tensor
    reader   the open file
    hashes   whether the sha256 is needed
    """

    file: str
    ref: TensorRef
    reader: WeightsFile
    hashes: bool


class _Numbers:
    """Reads the tensors of all weight files, each tensor once.

    tensors   the tensors to read, without aliases
    sha256    (file name, tensor name) -> sha256, after `check`
    """

    def __init__(self, findings: Findings, opened: OpenedDirectory, sums: Checksums | None) -> None:
        tensor_sums: Mapping[str, Mapping[str, str]] = sums.tensors if sums else {}
        covered = set(opened.fingerprinted_names())
        self._findings, self._opened = findings, opened
        self._weights = opened.weight_names()
        part = opened.base.checkpoint.part if opened.base else ""
        self._model = {f"{part}{path.name}" for path in opened.base.checkpoint.files} if opened.base else set()
        self.tensors = [
            _TensorRead(
                file, ref, reader, name in tensor_sums.get(file, {}) or (file in self._model and name in covered)
            )
            for file, reader in opened.weights.items()
            for name, ref in reader.tensors.items()
            if ref.alias_of is None
        ]
        self.sha256: dict[tuple[str, str], str] = {}

    def check(self, workers: Workers) -> None:
        """Read every tensor, and keep each sha256; add a problem or a note for NaN and infinite values."""
        for look, result in zip(self.tensors, workers.map(_read_tensor, self.tensors), strict=True):
            self._findings.tensors += 1
            if isinstance(result, LoftqError):
                self._findings.add_error(result)
                continue
            sha256, count = result
            if look.hashes:
                self.sha256[look.file, look.ref.name] = sha256
            if count:
                self._add_not_finite(look, f"holds {count} NaN or infinite value{'s' * (count > 1)}")

    def compare(self, sums: Checksums, differing: set[str]) -> None:
        """Compare each sha256 with the checksums; add a problem for each wrong tensor.

        differing   names of the files with a wrong sha256: intact tensors leave only the header as the damage
        """
        for file, listed_sums in sums.tensors.items():
            if not listed_sums or file not in self._opened.weights:
                continue
            refs = self._opened.weights[file].tensors
            wrong = {name: "does not have its sha256" for name in refs if name in listed_sums}
            wrong = {name: text for name, text in wrong.items() if self.sha256.get((file, name)) != listed_sums[name]}
            wrong |= {name: "is missing" for name in listed_sums if name not in refs}
            wrong |= {name: "is not part of the result" for name in refs if name not in listed_sums}
            for name, text in wrong.items():
                if file in differing:
                    self._findings.add_problem(text, file, name)
                else:
                    self._findings.add_problem(f"{text}, and its file {file} has", CHECKSUMS, name)
            if file in differing and not wrong and not self._findings.has_problem_with(file):
                self._findings.add_problem("its header is not the one that was written, its tensors are", file)

    def _add_not_finite(self, look: _TensorRead, text: str) -> None:
        """Add a problem for NaN in a weight or an adapter, a note for a tensor copied as is."""
        self._findings.not_finite += 1
        is_adapter = Path(look.file).name == WEIGHTS_NAME
        if is_adapter or (look.file in self._model and look.ref.name in self._weights):
            self._findings.add_problem(text, look.file, look.ref.name)
        else:
            self._findings.add_note(f"{text}; it is copied as it is", look.file, look.ref.name)


def _read_tensor(look: _TensorRead) -> tuple[str, int] | LoftqError:
    """The sha256 of a tensor and the number of NaN and infinite values; an error of reading is returned.

    The sha256 counts only when `look` asks for the hash.
    """
    digest, count = hashlib.sha256(), 0
    has_numbers = look.ref.dtype.startswith(FLOAT_PREFIXES)
    if not has_numbers and not look.hashes:
        return "", 0
    try:
        for chunk in look.reader.chunks(look.ref.name):
            if look.hashes:
                digest.update(chunk)
            if has_numbers:
                count += _count_not_finite(chunk, look.ref.dtype)
    except LoftqError as error:
        return error
    return digest.hexdigest(), count


def _count_not_finite(chunk: memoryview, dtype: str) -> int:
    import torch

    values = real_values(torch.frombuffer(chunk, dtype=getattr(torch, dtype)))
    return 0 if is_finite(values) else int((~torch.isfinite(values)).sum())


def _check_constants(findings: Findings, base: BaseModel | None, workers: Workers) -> None:
    """Add a problem for each quantized weight with constants from no quantizer."""
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
            findings.add_error(error)


def _check_fingerprints(findings: Findings, opened: OpenedDirectory, sha256: Mapping[tuple[str, str], str]) -> None:
    """Add a problem for each record with a foreign base_fingerprint. Damaged weights prove nothing: skip the check."""
    base = opened.base
    names = opened.fingerprinted_names()
    if base is None or not names:
        return
    refs, part = base.checkpoint.tensors, base.checkpoint.part
    if any(findings.has_problem_with(f"{part}{path.name}") for path in base.checkpoint.files):
        return
    sums = {name: sha256.get((f"{part}{refs[name].file.name}", name), "") for name in names}
    for file, recorded in recorded_fingerprints(findings, opened):
        if recorded != fingerprint_of(sums):
            findings.add_problem("is of other quantized weights than those here (base_fingerprint)", file)


def _note_unlisted(findings: Findings, sums: Checksums) -> None:
    for name in files_in(findings.directory):
        if name in sums.files or name == CHECKSUMS:
            continue
        if name in MODEL_FILES:
            findings.add_problem("is not part of the result, and loaders take it for its weights", name)
        else:
            findings.add_note("is not part of the result", name)
