"""The tensors of an adapter file, sorted: each tensor gets a role, or an error refuses the tensor by name.

Tensor names follow PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loftq_cli.adapter.config import CONFIG_NAME, PREFIX, pooling_of, scaling_of, values_of
from loftq_cli.adapter.expert_factors import FactorPart
from loftq_cli.adapter.naming import VOCABULARY_HEAD
from loftq_cli.adapter.parameters import holder_of, wrapped_parameters
from loftq_cli.adapter.spelling import adapter_names_in, without_adapter_name, without_wrappers, wrappers_in
from loftq_cli.adapter.targets import TargetModules
from loftq_cli.checkpoint.source import WeightsFile
from loftq_cli.errors import InputError, MismatchError, printable
from loftq_cli.tensors.headers import WEIGHT_DTYPES
from loftq_cli.tensors.specs import Pooling

_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_BIAS = "lora_B.bias"
_MAGNITUDE = "lora_magnitude_vector"  # DoRA; the state of a model has ".weight" behind the name
_LORA = re.compile(rf"(.+)\.({'|'.join(map(re.escape, (*_LINEAR, *_EMBEDDING, _BIAS, _MAGNITUDE)))})", re.DOTALL)
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta", re.DOTALL)

# PEFT wraps a module of the base: LoRA adds ".base_layer", and a trained copy has an untrained ".original_module".
_WRAPPERS = re.compile(r"\.(?:token_adapter\.base_layer|base_layer|modules_to_save(?:\.default)?)(?=\.)")
_MAX_NAMES = 5  # more names hide the sentence around the names
_TRAINED_COPY = ".modules_to_save."
_ORIGINAL = ".original_module"

GATHER_ZERO3 = (
    "DeepSpeed ZeRO-3 saved before gathering: run zero_to_fp32.py over the checkpoint, or save again with "
    "stage3_gather_16bit_weights_on_model_save"
)
GATHER_SLICES = "a slice from FSDP or ZeRO? gather first: FSDP's full state dict (FULL_STATE_DICT), or zero_to_fp32.py"


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """One adapted module: the names of the module's tensors, and the application of the factors.

    module        the module's name in the adapter's spelling
    lora_A        name of the first factor, [rank, in / group_size]; [rank, vocabulary] for an embedding
    lora_B        name of the second factor, [out, rank]; [width, rank] for an embedding
    lora_bias     name of the trained bias [out] of lora_B; None for a module without a trained bias
    rank, alpha   the config's values for the module
    scaling       factor of the product B·A, without the factor of a pooling
    is_embedding  whether the module is an embedding
    pooling       the config's pooling of inputs; None: lora_A reads each input
    magnitude     name of DoRA's lengths of rows, [out]; [width] for an embedding; None without DoRA
    part          the part of the factors for one matrix, or the number of experts in the factors; None: all is for one
                  matrix. `rank` is the rank of one expert then, and lora_A is [experts * rank, in].
    """

    module: str
    lora_A: str
    lora_B: str
    lora_bias: str | None
    rank: int
    alpha: float
    scaling: float
    is_embedding: bool
    pooling: Pooling | None = None
    magnitude: str | None = None
    part: FactorPart | None = None

    def pooling_for(self, in_features: int, inputs: int) -> Pooling | None:
        """The pooling over a weight of `in_features` columns; `inputs` is the number of columns of lora_A.

        PEFT pools on GPTQ layers only. Any layer but a GPTQ layer gets an ordinary adapter from PEFT under an
        equal config, and the width of lora_A tells the two cases apart.
        """
        return None if inputs == in_features else self.pooling


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Trained rows of a matrix over the vocabulary (PEFT's trainable_token_indices).

    module    the module's name in the adapter's spelling
    tensor    name of the rows, [tokens, width]
    indices   the numbers of the rows in the matrix
    """

    module: str
    tensor: str
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SortedTensors:
    """The five tables of an adapter file; each tensor of the file is in exactly one table.

    lora         module name -> the tensors of the adapted module
    whole        name of a base tensor in the loaded model -> the adapter's tensor in place of the base tensor
    tokens       module name -> trained rows of the matrix
    unused       tensor that PEFT writes and never reads -> the reason
    taken        the parts taken off the names of tensors: wrappers of a training run, and the name of the adapter
    parameters   name of a parameter of experts in the loaded model -> the tensors with the factors of all experts
    """

    lora: dict[str, LoraTensors]
    whole: dict[str, str]
    unused: dict[str, str]
    taken: tuple[str, ...] = ()
    tokens: dict[str, TokenRows] = field(default_factory=dict)
    parameters: dict[str, LoraTensors] = field(default_factory=dict)


