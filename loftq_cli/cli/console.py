"""Where words go: results to stdout, everything else to stderr. Names from a checkpoint are text, never markup."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from loftq_cli.conversion.report import LayerResult
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


def megabytes(nbytes: int) -> str:
    """Bytes for people."""
    if nbytes < 1e6:
        return f"{nbytes / 1e3:.1f} kB"
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def peak_nbytes() -> int:
    """The most memory this process has had in use."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    # On Linux this one begins with what the process that started it had in use.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class ConversionProgress:
    """An observer of a conversion: a live bar on a terminal, one plain line per layer elsewhere, nothing if quiet."""

    def __init__(self, n_layers: int, *, quiet: bool, verbose: bool) -> None:
        self._n_layers, self._quiet, self._verbose = n_layers, quiet, verbose
        self._done = 0
        self._started = time.monotonic()
        self._bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = Progress(
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("peak {task.fields[peak]}", markup=False),
                TextColumn("{task.fields[change]}", markup=False),
                # Last, where a narrow terminal cuts it off.
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=n_layers, peak=megabytes(peak_nbytes()), change="")

    def __enter__(self) -> ConversionProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def layer_started(self, name: str) -> None:
        """The next layer's name on the bar, beside the error of the one before."""
        if self._bar is not None:
            self._bar.update(self._task, description=printable(name, 60), peak=megabytes(peak_nbytes()))

    def layer_done(self, result: LayerResult, *, resumed: bool) -> None:
        """A finished layer: its error without and with what the method did about it."""
        self._done += 1
        if self._quiet:
            return
        change = f"error {result.quantization_error:.4f} -> {result.error.error:.4f}"
        if self._bar is not None:
            self._bar.update(self._task, advance=1, change=change, peak=megabytes(peak_nbytes()))
        else:
            seconds = time.monotonic() - self._started
            left = seconds / self._done * (self._n_layers - self._done)
            say(
                f"[{self._done}/{self._n_layers}] {result.name}: {change}{' (kept)' if resumed else ''}, "
                f"{seconds:.1f} s, {left:.0f} s left, peak {megabytes(peak_nbytes())}"
            )
        if self._verbose and result.iteration_errors:
            errors = " ".join(f"{error:.5f}" for error in result.iteration_errors)
            self._line(f"    iterations: {errors} (best: {result.best_iteration})")

    def phase(self, text: str) -> None:
        """What happens after the layers."""
        if not self._quiet:
            self._line(text)

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(Text(printable(text, 2000)))
        else:
            say(text)
