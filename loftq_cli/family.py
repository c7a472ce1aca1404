"""What the config of a model says about its tensors that headers alone do not: dtype, orientation, names after loading.

Facts about transformers' model classes, read from their sources (5.23); it is never imported here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loftq_cli.errors import InputError
from loftq_cli.tensors import MODEL_DTYPES, WEIGHT_DTYPES, TensorRef

# Families whose linears are Conv1D: stored [in, out], loaded as [out, in].
_CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_MODULE = re.compile(r"(?:^|\.)(?:c_attn|c_proj|c_fc|q_attn)$")

# Linears that transformers keeps in float32 whatever a quantization config says; a 4-bit one fails to load.
_FULL_PRECISION = {
    **dict.fromkeys(("t5", "mt5", "umt5", "pop2piano", "udop"), ("wo",)),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "axk2", "mistral_large4"), ("indexer.weights_proj",)),
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


@dataclass(frozen=True, slots=True)
class Family:
    """What `config` (the model's config.json, empty where there is none) says about its tensors."""

    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        quantization = self.config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
            raise InputError(
                f"the model is quantized already ({method})", hint="start from the full-precision checkpoint"
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
        prefix = _PREFIX_OF.get(self.model_type)
        if prefix is None or not self.architectures:
            return module
        has_prefix = any(name.startswith(f"{prefix}.") for name in modules)
        if _HEAD_CLASS.search(self.architectures[0]):
            return module if has_prefix else f"{prefix}.{module}"
        return module.removeprefix(f"{prefix}.")
