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
from loftq_cli.planning.recipe import (
    DEFAULT_TEXT_TOKENS,
    NONE,
    RANDOM,
    SELF,
    TEXT_OPTIONS,
    WEIGHTS,
    AffineOptions,
    CodebookOptions,
    FormatOptions,
    Override,
    Recipe,
    RecipeFields,
    TextOptions,
)
from loftq_cli.planning.sizes import parse_size
from loftq_cli.quant.formats import FORMATS, SCALES
from loftq_cli.tensors.headers import MODEL_DTYPES
from loftq_cli.tensors.specs import POOLINGS, Pooling

# Share of the cost of a joint fit that counts the base alone, with input statistics and without statistics.
_KEEP_BASE, _KEEP_BASE_BY_WEIGHTS = 0.3, 0.5

# Alternations of a joint fit, without input statistics and with statistics: more alternations reduce the error little.
_JOINT_ITERATIONS, _WEIGHTED_ITERATIONS = 11, 2
_ROUNDS, _WEIGHTED_ROUNDS, _MEASURED_ROUNDS = 0, 2, 4  # without statistics, from the weights alone, of a text

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
    rank, seed, adapter_dtype = _default(fields.rank, 16), _default(fields.seed, 0), fields.adapter_dtype or "float32"
    check_choice("quant_type", quant_type, FORMATS)
    check_choice("svd", fields.svd, SVD_MODES)
    check_choice("adapter_dtype", adapter_dtype, MODEL_DTYPES)
    _check_at_least("rank", rank, 1)
    _check_at_least("seed", seed, 0)
    _check_positive("alpha", fields.alpha)
    layout = fields.layout or default_layout(quant_type)
    check_choice("layout", layout, LAYOUTS)
    text = _settle_text(fields, typed)
    quant = settle_format(fields, quant_type, layout, typed)
    pooling, init = _settle_method(fields, METHODS[method], quant, typed)
    _refuse_unused(fields, METHODS[method], init, typed)
    fields = replace(fields, calibration=_settle_calibration(fields, METHODS[method].inits[init].takes))
    fitting = _settle_fitting(fields, METHODS[method], init, typed)
    scales = fields.scales or SCALES[fitting.fit == JOINT_FIT or _is_weighted(fields)]
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
        text=text,
        adapter_dtype=adapter_dtype,
        seed=seed,
        include=fields.include or (),
        exclude=fields.exclude or (),
        task=fields.task,
        num_labels=fields.num_labels,
        max_shard_size=fields.max_shard_size or "5GB",
        override=fields.override or (),
    )
    return _check_texts(recipe)


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
    if not _has_rounds(takes, fitting.fit, is_weighted=recipe.is_weighted):
        values["rounds"] = None
    keeps_base = "keep_base" in takes and (fitting.keep_base or fitting.fit == JOINT_FIT)
    values["keep_base"] = fitting.keep_base if keeps_base else None
    if recipe.text is not None:
        values |= {"text": recipe.text.names, "tokens": recipe.text.tokens, "context": recipe.text.context}
        values |= {"lines": recipe.text.lines or None, "sequential": recipe.text.sequential}
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
        calibration=_calibration_key(recipe, takes),
        pooling=None if recipe.pooling is None else recipe.pooling.convention,
        init=recipe.init,
        adapter_dtype=recipe.adapter_dtype,
        seed=recipe.seed,
        include=recipe.include,
        exclude=recipe.exclude,
        layout=recipe.layout,
        task=recipe.task,
        num_labels=recipe.num_labels,
        max_shard_size=recipe.max_shard_size,
        override=recipe.override,
        **values,
    )


def _calibration_key(recipe: Recipe, takes: Collection[str]) -> str | None:
    """The calibration in a recipe file: NONE where `settle` would choose statistics, and the recipe has none."""
    if recipe.calibration is not None or recipe.text is not None:
        return recipe.calibration
    fit = recipe.fitting.fit if "fit" in takes else None
    default = _settle_calibration(RecipeFields(fit=fit, scales=recipe.scales), takes)
    return None if default is None else NONE


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
    """Settle fit, solver and counts: requested values, or defaults for the method, the fit and the statistics."""
    takes, setting = entry.inits[init].takes, _setting_of(fields, init)
    fit = (fields.fit or JOINT_FIT) if "fit" in takes else PAPER_FIT
    check_choice("fit", fit, FITS)
    is_joint, is_weighted = fit == JOINT_FIT, _is_weighted(fields)
    usual = (_KEEP_BASE if is_weighted else _KEEP_BASE_BY_WEIGHTS) if is_joint else 0.0
    keep_base = _settle_keep_base(fields, usual, typed)
    # A base without the principal part of the weights is no model: adapters start at zero unless the user says so.
    start = fields.start or STARTS[0]
    check_choice("start", start, STARTS)
    iterations = 1
    if "iterations" in takes and keep_base < 1.0:
        joint = _WEIGHTED_ITERATIONS if is_weighted else _JOINT_ITERATIONS
        usual = entry.iterations or (joint if is_joint else SVD_MODES[str(fields.svd)])
        iterations = _default(fields.iterations, usual)
    _check_at_least("iterations", _default(fields.iterations, iterations), 1)
    rounds = 0
    if _has_rounds(takes, fit, is_weighted=is_weighted):
        measured = _WEIGHTED_ROUNDS if fields.calibration == WEIGHTS else _MEASURED_ROUNDS
        rounds = _default(fields.rounds, measured if is_weighted else _ROUNDS)
    elif fields.rounds is not None:
        setting_without_rounds = f"fit {fit}" if "fit" in takes else f"{setting} without calibration and text"
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


