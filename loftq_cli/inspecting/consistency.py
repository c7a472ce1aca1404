"""Whether a directory agrees with itself: its model with the report, the recipe, the merge report and the adapters
inside. Reads headers and small files, no numbers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.adapter.beside import adapter_folders
from loftq_cli.adapter.config import CONFIG_NAME, WEIGHTS_NAME, is_adapter_directory
from loftq_cli.adapter.source import AdapterSource, open_adapter
from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.checkpoint.source import MODEL_FILES, WeightsFile, open_weights_file
from loftq_cli.checkpoint.watched_file import WatchedFile
from loftq_cli.conversion.report import LayerResult, read_report
from loftq_cli.errors import InputError, LoftqError, MismatchError
from loftq_cli.inspecting.findings import Findings
from loftq_cli.layouts.layout import DENSE
from loftq_cli.model.stored import BaseModel, faults
from loftq_cli.output.records import MERGE_REPORT_NAME, PROVENANCE_NAME, RECIPE_NAME, REPORT_NAME
from loftq_cli.planning.jobs import QuantizableMatrix
from loftq_cli.planning.matrices import quantizable_matrices
from loftq_cli.planning.recipe_files import recipe_json, resolve_recipe

_MAX_RECIPE_NBYTES = 1_000_000
_HERE = "."


@dataclass(frozen=True)
class Opened:
    """What can be read of a directory; names of files and folders are relative to it.

    base       the model; None where it cannot be opened, and for an adapter by itself
    weights    every weight file that opens
    report     loftq_report.json and its layers
    adapters   the folders of adapters that belong to the directory
    """

    base: BaseModel | None
    weights: Mapping[str, WeightsFile]
    report: tuple[dict[str, Any], list[LayerResult]] | None
    adapters: tuple[str, ...]

    def files(self) -> set[str]:
        """Names of what was read to open it, but for small records."""
        read = {*self.weights, *(_inside(name, CONFIG_NAME) for name in self.adapters)}
        if self.base is None:
            return read
        index = self.base.checkpoint.index_file
        config = {"config.json"} if (self.base.folder / "config.json").is_file() else set()
        return {*read, *config, *([] if index is None else [index.name])}

    def fingerprinted(self) -> list[str]:
        """Names of the stored tensors that `base_fingerprint` stands for."""
        if self.base is None:
            return []
        names = sorted(self.base.quantized) if self.report is None else [layer.name for layer in self.report[1]]
        return [part.name for name in names if name in self.base.tensors for part in self.base.parts(name)]

    def weight_names(self) -> frozenset[str]:
        """Names of the stored tensors of which quantize and merge write, and read, finite numbers only."""
        if self.base is None:
            return frozenset()
        units = quantizable_matrices(self.base.tensors, self.base.config, layout=DENSE)
        layers = {unit.name for unit in units if isinstance(unit, QuantizableMatrix)} | self.base.quantized.keys()
        parts = {part.name for name in layers for part in self.base.parts(name)}
        return frozenset(parts) | frozenset(self.fingerprinted())


def open_all(found: Findings, listed: Mapping[str, str]) -> Opened:
    """Everything in the directory that opens, and a problem for everything that does not or disagrees with the rest.

    listed   the files that belong to a result; empty where nothing says it
    """
    directory = found.directory
    report = found.attempt(read_report, directory)
    is_adapter = is_adapter_directory(directory) and not any((directory / name).exists() for name in MODEL_FILES)
    base = None if is_adapter else _base(found)
    adapters = (_HERE,) if is_adapter else tuple(_adapters(directory, listed, report))
    weights = _weights(found, base, adapters, listed)
    opened = Opened(base, weights, report, adapters)
    sources = {name: _adapter(found, name, is_ours=bool(listed) or not is_adapter) for name in adapters}
    if base is not None and report is not None:
        _check_layers(found, base, report[1])
        _check_adapter_of_report(found, base, report, sources, listed)
    _check_recipe(found, report)
    _check_merge_report(found, base)
    return opened


def is_behind_link(directory: Path, name: str) -> bool:
    """Whether a folder on the way from `directory` to the file `name` is a link, which may lead anywhere."""
    return any(os.path.islink(directory / parent) for parent in Path(name).parents if parent != Path(_HERE))


def recorded_fingerprints(found: Findings, opened: Opened) -> Iterator[tuple[str, str]]:
    """(file, base_fingerprint) of everything that names the quantized base it belongs to."""
    if opened.report is not None:
        yield REPORT_NAME, str(opened.report[0]["base_fingerprint"])
    for adapter in opened.adapters:
        name = _inside(adapter, PROVENANCE_NAME)
        if not (found.directory / name).is_file():
            continue
        values = found.attempt(read_json_object, found.directory / name)
        if values is not None and not isinstance(values.get("base_fingerprint"), str):
            found.problem("is not a provenance file of this tool", name)
        elif values is not None:
            yield name, values["base_fingerprint"]


def _base(found: Findings) -> BaseModel | None:
    is_whole = True
    for error in faults(found.directory):
        is_whole = False
        found.error(error)
    return found.attempt(BaseModel.open, found.directory) if is_whole else None


def _adapters(
    directory: Path, listed: Mapping[str, str], report: tuple[dict[str, Any], list[LayerResult]] | None
) -> list[str]:
    """Folders of adapters that belong to the result; without a list of files, the folders that methods write to."""
    if listed:
        names = [name.removesuffix(f"/{CONFIG_NAME}") for name in listed if name.endswith(f"/{CONFIG_NAME}")]
    else:
        names = sorted(adapter_folders(None if report is None else str(report[0]["adapter_dir"])))
    return [
        name
        for name in names
        if not is_behind_link(directory, f"{name}/{CONFIG_NAME}") and is_adapter_directory(directory / name)
    ]


def _weights(
    found: Findings, base: BaseModel | None, adapters: tuple[str, ...], listed: Mapping[str, str]
) -> dict[str, WeightsFile]:
    """Weight files of the model, of the list and of the adapters, whatever else is wrong."""
    directory, opened = found.directory, {}
    known = {name for name in listed if name.endswith(".safetensors")} | {
        _inside(name, WEIGHTS_NAME) for name in adapters if (directory / name / WEIGHTS_NAME).exists()
    }
    if base is not None:
        known |= {path.relative_to(directory).as_posix() for path in base.checkpoint.files}
    for name in sorted(known):
        if not is_behind_link(directory, name) and (reader := found.attempt(open_weights_file, directory / name)):
            opened[name] = reader
    if base is None:  # a problem of a file that is part of the model is reported with the model
        for name in (path.name for path in sorted(directory.glob("*.safetensors")) if path.name not in known):
            with suppress(LoftqError):
                opened[name] = open_weights_file(directory / name)
    return opened


def _adapter(found: Findings, name: str, *, is_ours: bool) -> AdapterSource | None:
    """The adapter in the folder `name`. An adapter of somebody else may be of a kind that merging does not know."""
    try:
        return open_adapter(found.directory / name)
    except MismatchError as error:
        if is_ours:
            found.error(error)
        else:
            found.noted(error, CONFIG_NAME)
    except LoftqError as error:
        found.error(error)
    return None


def _check_layers(found: Findings, base: BaseModel, layers: list[LayerResult]) -> None:
    for layer in layers:
        if layer.name not in base.tensors:
            found.problem("is a layer in it, and not in the weight files", REPORT_NAME, layer.name)
        elif base.matrix_shape(layer.name) != layer.shape:
            shapes = f"{layer.shape} in it and {base.matrix_shape(layer.name)} in the weight files"
            found.problem(f"is {shapes}", REPORT_NAME, layer.name)
        elif layer.name in base.quantized and base.quantized[layer.name].spec != layer.spec:
            found.problem("is stored in another format than it says", REPORT_NAME, layer.name)
    for name in sorted(base.quantized.keys() - {layer.name for layer in layers}):
        found.problem("is quantized in the weight files, and no layer in it", REPORT_NAME, name)


def _check_adapter_of_report(
    found: Findings,
    base: BaseModel,
    report: tuple[dict[str, Any], list[LayerResult]],
    sources: Mapping[str, AdapterSource | None],
    listed: Mapping[str, str],
) -> None:
    name, layers = str(report[0]["adapter_dir"]), report[1]
    if name not in sources and f"{name}/{CONFIG_NAME}" not in listed:
        found.problem(f"names an adapter in {name}, and there is none", REPORT_NAME)
    source = sources.get(name)
    if source is None:
        return
    file = _inside(name, WEIGHTS_NAME)
    modules = {layer.module: layer for layer in layers if isinstance(layer.module, str)}
    for module in sorted(modules.keys() ^ source.lora.keys()):
        what = f"has no adapter for {module}" if module in modules else f"has an adapter for {module}, no layer of it"
        found.problem(f"{what}, says {REPORT_NAME}", file)
    for module in sorted(modules.keys() & source.lora.keys()):
        layer = modules[module]
        shape = base.matrix_shape(layer.name) if layer.name in base.tensors else ()
        if len(shape) == 2:
            _check_factors(found, file, source, layer, (shape[0], shape[1]))


def _check_factors(
    found: Findings, file: str, source: AdapterSource, layer: LayerResult, shape: tuple[int, int]
) -> None:
    lora = source.lora[layer.module]
    for error in source.fit(lora, shape, rank=layer.rank):
        found.problem(error.message, file, error.tensor)
    is_number = type(layer.scaling) in (int, float)
    if not is_number or not math.isclose(lora.scaling, layer.scaling, rel_tol=1e-6):
        folder = file.removesuffix(WEIGHTS_NAME)
        found.problem(f"gives {layer.module} another scaling than {REPORT_NAME}", f"{folder}{CONFIG_NAME}")


def _check_recipe(found: Findings, report: tuple[dict[str, Any], list[LayerResult]] | None) -> None:
    path = found.directory / RECIPE_NAME
    if not os.path.lexists(path):
        return
    try:
        if WatchedFile.open(path).nbytes > _MAX_RECIPE_NBYTES:
            raise InputError("is too large for a recipe", file=path)
        recipe = resolve_recipe(os.path.abspath(path), {})
    except LoftqError as error:
        found.error(error, RECIPE_NAME)
        return
    if report is not None and json.loads(json.dumps(recipe_json(recipe))) != report[0]["recipe"]:
        found.problem(f"is not the recipe in {REPORT_NAME}", RECIPE_NAME)


def _check_merge_report(found: Findings, base: BaseModel | None) -> None:
    if not (found.directory / MERGE_REPORT_NAME).is_file():
        return
    values = found.attempt(read_json_object, found.directory / MERGE_REPORT_NAME)
    if values is None or base is None:
        return
    layers = values.get("layers")
    if not isinstance(layers, list) or not all(isinstance(x, dict) and isinstance(x.get("name"), str) for x in layers):
        found.problem("is not a report of this tool", MERGE_REPORT_NAME)
        return
    for name in (layer["name"] for layer in layers if layer["name"] not in base.tensors):
        found.problem("is a layer in it, and not in the weight files", MERGE_REPORT_NAME, name)


def _inside(folder: str, name: str) -> str:
    return name if folder == _HERE else f"{folder}/{name}"
