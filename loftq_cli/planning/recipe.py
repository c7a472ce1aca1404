"""What the user asks for: one frozen record, from defaults < preset or TOML file < command-line flags.

Decides nothing about a particular checkpoint; needs no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loftq_cli.errors import UsageError
from loftq_cli.layouts.layout import LAYOUTS, default_layout
from loftq_cli.methods.method import FITS, INITS, METHODS, STARTS
from loftq_cli.planning.sizes import parse_size
from loftq_cli.quant.formats import FORMATS, SCALES
from loftq_cli.tensors.headers import MODEL_DTYPES
from loftq_cli.tensors.specs import POOLINGS

# How the low-rank step is solved, and how many alternations that asks for: cheap ones, more of them.
SVD_MODES = {"fast": 8, "faithful": 5, "exact": 5}
# The same of a joint fit, without statistics of the inputs and with them: where the error stops falling by much.
_JOINT_ITERATIONS, _WEIGHTED_ITERATIONS = 11, 2
_ROUNDS, _WEIGHTED_ROUNDS = 0, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """Other values for the layers whose module name `match` (a regular expression) finds. Later overrides win.

    A layer with another rank keeps the model's scaling unless its own alpha is given. Its quant_type is of the model's
    kind, integers or a codebook, and symmetric where the model's is.
    """

    match: str
    quantize: bool | None = None
    quant_type: str | None = None
    group_size: int | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    rank: int | None = None
    alpha: float | None = None


# Options that mean something for one kind of format or one method only, and their values there when not given.
_CODEBOOK_DEFAULTS = {"block_size": 64, "double_quant": True}
_AFFINE_DEFAULTS = {"group_size": 64, "symmetric": None, "scale_dtype": None}
_QALORA_DEFAULTS = {"pooling": POOLINGS[0], "init": INITS[0]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the bytes of a conversion. `alpha` of None means: equal to `rank`, scaling 1;
    `iterations` and `rounds` of None: as many as `fit`, `svd` and `calibration` are good for.

    What is None and belongs to the quant_type or the method is set to its default; what does not belong stays None.
    `scale_dtype` of None is what the layout's loaders expect. `calibration` is the path of what `loftq calibrate`
    wrote.
    """

    method: str = "loftq"
    quant_type: str = "nf4"
    block_size: int | None = None
    double_quant: bool | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    scale_dtype: str | None = None
    scales: str | None = None
    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    start: str | None = None
    fit: str | None = None
    iterations: int | None = None
    rounds: int | None = None
    svd: str = "fast"
    calibration: str | None = None
    pooling: str | None = None
    init: str | None = None
    adapter_dtype: str = "float32"
    seed: int = 0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layout: str | None = None
    max_shard_size: str = "5GB"
    override: tuple[Override, ...] = field(default=())

    def __post_init__(self) -> None:
        _choice("method", self.method, METHODS)
        _choice("quant_type", self.quant_type, FORMATS)
        _choice("svd", self.svd, SVD_MODES)
        _choice("adapter_dtype", self.adapter_dtype, MODEL_DTYPES)
        _at_least("rank", self.rank, 1)
        _at_least("seed", self.seed, 0)
        _positive("alpha", self.alpha)
        if self.layout is None:
            object.__setattr__(self, "layout", default_layout(self.quant_type))
        _choice("layout", self.layout, LAYOUTS)
        self._settle_format()
        self._settle_method()
        self._settle_fit()
        self._check_layout()
        for name in ("include", "exclude"):
            for pattern in getattr(self, name):
                _regex(name, pattern)
        parse_size(self.max_shard_size)
        for override in self.override:
            self._check_override(override)

    def _settle_format(self) -> None:
        is_affine = FORMATS[self.quant_type].is_affine
        self._settle(_CODEBOOK_DEFAULTS, not is_affine, f"quant_type {self.quant_type}")
        self._settle(_AFFINE_DEFAULTS, is_affine, f"quant_type {self.quant_type}")
        self._check_sizes(self.block_size, self.group_size)
        if not is_affine:
            return
        if self.scale_dtype is not None:
            _choice("scale_dtype", self.scale_dtype, MODEL_DTYPES)
        if self.symmetric is None:
            # Servers' 8-bit kernels read symmetric weights; with fewer bits a zero point is worth its space.
            has_offsets = self.method == "qalora" or LAYOUTS[str(self.layout)].zero_point == "float"
            is_mixed = any(override.quant_type or override.group_size for override in self.override)
            needs_none = is_mixed and LAYOUTS[str(self.layout)].mixed == "symmetric"
            object.__setattr__(self, "symmetric", (self.quant_type == "int8" or needs_none) and not has_offsets)

    def _settle_fit(self) -> None:
        """What is searched and fitted, and how often."""
        # QA-LoRA's standard start and QLoRA's add nothing, so there is nothing to fit.
        is_fitted = METHODS[self.method].iterates and self.init != "standard"
        where = f"method {self.method}" + (f" and init {self.init}" if self.init else "")
        self._settle({"start": None, "fit": "joint"}, is_fitted, where)
        is_joint = self.fit == "joint"
        is_weighted = self.calibration is not None
        if self.fit is not None:
            _choice("fit", self.fit, FITS)
            # Where errors count by outputs, the principal part of the weights is no better a start at 4 bits; and of
            # QA-LoRA's groups there is little that is principal.
            begins = is_joint and not is_weighted and self.method == "loftq"
            self._settle({"start": STARTS[begins]}, True, "")
            _choice("start", self.start, STARTS)
        has_search = is_joint or is_weighted
        self._settle({"scales": SCALES[has_search]}, True, "")
        _choice("scales", self.scales, SCALES)
        if self.iterations is None:
            joint = _WEIGHTED_ITERATIONS if is_weighted else _JOINT_ITERATIONS
            object.__setattr__(self, "iterations", joint if is_joint else SVD_MODES[self.svd])
        _at_least("iterations", self.iterations or 0, 1)
        has_rounds = is_joint or (is_weighted and not is_fitted)
        what = f"fit {self.fit}" if is_fitted else f"{where} without calibration"
        self._settle({"rounds": _WEIGHTED_ROUNDS if is_weighted else _ROUNDS}, has_rounds, what)
        _at_least("rounds", self.rounds or 0, 0)

    def _settle_method(self) -> None:
        self._settle(_QALORA_DEFAULTS, self.method == "qalora", f"method {self.method}")
        if self.method != "qalora":
            return
        _choice("pooling", self.pooling, POOLINGS)
        _choice("init", self.init, INITS)
        if not FORMATS[self.quant_type].is_affine:
            integers = ", ".join(name for name, row in FORMATS.items() if row.is_affine)
            raise UsageError(f"method qalora does not work with {self.quant_type}", hint=f"--quant-type {integers}")
        if self.symmetric:
            raise UsageError(
                "method qalora merges into zero points, and a symmetric base has none", hint="--asymmetric"
            )

    def _check_layout(self) -> None:
        row = LAYOUTS[str(self.layout)]
        if self.quant_type not in row.quant_types:
            holding = ", ".join(name for name, other in LAYOUTS.items() if self.quant_type in other.quant_types)
            raise UsageError(f"layout {self.layout} does not hold {self.quant_type}", hint=f"one of {holding}")
        if self.group_size is not None and row.group_sizes and self.group_size not in row.group_sizes:
            known = ", ".join(map(str, row.group_sizes))
            raise UsageError(f"layout {self.layout} does not hold groups of {self.group_size}", hint=f"one of {known}")
        if self.symmetric and row.zero_point == "float":
            raise UsageError(f"layout {self.layout} stores an offset for every group", hint="--asymmetric")
        if self.scale_dtype is not None and self.scale_dtype not in row.scale_dtypes:
            known = ", ".join(row.scale_dtypes)
            raise UsageError(f"layout {self.layout} has no {self.scale_dtype} scales", hint=f"one of {known}")

    def _settle(self, defaults: Mapping[str, Any], applies: bool, where: str) -> None:
        """Fill in what is None and applies. Raises UsageError for what is given and does not."""
        for name, default in defaults.items():
            value = getattr(self, name)
            if applies and value is None:
                object.__setattr__(self, name, default)
            elif not applies and value is not None:
                raise UsageError(f"{name} means nothing with {where}", hint=f"leave {name} out")

    def _check_override(self, override: Override) -> None:
        _regex("match", override.match)
        self._check_sizes(override.block_size, override.group_size)
        self._check_format_of(override)
        if override.double_quant is not None and FORMATS[self.quant_type].is_affine:
            raise UsageError(f"double_quant means nothing with quant_type {self.quant_type}")
        _positive("alpha", override.alpha)
        if override.rank is not None:
            _at_least("rank", override.rank, 1)

    def _check_format_of(self, override: Override) -> None:
        row, quant_type = LAYOUTS[str(self.layout)], override.quant_type
        if quant_type is not None:
            _choice("quant_type", quant_type, FORMATS)
            if FORMATS[quant_type].module != FORMATS[self.quant_type].module:
                what = f"an override has quant_type {quant_type} in a model of {self.quant_type}"
                raise UsageError(what, hint="integers go with integers, codebooks with codebooks")
            if quant_type not in row.quant_types:
                raise UsageError(f"layout {self.layout} does not hold {quant_type}, which an override asks for")
        if override.group_size in (None, self.group_size):
            return
        if row.group_sizes and override.group_size not in row.group_sizes:
            known = ", ".join(map(str, row.group_sizes))
            what = f"layout {self.layout} does not hold groups of {override.group_size}, which an override asks for"
            raise UsageError(what, hint=f"one of {known}")
        if self.method == "qalora":
            what = "method qalora pools inputs by one group size for all layers, and an override has another"
            raise UsageError(what, hint=f"group_size {self.group_size}")

    def _check_sizes(self, block_size: int | None, group_size: int | None) -> None:
        row = FORMATS[self.quant_type]
        for name, size, allowed in (
            ("block_size", block_size, row.block_sizes),
            ("group_size", group_size, row.group_sizes),
        ):
            if size is not None and size not in allowed:
                raise UsageError(
                    f"{name} {size} does not exist for {self.quant_type}",
                    hint=f"one of {', '.join(map(str, allowed))}" if allowed else f"leave {name} out",
                )

    @property
    def max_shard_nbytes(self) -> int:
        """`max_shard_size` in bytes."""
        return parse_size(self.max_shard_size)


def _choice(name: str, value: str | None, choices: Any) -> None:
    if value not in choices:
        raise UsageError(f"{name} {value!r} does not exist", hint=f"one of {', '.join(choices)}")


def _at_least(name: str, value: int, smallest: int) -> None:
    if value < smallest:
        raise UsageError(f"{name} must be at least {smallest}, not {value}")


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UsageError(f"{name} must be a positive number, not {value}")


def _regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{name} {pattern!r} is not a regular expression: {error}") from None
