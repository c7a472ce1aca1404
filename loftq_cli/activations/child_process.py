"""A function about a stranger's files, run in a child process with a time limit: libraries in Rust panic, and a
stranger's patterns and sizes may take for ever. The child sends a JSON value; a hostile file ends the child only.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from loftq_cli import errors
from loftq_cli.activations.transformers_models import reason_of
from loftq_cli.errors import InputError, LoftqError, StorageError, is_memory_shortage, printable

MEMORY_NBYTES = 4_000_000_000  # beside the memory of the parent; the largest tokenizers take 1 GB
_READ_NBYTES = 1 << 20
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MAX_DESCRIPTOR = 1 << 20  # Linux has no more by default (fs.nr_open)


@dataclass(frozen=True, slots=True)
class Subject:
    """The words for errors about a child process.

    name      what runs in the child
    failing   what a failure is: "fails on this text"
    slow      the remedy where the child takes too long
    remedy    the remedy where the child fails
    """

    name: str
    failing: str
    slow: str
    remedy: str


def run_in_child(
    function: Callable[[], Any],
    seconds: float,
    directory: Path,
    subject: Subject,
    *,
    memory_nbytes: int = MEMORY_NBYTES,
) -> Any:
    """The JSON value of `function()`, called in a child process with `memory_nbytes` beside the memory of the parent.
    `directory` and `subject` are for errors.

    Raises InputError when the function fails or takes more than `seconds`, the LoftqError of the function, StorageError
    when no process can start, MemoryError when the child lacks memory.

    >>> subject = Subject("its config", "fails", slow="another config", remedy="another config")
    >>> run_in_child(lambda: 6 * 7, 5.0, Path("model"), subject)
    42
    """
    reading, writing = os.pipe()
    try:
        # Without signals: an interrupt in the child would raise in a copy of all callers, and their clean-up would run.
        with _blocked_signals(), warnings.catch_warnings(action="ignore"):  # of threads beside a fork
            child = os.fork()
            if not child:
                os.close(reading)
                _answer(function, writing, seconds, memory_nbytes)
    except OSError as error:
        os.close(reading)
        os.close(writing)
        raise StorageError(f"no process for {subject.name} can start: {error.strerror}", file=directory) from None
    os.close(writing)
    try:
        answer = _read_answer(reading, time.monotonic() + seconds)
    finally:
        os.close(reading)
        with suppress(ProcessLookupError, ChildProcessError):  # of a caller who ignores SIGCHLD
            os.kill(child, signal.SIGKILL)  # no effect on a child that has ended
            os.waitpid(child, 0)
    if answer is None:
        message = f"{subject.name} takes more than {seconds:.0f} seconds"
        raise InputError(message, file=directory, hint=subject.slow)
    return _value_of(answer, directory, subject)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Signals that interrupt a command wait until the end of the block, in this thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer(function: Callable[[], Any], writing: int, seconds: float, memory_nbytes: int) -> NoReturn:
    """Call `function` in the child, write the value or the error as JSON, and end the child."""
    try:
        _confine(seconds, memory_nbytes, writing)
        answer = {"value": function()}
    except LoftqError as error:
        place = {"file": error.file, "tensor": error.tensor, "hint": error.hint}
        answer = {"error": type(error).__name__, "message": error.message, **place}
    except BaseException as error:  # a panic of Rust is no Exception
        answer = {"shortage": True} if is_memory_shortage(error) else {"failure": reason_of(error)}
    try:
        data = memoryview(json.dumps(answer).encode())
        while data:
            data = data[os.write(writing, data) :]
    finally:
        os._exit(0)  # nothing of the parent is flushed or closed


def _confine(seconds: float, memory_nbytes: int, writing: int) -> None:
    """Signals end the child, prints of libraries go nowhere, files and locks of the parent are closed, no file can be
    written, memory is bounded, and the child ends even when the parent is killed. `writing` stays open.
    """
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.closerange(3, writing)
    os.closerange(writing + 1, _MAX_DESCRIPTOR)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_DATA, _data_nbytes() + memory_nbytes)
    _limit(resource.RLIMIT_CPU, int(seconds) * (os.cpu_count() or 1) + 1)  # over all threads of a tokenizer


def _limit(kind: int, most: int) -> None:
    """Limit a resource of this process, for good."""
    bound = resource.getrlimit(kind)[1]
    most = most if bound == resource.RLIM_INFINITY else min(most, bound)
    resource.setrlimit(kind, (most, most))


def _data_nbytes() -> int:
    """Bytes that the process may write to in its memory: the memory of the parent counts in a child."""
    with suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5]) * resource.getpagesize()
    return 0


def _read_answer(reading: int, deadline: float) -> bytes | None:
    """Read up to the end of the child; None at the deadline."""
    parts: list[bytes] = []
    while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(reading, _READ_NBYTES)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None


def _value_of(answer: bytes, directory: Path, subject: Subject) -> Any:
    values = json.loads(answer) if answer else {"failure": "its process ended"}
    if "value" in values:
        return values["value"]
    if "shortage" in values:
        raise MemoryError
    if "error" in values:
        place = {key: values[key] for key in ("file", "tensor", "hint")}
        kind: type[LoftqError] = getattr(errors, values["error"])
        raise kind(values["message"], **place)
    message = f"{subject.name} {subject.failing}: {printable(values['failure'], 300)}"
    raise InputError(message, file=directory, hint=subject.remedy)
