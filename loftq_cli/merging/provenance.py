"""Whether an adapter belongs to a base. A LoftQ adapter holds the quantization error of its own base: on any other one,
the original weights included, its effect is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.conversion.report import read_report
from loftq_cli.errors import InputError, MismatchError, printable
from loftq_cli.methods.method import METHODS, find_init
from loftq_cli.model.stored import BaseModel
from loftq_cli.output.checksums import fingerprint_of
from loftq_cli.output.records import PROVENANCE_NAME, REPORT_NAME

_FORCE = "merge it into the base it was made for, or --force"
_FORCED = "merged all the same (--force)"


@dataclass(frozen=True, slots=True)
class Provenance:
    """What is known about an adapter's base before its numbers are read.

    expected   the base's fingerprint that must be found, or None where none is known
    layers     names of the base's weights that the fingerprint covers
    notes      what the records say, and what could not be checked
    """

    expected: str | None
    layers: tuple[str, ...]
    notes: tuple[str, ...]
    is_binding: bool = True


@dataclass(frozen=True, slots=True)
class _Base:
    """What a base says about itself: its report, its fingerprint and the weights that it covers."""

    model: BaseModel
    report: Mapping[str, Any] | None
    layers: tuple[str, ...]

    @property
    def fingerprint(self) -> str | None:
        return None if self.report is None else str(self.report["base_fingerprint"])

    def provenance(self, note: str, *, expected: str | None = None, is_binding: bool = True) -> Provenance:
        return Provenance(expected or self.fingerprint, self.layers, (note,), is_binding)


def check_provenance(base: BaseModel, adapter: Path, config: Mapping[str, Any], *, force: bool) -> Provenance:
    """What the records of both sides say. Raises MismatchError when they contradict each other, unless `force`;
    InputError for a record of a method that this version does not know: nobody can say then what the adapter holds.
    """
    report = read_report(base.folder)
    layers = tuple(layer.name for layer in report[1]) if report else tuple(sorted(base.quantized))
    known = _Base(base, report[0] if report else None, layers)
    side_file = adapter / PROVENANCE_NAME
    if not side_file.is_file():
        return _by_path(known, config, force=force)
    made_for = read_json_object(side_file)
    if not isinstance(made_for.get("base_fingerprint"), str) or not isinstance(made_for.get("method"), str):
        raise InputError("is not a provenance file of this tool", file=side_file, hint="delete it to merge without")
    is_fitted = _is_fitted(made_for, made_for, side_file)
    return _by_fingerprint(known, made_for, is_fitted=is_fitted, force=force)


def check_contents(base: BaseModel, provenance: Provenance, sha256: Callable[[str], str], *, force: bool) -> str | None:
    """Hash the base's quantized weights and compare; returns what came out of it, None for a base that has none.
    `sha256` gives that of a stored tensor.

    Raises MismatchError when they are not those of the records, unless `force`.
    """
    if provenance.expected is None:
        return "could not check the base's quantized weights: nothing records them" if provenance.layers else None
    sums = {
        part.name: sha256(part.name) for name in provenance.layers if name in base.tensors for part in base.parts(name)
    }
    if fingerprint_of(sums) == provenance.expected:
        return "the base's quantized weights have the recorded sha256"
    what = "its quantized weights are not those the adapter was made for"
    if not provenance.is_binding:
        return f"base: {what}"
    if not force:
        raise MismatchError(what, file=base.path, hint=f"inspect --verify says if it is damaged; {_FORCE}")
    return f"base: {what}, {_FORCED}"


def _is_fitted(start: Mapping[str, Any], record: Mapping[str, Any], file: Path) -> bool:
    """Whether an adapter belongs to its own base only, by the row of its method; `start` has method and init, `record`
    the version that wrote `file`. Raises InputError for a method that is not in the table.
    """
    entry = find_init(start.get("method"), start.get("init"))
    if entry is not None:
        return entry.is_fitted
    init = "" if start.get("init") is None else f" and init {printable(start['init'])}"
    message = f"records method {printable(start.get('method'))}{init}, and this version knows {', '.join(METHODS)}"
    raise InputError(message, file=file, hint=f"use loftq-cli {printable(record.get('version'))}, which wrote it")


def _by_fingerprint(base: _Base, made_for: Mapping[str, Any], *, is_fitted: bool, force: bool) -> Provenance:
    expected, method = str(made_for["base_fingerprint"]), str(made_for["method"])
    if base.fingerprint == expected or (base.fingerprint is None and base.layers):
        # Without a report only the adapter's record can differ, and one that starts at zero is bound to no base.
        binding = base.fingerprint is not None or is_fitted
        note = f"{PROVENANCE_NAME} in the adapter names this base" if base.fingerprint else "the base has no report"
        return base.provenance(note, expected=expected, is_binding=binding)
    what = "is another quantized base" if base.layers else "is not quantized"
    said = f"the {method} adapter was made for {printable(made_for.get('base_model'))}, and this base {what}"
    if is_fitted and not force:
        raise MismatchError(said, file=base.model.path, hint=_FORCE)
    # An adapter that starts at zero holds no base's error, so another base is worth a note and no refusal.
    return base.provenance(f"{said}, {_FORCED}" if is_fitted else said)


def _by_path(base: _Base, config: Mapping[str, Any], *, force: bool) -> Provenance:
    """Without a side file (PEFT does not keep it): by `base_model_name_or_path` and the reports of both bases."""
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not os.path.isdir(named):
        if base.report is not None and named == base.report["base_model"]:
            return base.provenance("the adapter names this base as it was called when it was converted")
        return base.provenance(f"could not check that the adapter belongs to this base: it names {named!r}, not found")
    if os.path.realpath(named) == os.path.realpath(base.model.folder):
        return base.provenance("the adapter names this base by its path")
    other = read_report(Path(named))
    if other is not None and other[0]["base_fingerprint"] == base.fingerprint:
        return base.provenance(f"the adapter names {named}, which is the same base")
    if other is None or not _is_fitted(other[0]["recipe"], other[0], Path(named) / REPORT_NAME):
        return base.provenance(f"the adapter names {named}, another directory")
    said = f"the adapter was trained on {named}, another base with a fitted adapter of its own"
    if not force:
        raise MismatchError(said, file=base.model.path, hint=_FORCE)
    return base.provenance(f"{said}, {_FORCED}")
