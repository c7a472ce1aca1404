"""The two streams: results go to stdout, everything else to stderr. Names from a checkpoint are text, never markup."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loftq_cli.errors import escape, printable

_FILE_WIDTH = 200  # columns of a table in a file or a pipe: wide enough for the longest usual tensor names


def say(text: str) -> None:
    """Print `text` as a single line on stderr, with unprintable characters escaped, cut at 2000 characters."""
    print(printable(text, 2000), file=sys.stderr, flush=True)


def write_result(text: str) -> None:
    """Print `text` on stdout at once, with unprintable characters of each line escaped.

    >>> write_result("28 layers")
    28 layers
    """
    print("\n".join(map(escape, text.split("\n"))), flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout: the first column holds text, every further column numbers.

    columns   the headings
    rows      cells as text, as many as columns

    >>> print_table(("layer", "bits"), [("q_proj", "4.13")])
    layer   bits
    q_proj  4.13
    """
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH, markup=False, highlight=False)
    table = Table(box=None, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def say_done() -> None:
    """Print the last line of a successful command on stderr: the peak memory of the process."""
    say(f"done, peak memory {format_nbytes(peak_nbytes())}")


def format_nbytes(nbytes: int) -> str:
    """A number of bytes as decimal kB, MB or GB.

    >>> format_nbytes(1500), format_nbytes(2_500_000), format_nbytes(3_210_000_000)
    ('1.5 kB', '2.5 MB', '3.21 GB')
    """
    if nbytes < 1e6:
        return f"{nbytes / 1e3:.1f} kB"
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def format_errors(plain_error: float | None, base_error: float | None, error: float, plain: str = "plain") -> str:
    """The three errors of a layer or of a model in a line; unknown errors are left out. `plain` names plain rounding.

    >>> format_errors(0.0922, 0.0951, 0.0708, "plain NF4")
    '0.0922 plain NF4, 0.0951 this base alone, 0.0708 base + adapter'
    """
    named = ((plain_error, plain), (base_error, "this base alone"), (error, "base + adapter"))
    return ", ".join(f"{number:.4f} {name}" for number, name in named if number is not None)


def peak_nbytes() -> int:
    """The peak memory of the process in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    # getrusage on Linux also counts the memory of the parent process at the fork, so /proc comes first.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_shape(shape: Sequence[int]) -> str:
    """A shape as text.

    >>> format_shape((192, 512))
    '192×512'
    """
    return "×".join(map(str, shape))
