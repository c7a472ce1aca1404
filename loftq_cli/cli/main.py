"""All commands together. Every error becomes a line on stderr and an exit status here, and nowhere else."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from loftq_cli.cli import guidance
from loftq_cli.cli.calibrate import calibrate
from loftq_cli.cli.inspect import inspect
from loftq_cli.cli.merge import merge
from loftq_cli.cli.quantize import quantize
from loftq_cli.cli.recipes import recipes
from loftq_cli.cli.render.console import say
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
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings=_SETTINGS,
    help="Quantized base weights plus LoRA tensors from a full-precision checkpoint, layer by layer, on any machine.",
)
for _command, _examples in (
    (quantize, guidance.QUANTIZE),
    (merge, guidance.MERGE),
    (inspect, guidance.INSPECT),
    (calibrate, guidance.CALIBRATE),
    (recipes, guidance.RECIPES),
):
    app.command(context_settings=_SETTINGS, epilog=guidance.format_examples(_examples))(_command)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"loftq-cli {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version  # the callback prints the version


def _describe_mistake(error: Exception) -> str:
    """The message of an error in the command line, with what the user probably meant, or the command of the help."""
    context = getattr(error, "ctx", None)
    help_command = f"{context.command_path if context is not None else 'loftq'} --help"
    option = getattr(error, "option_name", None)
    if option is None or context is None:
        return f"{error.format_message()} ({help_command})"  # type: ignore[attr-defined]
    known = [name for parameter in context.command.params for name in _spellings(parameter)]
    return f"No such option: {option} ({guidance.option_hint(option, known) or help_command})"


def _spellings(parameter: Any) -> list[str]:
    """The spellings of a parameter of a command: options, or the metavar of an argument."""
    options = [name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("--")]
    return options or [parameter.metavar or parameter.name.upper()]


def _run(arguments: list[str]) -> int:
    """Run a command, print the error if there is any, and return the exit status."""
    try:
        status = app(arguments or ["--help"], standalone_mode=False)
    except LoftqError as error:
        say(f"error: {error}")
        return error.exit_code
    except _CommandLineError as error:
        say(f"error: {_describe_mistake(error)}")
        return EXIT_INPUT
    except (KeyboardInterrupt, typer.Abort):
        status = EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit):  # the reader of stdout is gone; Typer raises SystemExit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # drop further output
        return EXIT_STORAGE
    except Exception as error:
        if is_memory_shortage(error):
            say(f"error: {memory_shortage()}")
            return EXIT_MEMORY
        if not isinstance(error, OSError):
            raise
        # The terminal or a cache failed, no weight file.
        say(f"error: {StorageError(error.strerror or 'input/output error', file=error.filename)}")
        return EXIT_STORAGE
    if status == EXIT_INTERRUPTED:  # Typer turns a KeyboardInterrupt into a silent status
        say("interrupted; run the same command to continue")
    return status if isinstance(status, int) else EXIT_OK
