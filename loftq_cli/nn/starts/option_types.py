"""Options by keyword: checked against the fields of a record, and written as keyword arguments in errors."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Any, get_args, get_type_hints

from loftq_cli.errors import LoftqError, UsageError

_OPTION = re.compile(r"--(?P<no>no-)?(?P<name>[a-z][a-z-]*)(?: (?P<value>'[^']*'|[\w.][\w.-]*\b))?")
_SWITCHES = {"symmetric": "symmetric=True", "asymmetric": "symmetric=False", "rslora": "rslora=True"}
_LISTS = ("include", "exclude")
_KIND_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "True or False"}


def check_options(options: Mapping[str, Any], record: type, without: Sequence[str] = ()) -> dict[str, Any]:
    """`options` as the dataclass `record` takes options: lists become tuples, and whole numbers become floats for
    fields of type float. The fields in `without` are no options.

    Raises UsageError for an unknown name, with the nearest option, and for a value of another type.

    >>> from loftq_cli.planning.recipe import RecipeFields
    >>> check_options({"rank": 8, "alpha": 16}, RecipeFields)
    {'rank': 8, 'alpha': 16.0}
    """
    hints = get_type_hints(record)
    names = [name for name in hints if name not in without]
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            message = f"option {name} means nothing here" if name in hints else f"unknown option {name}"
            raise UsageError(message, hint=f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}")
    return {name: _typed(name, value, hints[name]) for name, value in options.items()}


def _typed(name: str, value: Any, hint: Any) -> Any:
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
    if value is None and NoneType in get_args(hint):
        return None
    if kinds[0] == tuple[str, ...]:
        if isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value):
            return tuple(value)
        raise UsageError(f"{name} must be a list of texts, not {reprlib.repr(value)}", hint=f"{name}=['...']")
    if kinds[0] not in _KIND_NAMES:
        if isinstance(value, list | tuple):
            return tuple(value)
        raise UsageError(f"{name} must be a list, not {reprlib.repr(value)}")
    if type(value) is int and kinds[0] is float:
        return float(value)
    if type(value) is not kinds[0]:
        raise UsageError(f"{name} must be {_KIND_NAMES[kinds[0]]}, not {reprlib.repr(value)}")
    return value


@contextmanager
def python_remedies() -> Iterator[None]:
    """Rewrite errors from the block: options become keyword arguments, `rank=8` in place of `--rank 8`.

    >>> with python_remedies():
    ...     raise LoftqError("rank is too large", hint="--rank 8")
    Traceback (most recent call last):
    loftq_cli.errors.LoftqError: rank is too large (rank=8)
    """
    try:
        yield
    except LoftqError as error:
        hint = None if error.hint is None else in_python(error.hint)
        raise type(error)(in_python(error.message), file=error.file, tensor=error.tensor, hint=hint) from None


def in_python(text: str) -> str:
    """`text` with options of the command line as keyword arguments.

    >>> in_python("--layout dense holds every matrix; --no-double-quant, or --exclude 'lm_head'")
    "layout='dense' holds every matrix; double_quant=False, or exclude=['lm_head']"
    """
    return _OPTION.sub(_keyword, text)


def _keyword(match: re.Match[str]) -> str:
    name, value = match["name"].replace("-", "_"), match["value"]
    suffix = "" if value is None else f" {value}"
    if match["no"]:
        return f"{name}=False{suffix}"
    if match["name"] in _SWITCHES:
        return f"{_SWITCHES[match['name']]}{suffix}"
    if name in _LISTS and value is not None and value.startswith("'"):
        return f"{name}=[{value}]"
    if value is None or value in ("it", "as", "so", "they", "holds", "keeps", "out"):
        return f"{name}{suffix}"
    return f"{name}={value if re.fullmatch(r'[0-9.]+', value) else repr(value.strip(chr(39)))}"
