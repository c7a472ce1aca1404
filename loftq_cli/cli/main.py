"""The commands together, and the one place where an error becomes a line on stderr and an exit status."""

from __future__ import annotations

import os
import signal
import sys
from io import TextIOWrapper
from types import FrameType
from typing import Annotated

import typer

from loftq_cli.cli.calibrate import calibrate
from loftq_cli.cli.console import say
from loftq_cli.cli.inspect import inspect
from loftq_cli.cli.merge import merge
from loftq_cli.cli.quantize import quantize
from loftq_cli.errors import (
    EXIT_INPUT,
    EXIT_INTERRUPTED,
    EXIT_MEMORY,
    EXIT_OK,
    EXIT_STORAGE,
    LoftqError,
    StorageError,
    is_memory_shortage,
    memory_shortage,
)
from loftq_cli.runtime.version import VERSION

# Typer contains a copy of click, and exports a subclass of the copy's error class.
_CommandLineError: type[Exception] = next(k for k in typer.BadParameter.__mro__ if k.__name__ == "ClickException")

_SETTINGS = {"help_option_names": ["-h", "--help"], "token_normalize_func": lambda token: token.replace("_", "-")}

app = typer.Typer(
    name="loftq",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings=_SETTINGS,
    help="Quantized base weights plus LoRA tensors from a full-precision checkpoint, layer by layer, on any machine.",
)
app.command(context_settings=_SETTINGS)(quantize)
app.command(context_settings=_SETTINGS)(merge)
app.command(context_settings=_SETTINGS)(inspect)
app.command(context_settings=_SETTINGS)(calibrate)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"loftq-cli {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version  # handled by its callback


def main() -> None:
    """Run the command line and exit."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell ignores it for a background job
            signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # for terminals without our characters
    sys.exit(_run(sys.argv[1:]))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The first signal ends the run in order, which may take as long as the matrix at hand; a second one at once."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
    raise KeyboardInterrupt


def _run(arguments: list[str]) -> int:
    """The exit status of one command."""
    try:
        status = app(arguments or ["--help"], standalone_mode=False)
    except LoftqError as error:
        say(f"error: {error}")
        return error.exit_code
    except _CommandLineError as error:
        say(f"error: {error.format_message()} (loftq --help)")  # type: ignore[attr-defined]
        return EXIT_INPUT
    except (KeyboardInterrupt, typer.Abort):
        status = EXIT_INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not is_memory_shortage(error):
            raise
        say(f"error: {memory_shortage()}")
        return EXIT_MEMORY
    except (BrokenPipeError, SystemExit):  # whoever read stdout has gone; Typer answers that by SystemExit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more can be said there
        return EXIT_STORAGE
    except OSError as error:  # of what is not a weight file: the terminal's, a cache's
        say(f"error: {StorageError(error.strerror or 'input/output error', file=error.filename)}")
        return EXIT_STORAGE
    if status == EXIT_INTERRUPTED:  # Typer turns a KeyboardInterrupt into this status without a word
        say("interrupted; run the same command to continue")
    return status if isinstance(status, int) else EXIT_OK
