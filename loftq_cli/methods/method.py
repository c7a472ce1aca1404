"""The contract of a method, and the table of methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

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
    """Base and adapter of one weight W, as a method initializes the two.

    quantization_error   relative Frobenius error of quantizing W alone, once; None where `quantized` is W alone
    iteration_errors     relative error with the adapter after each iteration and round: Frobenius norms, or costs by
                         statistics of the inputs; empty where nothing iterates
    best_iteration       the iteration that is returned, counted from 1; 0 where nothing iterates
    """

    quantized: QuantizedTensor
    lora: LoraPair
    quantization_error: float | None = None
    iteration_errors: tuple[float, ...] = ()
    best_iteration: int = 0


# How the alternation begins: with an adapter that adds nothing, as in the paper, or with the principal part of W.
STARTS = ("zero", "principal")

# Kinds of fit: quantization and adapter in turns, as in the paper, or codes, constants and adapter together.
FITS = ("loftq", "joint")
PAPER_FIT, JOINT_FIT = FITS

# Solvers of the low-rank step, and how many alternations suit each: a cheaper solver gets more.
SVD_MODES = {"fast": 8, "faithful": 5, "exact": 5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """How a method looks for base and adapter. Which fields mean something for a method stands in METHODS; the others
    have their defaults.

    iterations   alternations of quantizing and fitting the adapter
    svd          the low-rank solver
    start, fit   see STARTS and FITS
    rounds       of refining codes and constants, after the alternations
    init         how the adapter starts; None for a method with one start only
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
        """Base and adapter of a weight [out, in].

        quantizer   the number format
        lora        rank, scaling and dtype of the adapter
        generator   the source of every random draw
        weighting   the cost of an error; None: the sum of squares
        sink        receives the codes of each slab of rows, which the result then lacks; for methods that stream
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class InitEntry:
    """One way in which the adapter of a method starts.

    is_fitted   whether the adapter holds a part of the weights that its own base lacks, so that the adapter is wrong on
                every other base; else the adapter adds nothing before training
    takes       the options that mean something, of "fit", "start", "iterations", "svd", "rounds" and "calibration"
    """

    is_fitted: bool
    takes: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodEntry:
    """One row of the table: every fact about a method that other modules need.

    module               the module whose `initialize` is the method
    adapter_dir          folder of the adapter inside the output: LoftQ's models on the hub keep theirs in "loftq_init"
    summary              half a sentence for help texts and model cards
    linear_class         the class in `loftq_cli.nn` that trains the adapter
    inits                by the name of each way to start, the default first; None: a method has one way without a name
    is_pooled            whether the adapter reads groups of inputs pooled to one number: the base is then of integers
                         in groups of one size, with zero points
    draws_adapter        whether numbers of the adapter are drawn at random: the seed matters with every solver
    joint_start          what the joint fit begins with, without statistics of the inputs
    svd                  the solver by default
    iterations           alternations by default; None: as many as the fit and the solver are good for
    streams              whether `initialize` gives codes to a `sink`, since the method looks at each row once
    stacks               the fits that `stacked.py` makes of many equal matrices on a GPU; a method that fits nothing
                         has the fit of the paper
    nbytes_per_weight    peak memory for each weight of a matrix, measured
    exact_nbytes         what an exact SVD adds for each weight, and for each entry of the smaller Gram matrix
    """

    module: str
    adapter_dir: str
    summary: str
    linear_class: str
    inits: Mapping[str | None, InitEntry]
    nbytes_per_weight: int
    exact_nbytes: tuple[int, int] = (0, 0)
    is_pooled: bool = False
    draws_adapter: bool = False
    joint_start: str = "zero"
    svd: str = "fast"
    iterations: int | None = None
    streams: bool = False
    stacks: tuple[str, ...] = ()

    def is_fitted(self, init: str | None) -> bool:
        """Whether an adapter that starts by `init`, a key of `inits`, belongs to its own base only."""
        return self.inits[init].is_fitted


_FITTED = InitEntry(is_fitted=True, takes=frozenset({"fit", "start", "iterations", "svd", "rounds", "calibration"}))
_ZERO = InitEntry(is_fitted=False, takes=frozenset({"rounds", "calibration"}))

METHODS: dict[str, MethodEntry] = {
    "loftq": MethodEntry(
        module="loftq_cli.methods.loftq",
        adapter_dir="loftq_init",
        summary="adapter fitted to the quantization error (arXiv 2310.08659)",
        linear_class="LoftQLinear",
        inits={None: _FITTED},
        joint_start="principal",
        stacks=(PAPER_FIT,),
        nbytes_per_weight=9,
        exact_nbytes=(8, 32),
    ),
    "pissa": MethodEntry(
        module="loftq_cli.methods.pissa",
        adapter_dir="pissa_init",
        summary="adapter of the principal part of the weights, over the quantized rest (arXiv 2404.02948)",
        linear_class="LoftQLinear",
        inits={None: InitEntry(is_fitted=True, takes=frozenset({"iterations", "svd"}))},
        svd="faithful",
        iterations=1,
        nbytes_per_weight=11,
        exact_nbytes=(8, 32),
    ),
    "qalora": MethodEntry(
        module="loftq_cli.methods.qalora",
        adapter_dir="qalora_init",
        summary="adapter over pooled inputs that merges into the zero points (arXiv 2309.14717)",
        linear_class="QALoRALinear",
        # Fitted to the group means of the quantization error, or adding nothing as in the paper.
        inits={"residual": _FITTED, "standard": _ZERO},
        is_pooled=True,
        draws_adapter=True,
        nbytes_per_weight=10,
    ),
    "qlora": MethodEntry(
        module="loftq_cli.methods.qlora",
        adapter_dir="qlora_init",
        summary="adapter that starts at zero (arXiv 2305.14314)",
        linear_class="QLoRALinear",
        inits={None: _ZERO},
        draws_adapter=True,
        streams=True,
        stacks=(PAPER_FIT,),
        nbytes_per_weight=5,
    ),
}
DEFAULT_METHOD = next(iter(METHODS))

# Every way to start that has a name.
INITS = tuple(init for entry in METHODS.values() for init in entry.inits if init is not None)


def find_init(method: object, init: object) -> InitEntry | None:
    """What the table says of a method and a way to start, as a record of an adapter names the two; None for names that
    this version does not know.

    >>> find_init("qlora", None).is_fitted
    False
    >>> find_init("of tomorrow", None) is None
    True
    """
    if not isinstance(method, str) or not (init is None or isinstance(init, str)):
        return None
    entry = METHODS.get(method)
    return None if entry is None else entry.inits.get(init)


def load_method(name: str) -> Method:
    """`initialize` of the method called `name`."""
    method: Method = import_module(METHODS[name].module).initialize
    return method


def zero_adapter(weight: Rows, lora: LoraSpec, generator: torch.Generator) -> LoraPair:
    """The adapter that adds nothing: lora_A uniform as in PEFT (Kaiming, a = √5: bound 1/√inputs), lora_B zero.

    lora_A [r, inputs] has a column for every input, or for every pooled group of inputs. The draw is made on the CPU,
    so that every device gets equal numbers.
    """
    import torch

    out_features, inputs = weight.shape[0], weight.shape[1] // lora.group_size
    bound, dtype = 1.0 / math.sqrt(inputs), getattr(torch, lora.dtype)
    lora_A = torch.empty(lora.rank, inputs).uniform_(-bound, bound, generator=generator)
    lora_B = torch.zeros(out_features, lora.rank, dtype=dtype, device=weight.device)
    return lora_pair(lora_A.to(weight.device, dtype), lora_B, lora.scaling, lora.pooling)
