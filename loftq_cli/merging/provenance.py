"""Checks whether an adapter belongs to a base.

A LoftQ adapter holds the quantization error of a single base: merged into any further base, the original weights
included, the effect is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.adapter.beside import find_adapter
from loftq_cli.adapter.config import CONFIG_NAME
from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.conversion.report import read_report
from loftq_cli.errors import InputError, MismatchError, printable
from loftq_cli.methods.method import METHODS, find_init
from loftq_cli.model.stored import BaseModel
from loftq_cli.output.checksums import fingerprint_of
from loftq_cli.output.records import PROVENANCE_NAME, REPORT_NAME, source_name

_FORCE = "merge it into the base it was made for, or --force"
_FORCED = "merged all the same (--force)"


@dataclass(frozen=True, slots=True)
class Provenance:
    """The records about an adapter's base, read before any number of the base.

    expected     the fingerprint to expect of the base; None without a record
    layers       names of the base weights under the fingerprint
    notes        remarks about the records, and about records without a proof
    is_binding   whether a wrong fingerprint is an error; otherwise a note
    """

    expected: str | None
    layers: tuple[str, ...]
    notes: tuple[str, ...]
    is_binding: bool = True


@dataclass(frozen=True, slots=True)
class _Base:
    """A base with records: report, fingerprint, and names of the weights under the fingerprint."""

    model: BaseModel
    report: Mapping[str, Any] | None
    layers: tuple[str, ...]

    @property
    def fingerprint(self) -> str | None:
        return None if self.report is None else str(self.report["base_fingerprint"])

    def provenance(self, note: str, *, expected: str | None = None, is_binding: bool = True) -> Provenance:
        return Provenance(expected or self.fingerprint, self.layers, (note,), is_binding)


def check_provenance(base: BaseModel, adapter: Path, config: Mapping[str, Any], *, force: bool) -> Provenance:
    """Compare the records of base and adapter.

    base      the opened base
    adapter   the adapter's directory; a provenance file inside decides
    config    content of adapter_config.json; decides without a provenance file
    force     whether a contradiction becomes a note

    Raises MismatchError when the records contradict each other, unless `force`; InputError for a damaged record, and
    for a method unknown to this version: the content of the adapter is unknown then.
    """
    report = read_report(base.folder)
    layers = (
        tuple(name for layer in report[1] for name in layer.stored_names) if report else tuple(sorted(base.quantized))
    )
    recorded = _Base(base, report[0] if report else None, layers)
    side_file = adapter / PROVENANCE_NAME
    if not side_file.is_file():
        return _compare_paths(recorded, config, force=force)
    made_for = read_json_object(side_file)
    if not isinstance(made_for.get("base_fingerprint"), str) or not isinstance(made_for.get("method"), str):
        raise InputError("is not a provenance file of this tool", file=side_file, hint="delete it to merge without")
    is_fitted = _is_fitted(made_for, made_for, side_file)
    return _compare_fingerprints(recorded, made_for, is_fitted=is_fitted, force=force)


def check_contents(base: BaseModel, provenance: Provenance, sha256: Callable[[str], str], *, force: bool) -> str | None:
    """Hash the quantized weights of the base, and compare the fingerprint with the records.

    provenance   the records, from `check_provenance`
    sha256       returns the sha256 of a stored tensor by name
    force        whether a wrong fingerprint becomes a note

    Returns a note about the comparison; None for a base without quantized weights.

    Raises MismatchError when the fingerprint is wrong and binding, unless `force`.
    """
    if provenance.expected is None:
        return "could not check the base's quantized weights: nothing records them" if provenance.layers else None
    sums = {
        part.name: sha256(part.name) for name in provenance.layers if name in base.tensors for part in base.parts(name)
    }
    if fingerprint_of(sums) == provenance.expected:
        return "the base's quantized weights have the recorded sha256"
    message = "its quantized weights are not those the adapter was made for"
    if not provenance.is_binding:
        return f"base: {message}"
    if not force:
        raise MismatchError(message, file=base.path, hint=f"inspect --verify says if it is damaged; {_FORCE}")
    return f"base: {message}, {_FORCED}"


def _is_fitted(start: Mapping[str, Any], record: Mapping[str, Any], file: Path) -> bool:
    """True when the adapter is fitted to a single base, by the row of the method.

    start    holds "method" and "init"
    record   holds "version", the version of this tool behind `file`

    Raises InputError for a method outside the table.
    """
    entry = find_init(start.get("method"), start.get("init"))
    if entry is not None:
        return entry.is_fitted
    init = "" if start.get("init") is None else f" and init {printable(start['init'])}"
    message = f"records method {printable(start.get('method'))}{init}, and this version knows {', '.join(METHODS)}"
    raise InputError(message, file=file, hint=f"use loftq-cli {printable(record.get('version'))}, which wrote it")


def _compare_fingerprints(base: _Base, made_for: Mapping[str, Any], *, is_fitted: bool, force: bool) -> Provenance:
    expected, method = str(made_for["base_fingerprint"]), str(made_for["method"])
    if base.fingerprint == expected or (base.fingerprint is None and base.layers):
        # A base without a report has no recorded fingerprint: only the adapter's record can differ from the weights. An
        # adapter with a start at zero is bound to no base.
        binding = base.fingerprint is not None or is_fitted
        note = f"{PROVENANCE_NAME} in the adapter names this base" if base.fingerprint else "the base has no report"
        return base.provenance(note, expected=expected, is_binding=binding)
    state = "is another quantized base" if base.layers else "is not quantized"
    source = printable(made_for.get("source", made_for.get("base_model")))
    message = f"the {method} adapter was made for a base of {source}, and this base {state}"
    if is_fitted and not force:
        raise MismatchError(message, file=base.model.path, hint=_FORCE)
    # An adapter with a start at zero holds no quantization error, so a foreign base is worth a note and no refusal.
    return base.provenance(f"{message}, {_FORCED}" if is_fitted else message)


def _compare_paths(base: _Base, config: Mapping[str, Any], *, force: bool) -> Provenance:
    """Compare `base_model_name_or_path` and the reports of both bases. PEFT does not keep the provenance file.

    Notes go into the report of the merge, so notes tell the last part of a path only.
    """
    base_name = config.get("base_model_name_or_path")
    if not isinstance(base_name, str) or not os.path.isdir(base_name):
        if base.report is not None and isinstance(base_name, str) and base_name == _own_name(base):
            return base.provenance("the adapter names this base as it was called when it was converted")
        shown = repr(source_name(Path(base_name))) if isinstance(base_name, str) and base_name else repr(base_name)
        return base.provenance(f"could not check that the adapter belongs to this base: it names {shown}, not found")
    name = source_name(Path(base_name))
    if os.path.realpath(base_name) == os.path.realpath(base.model.folder):
        return base.provenance("the adapter names this base by its path")
    report = read_report(Path(base_name))
    if report is not None and report[0]["base_fingerprint"] == base.fingerprint:
        return base.provenance(f"the adapter names {name}, which is the same base")
    if report is None or not _is_fitted(report[0]["recipe"], report[0], Path(base_name) / REPORT_NAME):
        return base.provenance(f"the adapter names {name}, another directory")
    if not force:
        message = f"the adapter was trained on {base_name}, another base with a fitted adapter of its own"
        raise MismatchError(message, file=base.model.path, hint=_FORCE)
    return base.provenance(f"the adapter was trained on {name}, another base with a fitted adapter, {_FORCED}")


def _own_name(base: _Base) -> object:
    """The name of the base in the config of the adapter inside; None for a base without an adapter inside."""
    own = None if base.report is None else find_adapter(base.model.folder, str(base.report["adapter_dir"]))
    return None if own is None else read_json_object(own / CONFIG_NAME).get("base_model_name_or_path")
