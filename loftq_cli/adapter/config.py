"""Tensor names and adapter_config.json of a PEFT LoRA adapter, written and read.

A config lists exactly the modules that have tensors: PEFT gives a listed module without tensors a fresh random adapter.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.patterns import first_matches
from loftq_cli.errors import printable
from loftq_cli.tensors.headers import OutTensor
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.specs import LoraSpec, Pooling

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One adapted linear: name in the loaded model, shape [out, in] of the weight, and form of the adapter."""

    module: str
    shape: tuple[int, int]
    lora: LoraSpec


def tensor_names(module: str) -> tuple[str, str]:
    """Names of lora_A [rank, in / group_size] and lora_B [out, rank] in an adapter file.

    >>> tensor_names("model.layers.0.mlp.up_proj")[0]
    'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def planned(adapted: AdaptedModule) -> tuple[OutTensor, OutTensor]:
    """The two tensors of one module."""
    name_A, name_B = tensor_names(adapted.module)
    out_features, in_features = adapted.shape
    rank, dtype, group_size = adapted.lora.rank, adapted.lora.dtype, adapted.lora.group_size
    return OutTensor(name_A, dtype, (rank, in_features // group_size)), OutTensor(name_B, dtype, (out_features, rank))


def pack(module: str, lora: LoraPair) -> dict[str, torch.Tensor]:
    """The tensors of `planned`, filled."""
    name_A, name_B = tensor_names(module)
    return {name_A: lora.lora_A, name_B: lora.lora_B}


def adapter_config(
    modules: Sequence[AdaptedModule], *, base_model: str, task_type: str | None, fan_in_fan_out: bool
) -> dict[str, Any]:
    """The values of adapter_config.json for `modules`, which share one pooling and one kind of scaling.

    The most common rank and alpha are the default; patterns list the modules with another rank or alpha.
    `init_lora_weights` is true, never "loftq": PEFT would initialize again and ask for a loftq_config.
    A pooled adapter says use_qalora only with PEFT's own pooling: PEFT has to fail on any other pooling, and not to
    scale wrongly.
    """
    pooling = modules[0].lora.pooling
    (rank, alpha), _ = Counter((m.lora.rank, m.lora.alpha) for m in modules).most_common(1)[0]
    uncommon = [m for m in modules if (m.lora.rank, m.lora.alpha) != (rank, alpha)]
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _number(alpha),
        "use_rslora": modules[0].lora.rslora,
        "target_modules": [m.module for m in modules],
        "rank_pattern": {m.module: m.lora.rank for m in uncommon},
        "alpha_pattern": {m.module: _number(m.lora.alpha) for m in uncommon},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "loftq_config": {},
        **({} if pooling is None else _pooling_json(pooling)),
    }


def _pooling_json(pooling: Pooling) -> dict[str, Any]:
    if pooling.convention == "peft":
        return {"use_qalora": True, "qalora_group_size": pooling.group_size}
    return {"qalora_pooling": pooling.convention, "qalora_group_size": pooling.group_size}


def pooling_of(config: Mapping[str, Any]) -> Pooling | None:
    """How lora_A pools inputs, as a config says; None without pooling.

    Raises ValueError for a pooling that does not exist.

    >>> pooling_of({"use_qalora": True, "qalora_group_size": 32})
    Pooling(convention='peft', group_size=32)
    """
    convention = config.get("qalora_pooling") or ("peft" if config.get("use_qalora") else None)
    if convention is None:
        return None
    group_size = config.get("qalora_group_size", 16)  # PEFT's default
    if type(group_size) is not int:
        raise ValueError("qalora_group_size is a whole number")
    return Pooling(convention, group_size)


def values_of(config: Mapping[str, Any], key: str, modules: Sequence[str]) -> dict[str, int | float]:
    """The rank ("r") or alpha ("lora_alpha") that PEFT takes for each of `modules`; `key` says which.

    rank_pattern and alpha_pattern win over the default: the first pattern, a regular expression, that matches the end
    of a module's name, after a dot or from the beginning.
    Raises ValueError naming the key of a value that is no positive number, or of a pattern that is no expression.

    >>> values_of({"r": 8, "rank_pattern": {"q_proj": 4}}, "r", ["layers.0.q_proj", "layers.0.k_proj"])
    {'layers.0.q_proj': 4, 'layers.0.k_proj': 8}
    """
    kinds = (int,) if key == "r" else (int, float)
    default, pattern_key = config.get(key, 8), "rank_pattern" if key == "r" else "alpha_pattern"
    if type(default) not in kinds or default <= 0:
        kind = "positive whole number" if key == "r" else "positive number"
        raise ValueError(f"{key} is {printable(repr(default), 80)}, not a {kind}")
    pattern = config.get(pattern_key) or {}
    if not isinstance(pattern, dict) or not all(type(value) in kinds and value > 0 for value in pattern.values()):
        raise ValueError(f"{pattern_key} is not a table of positive numbers")
    if not pattern:
        return dict.fromkeys(modules, default)
    try:
        matches = first_matches({end: rf"(.*\.)?({end})$" for end in pattern}, modules)
    except ValueError as error:
        raise ValueError(f"{pattern_key} has {error}") from None
    return {module: pattern[matches[module]] if module in matches else default for module in modules}


def scaling_of(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    """The scaling of B·A: alpha / rank, or alpha / sqrt(rank) where the config says use_rslora.

    >>> scaling_of({"use_rslora": True}, alpha=8, rank=16)
    2.0
    """
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def task_type_of(architectures: Sequence[str], *, is_encoder_decoder: bool) -> str | None:
    """PEFT's task type for a transformers class; None where PEFT would ask for a head that the model does not have."""
    name = architectures[0] if architectures else ""
    # PEFT's class for this task passes `input_ids` on, and speech models take no `input_ids`.
    if is_encoder_decoder and re.search(r"(?<!Whisper)(?<!Speech)For(ConditionalGeneration|Seq2SeqLM)$", name):
        return "SEQ_2_SEQ_LM"
    if re.search(r"(ForCausalLM|LMHeadModel)$", name):
        return "CAUSAL_LM"
    return None


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def is_adapter_directory(path: Path) -> bool:
    """Whether `path` holds a PEFT adapter."""
    return (path / CONFIG_NAME).is_file()
