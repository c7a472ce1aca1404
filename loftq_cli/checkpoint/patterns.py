"""Regular expressions that come with an adapter, matched in bounded time: one can be made to run for years.

The matcher of the standard library lets signals through while it runs, so a timer ends it. Only the main thread gets
signals: elsewhere only names are taken, dots included, and those are matched in no time.
"""

from __future__ import annotations

import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from loftq_cli.errors import printable

_SECONDS = 0.5  # of processor time; real patterns take a few µs a name
_SECONDS_PER_PAIR = 2e-6  # an adapter of many ranks has a key for each of its modules
_MOST_SECONDS = 10.0
_MAX_NCHARS = 10_000
_PLAIN = re.compile(r"[\w.\-]*")


class _TimeUp(Exception):
    pass


def first_matches(expressions: Mapping[str, str], names: Sequence[str], *, whole: bool = False) -> dict[str, str]:
    """Name -> the key of the first of `expressions` (key -> regular expression) that matches its beginning, or the
    `whole` of it; names that none matches are left out.

    Raises ValueError naming the key of an expression that is none, or that takes too long.
    """
    _refuse_slow_ones(expressions)
    seconds = min(_MOST_SECONDS, _SECONDS + _SECONDS_PER_PAIR * len(expressions) * len(names))
    current = ""
    matchers: dict[str, Callable[[str], Any]] = {}
    found: dict[str, str] = {}
    try:
        with _at_most(seconds):
            for current, expression in expressions.items():
                matchers[current] = _matcher(expression, whole=whole)
            for name in names:
                for current, match in matchers.items():
                    if match(name):
                        found[name] = current
                        break
    except (re.error, OverflowError, RecursionError):
        raise ValueError(f"the key {_shown(current)}, no regular expression") from None
    except _TimeUp:
        raise ValueError(f"the key {_shown(current)}, a regular expression that takes too long to match") from None
    return found


def _refuse_slow_ones(expressions: Mapping[str, str]) -> None:
    for key in expressions:
        if len(key) > _MAX_NCHARS:
            raise ValueError(f"the key {_shown(key)} of {len(key)} characters")
        if not _PLAIN.fullmatch(key) and not _has_timer():
            raise ValueError(f"the key {_shown(key)}, no plain name, and only the main thread matches expressions")


def _matcher(expression: str, *, whole: bool) -> Callable[[str], Any]:
    with warnings.catch_warnings(action="ignore"):  # of what other versions of Python may read differently
        compiled = re.compile(expression)
    return compiled.fullmatch if whole else compiled.match


def _has_timer() -> bool:
    return threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises _TimeUp inside when it took that much processor time; in other threads there is no bound."""
    if not _has_timer():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _end)
    try:
        # Again and again: the first one may come where Python drops exceptions.
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.05)
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        finally:
            signal.signal(signal.SIGVTALRM, before)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise _TimeUp


def _shown(key: str) -> str:
    return printable(repr(key[:200]), 80)
