"""Recipes in files: presets, TOML in and out, and command-line flags over the values of a file."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import reprlib
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from loftq_cli.checkpoint.watched_file import read_small_file
from loftq_cli.errors import UsageError
from loftq_cli.layouts.foreign_names import foreign_hint
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.methods.method import DEFAULT_METHOD, METHODS
from loftq_cli.planning.format_options import AFFINE_OPTIONS, CODEBOOK_OPTIONS
from loftq_cli.planning.recipe import NONE, TEXT_OPTIONS, WEIGHTS, AffineOptions, Override, Recipe, RecipeFields
from loftq_cli.planning.settle import fields_of, settle
from loftq_cli.planning.sizes import MAX_INT
from loftq_cli.quant.formats import FORMATS

_INTEGERS, _GROUP_SIZE = "int4", 64  # of experts, and under a bound; the group size of all integers is equal
MAX_RECIPE_NBYTES = 1_000_000  # a recipe with an override for each layer of the largest models has a tenth


def resolve_recipe(
    source: str | None,
    flags: Mapping[str, Any],
    *,
    mixes: bool = False,
    needs_integers: bool = False,
    expert_rows: Callable[[], Collection[int]] | None = None,
) -> Recipe:
    """Settle a recipe from three sources: flags win over `source`, and `source` wins over defaults.

    source   a preset's name or the path of a TOML file; None for defaults and flags alone
    flags    values by the names of RecipeFields; None: the flag was not typed
    mixes    whether to choose defaults for a model of several number formats, even without an override
    needs_integers   whether integers are the default format, because no codebook meets a bound on the size
    expert_rows   returns the input features of a model's experts that packed integers hold, no number for a model
                  without; asked only where the answer decides about a default

    A flag for quant_type, method, init, fit, keep_base, calibration, text or svd drops the options of `source` without
    a meaning beside the flag.

    Raises UsageError for a source without a recipe, and for unknown, contradictory or meaningless options; InputError
    for a source that is no regular file, or larger than MAX_RECIPE_NBYTES; StorageError for an unreadable file.

    >>> resolve_recipe("qlora-nf4", {"rank": 4}).rank
    4
    """
    typed = {name: value for name, value in flags.items() if value is not None}
    values = {} if source is None else _read_recipe(source)
    outdated = _find_outdated_options(values, typed)
    values["override"] = tuple(
        _drop_options(override, outdated | _find_outdated_formats(override, typed))
        for override in values.get("override", ())
    )
    fields = RecipeFields(**{**{name: value for name, value in values.items() if name not in outdated}, **typed})
    if needs_integers and _leaves_format_open(fields):
        fields = replace(fields, quant_type=_INTEGERS)
    recipe = settle(fields, typed)
    is_asymmetric = isinstance(recipe.quant, AffineOptions) and not recipe.quant.symmetric
    if mixes and fields.symmetric is None and is_asymmetric and recipe.pooling is None:
        return settle(replace(fields, symmetric=LAYOUTS[recipe.layout].mixed == "symmetric"), typed)
    with_experts = fields if expert_rows is None or mixes else _default_for_experts(fields, recipe, expert_rows)
    return recipe if with_experts is fields else settle(with_experts, typed)


def _default_for_experts(
    fields: RecipeFields, recipe: Recipe, expert_rows: Callable[[], Collection[int]]
) -> RecipeFields:
    """Fill open options so that a loader reads the quantized experts of a model: packed integers without zero points,
    in groups that divide the rows.

    fields        the requested options
    recipe        the options, settled without a look at the model
    expert_rows   as for `resolve_recipe`
    """
    is_open = _leaves_format_open(fields)
    if recipe.pooling is not None or not (is_open or LAYOUTS[recipe.layout].experts == "symmetric"):
        return fields
    rows = expert_rows()
    if not rows:
        return fields
    if is_open:
        fields = replace(fields, quant_type=_INTEGERS)
    if fields.group_size is None:
        sizes = sorted(FORMATS[fields.quant_type or recipe.quant_type].group_sizes, reverse=True)
        fitting = [size for size in sizes if size <= _GROUP_SIZE and not any(row % size for row in rows)]
        fields = replace(fields, group_size=next(iter(fitting), None))
    return fields if fields.symmetric is not None else replace(fields, symmetric=True)


def _leaves_format_open(fields: RecipeFields) -> bool:
    """True where no requested option chooses a format or a container."""
    codebooks = any(o.quant_type or o.block_size or o.double_quant is not None for o in fields.override or ())
    wishes = (fields.quant_type, fields.layout, fields.block_size, fields.double_quant)
    return not codebooks and all(wish is None for wish in wishes)


def _drop_options(override: Override, names: set[str]) -> Override:
    dropped_names = names.intersection(field.name for field in dataclasses.fields(Override))
    absent_values: dict[str, Any] = dict.fromkeys(dropped_names)
    return replace(override, **absent_values)


def _find_outdated_formats(override: Override, typed: Mapping[str, Any]) -> set[str]:
    """Return {"quant_type"} for integers in the override and a codebook in `typed`, or vice versa; else no name."""
    model_row, override_row = FORMATS.get(typed.get("quant_type", "")), FORMATS.get(override.quant_type or "")
    is_outdated = model_row and override_row and model_row.is_affine != override_row.is_affine
    return {"quant_type"} if is_outdated else set()


def _find_outdated_options(values: Mapping[str, Any], typed: Mapping[str, Any]) -> set[str]:
    """Find options without a meaning after `typed` has changed the format or the method of `values`."""
    names: set[str] = set()
    if (quant_type := typed.get("quant_type")) in FORMATS:
        names.update(CODEBOOK_OPTIONS if FORMATS[quant_type].is_affine else AFFINE_OPTIONS)
        layout = LAYOUTS.get(values.get("layout", ""))
        if layout is not None and quant_type not in layout.quant_types:
            names.add("layout")
    # Counts and starts of a file belong to the fit in the file.
    changed = {n for n in ("method", "init", "fit", "calibration", "text") if n in typed and typed[n] != values.get(n)}
    if "calibration" in typed:
        names |= set(TEXT_OPTIONS)
    elif "text" in typed:
        names.add("calibration")
    if changed:
        names |= {"start", "rounds", "iterations", "scales"}
    shares = (values.get("keep_base", 0.0), typed.get("keep_base", values.get("keep_base", 0.0)))
    if shares[0] != shares[1]:
        names |= {"start", "iterations"} if 1.0 in shares else {"start"}
    if changed & {"method", "init"}:
        names |= {"fit"} | _find_unused_options(values, typed)
    if changed & {"method", "init", "fit"}:
        names |= {"keep_base"} | ({"calibration"} if values.get("calibration") in (WEIGHTS, NONE) else set())
    entry = METHODS.get(typed.get("method", values.get("method", DEFAULT_METHOD)))
    if typed.get("svd") == "exact" and entry is not None and not entry.draws_adapter:
        names.add("seed")  # the exact solver draws nothing
    return names


def _find_unused_options(values: Mapping[str, Any], typed: Mapping[str, Any]) -> set[str]:
    """Find options of `values` without a meaning for the method or the start in `typed`."""
    entry = METHODS.get(typed.get("method", values.get("method", DEFAULT_METHOD)))
    if entry is None:
        return set()
    names = set() if entry.is_pooled else {"pooling"}
    init = typed.get("init", values.get("init"))
    if init not in entry.inits:
        names.add("init")
        init = next(iter(entry.inits))
    takes = entry.inits[init].takes
    names |= set() if "calibration" in takes else {"calibration", *TEXT_OPTIONS}
    return names | {name for name in ("svd", "keep_base") if name not in takes}


def preset_directory() -> Path:
    """The folder of the presets: inside an installed package, or beside the package in a source tree.

    >>> preset_directory().name
    'configs'
    """
    package = Path(__file__).parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def presets() -> dict[str, str]:
    """Preset name -> first line of the preset's comment, in alphabetical order.

    >>> "qlora-nf4" in presets()
    True
    """
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for path in sorted(preset_directory().glob("*.toml"))
    }


def recipe_toml(recipe: Recipe) -> str:
    """Write the whole recipe as TOML; `--recipe` reads an equal recipe back.

    >>> recipe_toml(resolve_recipe("qlora-nf4", {})).splitlines()[0]
    'method = "qlora"'
    """
    lines = []
    for name, value in _list_values(fields_of(recipe)).items():
        if name != "override":
            lines.append(f"{name} = {_format_toml(value)}")
    for override in recipe.override:
        lines.append("\n[[override]]")
        lines += [f"{name} = {_format_toml(value)}" for name, value in _list_values(override).items()]
    return "\n".join(lines) + "\n"


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as JSON values, without absent options.

    >>> recipe_json(resolve_recipe("qlora-nf4", {}))["quant_type"]
    'nf4'
    """
    values = _list_values(fields_of(recipe))
    values["override"] = [_list_values(override) for override in recipe.override]
    return values


