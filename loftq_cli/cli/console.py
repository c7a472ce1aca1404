"""The two streams: results go to stdout, everything else to stderr. Names from a checkpoint are text, never markup."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loftq_cli.errors import printable

_WIDE = 160  # columns of a table that no terminal shows: wide enough for the longest usual tensor names


def say(text: str) -> None:
    """One line on stderr."""
    print(printable(text, 2000), file=sys.stderr, flush=True)


def result(text: str) -> None:
    """Text on stdout."""
    print(text, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout; the first column is text, the others are numbers."""
    console = Console(width=None if sys.stdout.isatty() else _WIDE, markup=False, highlight=False)
    shown = Table(box=None, pad_edge=False)
    for place, column in enumerate(columns):
        shown.add_column(column, justify="right" if place else "left", no_wrap=True, overflow="ellipsis")
    for row in rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    console.print(shown)


def say_done() -> None:
    """The last line on stderr of a successful command."""
    say(f"done, peak memory {megabytes(peak_nbytes())}")


def megabytes(nbytes: int) -> str:
    """Bytes for people."""
    if nbytes < 1e6:
        return f"{nbytes / 1e3:.1f} kB"
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def peak_nbytes() -> int:
    """The peak memory of this process in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    # Linux counts the memory of the parent process too, as of the fork.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def by(shape: Sequence[int]) -> str:
    """A shape for people."""
    return "×".join(map(str, shape))
