"""Hostile bytes and JSON values, made from good ones by small changes: most of a file stays right, so that its reader
gets beyond the first check. Depends on the given generator alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from random import Random
from typing import Any

TEXTS = (
    *("", "a", "weight", "float16", "torch.float32", "../x", "/etc/passwd", "a\0b", "\x1b[2J\n", "[bold]red[/bold]"),
    *("%s%n{0}{x.__class__}", "é\u202e\U0001f600", "x" * 300, ".", "..", "a\\b", "NaN", "-1", "nf4", "all-linear", "("),
    *("[", ".*", "(?i)Q_PROJ", "a{99999999999}", "q_proj", "model.layers.0.self_attn.q_proj", "__metadata__", "F32"),
)
NUMBERS = (0, 1, 2, 3, 4, 8, 16, 64, 128, -1, 1.5, -0.0, 1e308, 1e-308, 2**31, 2**53, 2**63, 2**64, 10**30, 10**63)
HOSTILE: tuple[Any, ...] = (
    *TEXTS,
    *NUMBERS,
    *(True, False, None, [], {}, [[]], [[1, 2], [3]], {"": ""}, {"a": {"b": [{}]}}, ["q_proj"], [None], [1], [-1, 0]),
    {"(": 1},
    {"q_proj": 4},
)

# What `json.dumps` does not write, put in for a marker.
_RAW = (
    *("NaN", "-Infinity", "1e999", "-1e400", "1E-999", "01", "+1", "-", "'a'", "nul", "9" * 65, "9" * 5000, "[1,]"),
    *('"\\ud800"', '"\\udc00\\ud800"', '"\x01"', '"\\x"', '{"a":1,"a":2}', '{"a" 1}', "//", '"', "[", "}", "\ufeff"),
    *("[" * depth + "]" * depth for depth in (60, 98, 300, 900, 5000)),
    *('{"a":' * depth + "0" + "}" * depth for depth in (60, 98, 300, 3000)),
)
_MARKERS = tuple(f"@raw{i}@" for i in range(len(_RAW)))
_MARKER = re.compile(r'"@raw(\d+)@"')
_TOKENS = (
    b"",
    b"\0",
    b"\xff",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"0",
    b"-1",
    b"\xed\xa0\x80",
    b"9" * 20,
)


def pick(random: Random, items: Sequence[Any]) -> Any:
    """One of `items`; several times as fast as `random.choice`."""
    return items[int(random.random() * len(items))]


def edited(data: bytes, random: Random, places: Sequence[int] = ()) -> bytes:
    """`data` after one to three edits of a few bytes; half of them at `places`, if there are any."""
    result = bytearray(data)
    for _ in range(1 + int(random.random() * 3)):
        at = int(random.random() * (len(result) + 1))
        if places and random.random() < 0.5:
            at = pick(random, places)
        kind, end = random.random(), at + int(random.random() * 9)
        if kind < 0.4:
            result[at : at + 1] = bytes([int(random.random() * 256)])
        elif kind < 0.55:
            result[at:end] = b""
        elif kind < 0.75:
            result[at:at] = pick(random, _TOKENS)
        elif kind < 0.85:
            result[at:at] = result[at:end]
        elif kind < 0.95:
            other = int(random.random() * (len(result) + 1))
            result[at:end], result[other : other + 4] = result[other : other + 4], result[at:end]
        else:
            del result[at:]
    return bytes(result)


def changed(value: Any, random: Random, hostile: Sequence[Any] = HOSTILE) -> Any:
    """A copy of a JSON value with one leaf, subtree, key or order changed. Shares what it does not change."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        return _changed_object(value, random, hostile)
    if isinstance(value, list) and value and random.random() < 0.85:
        return _changed_list(value, random, hostile)
    if random.random() < 0.08:
        return pick(random, _MARKERS)
    return pick(random, hostile)


def json_bytes(value: Any, random: Random, hostile: Sequence[Any] = HOSTILE) -> bytes:
    """A JSON text from `value`: changed up to three times, then perhaps with a key twice, or edited as bytes."""
    for _ in range(int(random.random() * 4)):
        value = changed(value, random, hostile)
    text = json.dumps(value)
    if "@raw" in text:
        text = _MARKER.sub(lambda match: _RAW[int(match[1])], text)
    last = random.random()
    if last < 0.03 and isinstance(value, dict) and value:
        text = text.replace("{", f"{{{json.dumps(pick(random, list(value)))}: 0, ", 1)
    data = text.encode("utf-8", "surrogatepass")
    return edited(data, random) if last > 0.85 else data


def _changed_object(value: dict[str, Any], random: Random, hostile: Sequence[Any]) -> dict[str, Any]:
    result, key, kind = dict(value), pick(random, list(value)), random.random()
    if kind < 0.78:
        result[key] = changed(value[key], random, hostile)
    elif kind < 0.84:
        del result[key]
    elif kind < 0.88:
        result[_changed_text(key, random)] = result.pop(key)
    elif kind < 0.93:
        result[_changed_text(key, random)] = value[key]
    elif kind < 0.97:
        other = pick(random, list(value))
        result[key], result[other] = result[other], result[key]
    else:
        result = dict(reversed(result.items()))
    return result


def _changed_text(text: str, random: Random) -> str:
    """Another text, or this one with a part left out or a bit more at its end."""
    kind, at = random.random(), int(random.random() * (len(text) + 1))
    if kind < 0.4:
        return str(pick(random, TEXTS))
    return text[:at] + text[at + 1 + int(random.random() * 3) :] if kind < 0.8 else text + str(pick(random, TEXTS))


def _changed_list(value: list[Any], random: Random, hostile: Sequence[Any]) -> list[Any]:
    result, at, kind = list(value), int(random.random() * len(value)), random.random()
    if kind < 0.7:
        result[at] = changed(value[at], random, hostile)
    elif kind < 0.8:
        del result[at]
    elif kind < 0.9:
        result.insert(at, value[at])
    else:
        result.append(pick(random, hostile))
    return result
