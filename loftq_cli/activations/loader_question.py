"""What transformers would make of the tensors of a directory: the class of config.json on the meta device, its own
renamings, and its own choice of layers for packed weights. No number is read.

The question runs in a child process with a time limit, because config.json may be a stranger's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.activations.child_process import Subject, run_in_child
from loftq_cli.activations.transformers_models import (
    check_installed,
    load_config,
    model_class,
    report_failures,
    silence,
)
from loftq_cli.checkpoint.record_schema import read_record
from loftq_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import nn

_SECONDS = 300.0  # the largest models of transformers take a minute on the meta device
_LOADER = Subject(
    "transformers' model of config.json",
    "cannot be built",
    "take config.json from the model's source",
    "take config.json from the model's source",
)


@dataclass(frozen=True, slots=True)
class LoaderAnswer:
    """The model that transformers would load.

    version     of transformers
    class_name  name of the class
    matrices    name of each module with a matrix that takes an adapter -> (out, in)
    replaced    names of the modules that transformers replaces by modules for packed weights; empty where transformers
                decodes packed weights while loading, or lacks the library of the container
    places      name of a stored tensor -> name in the loaded model; absent for a tensor without a place
    converted   names of stored tensors that transformers splits, merges or changes in form
    ignored     names of stored tensors that the class drops on purpose
    missing     names of tensors of the loaded model without a stored tensor; unknown where tensors are converted
    """

    version: str
    class_name: str
    matrices: Mapping[str, tuple[int, int]]
    replaced: tuple[str, ...]
    places: Mapping[str, str]
    converted: tuple[str, ...]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]


def can_ask() -> bool:
    """Whether transformers 5 and accelerate are installed.

    >>> can_ask()
    True
    """
    try:
        check_installed()
    except UsageError:
        return False
    return True


def ask_loader(directory: Path, names: Iterable[str]) -> LoaderAnswer:
    """Ask transformers about the model in `directory`.

    names   names of the tensors in the files; a packed weight has the name of its dense form

    Raises InputError when transformers lacks the class, cannot build the model, or does not know the packed weights.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> answer = ask_loader(resolve_model("builtin:tiny-llama"), ["model.layers.0.mlp.up_proj.weight"])
    >>> answer.class_name, answer.matrices["model.layers.0.mlp.up_proj"], answer.replaced
    ('LlamaForCausalLM', (512, 192), ())
    """
    config = (directory / "config.json").read_bytes()
    return _ask(directory, config, tuple(sorted(names)))


@lru_cache(maxsize=4)  # the config's text stands for the file: the child reads the file again
def _ask(directory: Path, config: bytes, names: tuple[str, ...]) -> LoaderAnswer:
    check_installed()  # imports the libraries here, once, and not in each child
    values = run_in_child(lambda: asdict(_answer(directory, names)), _SECONDS, directory, _LOADER)
    return read_record(LoaderAnswer, values)


def _answer(directory: Path, names: tuple[str, ...]) -> LoaderAnswer:
    import torch
    import transformers

    with silence():
        config = load_config(directory)
        kind = model_class(directory, config)
        with report_failures(directory / "config.json", "transformers cannot build the model"), torch.device("meta"):
            model = kind(config)
        matrices, kinds = dict(_matrices(model)), {name: type(module) for name, module in model.named_modules()}
        state = dict(model.state_dict())
        _prepare(directory, config, model)
        unpacked = {name: shape for name, shape in _matrices(model) if name not in kinds}
        state, matrices = _without_replaced(state, model, unpacked), {**matrices, **unpacked}
        places, converted = _places(model, names, state)
    modules = ((name, module) for name, module in model.named_modules() if name in matrices)
    replaced = [name for name, module in modules if _is_replaced(module, kinds.get(name))]
    kept = [name for name in state if not _is_ignored(model, "missing", name)]
    covered = {target for target in places.values() if target in state} | _tied(model)
    return LoaderAnswer(
        version=transformers.__version__,
        class_name=kind.__name__,
        matrices=matrices,
        replaced=tuple(replaced),
        places={name: target for name, target in places.items() if target in state or name in converted},
        converted=tuple(converted),
        ignored=tuple(name for name in names if _is_ignored(model, "unexpected", places[name])),
        missing=() if converted else tuple(name for name in kept if name not in covered),
    )


def _without_replaced(state: dict[str, Any], model: nn.Module, unpacked: Iterable[str]) -> dict[str, Any]:
    """`state`, the parts of the model in full precision, after the quantizer has replaced modules: a tensor of all
    experts may have become a linear, one of `unpacked`, for each expert.
    """
    after = model.state_dict()
    kept = {name: part for name, part in state.items() if name in after or name.endswith((".weight", ".bias"))}
    return {**kept, **{f"{name}.weight": None for name in unpacked}}


def _matrices(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name and (out, in) of each linear of `model`."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            yield name, (module.weight.shape[1], module.weight.shape[0])


def _places(model: Any, names: tuple[str, ...], state: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The name in the loaded model of each stored tensor, and the tensors that a converter takes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    places, converted = dict[str, str](), list[str]()
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        places[name] = name if target not in state and pattern is None and name in state else target
        if pattern is not None:
            converted.append(name)
    return places, converted


def _prepare(directory: Path, config: Any, model: Any) -> None:
    """Let the quantizer of transformers replace modules, as before loading packed weights."""
    if getattr(config, "quantization_config", None) is None:
        return
    from transformers.quantizers.auto import get_hf_quantizer

    with report_failures(directory / "config.json", "transformers cannot prepare its packed weights"):
        try:
            quantizer, _, _ = get_hf_quantizer(config, None, {"": "cpu"}, True, {})
        except ImportError:
            return
        if quantizer is None:
            raise InputError("names a quantization that transformers does not know", file=directory / "config.json")
        quantizer.preprocess_model(model=model, dtype=model.dtype, device_map={"": "cpu"}, checkpoint_files=[])


def _is_replaced(module: nn.Module, kind: type | None) -> bool:
    """Whether the quantizer changed a module of the class `kind`: by another class, or by a scheme beside."""
    return (kind is not None and type(module) is not kind) or hasattr(module, "quantization_scheme")


def _tied(model: Any) -> set[str]:
    return set(getattr(model, "all_tied_weights_keys", None) or ())


def _is_ignored(model: Any, kind: str, name: str) -> bool:
    patterns = getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)
