"""The options of a conversion as three records: what a file and flags ask for, what an override asks for a few layers,
and the settled recipe that planning reads. No record decides anything about a particular checkpoint; none needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from loftq_cli.methods.method import Fitting
from loftq_cli.planning.sizes import parse_size
from loftq_cli.tensors.specs import Pooling


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """Other values for the layers whose module name `match` (a regular expression) finds. Later overrides win.

    A layer with another rank keeps the model's scaling unless the override gives an alpha. The quant_type of an
    override is of the model's kind, integers or a codebook, and symmetric where the model's is.
    """

    match: str
    quantize: bool | None = None
    quant_type: str | None = None
    group_size: int | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    rank: int | None = None
    alpha: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeFields:
    """What a recipe file and flags ask for. The names of the fields are the keys of the file; their order is the order
    of the lines that the tool writes. None: nobody asked, and `settle` chooses.
    """

    method: str | None = None
    quant_type: str | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    scale_dtype: str | None = None
    scales: str | None = None
    rank: int | None = None
    alpha: float | None = None
    rslora: bool | None = None
    start: str | None = None
    fit: str | None = None
    iterations: int | None = None
    rounds: int | None = None
    svd: str | None = None
    calibration: str | None = None
    pooling: str | None = None
    init: str | None = None
    adapter_dtype: str | None = None
    seed: int | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    layout: str | None = None
    max_shard_size: str | None = None
    override: tuple[Override, ...] | None = None


@dataclass(frozen=True, slots=True)
class CodebookOptions:
    """The number format of a base in a codebook: blocks of `block_size` weights share one absmax."""

    quant_type: str
    block_size: int
    double_quant: bool


@dataclass(frozen=True, slots=True)
class AffineOptions:
    """The number format of a base in integers: groups of `group_size` weights share one scale. A `scale_dtype` of None
    is the dtype that loaders of the layout expect, which can depend on the model.
    """

    quant_type: str
    group_size: int
    symmetric: bool
    scale_dtype: str | None


FormatOptions: TypeAlias = CodebookOptions | AffineOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A settled recipe: everything that decides the bytes of a conversion, each option with a value. `settle` makes
    recipes and has checked that the options belong together.

    alpha         lora_alpha; None: equal to the rank of each layer, scaling 1
    fitting       how the method looks for base and adapter
    pooling       how the adapter pools inputs; None: the adapter reads every input
    calibration   the path of what `loftq calibrate` wrote; None: each weight counts the same
    """

    method: str
    quant: FormatOptions
    layout: str
    scales: str
    rank: int
    alpha: float | None
    rslora: bool
    fitting: Fitting
    pooling: Pooling | None
    calibration: str | None
    adapter_dtype: str
    seed: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    max_shard_size: str
    override: tuple[Override, ...]

    @property
    def init(self) -> str | None:
        """How the adapter of the method starts; None where a method has one start only."""
        return self.fitting.init

    @property
    def quant_type(self) -> str:
        """The number format of layers without an override."""
        return self.quant.quant_type

    @property
    def max_shard_nbytes(self) -> int:
        """`max_shard_size` in bytes."""
        return parse_size(self.max_shard_size)
