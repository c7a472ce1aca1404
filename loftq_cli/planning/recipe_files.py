"""Recipes in files: presets, TOML in and out, and how command-line flags override them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import reprlib
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from loftq_cli.errors import StorageError, UsageError
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.methods.method import DEFAULT_METHOD, METHODS
from loftq_cli.planning.format_options import AFFINE_OPTIONS, CODEBOOK_OPTIONS
from loftq_cli.planning.recipe import AffineOptions, Override, Recipe, RecipeFields
from loftq_cli.planning.settle import fields_of, settle
from loftq_cli.planning.sizes import MAX_INT
from loftq_cli.quant.formats import FORMATS


def resolve_recipe(source: str | None, flags: Mapping[str, Any], *, mixes: bool = False) -> Recipe:
    """The settled recipe of defaults < `source` (a preset's name or a TOML file) < `flags`.

    flags   values by the names of RecipeFields; None: the flag was not typed
    mixes   whether defaults are those of a model whose layers have several formats, though no override says so yet

    Where a flag names another quant_type or method, what `source` says of the replaced one is dropped. Raises
    UsageError for a source that is no recipe, and for options that do not exist, contradict each other or mean nothing.

    >>> resolve_recipe("qlora-nf4", {"rank": 4}).rank
    4
    """
    typed = {name: value for name, value in flags.items() if value is not None}
    values = {} if source is None else _read_recipe(source)
    outdated = _outdated(values, typed)
    values["override"] = tuple(
        _without(override, outdated | _changed_family(override, typed)) for override in values.get("override", ())
    )
    fields = RecipeFields(**{**{name: value for name, value in values.items() if name not in outdated}, **typed})
    recipe = settle(fields, typed)
    is_asymmetric = isinstance(recipe.quant, AffineOptions) and not recipe.quant.symmetric
    if mixes and fields.symmetric is None and is_asymmetric and recipe.pooling is None:
        return settle(replace(fields, symmetric=LAYOUTS[recipe.layout].mixed == "symmetric"), typed)
    return recipe


def _without(override: Override, names: set[str]) -> Override:
    gone = names.intersection(field.name for field in dataclasses.fields(Override))
    nothing: dict[str, Any] = dict.fromkeys(gone)
    return replace(override, **nothing)


def _changed_family(override: Override, typed: Mapping[str, Any]) -> set[str]:
    """{"quant_type"} for an override of integers where `typed` names a codebook for the model, or vice versa."""
    model, own = FORMATS.get(typed.get("quant_type", "")), FORMATS.get(override.quant_type or "")
    return {"quant_type"} if model and own and model.is_affine != own.is_affine else set()


def _outdated(values: Mapping[str, Any], typed: Mapping[str, Any]) -> set[str]:
    """Names of options that mean nothing any more once `typed` has changed the format or the method of `values`."""
    names: set[str] = set()
    if (quant_type := typed.get("quant_type")) in FORMATS:
        names.update(CODEBOOK_OPTIONS if FORMATS[quant_type].is_affine else AFFINE_OPTIONS)
        layout = LAYOUTS.get(values.get("layout", ""))
        if layout is not None and quant_type not in layout.quant_types:
            names.add("layout")
    # Counts and starts were meant for the fit that the file names beside them.
    changed = {n for n in ("method", "init", "fit", "calibration") if n in typed and typed[n] != values.get(n)}
    if changed:
        names |= {"start", "rounds", "iterations", "scales"}
    if changed & {"method", "init"}:
        names |= {"fit"} | _untaken(values, typed)
    entry = METHODS.get(typed.get("method", values.get("method", DEFAULT_METHOD)))
    if typed.get("svd") == "exact" and entry is not None and not entry.draws_adapter:
        names.add("seed")  # nothing is drawn any more
    return names


def _untaken(values: Mapping[str, Any], typed: Mapping[str, Any]) -> set[str]:
    """Names of options of `values` that mean nothing for the method or the start in `typed`."""
    entry = METHODS.get(typed.get("method", values.get("method", DEFAULT_METHOD)))
    if entry is None:
        return set()
    names = set() if entry.is_pooled else {"pooling"}
    init = typed.get("init", values.get("init"))
    if init not in entry.inits:
        names.add("init")
        init = next(iter(entry.inits))
    return names | {name for name in ("svd", "calibration") if name not in entry.inits[init].takes}


def preset_directory() -> Path:
    """Where the packaged presets lie: inside the package, or beside it in a source tree."""
    package = Path(__file__).parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def presets() -> dict[str, str]:
    """The first line of the comment in each preset, by the preset's name."""
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for path in sorted(preset_directory().glob("*.toml"))
    }


def recipe_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML that `--recipe` reads back to an equal one.

    >>> recipe_toml(resolve_recipe("qlora-nf4", {})).splitlines()[0]
    'method = "qlora"'
    """
    lines = []
    for name, value in _set_fields(fields_of(recipe)).items():
        if name != "override":
            lines.append(f"{name} = {_toml_value(value)}")
    for override in recipe.override:
        lines.append("\n[[override]]")
        lines += [f"{name} = {_toml_value(value)}" for name, value in _set_fields(override).items()]
    return "\n".join(lines) + "\n"


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as JSON values, without options that are None."""
    values = _set_fields(fields_of(recipe))
    values["override"] = [_set_fields(override) for override in recipe.override]
    return values


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
    except (ValueError, RecursionError) as error:  # ValueError too for a number with thousands of digits
        raise UsageError(f"not valid TOML: {error}", file=path) from None
    overrides = table.pop("override", [])
    if not isinstance(overrides, list) or not all(isinstance(entry, dict) for entry in overrides):
        raise UsageError("override must be a list of tables", file=path, hint="write [[override]]")
    values = _typed(RecipeFields, table, path)
    values["override"] = tuple(_override(entry, path) for entry in overrides)
    return values


def _override(entry: dict[str, Any], path: Path) -> Override:
    if "match" not in entry:
        raise UsageError("an [[override]] has no match", file=path, hint="match = 'regular expression'")
    return Override(**_typed(Override, entry, path))


def _typed(record: type, table: dict[str, Any], path: Path) -> dict[str, Any]:
    """The values of `table` by the names of the fields of `record`. Raises UsageError for another key or type."""
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


def _set_fields(record: RecipeFields | Override) -> dict[str, Any]:
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return {name: value for name, value in values.items() if value is not None}


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    # JSON strings, numbers and booleans are TOML too.
    return json.dumps(value, ensure_ascii=False)
