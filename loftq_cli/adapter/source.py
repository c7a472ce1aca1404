"""The single reader of PEFT LoRA adapter directories. Files are distrusted: an error names a tensor of a wrong shape or
without a role.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.adapter.config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdaptedModule,
    is_adapter_directory,
    pooling_of,
    tensor_names,
    values_of,
)
from loftq_cli.adapter.library_adapter import library_file_in, open_library_file
from loftq_cli.adapter.naming import spelled_names
from loftq_cli.adapter.parameters import read_targets
from loftq_cli.adapter.sorting import LoraTensors, TokenRows, sort_tensors, targeted_modules
from loftq_cli.adapter.spelling import without_wrappers
from loftq_cli.adapter.targets import TargetModules
from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.checkpoint.source import WeightsFile, open_weights_file
from loftq_cli.checkpoint.watched_file import absent
from loftq_cli.errors import InputError, MismatchError, printable
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import module_of
from loftq_cli.tensors.matrices import LoraPair, lora_pair

WEIGHTS_NAMES = (WEIGHTS_NAME, "adapter_model.bin")

# Config values for arithmetic beyond W + s·B·A on the stored base (PEFT 0.21).
_REFUSED = {
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "KaSA truncates the base's weights and scales between the factors",
    "monteclora_config": "MonteCLoRA draws its weights",
    "layer_replication": "layers are replicated",
    "alora_invocation_tokens": "activated LoRA depends on the prompt",
    "arrow_config": "Arrow routes between adapters",
}
_MAX_NAMES = 10  # more names hide the sentence around the names
_MERGED_SWITCHES = {"use_rslora", "use_qalora", "use_dora"}
_REBASING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations change the base's weights in memory


@dataclass(frozen=True)
class AdapterSource:
    """One adapter: config, weight file, and the sorted tensors of the file.

    path         the adapter's directory
    config       the content of adapter_config.json; empty for the adapter of an unfinished conversion
    weights      the open weight file
    lora         module name in the adapter's spelling -> the tensors of the adapted module
    whole        name of a base tensor in the loaded model -> the adapter's tensor in place of the base tensor
    unused       tensor that PEFT writes and never reads -> the reason
    taken        the parts taken off the names of tensors: wrappers of a training run, and the name of the adapter
    tokens       module name in the adapter's spelling -> trained rows of the matrix
    parameters   name of a parameter of experts in the adapter's spelling -> the tensors with all experts' factors
    """

    path: Path
    config: Mapping[str, Any]
    weights: WeightsFile
    lora: Mapping[str, LoraTensors]
    whole: Mapping[str, str]
    unused: Mapping[str, str]
    taken: tuple[str, ...] = ()
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)
    parameters: Mapping[str, LoraTensors] = field(default_factory=dict)

    def names_in(self, base: BaseModel) -> dict[str, str]:
        """Map each tensor name in the files of `base` to the name in the adapter's spelling.

        `spelled_names` lists the spellings.
        """
        names = base.loaded_names()
        if self.taken:  # a model may have a module called like a wrapper, and the parts are off the adapter's names
            plain = {name: without_wrappers(loaded) for name, loaded in names.items()}
            names = plain if len(set(plain.values())) == len(set(names.values())) else names
        return spelled_names(names, {*self.lora, *self.tokens})

    def lora_in(self, base: BaseModel) -> dict[str, LoraTensors]:
        """Map each adapted weight of `base` to the tensors of the adapted module."""
        modules = {name: module_of(loaded) for name, loaded in self.names_in(base).items() if name.endswith(".weight")}
        return {name: self.lora[module] for name, module in modules.items() if module in self.lora}

    def untrained_in(self, base: BaseModel) -> list[str]:
        """List weights of `base` without a tensor in the adapter, although the config adapts the modules.

        The list is empty for a config without a list of target_modules. Raises InputError for an entry that PEFT does
        not understand.
        """
        if not isinstance(self.config.get("target_modules"), list):
            return []  # an expression may match modules by accident; an entry of a list is meant
        module_by_name = {
            name: module_of(loaded)
            for name, loaded in self.names_in(base).items()
            if name.endswith(".weight") and len(base.tensors[name].shape) == 2
        }
        targeted = targeted_modules(self.config, sorted(set(module_by_name.values())), self.path / CONFIG_NAME)
        untrained = targeted - self.lora.keys() - {module_of(loaded) for loaded in self.whole}
        return [name for name, module in module_by_name.items() if module in untrained]

    def fit(self, lora: LoraTensors, shape: tuple[int, int], *, rank: int | None = None) -> Iterator[MismatchError]:
        """Compare the factors of a linear with a weight, and yield an error for each wrong shape.

        lora    the tensors of the linear
        shape   [out, in] of the weight
        rank    the expected rank, from a report; None for the config's rank
        """
        if lora.magnitude is not None:
            yield MismatchError(
                "belongs to DoRA, which merge alone reads", file=self.weights.path, tensor=lora.magnitude
            )
        tensors, (out_features, in_features) = self.weights.tensors, shape
        rank = lora.rank if rank is None else rank
        pooling = lora.pooling_for(in_features, tensors[lora.lora_A].shape[1])
        group_size = pooling.group_size if pooling else 1
        if in_features % group_size:
            message = f"pools groups of {group_size}, and its layer has {in_features} inputs"
            yield MismatchError(message, file=self.weights.path, tensor=lora.lora_A)
        for name, expected in ((lora.lora_A, (rank, in_features // group_size)), (lora.lora_B, (out_features, rank))):
            if tensors[name].shape != expected:
                message = f"is {tensors[name].shape}, and its layer asks for {expected}"
                yield MismatchError(message, file=self.weights.path, tensor=name)

    def pair(self, module: str, shape: tuple[int, int]) -> LoraPair | None:
        """Load the factors of a linear; None for a module without an adapter and for an embedding.

        module   the name in the adapter's spelling, see `names_in`
        shape    [out, in] of the weight

        The pair's scaling includes the factor of the pooling. Raises MismatchError naming a factor of a wrong shape.
        """
        lora = self.lora.get(module)
        if lora is None or lora.is_embedding:
            return None
        for error in self.fit(lora, shape):
            raise error
        lora_A, lora_B = self.weights.load(lora.lora_A), self.weights.load(lora.lora_B)
        return lora_pair(lora_A, lora_B, lora.scaling, lora.pooling_for(shape[1], lora_A.shape[1]))

    def is_same(self, name: str, other_name: str) -> bool:
        """Whether two tensors of the adapter have equal bytes."""
        return self.weights.sha256(name) == self.weights.sha256(other_name)


def open_adapter(path: Path) -> AdapterSource:
    """Open an adapter directory and sort the tensors, from headers alone.

    path   directory with adapter_config.json and adapter_model.safetensors or adapter_model.bin, or with
           pytorch_lora_weights.safetensors of diffusers alone

    Raises InputError for a directory without an adapter and for a config with unreadable values; MismatchError for an
    adapter beyond W + s·B·A, for an adapter without tensors, and for tensors that contradict the config.

    >>> open_adapter(Path("no such folder"))
    Traceback (most recent call last):
    loftq_cli.errors.InputError: no such folder: is no directory (name a PEFT adapter directory)
    """
    config_file = path / CONFIG_NAME
    if not config_file.is_file():
        file = library_file_in(path)
        if file is not None:
            return _open_sorted(path, *open_library_file(file), file)
        message = f"holds no {CONFIG_NAME}" if path.is_dir() else "is no directory"
        raise absent(path, message, _adapters_below(path) or "name a PEFT adapter directory")
    return _open_sorted(path, read_json_object(config_file), open_weights_file(_weights_path(path)), config_file)


def _open_sorted(path: Path, config: Mapping[str, Any], weights: WeightsFile, config_file: Path) -> AdapterSource:
    """The adapter with sorted tensors; `config_file` is the file of the config, for errors."""
    _check_config(config, config_file)
    if not weights.tensors:
        raise MismatchError("holds no tensor", file=weights.path)
    places = sort_tensors(config, weights, config_file)
    return AdapterSource(
        path, config, weights, places.lora, places.whole, places.unused, places.taken, places.tokens, places.parameters
    )


def open_planned_adapter(path: Path, modules: Sequence[AdaptedModule]) -> AdapterSource:
    """Open the adapter of an unfinished conversion, before adapter_config.json exists.

    path      the adapter's directory
    modules   the adapted modules of the plan, in place of the config

    Raises InputError for a damaged weight file.
    """
    lora = {
        adapted.module: LoraTensors(
            adapted.module,
            *tensor_names(adapted.module),
            lora_bias=None,
            rank=adapted.lora.rank,
            alpha=adapted.lora.alpha,
            scaling=adapted.lora.scaling,
            is_embedding=False,
            pooling=adapted.lora.pooling,
        )
        for adapted in modules
    }
    return AdapterSource(path, {}, open_weights_file(path / WEIGHTS_NAME), lora, {}, {})


def _weights_path(path: Path) -> Path:
    for name in WEIGHTS_NAMES:
        if (path / name).exists():
            return path / name
    raise InputError(f"holds no {WEIGHTS_NAME}", file=path, hint=_adapters_below(path))


def _adapters_below(path: Path) -> str | None:
    """The hint that names the sub-folders with an adapter, PEFT's place for named adapters; None without any.

    Checkpoints of a trainer are sub-folders with an adapter as well.
    """
    try:
        names = sorted(folder.name for folder in path.iterdir() if is_adapter_directory(folder))
    except OSError:
        return None
    if not names:
        return None
    listed = ", ".join(printable(str(path / name), 200) for name in names[:_MAX_NAMES])
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"name one of the adapters in it: {listed}{more}"


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise MismatchError(f"peft_type {kind!r} is not merged", file=file, hint="merge it with PEFT")
    for name, value in config.items():
        unknown = "is not known to merging" if name.startswith("use_") and name not in _MERGED_SWITCHES else None
        reason = _REFUSED.get(name, unknown)
        if value and reason:
            raise MismatchError(f"{name}: {reason}", file=file, hint="merge it with PEFT")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_REBASING):
        raise MismatchError(
            f"init_lora_weights {init!r} changed the base's weights before training",
            file=file,
            hint="save it with PEFT's path_initial_model_for_weight_conversion, or merge it with PEFT",
        )
    try:
        # No modules: an invalid default is an error before any tensor is read.
        values_of(config, "r", ()), values_of(config, "lora_alpha", ())
        TargetModules.of(config), pooling_of(config), read_targets(config)
    except ValueError as error:
        raise InputError(str(error), file=file) from None
    trained_copies = config.get("modules_to_save") or []
    if not isinstance(trained_copies, list) or not all(isinstance(name, str) for name in trained_copies):
        raise InputError("modules_to_save is not a list of names", file=file)