def _refuse_unused(fields: RecipeFields, entry: MethodEntry, init: str | None, typed: Collection[str]) -> None:
    """Raises UsageError for an option without a meaning for the method and the start."""
    takes, setting = entry.inits[init].takes, _setting_of(fields, init)
    for name in ("start", "fit", "iterations", "keep_base", "svd", "calibration", "text"):
        if ("calibration" if name == "text" else name) not in takes:
            _refuse_unless_recorded(fields, name, setting, typed)
    if "svd" in takes and fields.svd == "exact" and not entry.draws_adapter:
        _refuse_unless_recorded(fields, "seed", "svd exact, where nothing is drawn", typed)


def _setting_of(fields: RecipeFields, init: str | None) -> str:
    """The method and the start as words for an error."""
    return f"method {fields.method}" + (f" and init {init}" if init else "")


def _settle_calibration(fields: RecipeFields, takes: Collection[str]) -> str | None:
    """Settle the source of statistics beside a text: a directory, WEIGHTS, or None for no statistics.

    A joint fit and a search for constants need statistics: without them the largest weights are clipped, and the
    predictions of the model get worse while the error of the weights falls.
    """
    if fields.text is not None or "calibration" not in takes or fields.calibration == NONE:
        return None
    is_joint = "fit" in takes and fields.fit in (None, JOINT_FIT)
    searches = "fit" not in takes and fields.scales == SCALES[1]
    return fields.calibration or (WEIGHTS if is_joint or searches else None)


def _is_weighted(fields: RecipeFields) -> bool:
    return fields.calibration is not None or fields.text is not None


def _settle_text(fields: RecipeFields, typed: Collection[str]) -> TextOptions | None:
    """Settle the text of the conversion, and the reading of the text; None without a text."""
    if fields.text is None:
        for name in TEXT_OPTIONS[1:]:
            if name in typed or getattr(fields, name) is not None:
                refuse(name, "a conversion without text", typed)
        return None
    if fields.calibration is not None:
        message = "calibration and text both give statistics of the layers' inputs"
        raise UsageError(message, hint="one of --calibration and --text")
    if not fields.text:
        raise UsageError("text names no text", hint=f"a file, a folder, {SELF} or {RANDOM}")
    if len(fields.text) > 1 and {SELF, RANDOM} & set(fields.text):
        raise UsageError(f"text {SELF} and text {RANDOM} stand alone", hint=f"./{SELF} for a file of the name")
    tokens = _default(fields.tokens, DEFAULT_TEXT_TOKENS)
    _check_at_least("tokens", tokens, 2)
    if fields.context is not None:
        _check_at_least("context", fields.context, 2)
    lines = _default(fields.lines, False)
    if lines and fields.text[0] in (SELF, RANDOM):
        refuse("lines", f"text {fields.text[0]}", typed)
    return TextOptions(fields.text, tokens, fields.context, lines, _default(fields.sequential, True))


def _settle_keep_base(fields: RecipeFields, usual: float, typed: Collection[str]) -> float:
    """Settle the share of the cost that counts the base alone; `usual` is the default. At 1 the base never sees the
    adapter, so a start and a number of alternations have no meaning; a file may repeat the values of a written recipe
    file.
    """
    keep_base = float(_default(fields.keep_base, usual))
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


def _check_texts(recipe: Recipe) -> Recipe:
    """`recipe`. Raises UsageError for an invalid expression, size, number of labels or override."""
    for name, pattern in [*(("include", p) for p in recipe.include), *(("exclude", p) for p in recipe.exclude)]:
        _check_regex(name, pattern)
    parse_size(recipe.max_shard_size)
    _check_at_least("num_labels", 1 if recipe.num_labels is None else recipe.num_labels, 1)
    for override in recipe.override:
        _check_override(recipe, override)
    return recipe


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
