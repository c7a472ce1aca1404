"""The adapter that lies inside a converted directory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.adapter import config as adapter_config
from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.checkpoint.source import WeightsFile, open_weights_file
from loftq_cli.errors import InputError, MismatchError
from loftq_cli.methods.method import METHODS
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import module_of
from loftq_cli.output.records import REPORT_NAME
from loftq_cli.tensors.matrices import LoraPair, lora_pair
from loftq_cli.tensors.specs import Pooling


def adapter_of(base: BaseModel, names: Iterable[str], reported: str | None) -> dict[str, LoraPair]:
    """The adapter inside a converted directory: its factors for each of the weights called `names` that it is on.

    Raises MismatchError for factors that do not fit the weight.
    """
    adapter, called = AdapterBeside.beside(base, reported), base.loaded_names()
    if adapter is None:
        return {}
    pairs = {name: adapter.pair(module_of(called[name]), matrix_shape_of(base, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair is not None}


@dataclass(frozen=True)
class AdapterBeside:
    """The adapter that lies inside a converted directory."""

    weights: WeightsFile
    config_file: Path
    config: dict[str, object]
    alphas: dict[str, int | float]

    @classmethod
    def beside(cls, base: BaseModel, reported: str | None) -> AdapterBeside | None:
        """The places that methods write to are tried first: a report that was changed cannot hide an adapter."""
        for name in (*(entry.adapter_dir for entry in METHODS.values()), reported or ""):
            directory = base.folder / Path(name).name
            if name and adapter_config.is_adapter_directory(directory):
                weights = open_weights_file(directory / adapter_config.WEIGHTS_NAME)
                config_file = directory / adapter_config.CONFIG_NAME
                config = read_json_object(config_file)
                return cls(weights, config_file, config, _alphas(weights, config, config_file))
        return None

    def rank(self, module: str) -> int | None:
        ref = self.weights.tensors.get(adapter_config.tensor_names(module)[0])
        return ref.shape[0] if ref is not None and ref.shape else None

    def scaling(self, module: str) -> float | None:
        rank = self.rank(module)
        return adapter_config.scaling_of(self.config, self.alphas[module], rank) if rank else None

    def pooling(self) -> Pooling | None:
        try:
            return adapter_config.pooling_of(self.config)
        except ValueError as error:
            raise InputError(str(error), file=self.config_file, hint="convert again") from None

    def pair(self, module: str, shape: tuple[int, int]) -> LoraPair | None:
        scaling, tensors = self.scaling(module), self.weights.tensors
        if scaling is None:
            return None
        name_A, name_B = adapter_config.tensor_names(module)
        rank, pooling = tensors[name_A].shape[0], self.pooling()
        group_size = pooling.group_size if pooling else 1
        if (
            tensors[name_A].shape != (rank, shape[1] // group_size)
            or shape[1] % group_size
            or name_B not in tensors
            or tensors[name_B].shape != (shape[0], rank)
        ):
            raise MismatchError(f"does not fit a layer of {shape}", file=self.weights.path, tensor=name_A)
        return lora_pair(self.weights.load(name_A), self.weights.load(name_B), scaling, pooling)


def _alphas(weights: WeightsFile, config: dict[str, object], config_file: Path) -> dict[str, int | float]:
    """The alpha of every module that has a lora_A."""
    prefix, suffix = adapter_config.PREFIX, adapter_config.tensor_names("")[0].removeprefix(adapter_config.PREFIX)
    names = [name for name in weights.tensors if name.startswith(prefix) and name.endswith(suffix)]
    try:
        modules = [name.removeprefix(prefix).removesuffix(suffix) for name in names]
        return adapter_config.values_of(config, "lora_alpha", modules)
    except ValueError as error:
        raise InputError(str(error), file=config_file, hint="convert again") from None


def matrix_shape_of(base: BaseModel, name: str) -> tuple[int, int]:
    shape = base.matrix_shape(name)
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"is a layer in {REPORT_NAME} and no matrix in the files", file=base.path, tensor=name)
    return (shape[0], shape[1])
