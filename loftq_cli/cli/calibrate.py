"""`loftq calibrate`."""

from __future__ import annotations

import json
import time

from loftq_cli.activations.calibration import CalibrationOptions, prepare_calibration, run_calibration
from loftq_cli.activations.text_windows import DEFAULT_TOKENS
from loftq_cli.cli import options
from loftq_cli.cli.console import megabytes, peak_nbytes, result, say
from loftq_cli.errors import printable
from loftq_cli.model.builtin import resolve_model
from loftq_cli.runtime.workers import available_threads


def calibrate(
    model: options.Model,
    text: options.Text,
    output: options.StatisticsOutput,
    tokens: options.Tokens = DEFAULT_TOKENS,
    context: options.Context = None,
    lines: options.Lines = False,
    diagonal: options.Diagonal = False,
    threads: options.Threads = None,
    overwrite: options.OverwriteStatistics = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what the linear layers of MODEL read on a text.

    Writes, for each layer that quantize takes, the mean of x·xᵀ over the tokens of the text. The model runs in float32
    with one block of it in memory at a time. Needs transformers: pip install 'loftq-cli[hf]'.
    """
    choices = CalibrationOptions(tokens, context, diagonal, lines)
    prepared = prepare_calibration(resolve_model(model), text, output, choices, overwrite=overwrite)
    done = run_calibration(prepared, _Progress(quiet=quiet, lines=lines), threads=threads or available_threads())
    if not quiet:
        say(f"done, peak memory {megabytes(peak_nbytes())}")
    if as_json:
        values = {
            "output": str(done.output),
            "kind": done.kind,
            "layers": done.layers,
            "inputs": done.inputs,
            "without_statistic": done.unread,
            "tokens": done.tokens,
            "windows": done.windows,
            "context": done.context,
            "lines": lines,
            "nbytes": done.nbytes,
        }
        result(json.dumps(values, indent=2))
        return
    windows = f"{done.windows} lines" if lines else f"windows of {done.context}"
    result(
        f"wrote {printable(done.output)}  {megabytes(done.nbytes)}, {done.layers} layers with {done.inputs} "
        f"{done.kind} statistics, {done.tokens} tokens in {windows}"
    )


class _Progress:
    """One line per note and block on stderr."""

    def __init__(self, *, quiet: bool, lines: bool) -> None:
        self._what = "lines of at most" if lines else "windows of"
        self._quiet, self._done, self._inputs, self._since = quiet, 0, 0, time.monotonic()

    def started(self, n_inputs: int, windows: int, context: int) -> None:
        """What there is to do."""
        self._inputs = n_inputs
        if not self._quiet:
            say(f"{n_inputs} inputs to measure, {windows} {self._what} {context} tokens")

    def note(self, text: str) -> None:
        """What a user may not expect."""
        if not self._quiet:
            say(f"note: {text}")

    def block_done(self, block: str, inputs: int) -> None:
        """A block that the whole text has gone through."""
        self._done += inputs
        if not self._quiet:
            seconds = time.monotonic() - self._since
            left = seconds / self._done * (self._inputs - self._done)
            say(
                f"[{self._done}/{self._inputs}] {block}: {seconds:.1f} s, {left:.0f} s left, "
                f"peak {megabytes(peak_nbytes())}"
            )
