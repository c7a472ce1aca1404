"""Requested options become a settled recipe: every option gets a value, and a meaningless option is an error. The row
of a method in METHODS lists the meaningful options.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from loftq_cli.checkpoint.patterns import check_expression
from loftq_cli.errors import UsageError, printable
from loftq_cli.layouts.layout import LAYOUTS, default_layout
from loftq_cli.methods.method import (
    DEFAULT_METHOD,
    FITS,
    JOINT_FIT,
    METHODS,
    PAPER_FIT,
    STARTS,
    SVD_MODES,
    Fitting,
    MethodEntry,
)
from loftq_cli.planning.format_options import check_choice, check_layout, check_sizes, refuse, settle_format
from loftq_cli.planning.recipe import AffineOptions, CodebookOptions, FormatOptions, Override, Recipe, RecipeFields
from loftq_cli.planning.sizes import parse_size
from loftq_cli.quant.formats import FORMATS, SCALES
from loftq_cli.tensors.headers import MODEL_DTYPES
from loftq_cli.tensors.specs import POOLINGS, Pooling

# Alternations of a joint fit, without input statistics and with statistics: more alternations reduce the error little.
_JOINT_ITERATIONS, _WEIGHTED_ITERATIONS = 11, 2
_ROUNDS, _WEIGHTED_ROUNDS = 0, 2

# Options of every written recipe file, even without a meaning. A file may repeat the value; a flag may not.
_RECORDED: dict[str, Any] = {"iterations": 8, "svd": "fast", "seed": 0}


def settle(fields: RecipeFields, typed: Collection[str] = ()) -> Recipe:
    """Settle a recipe: give every option a value.

    fields   the requested options; None for an option without a request
    typed    names of options from the command line. A meaningless flag is an error with any value; a file may repeat
             the values of every written recipe file.

    Raises UsageError for an unknown value, for contradictory options, and for an option that has no meaning beside the
    remaining options; the hint names the remedy.

    >>> settle(RecipeFields(rank=8)).fitting.fit
    'joint'
    >>> settle(RecipeFields(method="qlora", iterations=50))
    Traceback (most recent call last):
    loftq_cli.errors.UsageError: iterations means nothing with method qlora (leave iterations out)
    """
    method, quant_type = fields.method or DEFAULT_METHOD, fields.quant_type or "nf4"
    check_choice("method", method, METHODS)
    fields = replace(fields, method=method, svd=fields.svd or METHODS[method].svd)
    rank, seed = _default(fields.rank, 16), _default(fields.seed, 0)
    adapter_dtype = fields.adapter_dtype or "float32"
    check_choice("quant_type", quant_type, FORMATS)
    check_choice("svd", fields.svd, SVD_MODES)
    check_choice("adapter_dtype", adapter_dtype, MODEL_DTYPES)
    _check_at_least("rank", rank, 1)
    _check_at_least("seed", seed, 0)
    _check_positive("alpha", fields.alpha)
    layout = fields.layout or default_layout(quant_type)
    check_choice("layout", layout, LAYOUTS)
    quant = settle_format(fields, quant_type, layout, typed)
    pooling, init = _settle_method(fields, METHODS[method], quant, typed)
    fitting = _settle_fitting(fields, METHODS[method], init, typed)
    scales = fields.scales or SCALES[fitting.fit == JOINT_FIT or fields.calibration is not None]
    check_choice("scales", scales, SCALES)
    check_layout(quant, layout)
    recipe = Recipe(
        method=method,
        quant=quant,
        layout=layout,
        scales=scales,
        rank=rank,
        alpha=fields.alpha,
        rslora=_default(fields.rslora, False),
        fitting=fitting,
        pooling=pooling,
        calibration=fields.calibration,
        adapter_dtype=adapter_dtype,
        seed=seed,
        include=fields.include or (),
        exclude=fields.exclude or (),
        max_shard_size=fields.max_shard_size or "5GB",
        override=fields.override or (),
    )
    _check_texts(recipe)
    return recipe


def make_recipe(**fields: Any) -> Recipe:
    """Settle a recipe from keyword arguments, the fields of RecipeFields. Raises UsageError like `settle`.

    >>> make_recipe(method="qlora", rank=8).quant_type
    'nf4'
    """
    return settle(RecipeFields(**fields))


def revise(recipe: Recipe, **fields: Any) -> Recipe:
    """Replace some options of `recipe`, and settle the result again. Raises UsageError like `settle`.

    fields   replacements, by the names of RecipeFields; None lets `settle` choose

    >>> revise(make_recipe(rank=8), rank=4).rank
    4
    """
    return settle(replace(fields_of(recipe), **fields))


def fields_of(recipe: Recipe) -> RecipeFields:
    """The options of a settled recipe under the keys of a recipe file; `settle` makes an equal recipe from the fields.

    Meaningless options are None, but for iterations, svd and seed: every written recipe file has a value.

    >>> fields_of(make_recipe(method="qlora")).fit is None
    True
    """
    fitting, quant, takes = recipe.fitting, recipe.quant, METHODS[recipe.method].inits[recipe.init].takes
    values = {name: getattr(fitting, name) if name in takes else None for name in ("start", "fit", "rounds")}
    if not _has_rounds(takes, fitting.fit, is_weighted=recipe.calibration is not None):
        values["rounds"] = None
    values["keep_base"] = fitting.keep_base or None  # the default stays out of files
    values |= {name: getattr(fitting, name) if name in takes else _RECORDED[name] for name in ("iterations", "svd")}
    if isinstance(quant, CodebookOptions):
        values |= {"block_size": quant.block_size, "double_quant": quant.double_quant}
    else:
        values |= {"group_size": quant.group_size, "symmetric": quant.symmetric, "scale_dtype": quant.scale_dtype}
    return RecipeFields(
        method=recipe.method,
        quant_type=recipe.quant_type,
        scales=recipe.scales,
        rank=recipe.rank,
        alpha=recipe.alpha,
        rslora=recipe.rslora,
        calibration=recipe.calibration,
        pooling=None if recipe.pooling is None else recipe.pooling.convention,
        init=recipe.init,
        adapter_dtype=recipe.adapter_dtype,
        seed=recipe.seed,
        include=recipe.include,
        exclude=recipe.exclude,
        layout=recipe.layout,
        max_shard_size=recipe.max_shard_size,
        override=recipe.override,
        **values,
    )


def _settle_method(
    fields: RecipeFields, entry: MethodEntry, quant: FormatOptions, typed: Collection[str]
) -> tuple[Pooling | None, str | None]:
    """Settle the pooling of inputs by the adapter, and the start of the adapter."""
    setting = f"method {fields.method}"
    if fields.pooling is not None and not entry.is_pooled:
        refuse("pooling", setting, typed)
    if fields.init is not None and None in entry.inits:
        refuse("init", setting, typed)
    init = fields.init or next(iter(entry.inits))
    if init is not None:
        check_choice("init", init, [name for name in entry.inits if name is not None])
    if not entry.is_pooled:
        return None, init
    convention = fields.pooling or POOLINGS[0]
    check_choice("pooling", convention, POOLINGS)
    if not isinstance(quant, AffineOptions):
        integers = ", ".join(name for name, row in FORMATS.items() if row.is_affine)
        raise UsageError(f"{setting} does not work with {quant.quant_type}", hint=f"--quant-type {integers}")
    if quant.symmetric:
        raise UsageError(f"{setting} merges into zero points, and a symmetric base has none", hint="--asymmetric")
    return Pooling(convention, quant.group_size), init


def _settle_fitting(fields: RecipeFields, entry: MethodEntry, init: str | None, typed: Collection[str]) -> Fitting:
    """Settle fit, solver and counts: requested values, or defaults for the method, the fit and a calibration."""
    takes = entry.inits[init].takes
    setting = f"method {fields.method}" + (f" and init {init}" if init else "")
    for name in ("start", "fit", "iterations", "keep_base", "svd", "calibration"):
        if name not in takes:
            _refuse_unless_recorded(fields, name, setting, typed)
    if "svd" in takes and fields.svd == "exact" and not entry.draws_adapter:
        _refuse_unless_recorded(fields, "seed", "svd exact, where nothing is drawn", typed)
    fit = (fields.fit or JOINT_FIT) if "fit" in takes else PAPER_FIT
    check_choice("fit", fit, FITS)
    is_joint, is_weighted = fit == JOINT_FIT, fields.calibration is not None
    keep_base = _settle_keep_base(fields, typed)
    # Under a calibration, errors count by outputs: the principal part of the weights is no better a start at 4 bits.
    # A base that counts alone has to hold the principal part: from 0.05 on, measured, zero leaves less of the cost.
    start = fields.start or (entry.joint_start if is_joint and not is_weighted and not keep_base else STARTS[0])
    check_choice("start", start, STARTS)
    iterations = 1
    if "iterations" in takes and keep_base < 1.0:
        joint = _WEIGHTED_ITERATIONS if is_weighted else _JOINT_ITERATIONS
        usual = entry.iterations or (joint if is_joint else SVD_MODES[str(fields.svd)])
        iterations = _default(fields.iterations, usual)
    _check_at_least("iterations", _default(fields.iterations, iterations), 1)
    rounds = 0
    if _has_rounds(takes, fit, is_weighted=is_weighted):
        rounds = _default(fields.rounds, _WEIGHTED_ROUNDS if is_weighted else _ROUNDS)
    elif fields.rounds is not None:
        setting_without_rounds = f"fit {fit}" if "fit" in takes else f"{setting} without calibration"
        refuse("rounds", setting_without_rounds if "rounds" in takes else setting, typed)
    _check_at_least("rounds", rounds, 0)
    return Fitting(
        iterations=iterations,
        svd=str(fields.svd),
        start=start,
        fit=fit,
        rounds=rounds,
        keep_base=keep_base,
        init=init,
    )


def _settle_keep_base(fields: RecipeFields, typed: Collection[str]) -> float:
    """Settle the share of the cost that counts the base alone. At 1 the base never sees the adapter, so a start and a
    number of alternations have no meaning; a file may repeat the values of a written recipe file.
    """
    keep_base = float(_default(fields.keep_base, 0.0))
    if not 0.0 <= keep_base <= 1.0:
        raise UsageError(f"keep_base must be from 0 to 1, not {fields.keep_base}")
    if keep_base == 1.0:
        for name, recorded in (("start", STARTS[0]), ("iterations", 1)):
            if name in typed or getattr(fields, name) not in (None, recorded):
                refuse(name, "keep_base 1", typed)
    return keep_base


def _has_rounds(takes: Collection[str], fit: str, *, is_weighted: bool) -> bool:
    """Whether codes and constants are refined after the alternations: always in the joint fit, and under a calibration
    for a method without a choice of fits.
    """
    return "rounds" in takes and (fit == JOINT_FIT or (is_weighted and "fit" not in takes))


def _refuse_unless_recorded(fields: RecipeFields, name: str, where: str, typed: Collection[str]) -> None:
    """Raises UsageError for a requested option, unless a file repeats the value of every written recipe file."""
    value = getattr(fields, name)
    if name in typed or (value is not None and value != _RECORDED.get(name)):
        refuse(name, where, typed)


def _check_texts(recipe: Recipe) -> None:
    """Raises UsageError for an invalid expression, size or override."""
    for name in ("include", "exclude"):
        for pattern in getattr(recipe, name):
            _check_regex(name, pattern)
    parse_size(recipe.max_shard_size)
    for override in recipe.override:
        _check_override(recipe, override)


def _check_override(recipe: Recipe, override: Override) -> None:
    _check_regex("match", override.match)
    check_sizes(recipe.quant_type, override.block_size, override.group_size)
    _check_format_of(recipe, override)
    if override.double_quant is not None and isinstance(recipe.quant, AffineOptions):
        raise UsageError(f"double_quant means nothing with quant_type {recipe.quant_type}")
    _check_positive("alpha", override.alpha)
    if override.rank is not None:
        _check_at_least("rank", override.rank, 1)


def _check_format_of(recipe: Recipe, override: Override) -> None:
    row, quant_type = LAYOUTS[recipe.layout], override.quant_type
    if quant_type is not None:
        check_choice("quant_type", quant_type, FORMATS)
        if FORMATS[quant_type].module != FORMATS[recipe.quant_type].module:
            message = f"an override has quant_type {quant_type} in a model of {recipe.quant_type}"
            raise UsageError(message, hint="integers go with integers, codebooks with codebooks")
        if quant_type not in row.quant_types:
            raise UsageError(f"layout {recipe.layout} does not hold {quant_type}, which an override asks for")
    size = recipe.quant.group_size if isinstance(recipe.quant, AffineOptions) else None
    if override.group_size in (None, size):
        return
    if row.group_sizes and override.group_size not in row.group_sizes:
        sizes = ", ".join(map(str, row.group_sizes))
        message = f"layout {recipe.layout} does not hold groups of {override.group_size}, which an override asks for"
        raise UsageError(message, hint=f"one of {sizes}")
    if recipe.pooling is not None:
        message = f"method {recipe.method} pools inputs by one group size for all layers, and an override has another"
        raise UsageError(message, hint=f"group_size {size}")


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_at_least(name: str, value: int, smallest: int) -> None:
    if value < smallest:
        raise UsageError(f"{name} must be at least {smallest}, not {value}")


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UsageError(f"{name} must be a positive number, not {value}")


def _check_regex(name: str, pattern: str) -> None:
    try:
        check_expression(pattern)
    except ValueError as error:
        shown = printable(repr(pattern[:200]), 80)
        raise UsageError(f"{name} {shown} is not a regular expression that is read here: {error}") from None
