"""A PEFT LoRA adapter directory: tensor names, adapter_config.json, and the same read back.

Lists exactly the modules that have tensors: PEFT gives any other module it is told of a fresh random adapter.
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
    """One adapted linear: its name in the loaded model, the shape [out, in] of its weight, and its adapter."""

    module: str
    shape: tuple[int, int]
    lora: LoraSpec


def tensor_names(module: str) -> tuple[str, str]:
    """Names of lora_A [rank, in / group_size] and lora_B [out, rank]."""
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
    """adapter_config.json for `modules`; the most common rank and alpha are the default, the others are patterns.

    `init_lora_weights` is true, never "loftq": with that, PEFT would initialize again and ask for a loftq_config.
    A pooled adapter says use_qalora only with PEFT's own pooling: with another one, PEFT must fail, not scale wrongly.
    """
    pooling = modules[0].lora.pooling
    (rank, alpha), _ = Counter((m.lora.rank, m.lora.alpha) for m in modules).most_common(1)[0]
    others = [m for m in modules if (m.lora.rank, m.lora.alpha) != (rank, alpha)]
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _number(alpha),
        "use_rslora": modules[0].lora.rslora,
        "target_modules": [m.module for m in modules],
        "rank_pattern": {m.module: m.lora.rank for m in others},
        "alpha_pattern": {m.module: _number(m.lora.alpha) for m in others},
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
    """How the adapter of a config pools its inputs. Raises ValueError for a pooling that does not exist."""
    convention = config.get("qalora_pooling") or ("peft" if config.get("use_qalora") else None)
    if convention is None:
        return None
    group_size = config.get("qalora_group_size", 16)  # PEFT's default
    if type(group_size) is not int:
        raise ValueError("qalora_group_size is a whole number")
    return Pooling(convention, group_size)


def values_of(config: Mapping[str, Any], key: str, modules: Sequence[str]) -> dict[str, int | float]:
    """What PEFT takes for each of `modules`: `key` is "r" or "lora_alpha", and the first key of its pattern that
    matches, as a regular expression, the end of a module's name at a dot wins over it.

    Raises ValueError naming the key of anything that is no positive number, or no usable expression.
    """
    kinds = (int,) if key == "r" else (int, float)
    default, pattern_key = config.get(key, 8), "rank_pattern" if key == "r" else "alpha_pattern"
    if type(default) not in kinds or default <= 0:
        what = "positive whole number" if key == "r" else "positive number"
        raise ValueError(f"{key} is {printable(repr(default), 80)}, not a {what}")
    pattern = config.get(pattern_key) or {}
    if not isinstance(pattern, dict) or not all(type(value) in kinds and value > 0 for value in pattern.values()):
        raise ValueError(f"{pattern_key} is not a table of positive numbers")
    if not pattern:
        return dict.fromkeys(modules, default)
    try:
        found = first_matches({end: rf"(.*\.)?({end})$" for end in pattern}, modules)
    except ValueError as error:
        raise ValueError(f"{pattern_key} has {error}") from None
    return {module: pattern[found[module]] if module in found else default for module in modules}


def scaling_of(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    """The scaling that PEFT applies to an adapter of `alpha` and `rank`."""
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def task_type_of(architectures: Sequence[str], *, is_encoder_decoder: bool) -> str | None:
    """PEFT's task type for a transformers class; None where PEFT would ask for a head that we do not have."""
    name = architectures[0] if architectures else ""
    # PEFT's class for it passes `input_ids` on, which models that listen do not take.
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
