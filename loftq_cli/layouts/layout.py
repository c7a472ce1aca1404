"""The contract of an output container, and the table of containers. Planning needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from loftq_cli.quant.formats import QuantizedTensor, QuantSpec
from loftq_cli.tensors import OutTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One quantized weight as a container holds it.

    name          its tensor name, "....weight"
    shape         [out, in] of the matrix
    spec          its number format
    dtype         what a loader decodes to
    transposed    the source stores [in, out] (GPT-2's Conv1D)
    """

    name: str
    shape: tuple[int, int]
    spec: QuantSpec
    dtype: str
    transposed: bool


@dataclass(frozen=True, slots=True)
class Fit:
    """The specification a container can hold a matrix in, or None; and why it is not the one asked for."""

    spec: QuantSpec | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a container's config needs to know of the whole model; module names as the loaded model has them."""

    dtype: str
    spec: QuantSpec
    quantized_modules: Sequence[str]
    full_precision_modules: Sequence[str]


class Layout(Protocol):
    """The functions of a module in LAYOUTS."""

    QUANTIZED_ON_DISK: bool

    def fit(self, spec: QuantSpec, shape: tuple[int, int]) -> Fit:
        """What stock loaders read right for a matrix of this shape."""
        ...

    def planned(self, matrix: StoredMatrix) -> tuple[OutTensor, ...]:
        """Names, dtypes and shapes of the tensors that `pack` will give."""
        ...

    def pack(self, matrix: StoredMatrix, quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
        """The tensors to write, by name."""
        ...

    def model_config(self, config: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """config.json of the output."""
        ...


LAYOUTS: dict[str, str] = {
    "bitsandbytes": "loftq_cli.layouts.bitsandbytes",
    "dense": "loftq_cli.layouts.dequantized",
}

Loader = Callable[[str], "torch.Tensor"]


def load_layout(name: str) -> Layout:
    """The container called `name`."""
    return cast(Layout, import_module(LAYOUTS[name]))
