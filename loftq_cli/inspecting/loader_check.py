"""Asks transformers about a directory: whether each packed weight, each adapter and the list of layers in 16 bits meet
the modules of the model that would be loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

from loftq_cli.activations.loader_question import LoaderAnswer, ask_loader, can_ask
from loftq_cli.adapter.config import CONFIG_NAME, WEIGHTS_NAME
from loftq_cli.adapter.sorting import targeted_modules
from loftq_cli.adapter.source import AdapterSource
from loftq_cli.errors import LoftqError, MismatchError
from loftq_cli.inspecting.findings import Findings
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import module_of
from loftq_cli.output.records import MERGE_REPORT_NAME, REPORT_NAME

_MODEL_CONFIG, _LOADED_KEY = "config.json", "quantization_config"
_MOST_NAMES = 3  # more names hide the sentence around the names


def check_loader(findings: Findings, base: BaseModel, adapters: Mapping[str, AdapterSource]) -> None:
    """Add a problem for each difference between the files and the model that transformers would load, and a note where
    transformers has no answer. Nothing is asked without transformers, about a container of other loaders, and about a
    checkpoint that no command of this tool wrote: the libraries take ten times the memory of the other checks.

    base       the opened model of the directory
    adapters   folder -> adapter of the model
    """
    if not _is_for_transformers(base) or not can_ask():
        return
    try:
        answer = ask_loader(base.folder, base.tensors)
    except LoftqError as error:
        findings.add_note(f"transformers was not asked about the names of layers: {error.message}", _MODEL_CONFIG)
        return
    if base.quantized:
        _check_packed(findings, base, answer)
    _check_dropped(findings, base, answer)
    for folder, adapter in adapters.items():
        _check_adapter(findings, folder, adapter, answer)


def _is_for_transformers(base: BaseModel) -> bool:
    """Whether the model is a result of this tool, with a class, and packed as transformers reads."""
    if base.quantized:
        is_result = base.layout.row.config_key == _LOADED_KEY
    else:
        is_result = any((base.folder / name).is_file() for name in (REPORT_NAME, MERGE_REPORT_NAME))
    return is_result and bool(base.family.architectures) and (base.folder / _MODEL_CONFIG).is_file()


def _check_packed(findings: Findings, base: BaseModel, answer: LoaderAnswer) -> None:
    """Each packed weight meets a module for packed weights of the same shape, and each such module a packed weight."""
    loader, replaced = f"transformers {answer.version}", set(answer.replaced)
    for name in base.quantized:
        file, place = base.parts(name)[0].file.name, answer.places.get(name)
        module = module_of(place or "")
        if name in answer.converted:
            findings.add_problem(f"{loader} splits or merges it while loading, and packed codes cannot be", file, name)
        elif place is None:
            findings.add_problem(f"{answer.class_name} of {loader} has no place for it", file, name)
        elif answer.replaced and module not in answer.replaced:
            findings.add_problem(f"is packed, and {loader} loads {module} as a dense layer", file, name)
        elif answer.matrices.get(module) != base.matrix_shape(name):
            shapes = f"{base.matrix_shape(name)}, and {module} of {answer.class_name} is {answer.matrices.get(module)}"
            findings.add_problem(f"is {shapes}", file, name)
        replaced.discard(module)
    places = {module_of(place): name for name, place in answer.places.items()}
    for module in sorted(replaced & places.keys()):  # a layer with nothing stored is among the missing tensors
        stored = f"and the directory stores {places[module]} in 16 bits"
        findings.add_problem(f"lets {loader} load {module} from packed weights, {stored}", _MODEL_CONFIG)


def _check_dropped(findings: Findings, base: BaseModel, answer: LoaderAnswer) -> None:
    """Notes: an original may have tensors that its class drops, and a class a head that the original lacks."""
    dropped = [
        n for n in base.tensors if n not in answer.places and n not in answer.ignored and n not in base.quantized
    ]
    for names, text in ((dropped, "has no place for"), (answer.missing, "begins with random numbers for")):
        if names:
            findings.add_note(
                f"{answer.class_name} of transformers {answer.version} {text} {_listed(names)}", _MODEL_CONFIG
            )


def _check_adapter(findings: Findings, folder: str, adapter: AdapterSource, answer: LoaderAnswer) -> None:
    """Each adapter meets a linear of the model, and PEFT adds no adapter beside."""
    inside = "" if folder == "." else f"{folder}/"
    adapted = {module for module, lora in adapter.lora.items() if not lora.is_embedding}
    for module in sorted(adapted - answer.matrices.keys()):
        text = f"{answer.class_name} of transformers {answer.version} has no linear {module}: PEFT drops its adapter"
        findings.add_problem(text, f"{inside}{WEIGHTS_NAME}", adapter.lora[module].lora_A)
    for module in sorted(adapted & answer.matrices.keys()):
        for error in _unfit(adapter, module, answer.matrices[module]):
            findings.add_problem(f"{error.message}, in {answer.class_name}", f"{inside}{WEIGHTS_NAME}", error.tensor)
    targeted = findings.attempt(targeted_modules, adapter.config, sorted(answer.matrices), adapter.path / CONFIG_NAME)
    fresh = sorted((targeted or set()) - adapted - {module_of(name) for name in adapter.whole})
    if fresh:
        text = f"its target_modules give PEFT fresh adapters for {_listed(fresh)}"
        findings.add_problem(text, f"{inside}{CONFIG_NAME}")


def _unfit(adapter: AdapterSource, module: str, shape: tuple[int, int]) -> list[MismatchError]:
    try:
        return list(adapter.fit(adapter.lora[module], shape))
    except LoftqError:
        return []  # a problem of the adapter itself, which has a finding already


def _listed(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
