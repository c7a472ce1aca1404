"""Regular expressions from an adapter, a recipe or a command line, matched in bounded time, in any thread.

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
from functools import lru_cache
from typing import Any

from loftq_cli.errors import UsageError, printable

_SECONDS = 0.5  # processor time; expressions of real adapters take microseconds for a name
_SECONDS_PER_PAIR = 5e-6  # an adapter of many ranks has a key for each module
_MOST_SECONDS = 10.0
_SECONDS_PER_SEARCH = 5e-5  # for each search of an expression of a user; ten times the time of real ones
_MAX_NCHARS = 10_000
_MAX_SEARCH_NCHARS = 100_000  # recipes that a target wrote list the modules of a format
_MAX_EXPANDED = 100_000  # `regex` writes out x{1000} as 1000 nodes; a million nodes take 1.2 s and 275 MB to compile
_PLAIN = re.compile(r"(?:[\w.\-]|\\\.)*")  # a name; dots may be escaped
_ANCHORED = re.compile(rf"\^?{_PLAIN.pattern}\$?")
_PIECES = (
    r"[^\\\[({]",  # a character, an anchor, *, +, ?, | or )
    r"\\(?:[^A-Za-z0-9]|[1-9dDsSwWbBAZfnrtv])",
    # Sets of ASCII characters: `re` needs a second for each range over all of Unicode where case is ignored.
    r"\[\^?\]?(?:[ -Z^-~]|\\[ -/:-@\[-`{-~dDsSwWfnrtv])*\]",
    r"\((?!\?)",
    r"\(\?(?:[:=!>]|<[=!]|P<[A-Za-z_][A-Za-z_0-9]*>|[aimsu]+\)|[ims]*(?:-[ims]+)?:)",
    r"\{[0-9]{1,4}(?:,[0-9]{0,4})?\}",  # `regex` reads further braces as fuzzy matching, `re` as braces
)
# Without a possessive group: before 3.11.5 Python takes the beginning of a piece for a whole one there (gh-106052).
_SYNTAX = re.compile(f"(?:{'|'.join(_PIECES)})*", re.DOTALL)
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
    matchers = {key: _matcher(key, expression, whole=whole) for key, expression in expressions.items()}
    # The time limit is for matching, of this thread alone: `_check` bounds the time of compiling.
    deadline = time.thread_time() + seconds
    matches: dict[str, str] = {}
    for name in names:
        for key, match in matchers.items():
            if match(name, deadline):
                matches[name] = key
                break
    return matches


def finds(expression: str, name: str) -> bool:
    """True if the regular expression `expression` of a user matches anywhere in `name`. All searches of an expression
    in a process share a time limit that grows with their number.

    Raises UsageError for an expression that is broken, is too long, has syntax outside `_SYNTAX`, or has no answer
    within the time limit.

    >>> finds(r"layers\\.[01]\\.", "model.layers.0.q_proj"), finds("^q_proj", "model.layers.0.q_proj")
    (True, False)
    """
    try:
        return _finder(expression)(name)
    except _RefusedError as error:
        raise UsageError(f"{_shown(expression)} is {error.reason}", hint="a simpler expression") from None


def check_expression(expression: str) -> None:
    """Raises ValueError with the reason for an expression that `finds` refuses before the first search.

    >>> check_expression("(")
    Traceback (most recent call last):
    ValueError: missing ), unterminated subpattern at position 0
    """
    try:
        _check(expression, expression, _MAX_SEARCH_NCHARS)  # first: some expressions take minutes to compile
        with warnings.catch_warnings(action="ignore"):
            re.compile(expression)
        _finder(expression)
    except _RefusedError as error:
        raise ValueError(error.reason) from None
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


@lru_cache(maxsize=10_000)
def _finder(expression: str) -> Callable[[str], bool]:
    """Return a function that searches a name. Raises ValueError for an expression that is not searched for."""
    if _ANCHORED.fullmatch(expression):
        plain = re.compile(expression)
        return lambda name: plain.search(name) is not None
    _check(expression, expression, _MAX_SEARCH_NCHARS)
    return _BoundedSearch(expression)


class _BoundedSearch:
    """An expression, the number of searches so far, and the seconds of processor time spent in the searches. Two
    threads may lose a count of each other: the limit is a bound and no measurement.
    """

    def __init__(self, expression: str) -> None:
        self._expression, self._search = expression, _compile_timed(expression, expression).search
        self._searches, self._spent = 0, 0.0

    def __call__(self, name: str) -> bool:
        self._searches += 1
        seconds = _SECONDS + _SECONDS_PER_SEARCH * self._searches - self._spent
        begin = time.thread_time()
        try:
            return self._search(name, timeout=max(0.0, seconds)) is not None
        except (TimeoutError, MemoryError):
            raise _too_slow(self._expression) from None
        finally:
            self._spent += time.thread_time() - begin


def _check(key: str, expression: str, max_nchars: int = _MAX_NCHARS) -> None:
    """Raises ValueError for an expression whose length, syntax or counts `regex` cannot compile in bounded time."""
    if len(key) > max_nchars:
        raise _RefusedError(key, f"a regular expression of {len(key)} characters")
    if _PLAIN.fullmatch(key):
        return
    if not _SYNTAX.fullmatch(expression):
        raise _RefusedError(key, "no regular expression in the syntax that is read here")
    counts = (max(1, int(count)) for count in _COUNT.findall(expression))
    if math.prod(counts) * len(expression) > _MAX_EXPANDED:
        raise _too_slow(key)


def _matcher(key: str, expression: str, *, whole: bool) -> Callable[[str, float], Any]:
    """Return a function for matching a name before a deadline, in seconds of time.thread_time. The function raises
    ValueError at the deadline.
    """
    with warnings.catch_warnings(action="ignore"):  # syntax with another meaning in later versions of Python
        try:
            compiled = re.compile(expression)
        except (re.error, ValueError, OverflowError, RecursionError):  # ValueError: flags that contradict each other
            raise _RefusedError(key, "no regular expression") from None
    if _PLAIN.fullmatch(key):
        match = compiled.fullmatch if whole else compiled.match
        return lambda name, deadline: match(name)
    return _timed_matcher(key, expression, whole=whole)


def _timed_matcher(key: str, expression: str, *, whole: bool) -> Callable[[str, float], Any]:
    timed = _compile_timed(key, expression)
    match = timed.fullmatch if whole else timed.match

    def match_in_time(name: str, deadline: float) -> Any:
        try:
            return match(name, timeout=max(0.0, deadline - time.thread_time()))
        except (TimeoutError, MemoryError):
            raise _too_slow(key) from None

    return match_in_time


def _compile_timed(key: str, expression: str) -> Any:
    import regex  # most adapters list plain names

    try:
        return regex.compile(expression, regex.VERSION0, cache_pattern=False)
    except (regex.error, RecursionError):
        raise _RefusedError(key, "no regular expression") from None


class _RefusedError(ValueError):
    """The refusal of an expression; `reason` completes the sentence "KEY is ..."."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"the key {_shown(key)}, {reason}")
        self.reason = reason


def _too_slow(key: str) -> _RefusedError:
    return _RefusedError(key, "a regular expression that takes too long to match")


def _shown(key: str) -> str:
    return printable(repr(key[:200]), 80)
