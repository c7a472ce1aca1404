"""Checks whether the files of a directory agree: model, report, recipe, merge report and the adapters inside. Reads
headers and small files, no numbers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from loftq_cli.adapter.base_record import record_in
from loftq_cli.adapter.beside import adapter_folders
from loftq_cli.adapter.config import CONFIG_NAME, WEIGHTS_NAME, is_adapter_directory
from loftq_cli.adapter.source import AdapterSource, open_adapter
from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.checkpoint.source import MODEL_FILES, WeightsFile, open_weights_file
from loftq_cli.conversion.report import LayerResult, read_report
from loftq_cli.errors import LoftqError, MismatchError, UnreadFormat
from loftq_cli.inspecting.findings import Findings
from loftq_cli.layouts.layout import DENSE
from loftq_cli.model.foreign import foreign_note
from loftq_cli.model.stored import BaseModel, faults
from loftq_cli.output.records import MERGE_REPORT_NAME, PROVENANCE_NAME, RECIPE_NAME, REPORT_NAME
from loftq_cli.planning.jobs import QuantizableMatrix
from loftq_cli.planning.matrices import quantizable_matrices
from loftq_cli.planning.recipe_files import recipe_json, resolve_recipe
from loftq_cli.tensors.libraries import PIPELINE_FILES

_HERE = "."


@dataclass(frozen=True)
class OpenedDirectory:
    """The readable parts of a directory; names of files and folders are relative to the directory.

    base       the model; None for a damaged model, and for a directory with only an adapter
    weights    name of each readable weight file -> the open file
    report     content of loftq_report.json, and the layers of the report; None without a report
    adapters   the folders of the adapters
    sources    folder -> the opened adapter, for each readable adapter
    """

    base: BaseModel | None
    weights: Mapping[str, WeightsFile]
    report: tuple[dict[str, Any], list[LayerResult]] | None
    adapters: tuple[str, ...]
    sources: Mapping[str, AdapterSource] = field(default_factory=dict)

    def files(self) -> set[str]:
        """Names of the files behind model and adapters: weights, index and configs, but no small records."""
        read = {*self.weights, *(_inside(name, CONFIG_NAME) for name in self.adapters)}
        if self.base is None:
            return read
        index = self.base.checkpoint.index_file
        part = self.base.checkpoint.part
        config = {f"{part}config.json"} if (self.base.folder / part / "config.json").is_file() else set()
        return {*read, *config, *([] if index is None else [f"{part}{index.name}"])}

    def fingerprinted_names(self) -> list[str]:
        """Names of the stored tensors under `base_fingerprint`."""
        if self.base is None:
            return []
        layers = [] if self.report is None else self.report[1]
        names = sorted(self.base.quantized) if self.report is None else [n for x in layers for n in x.stored_names]
        return [part.name for name in names if name in self.base.tensors for part in self.base.parts(name)]

    def weight_names(self) -> frozenset[str]:
        """Names of the stored tensors of weights: quantize and merge read and write only finite numbers there."""
        if self.base is None:
            return frozenset()
        units = quantizable_matrices(self.base.tensors, self.base.config, layout=DENSE)
        layers = {unit.name for unit in units if isinstance(unit, QuantizableMatrix)} | self.base.quantized.keys()
        parts = {part.name for name in layers for part in self.base.parts(name)}
        return frozenset(parts) | frozenset(self.fingerprinted_names())


def open_directory(findings: Findings, listed_files: Mapping[str, str]) -> OpenedDirectory:
    """Open every readable part of the directory; add a problem for each damaged part and for each contradiction.

    findings       collects the problems of the directory
    listed_files   relative name -> sha256 of each file in the list of checksums; empty without a list
    """
    directory = findings.directory
    report = findings.attempt(read_report, directory)
    is_adapter = is_adapter_directory(directory) and not any(
        (directory / name).exists() for name in (*MODEL_FILES, *PIPELINE_FILES)
    )
    base = None if is_adapter else _open_base(findings)
    adapters = (_HERE,) if is_adapter else tuple(_adapter_names(directory, listed_files, report))
    weights = _open_weights(findings, base, adapters, listed_files)
    found = {name: _open_adapter(findings, name, is_ours=bool(listed_files) or not is_adapter) for name in adapters}
    sources = {name: source for name, source in found.items() if source is not None}
    opened = OpenedDirectory(base, weights, report, adapters, sources)
    if base is not None and report is not None:
        _check_layers(findings, base, report[1])
        _check_adapter_of_report(findings, base, report, found, listed_files)
    _check_recipe(findings, report)
    _check_merge_report(findings, base)
    return opened


def is_behind_link(directory: Path, name: str) -> bool:
    """True when a folder between `directory` and the file `name` is a link: a link may lead out of the directory.

    >>> import os
    >>> os.mkdir("inside"), os.symlink("inside", "linked")
    (None, None)
    >>> is_behind_link(Path("."), "linked/model.safetensors"), is_behind_link(Path("."), "inside/model.safetensors")
    (True, False)
    """
    return any(os.path.islink(directory / parent) for parent in Path(name).parents if parent != Path(_HERE))


def recorded_fingerprints(findings: Findings, opened: OpenedDirectory) -> Iterator[tuple[str, str]]:
    """Yield (file name, base_fingerprint) for the report, and for the provenance file and the config of each adapter.

    A damaged record is a problem.
    """
    if opened.report is not None:
        yield REPORT_NAME, str(opened.report[0]["base_fingerprint"])
    for adapter in opened.adapters:
        name = _inside(adapter, PROVENANCE_NAME)
        if (findings.directory / name).is_file():
            values = findings.attempt(read_json_object, findings.directory / name)
            if values is not None and not isinstance(values.get("base_fingerprint"), str):
                findings.add_problem("is not a provenance file of this tool", name)
            elif values is not None:
                yield name, values["base_fingerprint"]
        name = _inside(adapter, CONFIG_NAME)
        record = findings.attempt(_record_in_file, findings.directory / name)
        if record is not None:
            yield name, record["base_fingerprint"]


def _record_in_file(file: Path) -> dict[str, Any] | None:
    return record_in(read_json_object(file), file)


def _open_base(findings: Findings) -> BaseModel | None:
    is_intact = True
    for error in faults(findings.directory):
        if isinstance(error, UnreadFormat):
            findings.add_error_note(error, "config.json")
            continue
        is_intact = False
        findings.add_error(error)
    if not is_intact:
        return None
    base = findings.attempt(partial(BaseModel.open, any_format=True), findings.directory)
    note = None if base is None else foreign_note(base.tensors)
    if note is not None:
        findings.add_note(note, "config.json")
    return base


def _adapter_names(
    directory: Path, listed_files: Mapping[str, str], report: tuple[dict[str, Any], list[LayerResult]] | None
) -> list[str]:
    """Folders of the result's adapters: from the list of files, or else the folders in which methods write adapters."""
    if listed_files:
        names = [name.removesuffix(f"/{CONFIG_NAME}") for name in listed_files if name.endswith(f"/{CONFIG_NAME}")]
    else:
        names = sorted(adapter_folders(None if report is None else str(report[0]["adapter_dir"])))
    return [
        name
        for name in names
        if not is_behind_link(directory, f"{name}/{CONFIG_NAME}") and is_adapter_directory(directory / name)
    ]


