"""The start of the program: signals are caught before anything else is imported, since imports take a second."""

from __future__ import annotations

import os
import signal
import sys
from io import TextIOWrapper
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED = 130  # as errors.EXIT_INTERRUPTED


def main() -> None:
    """Run the command line in sys.argv, and exit with the status of the command.

    SIGINT, SIGTERM and SIGHUP interrupt the command in order; a second signal ends the process at once. A signal that
    the caller of the process ignores stays ignored: shells start background jobs so, and nohup does.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # some terminals lack our characters
    try:
        from loftq_cli.runtime.allocator import keep_freed_buffers

        keep_freed_buffers()
        from loftq_cli.cli.main import _run

        status = _run(sys.argv[1:])
        _let_signals_end_the_process()  # an exception past this line would be shown as a traceback
    except KeyboardInterrupt:  # before the command began, or in the last words of the command
        status = _INTERRUPTED
        os.write(2, b"interrupted; run the same command to continue\n")
    sys.exit(status)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Interrupt the run in order, after the current matrix; a second signal ends the process at once."""
    _let_signals_end_the_process()
    raise KeyboardInterrupt


def _let_signals_end_the_process() -> None:
    for number in _SIGNALS:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, signal.SIG_DFL)
