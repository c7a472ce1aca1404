"""Records from JSON values, checked by the type hints of a dataclass: a stranger's file gives either a record with
values of the hinted types, or an error with the key.

Values are never converted: 16 for a float field stays 16, so a record is written again with the bytes of the source.
(msgspec, a library for equal purposes, takes 90 ms to import.)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from loftq_cli.errors import printable

_Record = TypeVar("_Record")


class RecordError(ValueError):
    """A value unfit for the record; the text names the key."""


@dataclass(frozen=True, slots=True)
class AtLeast:
    """A bound in the hint of a number: Annotated[int, AtLeast(1)]."""

    least: float


@dataclass(frozen=True, slots=True)
class Spelled:
    """The spelling of a text in a hint: the whole text matches the expression."""

    expression: str


PositiveInt = Annotated[int, AtLeast(1)]
NonNegative = Annotated[float, AtLeast(0)]
Sha256 = Annotated[str, Spelled("[0-9a-f]{64}")]

_NAMES = {str: "a text", bool: "true or false", int: "a whole number", float: "a finite number"}


def read_record(kind: type[_Record], values: object, **names: Any) -> _Record:
    """Return the record of the dataclass `kind` from the JSON object `values`.

    A hint is str, bool, int, float (finite), Any, Literal, `X | None`, tuple[X, ...], tuple[X, X], list[X],
    dict[str, X], Mapping[str, X], a dataclass, or Annotated with AtLeast or Spelled. Keys without a field are ignored;
    a field with a default may be missing; `names` has the classes of hints without an import in the module.
    Raises RecordError with the key of a missing value, or of a value of a wrong type.

    >>> @dataclass
    ... class Layer:
    ...     name: str
    ...     rank: PositiveInt
    >>> read_record(Layer, {"name": "lm_head", "rank": 8})
    Layer(name='lm_head', rank=8)
    >>> read_record(Layer, {"name": "lm_head", "rank": 0})
    Traceback (most recent call last):
    loftq_cli.checkpoint.record_schema.RecordError: rank is 0, not 1 or more
    """
    return kind(**read_fields(kind, values, **names))


def read_fields(kind: type, values: object, *, without: str = "", where: str = "", **names: Any) -> dict[str, Any]:
    """Return the values of the fields of `kind` by name, read like the values of `read_record`, but for the field
    `without`; `where` is the key of `values` in errors. Raises RecordError like `read_record`.

    >>> @dataclass
    ... class Layer:
    ...     name: str
    ...     rank: int
    >>> read_fields(Layer, {"name": "lm_head"}, without="rank")
    {'name': 'lm_head'}
    """
    if not isinstance(values, Mapping):
        raise _error(where or "the record", values, "an object")
    hints, fields = _hints(kind, tuple(names.items())), {}
    for field in dataclasses.fields(kind):
        path = f"{where}.{field.name}" if where else field.name
        if field.name in values and field.name != without:
            fields[field.name] = _read(hints[field.name], values[field.name], path)
        elif field.default is field.default_factory is dataclasses.MISSING and field.name != without:
            raise RecordError(f"{printable(path)} is missing")
    return fields


@cache
def _hints(kind: type, names: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return get_type_hints(kind, localns=dict(names), include_extras=True)


def _read(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as `hint` says: lists as tuples where the hint is a tuple, objects as records."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or (value is None and NoneType in arguments):
        return value
    if origin in (Union, UnionType):
        return _read(arguments[0], value, where)
    if origin is Annotated:
        value, bound = _read(arguments[0], value, where), arguments[1]
        if isinstance(bound, AtLeast) and value < bound.least:
            raise _error(where, value, f"{bound.least} or more")
        if isinstance(bound, Spelled) and not re.fullmatch(bound.expression, value):
            raise _error(where, value, f"spelled {bound.expression}")
        return value
    if origin is Literal:
        if type(value) is not str or value not in arguments:
            raise _error(where, value, " or ".join(arguments))
    elif origin in (tuple, list):
        count = None if origin is list or arguments[-1] is Ellipsis else len(arguments)
        if not isinstance(value, (list, tuple)) or count not in (None, len(value)):
            raise _error(where, value, "a list" if count is None else f"a list of {count}")
        return origin(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif dataclasses.is_dataclass(hint):
        return hint(**read_fields(hint, value, where=where))  # type: ignore[operator, arg-type]
    elif origin in (dict, Mapping):
        if not isinstance(value, dict) or not all(type(key) is str for key in value):
            raise _error(where, value, "an object")
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    elif not _has_type(value, hint):
        raise _error(where, value, _NAMES[hint])
    return value


def _has_type(value: Any, hint: type) -> bool:
    if hint is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    return type(value) is hint


def _error(where: str, value: Any, expected: str) -> RecordError:
    return RecordError(f"{printable(where)} is {printable(repr(value), 80)}, not {expected}")
