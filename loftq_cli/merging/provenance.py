"""Checks whether an adapter belongs to a base.

A LoftQ adapter holds the quantization error of a single base: merged into any further base, the original weights
included, the effect is wrong.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loftq_cli.adapter.base_record import describe_base, read_base_record
from loftq_cli.adapter.beside import find_adapter
from loftq_cli.adapter.config import CONFIG_NAME
from loftq_cli.adapter.source import AdapterSource, open_adapter
from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.conversion.report import LayerResult, read_report
from loftq_cli.errors import InputError, MismatchError, printable
from loftq_cli.methods.method import METHODS, find_init
from loftq_cli.model.stored import BaseModel
from loftq_cli.output.checksums import fingerprint_of
from loftq_cli.output.records import REPORT_NAME, source_name
from loftq_cli.tensors.metrics import squared_norm

_FORCE = "merge it into the base it was made for, or --force"
_FORCED = "merged all the same (--force)"
_SAME_NORM = 1e-3  # relative; factors in bfloat16 and a report from other threads differ by less


@dataclass(frozen=True, slots=True)
class Provenance:
    """The records about an adapter's base, read before any number of the base.

    expected     the fingerprint to expect of the base; None without a record
    layers       names of the base weights under the fingerprint
    notes        remarks about the records
    warnings     doubts: another base, a forced merge, and records without a proof
    is_binding   whether a wrong fingerprint is an error; otherwise a note
    """

    expected: str | None
    layers: tuple[str, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
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

    @property
    def described(self) -> str:
        """The base in words: the start of the fingerprint and the name of the original, or what the base is."""
        if self.report is not None:
            return describe_base(self.report)
        return "a quantized base without a report" if self.layers else "none"

    @property
    def is_fitted(self) -> bool:
        """Whether the adapter of the base's own conversion is fitted to the base."""
        report = self.report
        return report is not None and _is_fitted(report["recipe"], report, self.model.folder / REPORT_NAME)

    def provenance(self, note: str, *, expected: str | None = None, is_binding: bool = True) -> Provenance:
        return Provenance(expected or self.fingerprint, self.layers, notes=(note,), is_binding=is_binding)

    def doubt(self, warning: str) -> Provenance:
        return Provenance(self.fingerprint, self.layers, warnings=(warning,))


def check_provenance(base: BaseModel, adapter: Path, config: Mapping[str, Any], *, force: bool) -> Provenance:
    """Compare the records of base and adapter. Names of directories count only where the adapter has no record.

    base      the opened base
    adapter   the adapter's directory
    config    content of adapter_config.json
    force     whether a contradiction becomes a warning

    Raises MismatchError when the records contradict each other, and when nothing tells the base of a fitted adapter,
    unless `force`; InputError for a damaged record, and for a method unknown to this version: the content of the
    adapter is unknown then.
    """
    report = read_report(base.folder)
    layers = (
        tuple(name for layer in report[1] for name in layer.stored_names) if report else tuple(sorted(base.quantized))
    )
    recorded = _Base(base, report[0] if report else None, layers)
    found = read_base_record(adapter, config)
    if found is None:
        return _compare_paths(recorded, adapter, config, report[1] if report else [], force=force)
    made_for, file = found
    return _compare_fingerprints(recorded, made_for, file, force=force)


def join_provenance(records: Sequence[Provenance]) -> Provenance:
    """The records of one or more adapters of a base: the notes and warnings of all, and the fingerprint of a binding
    record before other fingerprints.
    """
    chosen = next((record for record in records if record.expected is not None and record.is_binding), records[0])
    notes = dict.fromkeys(note for record in records for note in record.notes)
    warnings = dict.fromkeys(warning for record in records for warning in record.warnings)
    return replace(chosen, notes=tuple(notes), warnings=tuple(warnings))


def check_contents(base: BaseModel, provenance: Provenance, sha256: Callable[[str], str], *, force: bool) -> Provenance:
    """Hash the quantized weights of the base, and compare the fingerprint with the records.

    provenance   the records, from `check_provenance`
    sha256       returns the sha256 of a stored tensor by name
    force        whether a wrong fingerprint becomes a warning

    Returns the records with the note or warning about the comparison; without, for a base without quantized weights.

    Raises MismatchError when the fingerprint is wrong and binding, unless `force`.
    """
    if provenance.expected is None:
        note = "could not check the base's quantized weights: nothing records them"
        return replace(provenance, notes=(*provenance.notes, note)) if provenance.layers else provenance
    sums = {
        part.name: sha256(part.name) for name in provenance.layers if name in base.tensors for part in base.parts(name)
    }
    found, expected = fingerprint_of(sums), provenance.expected
    if found == expected:
        note = "the base's quantized weights have the recorded sha256"
        return replace(provenance, notes=(*provenance.notes, note))
    message = "its quantized weights are not those the adapter was made for"
    bases = f"fingerprint {found[:12]}, and {printable(expected[:12])} is recorded"
    if provenance.is_binding and not force:
        hint = f"inspect --verify says if it is damaged; {_FORCE}"
        raise MismatchError(f"{message}: {bases}", file=base.path, hint=hint)
    forced = f", {_FORCED}" if provenance.is_binding else ""
    return replace(provenance, warnings=(*provenance.warnings, f"base: {message}{forced}: {bases}"))


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


