"""The contract of a method, and the table of methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from loftq_cli.quant.formats import QuantizedTensor, Quantizer
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.matrices import LoraPair, lora_pair
from loftq_cli.tensors.rows import Rows
from loftq_cli.tensors.specs import LoraSpec

if TYPE_CHECKING:
    import torch

    from loftq_cli.methods.weighting import Weighting


@dataclass(frozen=True, slots=True)
class Initialization:
    """What a method makes of one weight.

    quantization_error   relative Frobenius error of quantizing W alone, once: what any adapter has to start from; None
                         where `quantized` is just that
    iteration_errors     relative error with the adapter after each iteration and round, by Frobenius norms, or by what
                         errors cost with statistics; empty where nothing iterates
    best_iteration       which of them is returned, counted from 1; 0 where nothing iterates
    """

    quantized: QuantizedTensor
    lora: LoraPair
    quantization_error: float | None = None
    iteration_errors: tuple[float, ...] = ()
    best_iteration: int = 0


# How the alternation begins: with an adapter that adds nothing, as the paper's, or with the best one of the weights.
STARTS = ("zero", "principal")

# What is fitted: an adapter to quantization errors in turns, as in the paper, or codes, constants and adapter together.
FITS = ("loftq", "joint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """How a method looks for its result; of methods that do not iterate, only `rounds` means something.

    iterations   alternations of quantizing and fitting the adapter
    svd          the low-rank solver
    start, fit   see STARTS and FITS
    rounds       of refining codes and constants, after the alternations
    init         of QA-LoRA, see INITS
    """

    iterations: int = 1
    svd: str = "fast"
    start: str = STARTS[0]
    fit: str = FITS[0]
    rounds: int = 0
    init: str | None = None


class Method(Protocol):
    """`initialize` of a module in METHODS."""

    def __call__(
        self,
        weight: Rows,
        quantizer: Quantizer,
        lora: LoraSpec,
        fitting: Fitting,
        *,
        generator: torch.Generator,
        weighting: Weighting | None = None,
        sink: Callable[[slice, torch.Tensor], None] | None = None,
        workers: Workers = SERIAL,
    ) -> Initialization:
        """Of a weight [out, in]; random draws come from `generator` alone. `weighting` says what errors cost; else
        their squares. `sink` gets the codes instead of the result, of a method that looks at each row once.
        """
        ...


# How a QA-LoRA adapter starts: fitted to the group means of the quantization error, or adding nothing as in the paper.
INITS = ("residual", "standard")


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """One row of the table.

    adapter_dir          LoftQ's models on the hub keep their adapter in "loftq_init"; QLoRA follows
    iterates             whether --iterations means something; else each row is looked at once
    nbytes_per_weight    peak memory for each weight of a matrix, measured
    exact_nbytes         what an exact SVD adds for each weight, and for each entry of the smaller Gram matrix
    """

    module: str
    adapter_dir: str
    summary: str
    iterates: bool
    nbytes_per_weight: int
    exact_nbytes: tuple[int, int] = (0, 0)


METHODS: dict[str, MethodEntry] = {
    "loftq": MethodEntry(
        module="loftq_cli.methods.loftq",
        adapter_dir="loftq_init",
        summary="adapter fitted to the quantization error (arXiv 2310.08659)",
        iterates=True,
        nbytes_per_weight=9,
        exact_nbytes=(8, 32),
    ),
    "qalora": MethodEntry(
        module="loftq_cli.methods.qalora",
        adapter_dir="qalora_init",
        summary="adapter over pooled inputs that merges into the zero points (arXiv 2309.14717)",
        iterates=True,
        nbytes_per_weight=10,
    ),
    "qlora": MethodEntry(
        module="loftq_cli.methods.qlora",
        adapter_dir="qlora_init",
        summary="adapter that starts at zero (arXiv 2305.14314)",
        iterates=False,
        nbytes_per_weight=5,
    ),
}


def load_method(name: str) -> Method:
    """`initialize` of the method called `name`."""
    method: Method = import_module(METHODS[name].module).initialize
    return method


def zero_adapter(weight: Rows, lora: LoraSpec, generator: torch.Generator) -> LoraPair:
    """lora_A uniform as PEFT draws it (Kaiming, a = √5: bound 1/√inputs), lora_B zero: it adds nothing yet.

    lora_A has a column for every input, or for every pooled group of inputs. Drawn on the CPU, whatever the device is.
    """
    import torch

    out_features, inputs = weight.shape[0], weight.shape[1] // lora.group_size
    bound, dtype = 1.0 / math.sqrt(inputs), getattr(torch, lora.dtype)
    lora_A = torch.empty(lora.rank, inputs).uniform_(-bound, bound, generator=generator)
    lora_B = torch.zeros(out_features, lora.rank, dtype=dtype, device=weight.device)
    return lora_pair(lora_A.to(weight.device, dtype), lora_B, lora.scaling, lora.pooling)


def is_fitted(values: Mapping[str, Any]) -> bool:
    """Whether an adapter of this method and init, from a recipe or a provenance, holds its own base's error."""
    return bool(values["method"] == "loftq" or values.get("init") == "residual")
