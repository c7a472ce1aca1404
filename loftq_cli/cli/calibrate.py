"""The command `loftq calibrate`."""

from __future__ import annotations

import json

from loftq_cli.activations.calibration import CalibrationResult
from loftq_cli.activations.text_windows import DEFAULT_TOKENS
from loftq_cli.api.calibrate import calibrate as calibrate_model
from loftq_cli.cli import options, options_inspect
from loftq_cli.cli.render.console import format_nbytes, say_done, write_result
from loftq_cli.cli.render.progress import CommandProgress
from loftq_cli.errors import printable


def calibrate(
    model: options.Model,
    text: options_inspect.Text,
    output: options_inspect.StatisticsOutput,
    tokens: options_inspect.Tokens = DEFAULT_TOKENS,
    context: options_inspect.Context = None,
    lines: options_inspect.Lines = False,
    diagonal: options_inspect.Diagonal = False,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    overwrite: options_inspect.OverwriteStatistics = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure the inputs of MODEL's linear layers on a text.

    Writes, for each layer to quantize, the mean of x·xᵀ over the tokens of the text. The model runs in float32 with a
    single block in memory. Needs: pip install transformers accelerate.
    """
    with CommandProgress(quiet=quiet) as progress:
        statistics = calibrate_model(
            model,
            text,
            output,
            tokens=tokens,
            context=context,
            lines=lines,
            diagonal=diagonal,
            threads=threads,
            device=device,
            overwrite=overwrite,
            observer=progress,
        )
    if not quiet:
        say_done()
    _print(statistics, as_json=as_json)


def _print(statistics: CalibrationResult, *, as_json: bool) -> None:
    if as_json:
        values = {
            "output": str(statistics.output),
            "kind": statistics.kind,
            "layers": statistics.layers,
            "inputs": statistics.inputs,
            "without_statistic": statistics.unread,
            "tokens": statistics.tokens,
            "windows": statistics.windows,
            "context": statistics.context,
            "lines": statistics.lines,
            "nbytes": statistics.nbytes,
        }
        write_result(json.dumps(values, indent=2))
        return
    windows = f"{statistics.windows} lines" if statistics.lines else f"windows of {statistics.context}"
    write_result(
        f"wrote {printable(statistics.output)}  {format_nbytes(statistics.nbytes)}, {statistics.layers} layers with "
        f"{statistics.inputs} {statistics.kind} statistics, {statistics.tokens} tokens in {windows}"
    )