def _compare_fingerprints(base: _Base, made_for: Mapping[str, Any], file: Path, *, force: bool) -> Provenance:
    """Compare the record `made_for` from `file` with the report of the base."""
    expected, method = str(made_for["base_fingerprint"]), made_for["method"]
    is_fitted = _is_fitted(made_for, made_for, file)
    if base.fingerprint == expected or (base.fingerprint is None and base.layers):
        # A base without a report has no recorded fingerprint: only the adapter's record can differ from the weights. An
        # adapter with a start at zero is bound to no base.
        binding = base.fingerprint is not None or is_fitted
        note = f"{file.name} in the adapter names this base" if base.fingerprint else "the base has no report"
        return base.provenance(note, expected=expected, is_binding=binding)
    source = printable(made_for.get("source", made_for.get("base_model")))
    state = "is another quantized base" if base.layers else "is not quantized"
    message = f"the {method} adapter was made for a base of {source}, and this base {state}"
    bases = f": fingerprint {describe_base(made_for)} in {file.name}, {base.described} here"
    if not is_fitted:  # an adapter with a start at zero holds no quantization error, so a foreign base is worth a note
        return base.provenance(message + bases)
    if not force:
        raise MismatchError(message + bases, file=base.model.path, hint=_FORCE)
    return base.doubt(f"{message}, {_FORCED}{bases}")


def _compare_paths(
    base: _Base, adapter: Path, config: Mapping[str, Any], layers: Sequence[LayerResult], *, force: bool
) -> Provenance:
    """Compare `base_model_name_or_path` and the reports of both bases: an adapter of an earlier version has no record.

    layers   of the report of the base

    Notes go into the report of the merge, so notes tell the last part of a path only.
    """
    base_name = config.get("base_model_name_or_path")
    if not isinstance(base_name, str) or not os.path.isdir(base_name):
        return _compare_names(base, adapter, base_name, layers, force=force)
    name = source_name(Path(base_name))
    if os.path.realpath(base_name) == os.path.realpath(base.model.folder):
        return base.provenance("the adapter names this base by its path")
    report = read_report(Path(base_name))
    if report is not None and report[0]["base_fingerprint"] == base.fingerprint:
        return base.provenance(f"the adapter names {name}, which is the same base")
    if report is None or not _is_fitted(report[0]["recipe"], report[0], Path(base_name) / REPORT_NAME):
        return base.doubt(f"the adapter names {name}, another directory")
    bases = f": fingerprint {describe_base(report[0])} there, {base.described} here"
    if not force:
        message = f"the adapter was trained on {base_name}, another base with a fitted adapter of its own{bases}"
        raise MismatchError(message, file=base.model.path, hint=_FORCE)
    return base.doubt(f"the adapter was trained on {name}, another base with a fitted adapter, {_FORCED}{bases}")


def _compare_names(
    base: _Base, adapter: Path, base_name: object, layers: Sequence[LayerResult], *, force: bool
) -> Provenance:
    """Judge an adapter without a record that names no directory here."""
    shown = repr(source_name(Path(base_name))) if isinstance(base_name, str) and base_name else repr(base_name)
    message = f"could not check that the adapter belongs to this base: it names {shown}, not found"
    if not base.is_fitted:
        return base.doubt(message)
    if isinstance(base_name, str) and base_name == _own_name(base):
        return base.doubt("the adapter names this base as it was called when it was converted, and nothing else tells")
    source = open_adapter(adapter)
    ranks = {layer.module: layer.rank for layer in layers}
    if {module: lora.rank for module, lora in source.lora.items()} != ranks:
        return base.doubt(message)  # no adapter that a conversion like this one starts
    if _is_untrained(source, layers):
        return base.provenance("the adapter is the untrained adapter of this base, by the norms in the report")
    if not force:
        message += f", holds no record of a base, and has the form of the fitted adapter of {base.described}"
        raise MismatchError(message, file=base.model.path, hint="--force merges it, where it was trained on this base")
    return base.doubt(f"{message}, {_FORCED}")


def _is_untrained(source: AdapterSource, layers: Sequence[LayerResult]) -> bool:
    """Whether every update s·B·A has the norm in the report of the conversion: training changes every norm, and no two
    bases have adapters of equal norms.
    """
    for layer in layers:
        pair = source.pair(layer.module, layer.shape)
        if pair is None or not math.isclose(squared_norm(pair), layer.error.squared_delta, rel_tol=_SAME_NORM):
            return False
    return True


def _own_name(base: _Base) -> object:
    """The name of the base in the config of the adapter inside; None for a base without an adapter inside."""
    own = None if base.report is None else find_adapter(base.model.folder, str(base.report["adapter_dir"]))
    return None if own is None else read_json_object(own / CONFIG_NAME).get("base_model_name_or_path")
