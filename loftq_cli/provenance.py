"""Whether an adapter belongs to a base. A LoftQ adapter holds the quantization error of its own base: on any other one,
the original weights included, its effect is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.base_model import BaseModel
from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.errors import InputError, MismatchError
from loftq_cli.report import PROVENANCE_NAME, fingerprint_of, read_report

_FORCE = "merge it into the base it was made for, or --force"


@dataclass(frozen=True, slots=True)
class Provenance:
    """What is known about an adapter's base before its numbers are read.

    expected   the base's fingerprint that must be found, or None where none is known
    layers     names of the base's weights that the fingerprint covers
    notes      what was checked, and what could not be
    """

    expected: str | None
    layers: tuple[str, ...]
    notes: tuple[str, ...]


def check_provenance(base: BaseModel, adapter: Path, config: Mapping[str, Any], *, force: bool) -> Provenance:
    """What the records of both sides say. Raises MismatchError when they contradict each other, unless `force`."""
    report = read_report(base.path)
    layers = tuple(layer.name for layer in report[1]) if report else tuple(sorted(base.quantized))
    found = str(report[0]["base_fingerprint"]) if report else None
    side_file = adapter / PROVENANCE_NAME
    if side_file.is_file():
        made_for = read_json_object(side_file)
        if not isinstance(made_for.get("base_fingerprint"), str) or not isinstance(made_for.get("method"), str):
            raise InputError("is not a provenance file of this tool", file=side_file, hint="delete it to merge without")
        return _by_fingerprint(base, layers, found, made_for, force=force)
    return _by_path(base, layers, found, report[0] if report else None, config, force=force)


def check_contents(base: BaseModel, provenance: Provenance, *, force: bool) -> None:
    """Hash the base's quantized weights and compare. Raises MismatchError when they were changed, unless `force`."""
    if provenance.expected is None:
        return
    sums = {part: base.sha256(part) for name in provenance.layers if name in base.tensors for part in base.parts(name)}
    if fingerprint_of(sums) != provenance.expected and not force:
        raise MismatchError("its weights are not those the adapter was made for", file=base.path, hint=_FORCE)


def _by_fingerprint(
    base: BaseModel, layers: tuple[str, ...], found: str | None, made_for: Mapping[str, Any], *, force: bool
) -> Provenance:
    expected, method = str(made_for["base_fingerprint"]), str(made_for["method"])
    if found == expected or (found is None and layers):
        return Provenance(expected, layers, ("the adapter was made for this base",))
    what = "is another quantized base" if layers else "is not quantized"
    if method == "loftq" and not force:
        raise MismatchError(
            f"the LoftQ adapter was made for {made_for.get('base_model')}, and this base {what}",
            file=base.path,
            hint=_FORCE,
        )
    return Provenance(
        None, layers, (f"the {method} adapter was made for {made_for.get('base_model')}, and this base {what}",)
    )


def _by_path(
    base: BaseModel,
    layers: tuple[str, ...],
    found: str | None,
    report: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    *,
    force: bool,
) -> Provenance:
    """Without a side file (PEFT does not keep it): by `base_model_name_or_path` and the reports of both bases."""
    named = config.get("base_model_name_or_path")
    trained_on = Path(named) if isinstance(named, str) and named else None
    if trained_on is not None and trained_on.is_dir():
        if trained_on.resolve() == base.path.resolve():
            return Provenance(found, layers, ("the adapter names this base by its path",))
        other = read_report(trained_on)
        if other is not None and other[0]["base_fingerprint"] == found:
            return Provenance(found, layers, (f"the adapter names {named}, which is the same base",))
        if other is not None and other[0]["recipe"]["method"] == "loftq" and not force:
            raise MismatchError(f"the adapter was trained on {named}, another base", file=base.path, hint=_FORCE)
        return Provenance(found, layers, (f"the adapter names {named}, another base",))
    if report is not None and named == report["base_model"]:
        return Provenance(found, layers, ("the adapter names this base as it was called when it was converted",))
    return Provenance(
        found, layers, (f"could not check that the adapter belongs to this base: it names {named!r}, not found here",)
    )
