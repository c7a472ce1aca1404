"""The config of a model: dtype, orientation and loaded names of tensors, beyond the facts in headers.

Facts about single families are in families.toml, names in loaded models in loaded_names.json; the module never imports
transformers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.quantized_source import SIDE_FILE
from loftq_cli.errors import SOURCE_HINT, InputError, UnreadFormat, printable
from loftq_cli.layouts.layout import CONFIG_KEYS, layout_of_key
from loftq_cli.model.families import FamilyRow, family_row
from loftq_cli.model.loaded_names import LoadedNames, loaded_names
from loftq_cli.tensors.headers import MODEL_DTYPES, WEIGHT_DTYPES, TensorRef
from loftq_cli.tensors.libraries import DEFAULT_LIBRARY, Library, library_of

_HEAD_CLASS = re.compile(r"For[A-Z]\w*$|(?:LMHead|DoubleHeads)Model$|WithLMHead")

# Keys of a config with a meaning for the tool, and the type of each value; a key may be absent or null.
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
_BLOCK, _MOST_BLOCKS = re.compile(r"\.\d+\."), 1000  # a thousand blocks is more than any model has
_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True, slots=True)
class Family:
    """A model's config.json and the facts about the family of the model.

    config   content of config.json; empty for a model without a config
    file     path of the config, for errors; None for an unknown path
    """

    config: Mapping[str, Any]
    file: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Raises InputError for a value of the wrong type, UnreadFormat for a quantized model."""
        check_types(self.config, self.file)
        key = next((key for key in CONFIG_KEYS if self.config.get(key)), None)
        if key is not None:
            description = self.config[key]
            method = description.get("quant_method") or description.get(SIDE_FILE) or layout_of_key(key) or "?"
            raise UnreadFormat(f"the model is quantized already ({method})", file=self.file, hint=SOURCE_HINT)

    @property
    def model_type(self) -> str:
        """transformers' name of the family; for other libraries the name of the class; "" for a config without both."""
        is_class = self.library is not DEFAULT_LIBRARY
        return str(self.config.get(self.library.class_key if is_class else "model_type", ""))

    @property
    def row(self) -> FamilyRow:
        """The facts about the family in families.toml."""
        return family_row(self.model_type)

    @property
    def library(self) -> Library:
        """The library that loads the model."""
        return library_of(self.config)

    @property
    def architectures(self) -> list[str]:
        """Names of the transformers classes that saved the checkpoint; empty for a config without names."""
        value = self.config.get("architectures")
        return [str(name) for name in value] if isinstance(value, list) else []

    def is_transposed(self, module: str) -> bool:
        """Whether the weight of `module` is stored [in, out]."""
        return module.rpartition(".")[2] in self.row.transposed

    def is_kept_in_float32(self, module: str) -> bool:
        """Whether transformers keeps `module` in float32 whatever a quantization config says."""
        return module.endswith(self.row.full_precision)

    def takes_adapter(self, module: str) -> bool:
        """Whether PEFT can put an adapter on `module` alone."""
        return not self._refuses_adapter(module) and module.rpartition(".")[2] not in self.row.moved

    def moves_adapter(self, module: str) -> bool:
        """Whether PEFT moves an adapter on `module` to the experts. An adapter on the weight of the module, listed
        under target_parameters, stays.
        """
        return not self._refuses_adapter(module) and module.rpartition(".")[2] in self.row.moved

    def _refuses_adapter(self, module: str) -> bool:
        """Whether PEFT refuses an adapter on `module`, or an adapter there computes something else."""
        return f".{module}".endswith(tuple(f".{end}" for end in self.row.no_adapter))

    def is_shared(self, module: str) -> bool:
        """Whether several modules of the loaded model have the weight of `module`."""
        return any(f".{part}." in f".{module}." for part in self.row.shared)

    def loads_in_4_bit(self) -> bool:
        """Whether transformers loads linears of the family from 4-bit tensors."""
        return self.row.loads_in_4_bit

    def ties_embeddings(self) -> bool:
        """Whether the config says that the head shares the embedding's weight."""
        nested = self.config.get("text_config")
        configs = (self.config, nested if isinstance(nested, dict) else {})
        return any(config.get("tie_word_embeddings") is True for config in configs)

    def dtype(self, weights: Iterable[TensorRef]) -> str:
        """The dtype of the model's computations: the config's, else the most common of `weights`, else float32."""
        nested = self.config.get("text_config")
        for part in (self.config, nested if isinstance(nested, dict) else {}):
            config_dtype = str(part.get("dtype") or part.get("torch_dtype") or "").removeprefix("torch.")
            if config_dtype in MODEL_DTYPES:
                return config_dtype
        counts = Counter(ref.dtype for ref in weights if ref.dtype in WEIGHT_DTYPES)
        common = counts.most_common(1)[0][0] if counts else "float32"
        return common if common in MODEL_DTYPES else "float32"

    @property
    def loader(self) -> LoadedNames | None:
        """The names that transformers gives to tensors while loading; None for a class outside the table."""
        return loaded_names(self.config)

    def is_converted(self, module: str) -> bool:
        """Whether transformers splits or merges the weight of `module` while loading, or changes the form."""
        loader = self.loader
        return loader is not None and loader.is_converted(module)

    def loaded_parts(self, module: str, modules: Iterable[str]) -> tuple[str, ...]:
        """The names of the modules in the loaded model that get the weight of `module`: more than one for a split, and
        those of every block for a shared module, because the config does not tell which blocks share.

        module, modules   as for `loaded_name`
        """
        loader = self.loader
        parts = (self.lasting_name(module, modules),) if loader is None else loader.find(module)
        count = self.config.get("num_hidden_layers")
        if not self.is_shared(module) or type(count) is not int:
            return parts
        blocks = range(min(count, _MOST_BLOCKS))
        return tuple(_BLOCK.sub(f".{block}.", part, count=1) for part in parts for block in blocks)

    def loaded_name(self, module: str, modules: Iterable[str]) -> str:
        """The name of a module in the loaded model, after loading with the class in the config. A converted weight has
        no module of its own in the loaded model, and has the name of `lasting_name`.

        module    name in the files
        modules   names of all modules in the files
        """
        loader = self.loader
        if loader is None or loader.is_converted(module):
            return self.lasting_name(module, modules)
        return loader.find(module)[0]

    def lasting_name(self, module: str, modules: Iterable[str]) -> str:
        """The name of a module for loaders that keep the names of the files, but for a prefix: vLLM, and transformers
        for most families.

        module, modules   as for `loaded_name`
        """
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
    """Raises InputError, naming the key, for a value of the config with an unexpected type.

    config   the content of a config.json
    file     the path for the error; None for an unknown path

    >>> check_types({"vocab_size": "32000"}, None)
    Traceback (most recent call last):
    loftq_cli.errors.InputError: vocab_size is '32000', not a whole number
    """
    _check_keys(config, _KEYS, "", file)
    if not all(isinstance(name, str) for name in config.get("architectures") or ()):
        raise InputError("architectures is not a list of class names", file=file)
    _check_keys(config.get("text_config") or {}, _NESTED_KEYS, "text_config.", file)


def _check_keys(
    config: Mapping[str, Any], keys: Mapping[str, tuple[type, str]], prefix: str, file: Path | None
) -> None:
    for key, (kind, type_text) in keys.items():
        value = config.get(key)
        if value is not None and type(value) is not kind:
            raise InputError(f"{prefix}{key} is {printable(repr(value), 80)}, not {type_text}", file=file)
    for key in _DTYPE_KEYS:
        value = config.get(key)
        # A model of several parts may have an object of dtypes, and the tool ignores the object.
        if value is not None and type(value) not in (str, dict):
            raise InputError(f"{prefix}{key} is {printable(repr(value), 80)}, not the name of a dtype", file=file)
