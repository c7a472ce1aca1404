"""Full-precision weights of a model by the names of the linears, from a checkpoint, from memory, or from a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from loftq_cli.errors import InputError, MismatchError, UsageError
from loftq_cli.model.builtin import resolve_model
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import module_of
from loftq_cli.tensors.headers import WEIGHT_DTYPES

# A checkpoint's path, a model in memory, tensors by module or tensor name, or a function from module name to tensor.
Original: TypeAlias = str | Path | nn.Module | Mapping[str, torch.Tensor] | Callable[[str], torch.Tensor]

_NAMES = "names are those of the model before PEFT wrapped it"


@dataclass(frozen=True, slots=True)
class OriginalWeights:
    """Weights [out, in] by module name.

    get     gives the weight of a name, or None
    shape   gives the shape of a weight without reading numbers; None if only `get` knows shapes
    path    the file or folder of the weights, for errors
    """

    get: Callable[[str], torch.Tensor | None]
    shape: Callable[[str], tuple[int, ...] | None] | None
    path: Path | None

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raises MismatchError when headers show no weight called `name` of `shape`."""
        if self.shape is not None:
            self._check_shape(name, self.shape(name), shape)

    def load(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """The weight of a linear, floating point [out, in], on the CPU.

        Raises MismatchError for a missing weight and for another shape, InputError for quantized, NaN or infinite
        weights, UsageError for a weight without memory.
        """
        weight = self.get(name)
        if weight is not None and not isinstance(weight, torch.Tensor):
            message = f"original gives a {type(weight).__name__}, not a tensor"
            raise UsageError(message, tensor=name, hint="a function of a module name that gives the weight [out, in]")
        self._check_shape(name, None if weight is None else tuple(weight.shape), shape)
        assert weight is not None
        if weight.is_meta:
            hint = "load its numbers, or name the path of the checkpoint"
            raise UsageError("original is on the meta device", tensor=name, hint=hint)
        if str(weight.dtype).removeprefix("torch.") not in WEIGHT_DTYPES:
            raise self._not_full_precision(name)
        weight = weight.detach().cpu()
        if not bool(torch.isfinite(weight).all()):
            raise InputError("original holds NaN or infinite values", file=self.path, tensor=name, hint="repair it")
        return weight

    def _check_shape(self, name: str, own: tuple[int, ...] | None, shape: tuple[int, int]) -> None:
        if own is None:
            raise MismatchError("original has no weight of this name", file=self.path, tensor=name, hint=_NAMES)
        if own != shape:
            is_turned = own == shape[::-1]
            hint = "weights are [out, in]: turn it, as weight.T" if is_turned else "name the checkpoint of the base"
            message = f"original is {own}, and the base {shape}"
            raise MismatchError(message, file=self.path, tensor=name, hint=hint)

    def _not_full_precision(self, name: str) -> InputError:
        hint = "name the full-precision checkpoint that the base was quantized from"
        return InputError("original is not in full precision", file=self.path, tensor=name, hint=hint)


@contextmanager
def open_original(original: Original) -> Iterator[OriginalWeights]:
    """The weights of `original`, during the block. Nothing is read before `OriginalWeights.load`.

    Raises UsageError for an object of another kind than `Original`, InputError for a damaged checkpoint.

    >>> with open_original({"head": torch.ones(3, 2)}) as weights:
    ...     weights.get("head").shape
    torch.Size([3, 2])
    """
    if isinstance(original, nn.Module):
        original = original.state_dict()
    if isinstance(original, str | Path):
        path = resolve_model(str(original))
        with BaseModel.open(path) as base:
            yield _of_checkpoint(base, path)
    elif isinstance(original, Mapping):
        tensors = original

        def get(name: str) -> torch.Tensor | None:
            return tensors.get(name, tensors.get(f"{name}.weight"))

        yield OriginalWeights(get, lambda name: _shape(get(name)), None)
    elif callable(original):
        yield OriginalWeights(original, None, None)
    else:
        message = f"original is a {type(original).__name__}"
        raise UsageError(message, hint="a path, a mapping from module names to tensors, or a function of a name")


def _shape(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _of_checkpoint(base: BaseModel, path: Path) -> OriginalWeights:
    """Weights [out, in] by the names of the loaded model."""
    loaded = base.loaded_names()
    stored = {module_of(loaded[name]): name for name in base.tensors if name.endswith(".weight")}

    def get(name: str) -> torch.Tensor | None:
        if name not in stored:
            return None
        if stored[name] in base.quantized:
            hint = "name the full-precision checkpoint that the base was quantized from"
            raise InputError("original is quantized itself", file=path, tensor=stored[name], hint=hint)
        weight = base.load(stored[name])
        return weight.T if base.family.is_transposed(module_of(stored[name])) else weight

    return OriginalWeights(get, lambda name: base.matrix_shape(stored[name]) if name in stored else None, path)