def sort_tensors(config: Mapping[str, Any], weights: WeightsFile, config_file: Path) -> SortedTensors:
    """Sort the tensors of an adapter file into tables, from headers alone.

    config        the content of adapter_config.json
    weights       the open weight file
    config_file   the path of adapter_config.json, for errors

    Raises MismatchError naming a tensor without a role, with the role of an earlier tensor, or with a shape that
    contradicts `config`; InputError naming `config_file` for a config with values of unexpected types.
    """
    return _Sorter(config, weights, config_file).sort()


class _Sorter:
    """Fills the tables of one adapter file."""

    def __init__(self, config: Mapping[str, Any], weights: WeightsFile, config_file: Path) -> None:
        self._config, self._weights, self._config_file = config, weights, config_file
        self._factors: dict[str, dict[str, str]] = {}  # module -> part -> tensor
        self._originals: list[str] = []
        self._replacements: dict[str, str] = {}
        self._unused: dict[str, str] = {}
        self._tokens: dict[str, TokenRows] = {}
        self._changed: list[str] = []
        targets = config.get("target_modules")
        self._listed = {name for name in targets if isinstance(name, str)} if isinstance(targets, list) else set()
        self._wrapped: dict[str, str] = {}  # module -> the file's spelling, where wrappers were taken off

    def sort(self) -> SortedTensors:
        adapters = self._check_one_adapter()
        for name in self._weights.tensors:
            self._place(name)
        parameters = self._check_targeted()
        keys = [parameters.get(module, module) for module in self._factors]  # patterns see a parameter's complete name
        ranks, alphas = self._values_of("r", keys), self._values_of("lora_alpha", keys)
        lora, stacks = dict[str, LoraTensors](), dict[str, LoraTensors]()
        for (module, parts), key in zip(self._factors.items(), keys, strict=True):
            tensors = self._lora_tensors(module, parts, int(ranks[key]), alphas[key], key if key != module else None)
            if key == module or (key.endswith(".weight") and tensors.part is None):
                lora[holder_of(module)] = replace(tensors, module=holder_of(module))
            else:
                stacks[key] = replace(tensors, module=key, part=tensors.part or FactorPart())
        self._set_aside_originals()
        if self._config.get("trainable_token_indices") and not self._tokens:
            message = f"holds no rows of single tokens, and {CONFIG_NAME} says trainable_token_indices"
            raise MismatchError(message, file=self._weights.path)
        taken = (*wrappers_in(self._changed), *adapters)
        return SortedTensors(lora, self._replacements, self._unused, taken, self._tokens, stacks)

    def _check_one_adapter(self) -> list[str]:
        """List the adapter's name in the names of the tensors, if any. Raises MismatchError for two adapters."""
        adapters = adapter_names_in(map(without_wrappers, self._weights.tensors))
        if len(adapters) > 1:
            found = ", ".join(printable(name, 80) for name in adapters[:_MAX_NAMES])
            hint = "save each adapter with PEFT's save_pretrained"
            raise MismatchError(f"holds several adapters: {found}", file=self._weights.path, hint=hint)
        return adapters

    def _place(self, name: str) -> None:
        key, dtype = self._read_name(name), self._weights.tensors[name].dtype
        if dtype not in WEIGHT_DTYPES:
            raise self._mismatch(f"is {dtype}, not floating point", name)
        if 0 in self._weights.tensors[name].shape:
            raise self._mismatch("is empty: the save was incomplete", name, GATHER_ZERO3)
        if match := _LORA.fullmatch(key):
            self._wrapped[match[1]] = name.removeprefix(PREFIX).rpartition(".lora_")[0]
            earlier = self._factors.setdefault(match[1], {}).setdefault(match[2], name)
            if earlier != name:
                raise self._mismatch(f"has the same place as {earlier}", name)
        elif match := _TOKENS.fullmatch(key):
            self._place_tokens(name, match[1])
        elif re.search(r"(?:^|\.)lora_", key):
            raise self._mismatch("is of a kind that merging does not know", name)
        elif f"{_ORIGINAL}." in key:
            self._originals.append(name)
        else:
            self._place_replacement(name, key)

    def _read_name(self, name: str) -> str:
        """`plain_name`; a module called "module" keeps the name where the config lists the complete name."""
        written = name.removeprefix(PREFIX)
        match, key = _LORA.fullmatch(written), plain_name(name)
        if match and match[1] in self._listed and wrappers_in([match[1]]) == ["module."]:
            return written
        if key != written:
            self._changed.append(name)
        return key

    def _place_tokens(self, name: str, module: str) -> None:
        if module in self._tokens:
            raise self._mismatch(f"has the same place as {self._tokens[module].tensor}", name)
        try:
            indices = token_indices_of(self._config, module)
        except ValueError as error:
            raise InputError(str(error), file=self._config_file) from None
        shape = self._weights.tensors[name].shape
        if len(shape) != 2 or shape[0] != len(indices):
            raise self._mismatch(f"is {shape}, and {CONFIG_NAME} lists {len(indices)} tokens", name)
        self._tokens[module] = TokenRows(module, name, indices)

    def _place_replacement(self, name: str, key: str) -> None:
        target = _WRAPPERS.sub("", key)
        earlier = self._replacements.setdefault(target, name)
        if earlier == name:
            return
        # PEFT with bias="all" saves the bias of a trained copy under two names, and reads the plain name.
        copies = [tensor for tensor in (name, earlier) if _TRAINED_COPY in tensor]
        if len(copies) != 1:
            raise self._mismatch(f"has the same place as {earlier}", name)
        self._replacements[target] = earlier if copies == [name] else name
        self._unused[copies[0]] = f"PEFT reads {self._replacements[target]} instead"

    def _set_aside_originals(self) -> None:
        """List the untrained modules of trained copies as unused: PEFT with bias="all" saves their biases too."""
        for name in self._originals:
            if plain_name(name).replace(_ORIGINAL, "") not in self._replacements:
                raise self._mismatch("is left over: no trained copy is beside it", name)
            self._unused[name] = "the untrained original beside its trained copy"

    def _check_targeted(self) -> dict[str, str]:
        """Find the modules whose tensors adapt a parameter: module -> parameter.

        Raises MismatchError for a tensor that PEFT would drop because the config does not adapt the module.
        """
        spellings = dict.fromkeys([*self._factors, *self._wrapped.values()])
        targeted = targeted_modules(self._config, list(spellings), self._config_file)
        if self._config.get("target_modules") is None and self._config.get("target_parameters"):
            targeted = set()
        if self._config.get("ensure_weight_tying"):  # PEFT adapts the head with the embedding, listed or not
            targeted |= {module for module in spellings if VOCABULARY_HEAD.search(module) or self._is_embedding(module)}
        untargeted = [m for m in self._factors if m not in targeted and self._wrapped[m] not in targeted]
        try:
            parameters = wrapped_parameters(self._config, untargeted)
        except ValueError as error:
            raise MismatchError(str(error), file=self._config_file) from None
        for module in untargeted:
            if module not in parameters:
                parts = self._factors[module]
                message = (
                    f"its module is none of those that {CONFIG_NAME} adapts (target_modules), and PEFT would drop it"
                )
                raise self._mismatch(message, next(iter(parts.values())))
        return parameters

    def _is_embedding(self, module: str) -> bool:
        return any(part in self._factors.get(module, ()) for part in _EMBEDDING)

    def _values_of(self, key: str, modules: list[str]) -> dict[str, int | float]:
        try:
            return values_of(self._config, key, modules)
        except ValueError as error:
            raise InputError(str(error), file=self._config_file) from None

    def _lora_tensors(
        self, module: str, parts: Mapping[str, str], rank: int, alpha: float, parameter: str | None
    ) -> LoraTensors:
        """The record of a module, or of `parameter`: then the factors of one or more experts are in the tensors."""
        is_embedding = any(part in parts for part in _EMBEDDING)
        part_A, part_B = _EMBEDDING if is_embedding else _LINEAR
        for part in (part_A, part_B):
            if part not in parts:
                message = f"has no {part.removesuffix('.weight')} beside it"
                raise self._mismatch(message, next(iter(parts.values())))
        extra = next((name for part, name in parts.items() if part not in (*_EMBEDDING, _MAGNITUDE)), None)
        if is_embedding and extra is not None:
            raise self._mismatch("belongs to a linear layer, and its module is an embedding", extra)
        name_A, name_B, bias = parts[part_A], parts[part_B], parts.get(_BIAS)
        magnitude = parts.get(_MAGNITUDE)
        n_experts = 1 if parameter is None else self._count_experts(name_A, rank)
        self._check_shapes(name_A, name_B, bias, rank * n_experts)
        self._check_magnitude(name_B, bias, magnitude)
        experts = FactorPart(n_experts) if n_experts > 1 else None
        pooling = None if is_embedding else pooling_of(self._config)
        scaling = scaling_of(self._config, alpha, rank)
        return LoraTensors(
            module, name_A, name_B, bias, rank, alpha, scaling, is_embedding, pooling, magnitude, experts
        )

    def _count_experts(self, name_A: str, rank: int) -> int:
        """The number of experts with factors of `rank` in lora_A; 1 where the rows do not divide."""
        rows = self._weights.tensors[name_A].shape[0] if self._weights.tensors[name_A].shape else 0
        return rows // rank if rows and rows % rank == 0 else 1

    def _check_magnitude(self, lora_B: str, bias: str | None, magnitude: str | None) -> None:
        """Raises MismatchError for DoRA's lengths without use_dora, and for use_dora without lengths."""
        if bool(self._config.get("use_dora")) != (magnitude is not None):
            if magnitude is None:
                raise self._mismatch(f"has no {_MAGNITUDE} beside it, and {CONFIG_NAME} says use_dora", lora_B)
            raise self._mismatch(f"belongs to DoRA, and {CONFIG_NAME} does not say use_dora", magnitude)
        if magnitude is None:
            return
        if bias is not None:
            raise self._mismatch("is a trained bias of lora_B beside DoRA, which PEFT does not have", bias)
        shape, rows = self._weights.tensors[magnitude].shape, self._weights.tensors[lora_B].shape[:1]
        if shape != rows:
            raise self._mismatch(f"is {shape}, and its layer has {rows[0]} rows", magnitude)

    def _check_shapes(self, name_A: str, name_B: str, bias: str | None, rank: int) -> None:
        tensors = self._weights.tensors
        shape_A, shape_B = tensors[name_A].shape, tensors[name_B].shape
        for name, shape in ((name_A, shape_A), (name_B, shape_B)):
            if len(shape) != 2:
                raise self._mismatch(f"is {shape}, not a matrix", name, GATHER_SLICES if len(shape) == 1 else None)
        if shape_A[0] < rank == shape_B[1]:
            raise self._mismatch(f"holds {shape_A[0]} of {rank} rows", name_A, GATHER_SLICES)
        if shape_A[0] != shape_B[1]:
            raise self._mismatch(f"is {shape_B} and lora_A is {shape_A}: their ranks differ", name_B)
        if shape_A[0] != rank:
            raise self._mismatch(f"has rank {shape_A[0]}, and {CONFIG_NAME} says {rank}", name_A)
        if bias is not None and tensors[bias].shape != shape_B[:1]:
            raise self._mismatch(f"is {tensors[bias].shape} and lora_B is {shape_B}", bias)

    def _mismatch(self, message: str, tensor: str, hint: str | None = None) -> MismatchError:
        return MismatchError(message, file=self._weights.path, tensor=tensor, hint=hint)


