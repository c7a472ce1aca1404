"""Configs, indexes and headers as JSON, read strictly: a regular file of bounded size, UTF-8, an object,
no key twice (RFC 8259 section 4 leaves that open, so readers disagree), only finite numbers.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

from loftq_cli.checkpoint.watched_file import open_regular_file, refuse_placeholder
from loftq_cli.errors import InputError, StorageError, printable

MAX_JSON_NBYTES = 100_000_000  # what safetensors allows a header; the largest published index is a fifth of it
_MAX_INT_DIGITS = 64  # tokenizers write int(1e30) for "no limit"; Python itself refuses above 4300 digits

_DAMAGED = "download it again, or take it from its source"


def read_json_object(path: Path, *, max_nbytes: int = MAX_JSON_NBYTES) -> dict[str, Any]:
    """The object in the JSON file `path`.

    Raises InputError when it is missing, not a regular file, larger than `max_nbytes` or not a strict JSON object.
    Raises StorageError when it cannot be read.
    """
    descriptor = open_regular_file(path)
    with os.fdopen(descriptor, "rb") as stream:
        try:
            data = stream.read(max_nbytes + 1)
        except OSError as exc:
            raise StorageError(f"cannot be read: {exc.strerror}", file=path) from exc
    if len(data) > max_nbytes:
        raise InputError(f"is larger than the {max_nbytes} bytes allowed here", file=path, hint=_DAMAGED)
    refuse_placeholder(path, data)
    return parse_json_object(data, file=path)


def parse_json_object(data: bytes | bytearray, *, file: Path, what: str = "the file") -> dict[str, Any]:
    """The JSON object in `data`, which comes from `file`; `what` names it in messages ("the header").

    Raises InputError when it is not UTF-8, not JSON, not an object, holds a key twice, NaN, Infinity or a number
    that is not finite as a float, or is nested too deeply.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_pairs,
            parse_float=_finite_float,
            parse_int=_bounded_int,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as exc:
        raise InputError(f"{what} is not UTF-8 text", file=file, hint=_DAMAGED) from exc
    except RecursionError as exc:
        raise InputError(f"{what} is nested too deeply", file=file, hint=_DAMAGED) from exc
    except ValueError as exc:
        raise InputError(f"{what} is not valid JSON: {exc}", file=file, hint=_DAMAGED) from exc
    if not isinstance(value, dict):
        raise InputError(f"{what} is not a JSON object", file=file, hint=_DAMAGED)
    return value


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"the key {printable(key)} stands twice")
        unique[key] = value
    return unique


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {printable(text, 40)} is too large")
    return number


def _bounded_int(text: str) -> int:
    if len(text) > _MAX_INT_DIGITS:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
