"""The contract of a method, and the table of methods."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from loftq_cli.quant.formats import QuantizedTensor, Quantizer
from loftq_cli.tensors import LoraPair, LoraSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Initialization:
    """What a method makes of one weight.

    quantization_error   relative Frobenius error of quantizing W alone, once: what any adapter has to start from
    iteration_errors     relative Frobenius error with the adapter after each iteration; empty where nothing iterates
    best_iteration       which of them is returned, counted from 1; 0 where nothing iterates
    """

    quantized: QuantizedTensor
    lora: LoraPair
    quantization_error: float
    iteration_errors: tuple[float, ...]
    best_iteration: int


class Method(Protocol):
    """`initialize` of a module in METHODS."""

    def __call__(
        self,
        weight: torch.Tensor,
        quantizer: Quantizer,
        lora: LoraSpec,
        *,
        iterations: int,
        svd: str,
        generator: torch.Generator,
    ) -> Initialization:
        """`weight` is float32 [out, in]; random draws come from `generator` alone."""
        ...


# adapter_dir: LoftQ's models on the hub keep their adapter in "loftq_init"; QLoRA follows.
@dataclass(frozen=True, slots=True)
class MethodEntry:
    """One row of the table."""

    module: str
    adapter_dir: str
    summary: str


METHODS: dict[str, MethodEntry] = {
    "loftq": MethodEntry(
        "loftq_cli.methods.loftq", "loftq_init", "adapter fitted to the quantization error (arXiv 2310.08659)"
    ),
    "qlora": MethodEntry("loftq_cli.methods.qlora", "qlora_init", "adapter that starts at zero (arXiv 2305.14314)"),
}


def load_method(name: str) -> Method:
    """`initialize` of the method called `name`."""
    method: Method = import_module(METHODS[name].module).initialize
    return method
