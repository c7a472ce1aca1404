"""A PEFT LoRA adapter as `merge` reads it: every tensor of its file has a place, or is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.checkpoint.source import WeightsFile, open_weights_file
from loftq_cli.errors import InputError, MismatchError
from loftq_cli.layouts.peft_adapter import CONFIG_NAME, PREFIX, pattern_value, scaling_of
from loftq_cli.tensors import WEIGHT_DTYPES

_LORA = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B)")
_FACTORS = {
    "lora_A.weight": "lora_A",
    "lora_embedding_A": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_B": "lora_B",
    "lora_B.bias": "lora_bias",
}

# Config values that mean arithmetic other than W + s·B·A on the base as it is stored.
_REFUSED = {
    "use_dora": "DoRA scales the merged weight by a magnitude",
    "use_qalora": "QA-LoRA adapters read pooled inputs",
    "target_parameters": "adapters of fused expert parameters are not merged",
    "layer_replication": "layers are replicated",
    "trainable_token_indices": "single token embeddings were trained",
    "alora_invocation_tokens": "activated LoRA depends on the prompt",
    "arrow_config": "Arrow routes between adapters",
}
_REBASING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that change the base's weights in memory


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """Tensor names of one adapted module, and the factor its product is scaled by."""

    module: str
    lora_A: str
    lora_B: str
    lora_bias: str | None
    scaling: float
    is_embedding: bool


@dataclass(frozen=True)
class AdapterSource:
    """`lora` by module name in the loaded model; `whole` maps a base tensor's loaded name to the tensor replacing it."""

    path: Path
    config: Mapping[str, Any]
    weights: WeightsFile
    lora: dict[str, LoraTensors] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)


def open_adapter(path: Path) -> AdapterSource:
    """Open the adapter directory `path` and sort its tensors. Reads no numbers.

    Raises InputError for something that is no LoRA adapter, MismatchError for one that merging cannot represent or
    whose tensors do not fit its config.
    """
    if not (path / CONFIG_NAME).is_file():
        raise InputError(f"holds no {CONFIG_NAME}", file=path, hint="name a PEFT adapter directory")
    config = read_json_object(path / CONFIG_NAME)
    _check_config(config, path / CONFIG_NAME)
    weights = open_weights_file(_weights_path(path))
    source = AdapterSource(path, config, weights)
    factors: dict[str, dict[str, str]] = {}
    for name, ref in weights.tensors.items():
        if ref.dtype not in WEIGHT_DTYPES:
            raise MismatchError(f"is {ref.dtype}, not floating point", file=weights.path, tensor=name)
        key = name.removeprefix(PREFIX)
        if match := _LORA.fullmatch(key):
            factors.setdefault(match[1], {})[match[2]] = name
        elif "lora_" in key:
            raise MismatchError("is of a kind that merging does not know", file=weights.path, tensor=name)
        else:
            source.whole[re.sub(r"\.modules_to_save(\.default)?|\.base_layer", "", key)] = name
    for module, parts in factors.items():
        source.lora[module] = _lora_tensors(module, parts, source)
    if not source.lora and not source.whole:
        raise MismatchError("holds no tensor", file=weights.path)
    return source


def _weights_path(path: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (path / name).exists():
            return path / name
    raise InputError("holds no adapter_model.safetensors", file=path)


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise MismatchError(f"peft_type {kind!r} is not merged", file=file, hint="merge it with PEFT")
    for name, why in _REFUSED.items():
        if config.get(name):
            raise MismatchError(f"{name}: {why}", file=file, hint="merge it with PEFT")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_REBASING):
        raise MismatchError(
            f"init_lora_weights {init!r} changed the base's weights before training",
            file=file,
            hint="save the adapter with PEFT's path_initial_model_for_weight_conversion first",
        )
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(type(v) in (int, float) and v > 0 for v in pattern.values()):
            raise InputError(f"{name} is not a table of positive numbers", file=file)
    if type(config.get("r", 8)) is not int or config.get("r", 8) < 1:
        raise InputError(f"r is {config.get('r')!r}, not a positive whole number", file=file)
    alpha = config.get("lora_alpha", 8)
    if type(alpha) not in (int, float) or alpha <= 0:
        raise InputError(f"lora_alpha is {alpha!r}, not a positive number", file=file)


def _lora_tensors(module: str, parts: Mapping[str, str], source: AdapterSource) -> LoraTensors:
    names = {_FACTORS[part]: name for part, name in parts.items()}
    any_name = next(iter(names.values()))
    for factor in ("lora_A", "lora_B"):
        if factor not in names:
            raise MismatchError(f"has no {factor} beside it", file=source.weights.path, tensor=any_name)
    is_embedding = "lora_embedding_A" in parts
    tensors = source.weights.tensors
    shape_A, shape_B = tensors[names["lora_A"]].shape, tensors[names["lora_B"]].shape
    if len(shape_A) != 2 or len(shape_B) != 2 or shape_A[0] != shape_B[1]:
        raise MismatchError(
            f"is {shape_B} and lora_A is {shape_A}: their ranks differ",
            file=source.weights.path,
            tensor=names["lora_B"],
        )
    rank = pattern_value(source.config.get("rank_pattern") or {}, module, source.config.get("r", 8))
    if shape_A[0] != rank:
        raise MismatchError(
            f"has rank {shape_A[0]}, and {CONFIG_NAME} says {rank}", file=source.weights.path, tensor=names["lora_A"]
        )
    scaling = scaling_of(source.config, module, rank)
    return LoraTensors(module, names["lora_A"], names["lora_B"], names.get("lora_bias"), scaling, is_embedding)
