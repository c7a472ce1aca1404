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
    """Base and adapter of a weight W [out, in], as a method initializes the two.

    quantized            the base Q
    lora                 the adapter
    quantization_error   relative Frobenius error of quantizing W once, without an adapter; None if no adapter
                         is fitted
    iteration_errors     relative error with the adapter after each iteration and round: by Frobenius norms, or by costs
                         with statistics of the inputs; empty for a method without iterations. `Fitting.keep_base`
                         mixes the squared error of the base into the squared errors
    best_iteration       number of the returned iteration or round, counted from 1; 0 if no iteration is returned
    """

    quantized: QuantizedTensor
    lora: LoraPair
    quantization_error: float | None = None
    iteration_errors: tuple[float, ...] = ()
    best_iteration: int = 0


# How the alternation begins: with an adapter that adds nothing, as in the LoftQ paper, or with the principal part of W.
STARTS = ("zero", "principal")

# Kinds of fit: quantization and adapter in turns, as in the LoftQ paper, or codes, constants and adapter together.
FITS = ("loftq", "joint")
PAPER_FIT, JOINT_FIT = FITS

# Solvers of the low-rank step, and how many alternations suit each: a cheaper solver gets more.
SVD_MODES = {"fast": 8, "faithful": 5, "exact": 5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """How a method searches for base and adapter. A method reads the fields that METHODS lists for the method; all
    further fields have defaults.

    iterations   number of alternations of quantizing and fitting the adapter
    svd          the low-rank solver, a key of SVD_MODES
    start        how the alternation begins, see STARTS
    fit          the kind of fit, see FITS
    rounds       number of rounds that refine codes and constants, after the alternations
    keep_base    share of the cost that counts the base alone, from 0 to 1: a step is judged by
                 (1 − keep_base)·cost(base + adapter) + keep_base·cost(base). 0 counts only base + adapter; 1 quantizes
                 as if there were no adapter, and fits the adapter afterwards
    init         how the adapter starts, a key of `MethodEntry.inits`; None for a method with a single start
    """

    iterations: int = 1
    svd: str = "fast"
    start: str = STARTS[0]
    fit: str = FITS[0]
    rounds: int = 0
    keep_base: float = 0.0
    init: str | None = None

    @property
    def adapter_share(self) -> float:
        """γ = 1 − keep_base: the part of the adapter that the base makes room for, section 8 of the derivation.

        >>> Fitting(keep_base=0.25).adapter_share
        0.75
        """
        return 1.0 - self.keep_base


class Method(Protocol):
    """The signature of `initialize` in every module of METHODS."""

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
        """Compute base and adapter of a weight.

        weight      the original W [out, in]
        quantizer   the number format of the base
        lora        rank, scaling and dtype of the adapter
        fitting     how to search for base and adapter
        generator   the source of every random draw, on the CPU
        weighting   the cost of an error; None means the sum of squares
        sink        receives the codes of each slab of rows, and the result has no codes; for methods that stream
        workers     the threads
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class InitEntry:
    """A way in which the adapter of a method starts.

    is_fitted      whether the adapter holds a part of the weights that the base lacks, so the adapter is wrong beside
                   any different base; if false, the adapter adds nothing before training
    takes          the options with a meaning, out of "fit", "start", "iterations", "svd", "rounds", "keep_base" and
                   "calibration"
    is_principal   whether the adapter starts as the principal part of W, whatever the options
    """

    is_fitted: bool
    takes: frozenset[str]
    is_principal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodEntry:
    """A row of METHODS: every fact about a method that further modules need.

    module               the module whose `initialize` is the method
    adapter_dir          folder of the adapter inside the output: LoftQ's models on the hub have "loftq_init"
    summary              half a sentence for help texts and model cards
    linear_class         the class in `loftq_cli.nn` that trains the adapter
    inits                the ways to start by name, the default first; None names the only way of a method
    is_pooled            whether the adapter reads inputs pooled by groups: the base then has integer codes, groups of a
                         single size, and zero points
    draws_adapter        whether numbers of the adapter are drawn at random, so the seed matters with every solver
    svd                  the default solver
    iterations           the default number of alternations; None leaves the number to the fit and the solver
    streams              whether `initialize` passes codes to a `sink`: the method reads each row once
    stacks               the fits that `stacked.py` computes for many equal matrices on a GPU; PAPER_FIT stands for a
                         method that fits nothing
    nbytes_per_weight    peak memory in bytes per weight of a matrix, measured
    exact_nbytes         bytes that an exact SVD adds per weight, and per entry of the smaller Gram matrix
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
    svd: str = "fast"
    iterations: int | None = None
    streams: bool = False
    stacks: tuple[str, ...] = ()

    def is_fitted(self, init: str | None) -> bool:
        """Whether an adapter that starts by `init` fits a single base. Raises KeyError unless `init` is in `inits`."""
        return self.inits[init].is_fitted


_FITTED = InitEntry(
    is_fitted=True, takes=frozenset({"fit", "start", "iterations", "svd", "rounds", "keep_base", "calibration"})
)
_ZERO = InitEntry(is_fitted=False, takes=frozenset({"rounds", "calibration"}))

METHODS: dict[str, MethodEntry] = {
    "loftq": MethodEntry(
        module="loftq_cli.methods.loftq",
        adapter_dir="loftq_init",
        summary="adapter fitted to the quantization error (arXiv 2310.08659)",
        linear_class="LoftQLinear",
        inits={None: _FITTED},
        stacks=(PAPER_FIT,),
        nbytes_per_weight=9,
        exact_nbytes=(8, 32),
    ),
    "pissa": MethodEntry(
        module="loftq_cli.methods.pissa",
        adapter_dir="pissa_init",
        summary="adapter of the principal part of the weights, over the quantized rest (arXiv 2404.02948)",
        linear_class="LoftQLinear",
        inits={None: InitEntry(is_fitted=True, takes=frozenset({"iterations", "svd"}), is_principal=True)},
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
        # "residual" fits the group means of the quantization error; "standard" adds nothing, as in the paper.
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

# The names of all ways to start.
INITS = tuple(init for entry in METHODS.values() for init in entry.inits if init is not None)


def find_init(method: object, init: object) -> InitEntry | None:
    """The entry of METHODS for the names of a method and of a start in a record of an adapter; None for names that the
    table lacks, and for values that are no names.

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
    """The function `initialize` of the method `name`. Raises KeyError unless `name` is in METHODS.

    >>> load_method("qlora").__module__
    'loftq_cli.methods.qlora'
    """
    method: Method = import_module(METHODS[name].module).initialize
    return method


def zero_adapter(weight: Rows, lora: LoraSpec, generator: torch.Generator) -> LoraPair:
    """The adapter that adds nothing: lora_A uniform as in PEFT (Kaiming, a = √5: bound 1/√inputs), lora_B zero.

    weight [out, in] gives shape and device. lora_A [r, inputs] has a column for every input, or for every pooled group
    of inputs; lora_B is [out, r]; both have the dtype of `lora`. The CPU draws, so every device gets equal numbers.

    >>> import torch
    >>> from loftq_cli.tensors.rows import TensorRows
    >>> pair = zero_adapter(TensorRows(torch.ones(8, 4)), LoraSpec(rank=2, alpha=6.0), torch.Generator())
    >>> tuple(pair.lora_A.shape), bool(pair.lora_B.any()), pair.scaling
    ((2, 4), False, 3.0)
    """
    import torch

    out_features, inputs = weight.shape[0], weight.shape[1] // lora.group_size
    bound, dtype = 1.0 / math.sqrt(inputs), getattr(torch, lora.dtype)
    lora_A = torch.empty(lora.rank, inputs, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    lora_B = torch.zeros(out_features, lora.rank, dtype=dtype, device=weight.device)
    return lora_pair(lora_A.to(weight.device, dtype), lora_B, lora.scaling, lora.pooling)
