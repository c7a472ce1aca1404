"""Regular expressions from an adapter, matched in bounded time, in any thread.

A stranger's expression can run for years. Python's `re` has no time limit; the package `regex` has a limit for matching
and none for compiling. So an expression passes three gates: `_SYNTAX` lists the syntax with an equal meaning and quick
compiling in `re` and `regex`; `re` compiles, since PEFT would; `regex` matches within a time limit. Plain names need no
limit.

`re` and `regex` disagree about characters outside of module names: numbers like "²" are \\w for `re` only, and
(?i)[a-z] has the Turkish letters "ı" and "İ" for `re` only.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loftq_cli.errors import printable

_SECONDS = 0.5  # processor time; expressions of real adapters take microseconds for a name
_SECONDS_PER_PAIR = 5e-6  # an adapter of many ranks has a key for each module
_MOST_SECONDS = 10.0
_MAX_NCHARS = 10_000
_MAX_EXPANDED = 100_000  # `regex` writes out x{1000} as 1000 nodes; a million nodes take 1.2 s and 275 MB to compile
_PLAIN = re.compile(r"(?:[\w.\-]|\\\.)*")  # a name; dots may be escaped
_PIECES = (
    r"[^\\\[({]",  # a character, an anchor, *, +, ?, | or )
    r"\\(?:[^A-Za-z0-9]|[1-9dDsSwWbBAZfnrtv])",
    # Sets of ASCII characters: `re` needs a second for each range over all of Unicode where case is ignored.
    r"\[\^?\]?(?:[ -Z^-~]|\\[ -/:-@\[-`{-~dDsSwWfnrtv])*\]",
    r"\((?!\?)",
    r"\(\?(?:[:=!>]|<[=!]|P<[A-Za-z_][A-Za-z_0-9]*>|[aimsu]+\)|[ims]*(?:-[ims]+)?:)",
    r"\{[0-9]{1,4}(?:,[0-9]{0,4})?\}",  # `regex` reads further braces as fuzzy matching, `re` as braces
)
_SYNTAX = re.compile(f"(?:{'|'.join(_PIECES)})*+", re.DOTALL)
_COUNT = re.compile(r"\{([0-9]+)")


def first_matches(expressions: Mapping[str, str], names: Sequence[str], *, whole: bool = False) -> dict[str, str]:
    """Return for each of `names` the key of the first matching expression of `expressions` (key -> regular expression).
    An expression matches the beginning of a name, or under `whole` the entire name. Names without a match are left out.

    Raises ValueError with the key of a broken or too long expression, of an expression with syntax outside `_SYNTAX`,
    and of an expression without an answer within the time limit.

    >>> first_matches({"attention": r".*\\.[qkv]_proj", "rest": ".*"}, ["layers.0.q_proj", "lm_head"])
    {'layers.0.q_proj': 'attention', 'lm_head': 'rest'}
    """
    for key, expression in expressions.items():
        _check(key, expression)
    seconds = min(_MOST_SECONDS, _SECONDS + _SECONDS_PER_PAIR * len(expressions) * len(names))
    deadline = time.process_time() + seconds
    matchers = {key: _matcher(key, expression, deadline, whole=whole) for key, expression in expressions.items()}
    matches: dict[str, str] = {}
    for name in names:
        for key, match in matchers.items():
            if match(name):
                matches[name] = key
                break
    return matches


def _check(key: str, expression: str) -> None:
    """Raises ValueError for an expression whose length, syntax or counts `regex` cannot compile in bounded time."""
    if len(key) > _MAX_NCHARS:
        raise ValueError(f"the key {_shown(key)} of {len(key)} characters")
    if _PLAIN.fullmatch(key):
        return
    if not _SYNTAX.fullmatch(expression):
        raise ValueError(f"the key {_shown(key)}, no regular expression in the syntax that is read here")
    counts = (max(1, int(count)) for count in _COUNT.findall(expression))
    if math.prod(counts) * len(expression) > _MAX_EXPANDED:
        raise _too_slow(key)


def _matcher(key: str, expression: str, deadline: float, *, whole: bool) -> Callable[[str], Any]:
    """Return a function for matching a name. The function raises ValueError at the `deadline`, in seconds of
    time.process_time.
    """
    with warnings.catch_warnings(action="ignore"):  # syntax with another meaning in later versions of Python
        try:
            compiled = re.compile(expression)
        except (re.error, OverflowError, RecursionError):
            raise ValueError(f"the key {_shown(key)}, no regular expression") from None
    if _PLAIN.fullmatch(key):
        return compiled.fullmatch if whole else compiled.match
    return _timed_matcher(key, expression, deadline, whole=whole)


def _timed_matcher(key: str, expression: str, deadline: float, *, whole: bool) -> Callable[[str], Any]:
    import regex  # most adapters list plain names

    try:
        timed = regex.compile(expression, regex.VERSION0, cache_pattern=False)
    except (regex.error, RecursionError):
        raise ValueError(f"the key {_shown(key)}, no regular expression") from None
    match = timed.fullmatch if whole else timed.match

    def match_in_time(name: str) -> Any:
        try:
            return match(name, timeout=max(0.0, deadline - time.process_time()))
        except (TimeoutError, MemoryError):
            raise _too_slow(key) from None

    return match_in_time


def _too_slow(key: str) -> ValueError:
    return ValueError(f"the key {_shown(key)}, a regular expression that takes too long to match")


def _shown(key: str) -> str:
    return printable(repr(key[:200]), 80)