def _open_weights(
    findings: Findings, base: BaseModel | None, adapters: tuple[str, ...], listed_files: Mapping[str, str]
) -> dict[str, WeightsFile]:
    """Open the readable weight files of model, list and adapters, in spite of damage elsewhere."""
    directory, opened = findings.directory, {}
    names = {name for name in listed_files if name.endswith(".safetensors")} | {
        _inside(name, WEIGHTS_NAME) for name in adapters if (directory / name / WEIGHTS_NAME).exists()
    }
    if base is not None:
        names |= {path.relative_to(directory).as_posix() for path in base.checkpoint.files}
    for name in sorted(names):
        if not is_behind_link(directory, name) and (reader := findings.attempt(open_weights_file, directory / name)):
            opened[name] = reader
    if base is None:  # opening the model reported the damage of the model's files already
        for name in (path.name for path in sorted(directory.glob("*.safetensors")) if path.name not in names):
            with suppress(LoftqError):
                opened[name] = open_weights_file(directory / name)
    return opened


def _open_adapter(findings: Findings, name: str, *, is_ours: bool) -> AdapterSource | None:
    """The adapter in the folder `name`; None for a damaged adapter. A foreign adapter of a kind unknown to `merge` is
    worth a note.
    """
    try:
        return open_adapter(findings.directory / name)
    except MismatchError as error:
        if is_ours:
            findings.add_error(error)
        else:
            findings.add_error_note(error, CONFIG_NAME)
    except LoftqError as error:
        findings.add_error(error)
    return None


