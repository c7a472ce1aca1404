"""A bar or lines on stderr while a command runs: an observer of the API."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from loftq_cli.api.observer import Observer
from loftq_cli.api.results import MergePlan, QuantizePlan
from loftq_cli.cli.render.console import format_errors, format_nbytes, peak_nbytes, say, write_result
from loftq_cli.cli.render.conversion import announce, announce_copies
from loftq_cli.cli.render.merging import format_summary
from loftq_cli.cli.render.verification import MAX_LINES, problem_line
from loftq_cli.conversion.report import LayerResult
from loftq_cli.errors import printable
from loftq_cli.inspecting.findings import Problem
from loftq_cli.merging.report import MergedLayer


class CommandProgress(Observer):
    """Prints the progress of a command on stderr: a live bar for the layers of a conversion on a terminal, plain lines
    otherwise.

    quiet     whether nothing but warnings is printed
    verbose   whether every iteration's error and every copied tensor is printed
    """

    def __init__(self, *, quiet: bool, verbose: bool = False) -> None:
        self._quiet, self._verbose = quiet, verbose
        self._total = self._done = 0
        self._since = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> CommandProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def started(self, plan: QuantizePlan | MergePlan) -> None:
        self._total, self._since = len(plan.layers) if isinstance(plan, QuantizePlan) else plan.layers, time.monotonic()
        if self._quiet:
            return
        if isinstance(plan, MergePlan):
            say(format_summary(plan))
            return
        announce(plan)
        if self._verbose:
            announce_copies(plan)
        if sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task("", total=self._total, peak=format_nbytes(peak_nbytes()), change="")
            self._bar.start()

    def phase(self, text: str) -> None:
        if not self._quiet:
            self._line(text)

    def note(self, text: str) -> None:
        self.phase(f"note: {text}")

    def warning(self, text: str) -> None:
        self._line(f"warning: {text}")

    def layer_measured(self, name: str, done: int, total: int) -> None:
        self.phase(f"measured [{done}/{total}] {name}")

    def layer_started(self, name: str) -> None:
        # The bar shows the current name beside the error of the previous layer.
        if self._bar is not None:
            self._bar.update(self._task, description=printable(name, 60), peak=format_nbytes(peak_nbytes()))

    def layer_converted(self, layer: LayerResult, *, resumed: bool) -> None:
        self._done += 1
        if self._quiet:
            return
        change = f"error {format_errors(layer.plain_error, layer.error.base_error, layer.error.error)}"
        if self._bar is not None:
            self._bar.update(self._task, advance=1, change=change, peak=format_nbytes(peak_nbytes()))
        else:
            say(f"[{self._done}/{self._total}] {layer.name}: {change}{' (kept)' if resumed else ''}, {self._times()}")
        if self._verbose and layer.iteration_errors:
            errors = " ".join(f"{error:.5f}" for error in layer.iteration_errors)
            self._line(f"    iterations: {errors} (best: {layer.best_iteration})")

    def layer_merged(self, layer: MergedLayer) -> None:
        self._done += 1
        share = "" if layer.retention is None else f", {layer.retention:.1%} of it retained"
        if layer.lost is not None:
            share += f", {layer.lost:.2g} of it lost"
        self.phase(f"[{self._done}/{self._total}] {layer.name}: changed by {layer.relative_delta:.2%}{share}")

    def calibration_started(self, inputs: int, windows: int, context: int, *, lines: bool, nbytes: int) -> None:
        self._total = inputs
        unit = "lines of at most" if lines else "windows of"
        self.phase(f"{inputs} inputs to measure, {windows} {unit} {context} tokens; {format_nbytes(nbytes)} to write")

    def block_calibrated(self, block: str, inputs: int) -> None:
        self._done += inputs
        self.phase(f"[{self._done}/{self._total}] {block}: {self._times()}")

    def _times(self) -> str:
        """Elapsed seconds, remaining seconds and peak memory, as text."""
        seconds = max(0.0, time.monotonic() - self._since)
        remaining = seconds / self._done * (self._total - self._done)
        return f"{seconds:.1f} s, {remaining:.0f} s left, peak {format_nbytes(peak_nbytes())}"

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(Text(printable(text, 2000)))
        else:
            say(text)


class InspectionProgress(CommandProgress):
    """Prints the progress of an inspection on stderr, and each problem of a verification on stdout at once.

    as_json   whether the problems are left to the JSON result at the end
    """

    def __init__(self, *, as_json: bool) -> None:
        super().__init__(quiet=False)
        self._as_json, self._problems = as_json, 0

    def problem_found(self, problem: Problem, path: Path) -> None:
        self._problems += 1
        if not self._as_json and self._problems <= MAX_LINES:
            write_result(problem_line(problem, path))


def _bar() -> Progress:
    return Progress(
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("peak {task.fields[peak]}", markup=False),
        TextColumn("{task.fields[change]}", markup=False),
        # The name comes last: a narrow terminal cuts the end off.
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
    )
