"""A PEFT LoRA adapter as `merge` reads it: every tensor of its file has a place, or is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.adapter.config import CONFIG_NAME, PREFIX, WEIGHTS_NAME, pooling_of, scaling_of, values_of
from loftq_cli.adapter.targets import TargetModules
from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.checkpoint.source import WeightsFile, open_weights_file
from loftq_cli.errors import InputError, MismatchError
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import module_of
from loftq_cli.tensors.headers import WEIGHT_DTYPES
from loftq_cli.tensors.specs import Pooling

_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_BIAS = "lora_B.bias"
_LORA = re.compile(rf"(.+)\.({'|'.join(map(re.escape, (*_LINEAR, *_EMBEDDING, _BIAS)))})")

# What PEFT puts around a module of the base: LoRA's wrapper, and the trained copy beside the original.
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
_TRAINED_COPY = ".modules_to_save."
_ORIGINAL = ".original_module"

# Config values that mean arithmetic other than W + s·B·A on the base as it is stored (peft 0.21).
_REFUSED = {
    "use_dora": "DoRA scales the merged weight by a magnitude",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "KaSA truncates the base's weights and scales between the factors",
    "monteclora_config": "MonteCLoRA draws its weights",
    "target_parameters": "adapters of fused expert parameters are not merged",
    "layer_replication": "layers are replicated",
    "trainable_token_indices": "single token embeddings were trained",
    "alora_invocation_tokens": "activated LoRA depends on the prompt",
    "arrow_config": "Arrow routes between adapters",
}
_MERGED_SWITCHES = {"use_rslora", "use_qalora"}
_REBASING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that change the base's weights in memory


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """Tensor names of one adapted module, its alpha and the factor its product is scaled by, and how its input is
    pooled.
    """

    module: str
    lora_A: str
    lora_B: str
    lora_bias: str | None
    alpha: float
    scaling: float
    is_embedding: bool
    pooling: Pooling | None = None


@dataclass(frozen=True)
class AdapterSource:
    """One adapter; no tensor of its file is in none of the three tables.

    lora     by module name in the loaded model
    whole    a base tensor's loaded name -> the tensor that takes its place
    unused   tensors that PEFT writes and does not read, and why
    """

    path: Path
    config: Mapping[str, Any]
    weights: WeightsFile
    lora: dict[str, LoraTensors] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)

    def names_in(self, base: BaseModel) -> dict[str, str]:
        """What the adapter calls each tensor of `base`.

        An adapter that was trained through another class of the same model (the "LlamaModel" in a "LlamaForCausalLM")
        has one leading part more or less in all its names.
        """
        names = base.loaded_names()
        known, wanted = {module_of(loaded) for loaded in names.values()}, set(self.lora)
        if not wanted or wanted & known:
            return names
        for prefix in {f"{module.partition('.')[0]}." for module in wanted}:
            if all(module.removeprefix(prefix) in known for module in wanted):
                return {name: prefix + loaded for name, loaded in names.items()}
        for prefix in sorted({f"{module.partition('.')[0]}." for module in known}):
            if all(prefix + module in known for module in wanted):
                return {name: loaded.removeprefix(prefix) for name, loaded in names.items()}
        return names

    def untrained_in(self, base: BaseModel) -> list[str]:
        """Weights of `base` whose modules the config names as adapted, and of which the adapter holds nothing.

        Raises InputError for a config that names modules in a way that PEFT does not.
        """
        if not isinstance(self.config.get("target_modules"), list):
            return []  # only a list was written by somebody who meant each of its entries
        called = {
            name: module_of(loaded)
            for name, loaded in self.names_in(base).items()
            if name.endswith(".weight") and len(base.tensors[name].shape) == 2
        }
        named = _targeted(self.config, sorted(set(called.values())), self.path / CONFIG_NAME)
        untrained = named - self.lora.keys() - {module_of(loaded) for loaded in self.whole}
        return [name for name, module in called.items() if module in untrained]

    def is_same(self, name: str, other: str) -> bool:
        """Whether two tensors have the same bytes."""
        return self.weights.sha256(name) == self.weights.sha256(other)


def open_adapter(path: Path) -> AdapterSource:
    """Open the adapter directory `path` and sort its tensors. Reads no numbers.

    Raises InputError for something that is no LoRA adapter, MismatchError for one that merging cannot represent or
    whose tensors do not fit its config.
    """
    if not (path / CONFIG_NAME).is_file():
        what = f"holds no {CONFIG_NAME}" if path.is_dir() else "is no directory"
        raise InputError(what, file=path, hint="name a PEFT adapter directory")
    config = read_json_object(path / CONFIG_NAME)
    _check_config(config, path / CONFIG_NAME)
    source = AdapterSource(path, config, open_weights_file(_weights_path(path)))
    if not source.weights.tensors:
        raise MismatchError("holds no tensor", file=source.weights.path)
    _sort_tensors(source)
    return source


def _weights_path(path: Path) -> Path:
    for name in (WEIGHTS_NAME, "adapter_model.bin"):
        if (path / name).exists():
            return path / name
    raise InputError(f"holds no {WEIGHTS_NAME}", file=path)


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise MismatchError(f"peft_type {kind!r} is not merged", file=file, hint="merge it with PEFT")
    for name, value in config.items():
        unknown = "is not known to merging" if name.startswith("use_") and name not in _MERGED_SWITCHES else None
        why = _REFUSED.get(name, unknown)
        if value and why:
            raise MismatchError(f"{name}: {why}", file=file, hint="merge it with PEFT")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_REBASING):
        raise MismatchError(
            f"init_lora_weights {init!r} changed the base's weights before training",
            file=file,
            hint="save it with PEFT's path_initial_model_for_weight_conversion, or merge it with PEFT",
        )
    try:
        # Without modules: what is no number at all is said before any tensor is looked at.
        values_of(config, "r", ()), values_of(config, "lora_alpha", ())
        TargetModules.of(config), pooling_of(config)
    except ValueError as error:
        raise InputError(str(error), file=file) from None
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise InputError("modules_to_save is not a list of names", file=file)


def _sort_tensors(source: AdapterSource) -> None:
    """Fill the tables of `source`. Raises MismatchError for a tensor that has no place, or whose place is taken."""
    factors: dict[str, dict[str, str]] = {}
    originals: list[str] = []
    file = source.weights.path
    for name, ref in source.weights.tensors.items():
        key = name.removeprefix(PREFIX)
        if ref.dtype not in WEIGHT_DTYPES:
            raise MismatchError(f"is {ref.dtype}, not floating point", file=file, tensor=name)
        if match := _LORA.fullmatch(key):
            other = factors.setdefault(match[1], {}).setdefault(match[2], name)
            if other != name:
                raise MismatchError(f"has the same place as {other}", file=file, tensor=name)
        elif re.search(r"(?:^|\.)lora_", key):
            raise MismatchError("is of a kind that merging does not know", file=file, tensor=name)
        elif f"{_ORIGINAL}." in key:
            originals.append(name)
        else:
            _place_whole(source, name, key)
    _check_targeted(source, factors)
    ranks, alphas = (_values_of(source, key, list(factors)) for key in ("r", "lora_alpha"))
    for module, parts in factors.items():
        source.lora[module] = _lora_tensors(module, parts, source, int(ranks[module]), alphas[module])
    for name in originals:  # with bias="all" PEFT saves these too
        if name.removeprefix(PREFIX).replace(_ORIGINAL, "") not in source.whole:
            raise MismatchError("is left over: no trained copy is beside it", file=file, tensor=name)
        source.unused[name] = "the untrained original beside its trained copy"


def _place_whole(source: AdapterSource, name: str, key: str) -> None:
    target = _WRAPPERS.sub("", key)
    other = source.whole.setdefault(target, name)
    if other == name:
        return
    # With bias="all" PEFT saves the bias of a trained copy under both names, and reads the plain one.
    written_twice = [n for n in (name, other) if _TRAINED_COPY in n]
    if len(written_twice) != 1:
        raise MismatchError(f"has the same place as {other}", file=source.weights.path, tensor=name)
    source.whole[target] = other if written_twice == [name] else name
    source.unused[written_twice[0]] = f"PEFT reads {source.whole[target]} instead"


def _values_of(source: AdapterSource, key: str, modules: Sequence[str]) -> dict[str, int | float]:
    try:
        return values_of(source.config, key, modules)
    except ValueError as error:
        raise InputError(str(error), file=source.path / CONFIG_NAME) from None


def _targeted(config: Mapping[str, Any], modules: Sequence[str], file: Path) -> set[str]:
    try:
        return TargetModules.of(config).named(modules)
    except ValueError as error:
        raise InputError(str(error), file=file) from None


def _check_targeted(source: AdapterSource, factors: Mapping[str, Mapping[str, str]]) -> None:
    """Raises MismatchError for a tensor that PEFT would drop: its module is none of those that the config names."""
    named = _targeted(source.config, list(factors), source.path / CONFIG_NAME)
    for module, parts in factors.items():
        if module not in named:
            what = f"its module is none of those that {CONFIG_NAME} adapts (target_modules), and PEFT would drop it"
            raise MismatchError(what, file=source.weights.path, tensor=next(iter(parts.values())))


def _lora_tensors(module: str, parts: Mapping[str, str], source: AdapterSource, rank: int, alpha: float) -> LoraTensors:
    file, any_name = source.weights.path, next(iter(parts.values()))
    is_embedding = any(part in parts for part in _EMBEDDING)
    part_A, part_B = _EMBEDDING if is_embedding else _LINEAR
    for part in (part_A, part_B):
        if part not in parts:
            raise MismatchError(f"has no {part.removesuffix('.weight')} beside it", file=file, tensor=any_name)
    if is_embedding and len(parts) > len(_EMBEDDING):
        extra = next(name for part, name in parts.items() if part not in _EMBEDDING)
        raise MismatchError("belongs to a linear layer, and its module is an embedding", file=file, tensor=extra)
    tensors, name_A, name_B = source.weights.tensors, parts[part_A], parts[part_B]
    shape_A, shape_B = tensors[name_A].shape, tensors[name_B].shape
    for name, shape in ((name_A, shape_A), (name_B, shape_B)):
        if len(shape) != 2:
            raise MismatchError(f"is {shape}, not a matrix", file=file, tensor=name)
    if shape_A[0] != shape_B[1]:
        raise MismatchError(f"is {shape_B} and lora_A is {shape_A}: their ranks differ", file=file, tensor=name_B)
    if shape_A[0] != rank:
        raise MismatchError(f"has rank {shape_A[0]}, and {CONFIG_NAME} says {rank}", file=file, tensor=name_A)
    bias = parts.get(_BIAS)
    if bias is not None and tensors[bias].shape != shape_B[:1]:
        raise MismatchError(f"is {tensors[bias].shape} and lora_B is {shape_B}", file=file, tensor=bias)
    pooling = None if is_embedding else pooling_of(source.config)
    scaling = scaling_of(source.config, alpha, rank)
    return LoraTensors(module, name_A, name_B, bias, alpha, scaling, is_embedding, pooling)
