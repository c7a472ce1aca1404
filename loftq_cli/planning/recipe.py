"""The options of a conversion as three records: the requests of a file and of flags, the requests of an override for a
few layers, and the settled recipe for planning. No record depends on a checkpoint, and no record needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from loftq_cli.methods.method import METHODS, Fitting
from loftq_cli.planning.sizes import parse_size
from loftq_cli.tensors.specs import Pooling


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """Values for some layers in place of the model's values; None keeps the model's value. Later overrides win.

    match          regular expression; the override is for layers with a match anywhere in the module name
    quantize       False leaves the layers in full precision
    quant_type     number format; integers in a model of integers, symmetric like the model, or a codebook in a model of
                   codebooks
    group_size     columns with a common scale, for integers
    block_size     weights with a common absmax, for a codebook
    double_quant   whether absmax are 8-bit, for a codebook
    rank           columns of lora_B
    alpha          numerator of the scaling; None: a layer of uncommon rank keeps the model's scaling
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
    """The requests of a recipe file and of flags. None: no request, and `settle` chooses a value.

    The names of the fields are the keys of a recipe file, in the order of written files. `Recipe` and its parts explain
    the values.
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
    keep_base: float | None = None
    svd: str | None = None
    calibration: str | None = None
    text: tuple[str, ...] | None = None
    tokens: int | None = None
    context: int | None = None
    lines: bool | None = None
    sequential: bool | None = None
    pooling: str | None = None
    init: str | None = None
    adapter_dtype: str | None = None
    seed: int | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    layout: str | None = None
    task: str | None = None
    num_labels: int | None = None
    max_shard_size: str | None = None
    override: tuple[Override, ...] | None = None


@dataclass(frozen=True, slots=True)
class CodebookOptions:
    """The number format of a base in a codebook.

    quant_type     "nf4" or "fp4"
    block_size     weights with a common absmax
    double_quant   whether absmax are 8-bit, in blocks of their own
    """

    quant_type: str
    block_size: int
    double_quant: bool


@dataclass(frozen=True, slots=True)
class AffineOptions:
    """The number format of a base in integers.

    quant_type    "int2", "int3", "int4" or "int8"
    group_size    neighbouring columns of a row with a common scale
    symmetric     whether groups have no zero points
    scale_dtype   dtype of the scales; None: the default dtype of the container, or else the dtype of the model
    """

    quant_type: str
    group_size: int
    symmetric: bool
    scale_dtype: str | None


FormatOptions: TypeAlias = CodebookOptions | AffineOptions


SELF, RANDOM = "self", "random"  # texts without a file: by the model itself, and of random tokens
WEIGHTS, NONE = "weights", "none"  # calibrations without a directory: from the weights alone, and no statistics
DEFAULT_TEXT_TOKENS = 8192
TEXT_OPTIONS = ("text", "tokens", "context", "lines", "sequential")  # names in RecipeFields


@dataclass(frozen=True, slots=True)
class TextOptions:
    """The text that a model reads during the conversion, for statistics of the inputs of the layers.

    names        SELF, RANDOM, or paths of files and folders
    tokens       most tokens to read, over all windows
    context      tokens of a window; None: the model's longest input, at most 512, and 128 for SELF
    lines        whether each line of a file is a text
    sequential   whether a block reads the outputs of the converted blocks before; otherwise of the original blocks
    """

    names: tuple[str, ...]
    tokens: int = DEFAULT_TEXT_TOKENS
    context: int | None = None
    lines: bool = False
    sequential: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A settled recipe: every option that decides the bytes of a conversion. `settle` accepts consistent options only.

    method           a key of METHODS
    quant            the number format of layers without an override
    layout           the container of the base, a key of LAYOUTS
    scales           the choice of block and group constants, a member of SCALES
    rank             columns of lora_B
    alpha            lora_alpha; None: equal to the recipe's rank
    rslora           whether the scaling is alpha / sqrt(rank) in place of alpha / rank
    fitting          the method's search for base and adapter
    pooling          the adapter's pooling of inputs; None: the adapter reads every input
    calibration      path of the statistics from `loftq calibrate`, or WEIGHTS for statistics from the weights alone;
                     None: no such statistics
    text             the text that the model reads during the conversion; None without a text
    adapter_dtype    dtype of lora_A and lora_B
    seed             start of all random draws
    include          regular expressions; matching modules replace the default choice of layers
    exclude          regular expressions; matching modules stay in full precision
    task             PEFT's task type, a member of TASKS; None for the type of the model's class
    num_labels       labels of a classifier; None for the number in the model's config
    max_shard_size   largest size of a shard of the base, as text: "5GB"
    override         values for some layers in place of the model's values
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
    text: TextOptions | None
    adapter_dtype: str
    seed: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    task: str | None
    num_labels: int | None
    max_shard_size: str
    override: tuple[Override, ...]

    @property
    def is_weighted(self) -> bool:
        """Whether statistics of the layers' inputs weight the errors; otherwise all errors count alike."""
        return self.calibration is not None or self.text is not None

    @property
    def init(self) -> str | None:
        """The way of starting the adapter; None for a method with a single way."""
        return self.fitting.init

    @property
    def is_principal(self) -> bool:
        """Whether the adapter starts as the principal part of the weights: the factors are then large."""
        return METHODS[self.method].inits[self.init].is_principal or self.fitting.start == "principal"

    @property
    def quant_type(self) -> str:
        """The number format of layers without an override."""
        return self.quant.quant_type

    @property
    def max_shard_nbytes(self) -> int:
        """`max_shard_size` in bytes."""
        return parse_size(self.max_shard_size)