def plain_name(name: str) -> str:
    """The place of a tensor in the loaded model: no PEFT prefix, no wrapper of a training run, no name of an adapter.

    >>> plain_name("module.base_model.model.h.0.fc.lora_A.default.weight")
    'h.0.fc.lora_A.weight'
    """
    plain = without_adapter_name(without_wrappers(name).removeprefix(PREFIX))
    return plain.removesuffix(".weight") if plain.endswith(f".{_MAGNITUDE}.weight") else plain


def token_indices_of(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """The numbers of the tokens whose rows of `module` were trained, in the order of the rows.

    config   the content of adapter_config.json
    module   the name of an embedding or a head in the loaded model

    Raises ValueError for a config that lists no tokens for the module, and for values that are no different numbers.

    >>> token_indices_of({"trainable_token_indices": {"embed_tokens": [3, 5]}}, "model.embed_tokens")
    (3, 5)
    """
    listed: Any = config.get("trainable_token_indices")
    if isinstance(listed, dict):
        ends = (name for name in listed if module == name or module.endswith(f".{name}"))
        listed = listed.get(max(ends, key=len, default=""))
    if not isinstance(listed, list):
        raise ValueError(f"trainable_token_indices lists no tokens for {printable(module, 80)}")
    if not all(type(index) is int and index >= 0 for index in listed) or len(set(listed)) < len(listed):
        raise ValueError("trainable_token_indices are not different whole numbers from 0")
    return tuple(listed)


def targeted_modules(config: Mapping[str, Any], modules: Sequence[str], config_file: Path) -> set[str]:
    """Choose the modules that PEFT adapts under a config, among `modules`.

    config        the content of adapter_config.json
    modules       names in the loaded model
    config_file   the path of adapter_config.json, for errors

    Raises InputError naming `config_file` for an entry that PEFT does not understand.

    >>> targeted_modules({"target_modules": ["fc"]}, ["h.0.fc", "h.0.attn"], Path("adapter_config.json"))
    {'h.0.fc'}
    """
    try:
        return TargetModules.of(config).select(modules)
    except ValueError as error:
        raise InputError(str(error), file=config_file) from None
