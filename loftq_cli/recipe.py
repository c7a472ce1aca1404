"""What the user asks for: one frozen record, from defaults < preset or TOML file < command-line flags.

Decides nothing about a particular checkpoint; needs no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import reprlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from loftq_cli.errors import StorageError, UsageError, printable
from loftq_cli.layouts.layout import LAYOUTS, default_layout
from loftq_cli.methods.method import FITS, INITS, METHODS, STARTS
from loftq_cli.quant.formats import FORMATS, SCALES
from loftq_cli.tensors import MODEL_DTYPES, POOLINGS

# How the low-rank step is solved, and how many alternations that asks for: cheap ones, more of them.
SVD_MODES = {"fast": 8, "faithful": 5, "exact": 5}

# The same of a joint fit, without statistics of the inputs and with them: where the error stops falling by much.
_JOINT_ITERATIONS, _WEIGHTED_ITERATIONS = 11, 2
_ROUNDS, _WEIGHTED_ROUNDS = 0, 2

_MAX_INT = 2**63 - 1  # TOML's own limit, which Python's reader leaves open
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


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


def resolve_recipe(source: str | None, flags: Mapping[str, Any], *, mixes: bool = False) -> Recipe:
    """Defaults < `source` (a preset's name or a TOML file) < `flags` (field name -> value; None is not given).

    With `mixes`, defaults are those of a model whose layers have several formats, though no override says so yet. Where
    a flag names another quant_type or method, what `source` says of the one that it replaces goes with it.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    values = {} if source is None else _read_recipe(source)
    outdated = _outdated(values, given)
    values["override"] = tuple(
        _without(override, outdated | _changed_family(override, given)) for override in values.get("override", ())
    )
    merged = {**{name: value for name, value in values.items() if name not in outdated}, **given}
    recipe = Recipe(**merged)
    if mixes and "symmetric" not in merged and recipe.symmetric is False:
        return replace(recipe, symmetric=recipe.method != "qalora" and LAYOUTS[str(recipe.layout)].mixed == "symmetric")
    return recipe


def _without(override: Override, names: set[str]) -> Override:
    gone = names.intersection(field.name for field in dataclasses.fields(Override))
    nothing: dict[str, Any] = dict.fromkeys(gone)
    return replace(override, **nothing)


def _changed_family(override: Override, given: Mapping[str, Any]) -> set[str]:
    """The name of an override's quant_type where `given` names one of the other kind for the model."""
    model, own = FORMATS.get(given.get("quant_type", "")), FORMATS.get(override.quant_type or "")
    return {"quant_type"} if model and own and model.is_affine != own.is_affine else set()


def _outdated(values: Mapping[str, Any], given: Mapping[str, Any]) -> set[str]:
    """Names of options that mean nothing any more once `given` has changed the format or the method of `values`."""
    names: set[str] = set()
    if (quant_type := given.get("quant_type")) in FORMATS:
        names |= (_CODEBOOK_DEFAULTS if FORMATS[quant_type].is_affine else _AFFINE_DEFAULTS).keys()
        layout = LAYOUTS.get(values.get("layout", ""))
        if layout is not None and quant_type not in layout.quant_types:
            names.add("layout")
    if given.get("method", "qalora") != "qalora":
        names |= _QALORA_DEFAULTS.keys()
    # How often something is done, and from where, was meant for the fit that was named beside it.
    changed = {n for n in ("method", "init", "fit", "calibration") if n in given and given[n] != values.get(n)}
    if changed:
        names |= {"start", "rounds", "iterations", "scales"}
    if changed & {"method", "init"}:
        names.add("fit")
    return names


def preset_directory() -> Path:
    """Where the packaged presets lie: inside the package, or beside it in a source tree."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def presets() -> dict[str, str]:
    """Name of each preset -> the first line of its comment."""
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for path in sorted(preset_directory().glob("*.toml"))
    }


def recipe_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML that `--recipe` reads back to an equal one."""
    lines = []
    for name, value in _set_fields(recipe).items():
        if name != "override":
            lines.append(f"{name} = {_toml_value(value)}")
    for override in recipe.override:
        lines.append("\n[[override]]")
        lines += [f"{name} = {_toml_value(value)}" for name, value in _set_fields(override).items()]
    return "\n".join(lines) + "\n"


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as JSON values; what is None is left out."""
    values = _set_fields(recipe)
    values["override"] = [_set_fields(override) for override in recipe.override]
    return values


def parse_size(text: str, name: str = "max_shard_size", least: int = 10**6) -> int:
    """Bytes of "5GB", "500 MB", "1GiB" or "1000000". Raises UsageError for anything else, and for less than `least`, in
    which `name` is what has the size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise UsageError(f"{text!r} is not a size", hint="write it like 5GB or 500MB")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size > _MAX_INT:
        raise UsageError(f"{printable(text, 80)} is larger than any disk", hint="write it like 5GB or 500MB")
    nbytes = int(size)
    if nbytes < least:
        raise UsageError(f"{name} {text} is less than 1 MB", hint="a whole tensor has to go in anyway")
    return nbytes


def _read_recipe(source: str) -> dict[str, Any]:
    path = preset_directory() / f"{source}.toml" if source in presets() else Path(source)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(
            f"no recipe {source!r}", hint=f"a TOML file, or one of the presets {', '.join(presets())}"
        ) from None
    except OSError as error:
        raise StorageError(error.strerror or "cannot be read", file=path) from None
    try:
        table = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # beside its own, that of a number with thousands of digits
        raise UsageError(f"not valid TOML: {error}", file=path) from None
    overrides = table.pop("override", [])
    if not isinstance(overrides, list) or not all(isinstance(entry, dict) for entry in overrides):
        raise UsageError("override must be a list of tables", file=path, hint="write [[override]]")
    values = _typed(Recipe, table, path)
    values["override"] = tuple(_override(entry, path) for entry in overrides)
    return values


def _override(entry: dict[str, Any], path: Path) -> Override:
    if "match" not in entry:
        raise UsageError("an [[override]] has no match", file=path, hint="match = 'regular expression'")
    return Override(**_typed(Override, entry, path))


def _typed(record: type, table: dict[str, Any], path: Path) -> dict[str, Any]:
    """`table` with its keys and types checked against the fields of `record`."""
    hints = get_type_hints(record)
    values = {}
    for name, value in table.items():
        key = name.replace("-", "_")
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            raise UsageError(
                f"unknown key {name}",
                file=path,
                hint=f"did you mean {near[0]}?" if near else f"known: {', '.join(hints)}",
            )
        values[key] = _convert(value, hints[key], name, path)
    return values


def _convert(value: Any, hint: Any, name: str, path: Path) -> Any:
    wanted = [kind for kind in get_args(hint) if kind is not type(None)] if type(None) in get_args(hint) else [hint]
    kind = wanted[0]
    if kind == tuple[str, ...]:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UsageError(f"{name} must be a list of strings", file=path)
    if type(value) is int and abs(value) > _MAX_INT:
        raise UsageError(f"{name} is a number of more than 64 bits", file=path)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"{name} must be {_KIND_NAMES[kind]}, not {reprlib.repr(value)}", file=path)
    return value


_KIND_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def _set_fields(record: Recipe | Override) -> dict[str, Any]:
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return {name: value for name, value in values.items() if value is not None}


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    # JSON strings, numbers and booleans are TOML too.
    return json.dumps(value, ensure_ascii=False)


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
