"""Strict JSON for configs, indexes and headers.

A file is regular, of bounded size and UTF-8; the value is an object without repeated keys (RFC 8259 section 4 permits
repeated keys, so readers disagree), with finite numbers and Unicode text, no deeper and no denser than real files.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from loftq_cli.checkpoint.watched_file import read_small_file, refuse_placeholder
from loftq_cli.errors import InputError, printable

MAX_JSON_NBYTES = 100_000_000  # safetensors' limit for a header; the largest published index has a fifth
_MAX_DEPTH = 100  # configs nest less than ten levels; later readers of the values may recurse
# An entry of a safetensors header has at least 51 bytes for three containers and four keys. Denser text above the size
# limit is refused before Python spends 60 bytes on each "[]" and 300 on each key.
_DENSE_NBYTES = 1_000_000
_NBYTES_PER_CONTAINER = 16
_NBYTES_PER_KEY = 12
_MAX_INT_DIGITS = 64  # tokenizers write int(1e30) for "no limit"; Python itself refuses above 4300 digits

_DAMAGED = "download it again, or take it from its source"
_STRING_OR_OPENING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{:]', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json_object(path: Path, *, max_nbytes: int = MAX_JSON_NBYTES) -> dict[str, Any]:
    """Read the object in the JSON file `path`.

    Raises InputError when the file is missing, not regular, larger than `max_nbytes` or not a strict JSON object.
    Raises StorageError when reading fails.

    >>> _ = Path("config.json").write_text('{"hidden_size": 64}')
    >>> read_json_object(Path("config.json"))
    {'hidden_size': 64}
    """
    data = read_small_file(path, max_nbytes, hint=_DAMAGED)
    refuse_placeholder(path, data)
    return parse_json_object(data, file=path)


def parse_json_object(data: bytes | bytearray, *, file: Path, what: str = "the file") -> dict[str, Any]:
    """Parse the JSON object in `data` from `file`; `what` names the object in messages ("the header").

    Raises InputError when the data is not UTF-8, not JSON or not an object, for a repeated key, NaN, Infinity or a
    number beyond float range, for deep nesting, and for text with a value of many times the text's size in memory.

    >>> parse_json_object(b'{"rank": 16}', file=Path("config.json"))
    {'rank': 16}
    """
    _refuse_density(data, file, what)
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
    _refuse_depth(value, data, file, what)
    _refuse_surrogates(value, data, file, what)
    return value


def _refuse_density(data: bytes | bytearray, file: Path, what: str) -> None:
    if len(data) <= _DENSE_NBYTES:
        return
    max_containers, max_keys = len(data) // _NBYTES_PER_CONTAINER, len(data) // _NBYTES_PER_KEY
    if data.count(b"[") + data.count(b"{") <= max_containers and data.count(b":") <= max_keys:
        return
    containers = keys = 0  # brackets inside texts are counted too: skipping texts takes time
    for match in _STRING_OR_OPENING.finditer(data):
        keys += match[0] == b":"
        containers += match[0] in (b"[", b"{")
        if containers > max_containers or keys > max_keys:
            raise InputError(f"{what} holds too many lists or objects for its size", file=file, hint=_DAMAGED)


def _refuse_depth(value: dict[str, Any], data: bytes | bytearray, file: Path, what: str) -> None:
    if data.count(b"[") + data.count(b"{") <= _MAX_DEPTH:
        return
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        children = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for group in children for child in group if isinstance(child, (dict, list))]
        if not level:
            return
    raise InputError(f"{what} is nested too deeply", file=file, hint=_DAMAGED)


def _refuse_surrogates(value: dict[str, Any], data: bytes | bytearray, file: Path, what: str) -> None:
    """Refuse lone surrogates: JSON can escape half a character, and no file can hold half a character."""
    if not _SURROGATE.search(data):
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise InputError(f"{what} holds half a character (a lone surrogate)", file=file, hint=_DAMAGED) from exc


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
