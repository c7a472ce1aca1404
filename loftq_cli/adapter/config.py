"""Tensor names and adapter_config.json of a PEFT LoRA adapter, written and read.

A config lists exactly the modules with tensors: PEFT gives a listed module without tensors a fresh random adapter.
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
    """One adapted linear, or the adapted parameter of the experts of a layer.

    module         name in the loaded model
    shape          [out, in] of the weight; of an expert's matrix
    lora           rank, alpha, dtype and pooling of the adapter
    is_parameter   whether `module` names a parameter, which PEFT lists under target_parameters
    """

    module: str
    shape: tuple[int, int]
    lora: LoraSpec
    is_parameter: bool = False


def tensor_names(module: str) -> tuple[str, str]:
    """Names of lora_A [rank, in / group_size] and lora_B [out, rank] in an adapter file.

    >>> tensor_names("model.layers.0.mlp.up_proj")[0]
    'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def planned(adapted: AdaptedModule) -> tuple[OutTensor, OutTensor]:
    """Plan the two tensors of a module: lora_A [rank, in / group_size] and lora_B [out, rank], in the adapter's dtype.

    >>> lora_A, lora_B = planned(AdaptedModule("h.0.fc", (64, 32), LoraSpec(rank=8, alpha=8)))
    >>> lora_A.shape, lora_B.shape
    ((8, 32), (64, 8))
    """
    name_A, name_B = tensor_names(adapted.module)
    out_features, in_features = adapted.shape
    rank, dtype, group_size = adapted.lora.rank, adapted.lora.dtype, adapted.lora.group_size
    return OutTensor(name_A, dtype, (rank, in_features // group_size)), OutTensor(name_B, dtype, (out_features, rank))


def pack(module: str, lora: LoraPair) -> dict[str, torch.Tensor]:
    """Name the factors of a module for an adapter file: the tensors of `planned` with numbers.

    module   name in the loaded model
    lora     lora_A [rank, in / group_size] and lora_B [out, rank]
    """
    name_A, name_B = tensor_names(module)
    return {name_A: lora.lora_A, name_B: lora.lora_B}


def adapter_config(
    modules: Sequence[AdaptedModule],
    *,
    base_model: str,
    task_type: str | None,
    fan_in_fan_out: bool,
    modules_to_save: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Build the content of adapter_config.json, as JSON values.

    modules          the adapted modules and parameters, at least one, with a common pooling and kind of scaling
    base_model       name or path of the base
    task_type        PEFT's task type, or None, from `task_type_of`
    fan_in_fan_out   whether the model's linears store weights [in, out]
    modules_to_save  modules that train in full, a new head; None for no such module

    The most common rank and alpha are the default; patterns list modules of uncommon rank or alpha. `init_lora_weights`
    is true, never "loftq": PEFT would initialize again and ask for a loftq_config. A pooled adapter says use_qalora
    only with PEFT's own pooling: PEFT must fail on a foreign pooling, and not scale wrongly.

    >>> module = AdaptedModule("h.0.fc", (64, 32), LoraSpec(rank=8, alpha=16))
    >>> adapter_config([module], base_model="base", task_type=None, fan_in_fan_out=False)["lora_alpha"]
    16
    """
    pooling = modules[0].lora.pooling
    (rank, alpha), _ = Counter((m.lora.rank, m.lora.alpha) for m in modules).most_common(1)[0]
    uncommon = [m for m in modules if (m.lora.rank, m.lora.alpha) != (rank, alpha)]
    parameters = [m.module for m in modules if m.is_parameter]
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _to_json_number(alpha),
        "use_rslora": modules[0].lora.rslora,
        "target_modules": [m.module for m in modules if not m.is_parameter],
        **({"target_parameters": parameters} if parameters else {}),
        "rank_pattern": {m.module: m.lora.rank for m in uncommon},
        "alpha_pattern": {m.module: _to_json_number(m.lora.alpha) for m in uncommon},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None if modules_to_save is None else list(modules_to_save),
        "loftq_config": {},
        **({} if pooling is None else _describe_pooling(pooling)),
    }


def _describe_pooling(pooling: Pooling) -> dict[str, Any]:
    if pooling.convention == "peft":
        return {"use_qalora": True, "qalora_group_size": pooling.group_size}
    return {"qalora_pooling": pooling.convention, "qalora_group_size": pooling.group_size}


def pooling_of(config: Mapping[str, Any]) -> Pooling | None:
    """The pooling of lora_A's inputs under a config; None for a config without pooling.

    config   the content of adapter_config.json

    Raises ValueError for an unknown pooling and for a group size that is no positive whole number.

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
    """PEFT's rank or alpha for each module: module name -> value.

    config    the content of adapter_config.json
    key       "r" for ranks, "lora_alpha" for alphas
    modules   names of modules

    A pattern in rank_pattern or alpha_pattern wins over the default. A pattern is a regular expression for the end of a
    module's name, after a dot or for the complete name; the first matching pattern counts.

    Raises ValueError, naming the key, for a value that is no positive number and for a pattern that is no expression.

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
    """The scaling of B·A: alpha / rank, or alpha / sqrt(rank) for a config with use_rslora (arXiv 2312.03732).

    >>> scaling_of({"use_rslora": True}, alpha=8, rank=16)
    2.0
    """
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def task_type_of(architectures: Sequence[str], *, is_encoder_decoder: bool) -> str | None:
    """PEFT's task type for a transformers class; None if PEFT would ask for a head that the model does not have.

    architectures        class names of the model's config; the first name counts
    is_encoder_decoder   the entry of the model's config

    >>> task_type_of(["LlamaForCausalLM"], is_encoder_decoder=False)
    'CAUSAL_LM'
    """
    name = architectures[0] if architectures else ""
    # PEFT's class for this task passes `input_ids` on, and speech models take no `input_ids`.
    if is_encoder_decoder and re.search(r"(?<!Whisper)(?<!Speech)For(ConditionalGeneration|Seq2SeqLM)$", name):
        return "SEQ_2_SEQ_LM"
    if re.search(r"(ForCausalLM|LMHeadModel)$", name):
        return "CAUSAL_LM"
    return None


def _to_json_number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def is_adapter_directory(path: Path) -> bool:
    """Whether the directory `path` holds an adapter_config.json."""
    return (path / CONFIG_NAME).is_file()
