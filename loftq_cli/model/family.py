"""What the config of a model says about its tensors that headers alone do not: dtype, orientation, names after loading.

Facts about single families are in families.toml; transformers is never imported here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.errors import InputError, printable
from loftq_cli.layouts.layout import CONFIG_KEYS, layout_of_key
from loftq_cli.model.families import FamilyRow, family_row
from loftq_cli.tensors.headers import MODEL_DTYPES, WEIGHT_DTYPES, TensorRef

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
    **dict.fromkeys(CONFIG_KEYS, _OBJECT),
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
        key = next((key for key in CONFIG_KEYS if self.config.get(key)), None)
        if key is not None:
            method = self.config[key].get("quant_method", layout_of_key(key) or "?")
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
    def row(self) -> FamilyRow:
        """The facts about the family in families.toml."""
        return family_row(self.model_type)

    @property
    def architectures(self) -> list[str]:
        """Class names that the checkpoint was saved from."""
        value = self.config.get("architectures")
        return [str(name) for name in value] if isinstance(value, list) else []

    def is_transposed(self, module: str) -> bool:
        """Whether the weight of `module` is stored [in, out]."""
        return module.rpartition(".")[2] in self.row.transposed

    def is_kept_in_float32(self, module: str) -> bool:
        """Whether transformers refuses to hold `module` in 4 bits."""
        return module.endswith(self.row.full_precision)

    def takes_adapter(self, module: str) -> bool:
        """Whether PEFT can put an adapter on `module` and nowhere else."""
        return module.rpartition(".")[2] not in self.row.no_adapter

    def loads_in_4_bit(self) -> bool:
        """Whether transformers loads linears of this family from 4-bit tensors."""
        return self.row.loads_in_4_bit

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
            for pattern, replacement in self.row.renamings:
                module = re.sub(pattern, replacement, module)
        prefix = self.row.prefix
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