def _check_layers(findings: Findings, base: BaseModel, layers: list[LayerResult]) -> None:
    for layer in layers:
        for name in layer.stored_names:
            if name not in base.tensors:
                findings.add_problem("is a layer in it, and not in the weight files", REPORT_NAME, name)
            elif layer.experts is None and base.matrix_shape(name) != layer.shape:
                shapes = f"{layer.shape} in it and {base.matrix_shape(name)} in the weight files"
                findings.add_problem(f"is {shapes}", REPORT_NAME, name)
            elif name in base.quantized and base.quantized[name].spec != layer.spec:
                findings.add_problem("is stored in another format than it says", REPORT_NAME, name)
    for name in sorted(base.quantized.keys() - {name for layer in layers for name in layer.stored_names}):
        findings.add_problem("is quantized in the weight files, and no layer in it", REPORT_NAME, name)


def _check_adapter_of_report(
    findings: Findings,
    base: BaseModel,
    report: tuple[dict[str, Any], list[LayerResult]],
    sources: Mapping[str, AdapterSource | None],
    listed_files: Mapping[str, str],
) -> None:
    name, layers = str(report[0]["adapter_dir"]), report[1]
    if name not in sources and f"{name}/{CONFIG_NAME}" not in listed_files:
        findings.add_problem(f"names an adapter in {name}, and there is none", REPORT_NAME)
    source = sources.get(name)
    if source is None:
        return
    file = _inside(name, WEIGHTS_NAME)
    modules = {layer.module: layer for layer in layers if layer.experts is None}
    of_experts = tuple(f"{layer.module.rpartition('.')[0]}." for layer in layers if layer.experts is not None)
    adapted = {module for module in source.lora if not (of_experts and f"{module}.".startswith(of_experts))}
    for module in sorted(modules.keys() ^ adapted):
        is_lacking = module in modules
        text = f"has no adapter for {module}" if is_lacking else f"has an adapter for {module}, no layer of it"
        findings.add_problem(f"{text}, says {REPORT_NAME}", file)
    for module in sorted(modules.keys() & source.lora.keys()):
        layer = modules[module]
        shape = base.matrix_shape(layer.name) if layer.name in base.tensors else ()
        if len(shape) == 2:
            _check_factors(findings, file, source, layer, (shape[0], shape[1]))


def _check_factors(
    findings: Findings, file: str, source: AdapterSource, layer: LayerResult, shape: tuple[int, int]
) -> None:
    lora = source.lora[layer.module]
    for error in source.fit(lora, shape, rank=layer.rank):
        findings.add_problem(error.message, file, error.tensor)
    is_number = type(layer.scaling) in (int, float)
    if not is_number or not math.isclose(lora.scaling, layer.scaling, rel_tol=1e-6):
        folder = file.removesuffix(WEIGHTS_NAME)
        findings.add_problem(f"gives {layer.module} another scaling than {REPORT_NAME}", f"{folder}{CONFIG_NAME}")


def _check_recipe(findings: Findings, report: tuple[dict[str, Any], list[LayerResult]] | None) -> None:
    path = findings.directory / RECIPE_NAME
    if not os.path.lexists(path):
        return
    try:
        recipe = resolve_recipe(os.path.abspath(path), {})
    except LoftqError as error:
        findings.add_error(error, RECIPE_NAME)
        return
    if report is not None and json.loads(json.dumps(recipe_json(recipe))) != report[0]["recipe"]:
        findings.add_problem(f"is not the recipe in {REPORT_NAME}", RECIPE_NAME)


def _check_merge_report(findings: Findings, base: BaseModel | None) -> None:
    if not (findings.directory / MERGE_REPORT_NAME).is_file():
        return
    values = findings.attempt(read_json_object, findings.directory / MERGE_REPORT_NAME)
    if values is None or base is None:
        return
    layers = values.get("layers")
    if not isinstance(layers, list) or not all(isinstance(x, dict) and isinstance(x.get("name"), str) for x in layers):
        findings.add_problem("is not a report of this tool", MERGE_REPORT_NAME)
        return
    for name in (layer["name"] for layer in layers if layer["name"] not in base.tensors):
        findings.add_problem("is a layer in it, and not in the weight files", MERGE_REPORT_NAME, name)


def _inside(folder: str, name: str) -> str:
    return name if folder == _HERE else f"{folder}/{name}"
