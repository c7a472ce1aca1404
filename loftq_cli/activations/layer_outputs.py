"""The output error of each quantized linear of a converted model, summed over the rows that the linear of the original
reads. Holds sums only; changes no weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import MismatchError, NumericError
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import module_of
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.metrics import relative

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class OutputError:
    """Sums over the input rows x of a layer in the original model.

    squared_output   Σ‖W·x‖², with W of the original
    squared_base     Σ‖(W − base)·x‖²
    squared_error    Σ‖(W − base − s·B·A)·x‖²; equal to `squared_base` without an adapter

    >>> OutputError(squared_output=4.0, squared_base=1.0, squared_error=0.25).base_error
    0.5
    """

    squared_output: float
    squared_base: float
    squared_error: float

    @property
    def base_error(self) -> float:
        """Relative error of the base alone: √(Σ‖(W − base)·x‖² / Σ‖W·x‖²)."""
        return relative(self.squared_base, self.squared_output)

    @property
    def error(self) -> float:
        """Relative error of base and adapter: √(Σ‖(W − base − s·B·A)·x‖² / Σ‖W·x‖²)."""
        return relative(self.squared_error, self.squared_output)


class ComparedLayer:
    """One quantized linear in both models, and three sums of squares over the rows of the original's input.

    name        name of the weight in the converted directory
    original    the module of the original model
    converted   the module of the converted model
    is_read     whether the text has reached the layer
    """

    def __init__(self, name: str, original: Any, converted: Any, pair: LoraPair | None, *, transposed: bool) -> None:
        self.name, self.original, self.converted = name, original, converted
        self._pair, self._transposed = pair, transposed
        self._sums, self.is_read = [0.0, 0.0, 0.0], False

    @classmethod
    def find(
        cls, original: Any, converted: Any, base: BaseModel, name: str, module: str, pair: LoraPair | None
    ) -> ComparedLayer:
        """The layer of the weight `name`, whose linear is called `module` in both models.

        Raises MismatchError when the original has no linear of this name.
        """
        modules = dict(original.named_modules())
        if module not in modules or not hasattr(modules[module], "weight"):
            raise MismatchError("is no layer of the reference", file=base.path, tensor=name)
        transposed = base.family.is_transposed(module_of(name))
        return cls(name, modules[module], converted.get_submodule(module), pair, transposed=transposed)

    def measure(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Add the squares for input x [..., in] and `output` [..., out] of the original's layer."""
        from torch.nn import functional

        self.is_read = True
        rows = x.reshape(-1, x.shape[-1])
        difference = self.converted.weight - self.original.weight
        base_difference = functional.linear(rows, difference.T if self._transposed else difference)
        update = self.compute_update(rows)
        bias = self.original.bias
        exact = (output if bias is None else output - bias).reshape(base_difference.shape)
        adapted_difference = base_difference if update is None else base_difference + update
        for place, values in enumerate((exact, base_difference, adapted_difference)):
            self._sums[place] += float(values.double().square().sum())

    def compute_update(self, x: torch.Tensor) -> torch.Tensor | None:
        """s·B·A·x [..., out] float32 for x [..., in]; None without an adapter. A pooled adapter (QA-LoRA) gets the sums
        of x over groups.
        """
        from torch.nn import functional

        if self._pair is None:
            return None
        size = self._pair.group_size
        pooled = x if size == 1 else x.reshape(*x.shape[:-1], x.shape[-1] // size, size).sum(-1)
        lora_A, lora_B = self._pair.lora_A.float(), self._pair.lora_B.float()
        return functional.linear(functional.linear(pooled, lora_A), lora_B) * self._pair.scaling

    def error(self) -> OutputError:
        """The sums over all rows so far. Raises NumericError when a sum is not finite."""
        if not all(map(math.isfinite, self._sums)):
            raise NumericError("its output is not finite on this text", tensor=self.name)
        return OutputError(*self._sums)


@contextmanager
def measure_layers(layers: Sequence[ComparedLayer]) -> Iterator[None]:
    """Add the squares of every layer at each forward of the original model, until the context ends."""

    def hook(layer: ComparedLayer) -> Callable[..., None]:
        return lambda module, args, kwargs, output: layer.measure(_first_argument(args, kwargs), output)

    with _hook_forwards([(layer.original, hook(layer)) for layer in layers]):
        yield


@contextmanager
def add_adapters(layers: Sequence[ComparedLayer]) -> Iterator[None]:
    """The converted model computes with the adapter until the context ends."""

    def hook(layer: ComparedLayer) -> Callable[..., Any]:
        def add(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
            update = layer.compute_update(_first_argument(args, kwargs))
            return output if update is None else output + update

        return add

    with _hook_forwards([(layer.converted, hook(layer)) for layer in layers]):
        yield


@contextmanager
def _hook_forwards(hooks: Sequence[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_argument(args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The input of a linear, passed by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))
