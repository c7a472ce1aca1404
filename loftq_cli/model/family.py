"""What the config of a model says about its tensors that headers alone do not: dtype, orientation, names after loading.

Facts about transformers' model classes, read from their sources (5.23); it is never imported here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.errors import InputError, printable
from loftq_cli.tensors.headers import MODEL_DTYPES, WEIGHT_DTYPES, TensorRef

# Families whose linears are Conv1D: stored [in, out], loaded as [out, in].
_CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_MODULE = re.compile(r"(?:^|\.)(?:c_attn|c_proj|c_fc|q_attn)$")

# Linears that transformers keeps in float32 whatever a quantization config says; a 4-bit one fails to load.
_FULL_PRECISION = {
    **dict.fromkeys(("t5", "mt5", "umt5", "pop2piano", "udop"), ("wo",)),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "axk2", "mistral_large4"), ("indexer.weights_proj",)),
}

# Linears on which PEFT takes no adapter (0.21): where the projections of experts are fused, it moves every adapter of
# these names to the experts, from shared ones and dense layers too; and it refuses these names in Mamba models.
_MOVED_TO_EXPERTS = (
    *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
    *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe"),
    *("longcat_flash", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "solar_open"),
)
_NO_ADAPTER = {
    **dict.fromkeys(_MOVED_TO_EXPERTS, ("gate_proj", "up_proj", "down_proj")),
    **dict.fromkeys(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), ("out_proj", "conv1d")),
}

# Families that transformers 5 cannot load from 4-bit tensors: Falcon's linears are of a class of its own, which is not
# replaced, and with a quantization config Llama 4's fused experts are replaced by others.
_NEVER_IN_4_BIT = ("falcon", "llama4", "llama4_text")

# Renamings that transformers applies to older checkpoints of these families while it loads a head class.
_LLAVA_RENAMINGS = (
    (r"^language_model\.lm_head", "lm_head"),
    (r"^language_model\.(?:model\.)?", "model.language_model."),
    (r"^(?=(?:vision_tower|audio_tower|multi_modal_projector)\.)", "model."),
)
_QWEN_VL_RENAMINGS = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)
_LLAVA_LIKE = (
    *("aria", "aya_vision", "gemma3", "got_ocr2", "internvl", "llava", "llava_next", "llava_next_video"),
    *("llava_onevision", "mistral3", "paligemma", "qwen2_audio", "vipllava"),
)
_RENAMINGS = {
    **dict.fromkeys(_LLAVA_LIKE, _LLAVA_RENAMINGS),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN_VL_RENAMINGS),
}

# The attribute under which a head class holds the base model. Checkpoints saved from the base model (gpt2, bloom on
# the hub) lack it in their names, and loaders add it: an adapter must name modules as they are then called.
_FAMILIES_OF_PREFIX = {
    "transformer": "bloom codegen ctrl falcon gpt2 gpt_bigcode gpt_neo gptj mpt openai-gpt xlnet",
    "roberta": "camembert roberta xlm-roberta",
    "deberta": "deberta deberta-v2",
    "model": "bart cohere gemma gemma2 granite llama mistral mixtral olmo olmo2 olmoe opt phi phi3 "
    "qwen2 qwen2_moe qwen3 qwen3_moe stablelm starcoder2",
    "albert": "albert",
    "bert": "bert",
    "distilbert": "distilbert",
    "electra": "electra",
    "gpt_neox": "gpt_neox",
    "mpnet": "mpnet",
}
_PREFIX_OF = {family: prefix for prefix, families in _FAMILIES_OF_PREFIX.items() for family in families.split()}
_HEAD_CLASS = re.compile(r"For[A-Z]\w*$|(?:LMHead|DoubleHeads)Model$|WithLMHead")


# What decides something here or in a container, and the type it must have where it is there and not null.
_TEXT, _OBJECT, _SWITCH = (str, "a text"), (dict, "an object"), (bool, "true or false")
_NESTED_KEYS = {"tie_word_embeddings": _SWITCH, "vocab_size": (int, "a whole number")}
_KEYS = {
    **_NESTED_KEYS,
    "model_type": _TEXT,
    "architectures": (list, "a list of class names"),
    "text_config": _OBJECT,
    "is_encoder_decoder": _SWITCH,
    "quantization_config": _OBJECT,
    "quantization": _OBJECT,
}
_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True, slots=True)
class Family:
    """What `config` (the model's config.json, empty where there is none) says about its tensors; `file` is where that
    lies, if it is known.
    """

    config: Mapping[str, Any]
    file: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Raises InputError for a value of the wrong type, and for a model that is quantized already."""
        check_types(self.config, self.file)
        quantization = self.config.get("quantization_config") or self.config.get("quantization")
        if quantization:
            known = "?" if "quantization_config" in self.config else "mlx"
            method = quantization.get("quant_method", known) if isinstance(quantization, dict) else "?"
            raise InputError(
                f"the model is quantized already ({method})",
                file=self.file,
                hint="start from the full-precision checkpoint",
            )

    @property
    def model_type(self) -> str:
        """transformers' name of the family; "" where unknown."""
        return str(self.config.get("model_type", ""))

    @property
    def architectures(self) -> list[str]:
        """Class names that the checkpoint was saved from."""
        value = self.config.get("architectures")
        return [str(name) for name in value] if isinstance(value, list) else []

    def is_transposed(self, module: str) -> bool:
        """Whether the weight of `module` is stored [in, out]."""
        return self.model_type in _CONV1D_FAMILIES and bool(_CONV1D_MODULE.search(module))

    def is_kept_in_float32(self, module: str) -> bool:
        """Whether transformers refuses to hold `module` in 4 bits."""
        return module.endswith(_FULL_PRECISION.get(self.model_type, ()))

    def takes_adapter(self, module: str) -> bool:
        """Whether PEFT can put an adapter on `module` and nowhere else."""
        return module.rpartition(".")[2] not in _NO_ADAPTER.get(self.model_type, ())

    def loads_in_4_bit(self) -> bool:
        """Whether transformers loads linears of this family from 4-bit tensors."""
        return self.model_type not in _NEVER_IN_4_BIT

    def ties_embeddings(self) -> bool:
        """Whether the config says that the head shares the embedding's weight."""
        nested = self.config.get("text_config")
        both = (self.config, nested if isinstance(nested, dict) else {})
        return any(part.get("tie_word_embeddings") is True for part in both)

    def dtype(self, weights: Iterable[TensorRef]) -> str:
        """The dtype the model computes in: the config's, else the most common one of `weights`, else float32."""
        nested = self.config.get("text_config")
        for part in (self.config, nested if isinstance(nested, dict) else {}):
            named = str(part.get("dtype") or part.get("torch_dtype") or "").removeprefix("torch.")
            if named in MODEL_DTYPES:
                return named
        counts = Counter(ref.dtype for ref in weights if ref.dtype in WEIGHT_DTYPES)
        common = counts.most_common(1)[0][0] if counts else "float32"
        return common if common in MODEL_DTYPES else "float32"

    def loaded_name(self, module: str, modules: Iterable[str]) -> str:
        """What `module` is called in a model loaded with the class that the config names; `modules` are all."""
        if not self.architectures:
            return module
        if _HEAD_CLASS.search(self.architectures[0]):
            for pattern, new in _RENAMINGS.get(self.model_type, ()):
                module = re.sub(pattern, new, module)
        prefix = _PREFIX_OF.get(self.model_type)
        if prefix is None:
            return module
        has_prefix = any(name.startswith(f"{prefix}.") for name in modules)
        if _HEAD_CLASS.search(self.architectures[0]):
            return module if has_prefix else f"{prefix}.{module}"
        return module.removeprefix(f"{prefix}.")


def check_types(config: Mapping[str, Any], file: Path | None) -> None:
    """Raises InputError naming the key of a config whose value is of another type than everybody writes."""
    _check_keys(config, _KEYS, "", file)
    if not all(isinstance(name, str) for name in config.get("architectures") or ()):
        raise InputError("architectures is not a list of class names", file=file)
    _check_keys(config.get("text_config") or {}, _NESTED_KEYS, "text_config.", file)


def _check_keys(
    config: Mapping[str, Any], keys: Mapping[str, tuple[type, str]], prefix: str, file: Path | None
) -> None:
    for key, (kind, what) in keys.items():
        value = config.get(key)
        if value is not None and type(value) is not kind:
            raise InputError(f"{prefix}{key} is {printable(repr(value), 80)}, not {what}", file=file)
    for key in _DTYPE_KEYS:
        value = config.get(key)
        # A model of several parts may have an object of dtypes, which says nothing here.
        if value is not None and type(value) not in (str, dict):
            raise InputError(f"{prefix}{key} is {printable(repr(value), 80)}, not the name of a dtype", file=file)