def _read_recipe(source: str) -> dict[str, Any]:
    path = preset_directory() / f"{source}.toml" if source in presets() else Path(source)
    if not os.path.lexists(path):
        near = difflib.get_close_matches(source, presets(), n=1)
        meant = f"did you mean {near[0]}?" if near else foreign_hint(source)
        hint = meant or f"a TOML file, or one of the presets {', '.join(presets())}"
        raise UsageError(f"no recipe {source!r}", hint=hint)
    data = read_small_file(path, MAX_RECIPE_NBYTES, hint="give a TOML file with the options of a conversion")
    try:
        table = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError too for a number with thousands of digits
        raise UsageError(f"not valid TOML: {error}", file=path) from None
    overrides = table.pop("override", [])
    if not isinstance(overrides, list) or not all(isinstance(entry, dict) for entry in overrides):
        raise UsageError("override must be a list of tables", file=path, hint="write [[override]]")
    values = _convert_table(RecipeFields, table, path)
    values["override"] = tuple(_read_override(entry, path) for entry in overrides)
    return values


def _read_override(entry: dict[str, Any], path: Path) -> Override:
    if "match" not in entry:
        raise UsageError("an [[override]] has no match", file=path, hint="match = 'regular expression'")
    return Override(**_convert_table(Override, entry, path))


def _convert_table(record: type, table: dict[str, Any], path: Path) -> dict[str, Any]:
    """Convert the values of `table` by the fields of `record`. Raises UsageError for an unknown key or a wrong type."""
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
    if type(value) is int and abs(value) > MAX_INT:
        raise UsageError(f"{name} is a number of more than 64 bits", file=path)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"{name} must be {_KIND_NAMES[kind]}, not {reprlib.repr(value)}", file=path)
    return value


_KIND_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def _list_values(record: RecipeFields | Override) -> dict[str, Any]:
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return {name: value for name, value in values.items() if value is not None}


def _format_toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_format_toml, value)) + "]"
    # JSON strings, numbers and booleans are TOML too, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
