"""A stranger's tokenizer, run in a child process with a time limit: an expression of a tokenizer may take for ever, and
the library in Rust below a tokenizer may panic. The child sends token ids; a hostile tokenizer ends the child only.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from loftq_cli import errors
from loftq_cli.activations import transformers_models
from loftq_cli.activations.text_windows import TextFile, TokenizerFacts, Windows, cut_ids
from loftq_cli.errors import InputError, LoftqError, StorageError, is_memory_shortage, printable

_SECONDS = 120.0  # to load a tokenizer: the largest take seconds
_NBYTES_PER_SECOND = 50_000  # of text beside; a tokenizer in Python has twice the speed, in Rust twenty times
_MEMORY_NBYTES = 4_000_000_000  # beside the memory of the parent; the largest tokenizers take 1 GB
_MEMORY_PER_NBYTE = 400  # of text: a token of one character is a Python number, a text and two offsets
_READ_NBYTES = 1 << 20
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MAX_DESCRIPTOR = 1 << 20  # Linux has no more by default (fs.nr_open)


def cut_windows(
    directory: Path, config: Any, texts: Sequence[TextFile], *, tokens: int, context: int | None, lines: bool
) -> Windows:
    """Cut texts into windows with the tokenizer of the model in `directory`. The tokenizer is loaded and runs in a
    child process; the child ends after 120 seconds and a second for every 50 kB of text.

    config                   the result of `transformers_models.load_config`
    tokens, context, lines   see `cut_ids`

    Raises InputError when the folder has no tokenizer, or the tokenizer fails, panics or takes too long, and in the
    cases of `cut_ids`; UsageError as `cut_ids` does; StorageError when no process can start; MemoryError when the child
    lacks memory.

    >>> from loftq_cli.activations.text_windows import read_text
    >>> from loftq_cli.model.builtin import resolve_model
    >>> model, text = resolve_model("builtin:tiny-llama"), Path("text.txt")
    >>> _ = text.write_text("A text.")
    >>> config = transformers_models.load_config(model)
    >>> cut_windows(model, config, [read_text(text)], tokens=64, context=None, lines=False).tokens
    7
    """

    def cut() -> dict[int, list[list[int]]]:
        tokenizer = transformers_models.load_tokenizer(directory)
        longest = transformers_models.longest_input(config, tokenizer)
        vocabulary = transformers_models.vocabulary_size(config)
        return cut_ids(
            texts, tokenizer, tokens=tokens, context=context, lines=lines, longest=longest, vocabulary=vocabulary
        )

    by_length = _run_in_child(cut, sum(text.nbytes for text in texts), directory)
    return Windows.of({int(length): windows for length, windows in by_length.items()})


def read_facts(directory: Path, config: Any) -> TokenizerFacts:
    """The facts about the tokenizer of the model in `directory`, found in a child process as in `cut_windows`. Raises
    as `cut_windows` does.

    config   the result of `transformers_models.load_config`

    >>> from loftq_cli.model.builtin import resolve_model
    >>> model = resolve_model("builtin:tiny-llama")
    >>> read_facts(model, transformers_models.load_config(model)).longest
    512
    """

    def find() -> dict[str, Any]:
        tokenizer = transformers_models.load_tokenizer(directory)
        return dataclasses.asdict(TokenizerFacts.of(tokenizer, transformers_models.longest_input(config, tokenizer)))

    facts = _run_in_child(find, 0, directory)
    lists = {key: tuple(facts[key]) for key in ("before", "after", "special")}
    return TokenizerFacts(**{**facts, **lists})


def _run_in_child(function: Callable[[], Any], text_nbytes: int, directory: Path) -> Any:
    """The JSON value of `function()`, called in a child process with bounds for a text of `text_nbytes` bytes.
    `directory` holds the tokenizer, for errors.
    """
    seconds = _SECONDS + text_nbytes / _NBYTES_PER_SECOND
    reading, writing = os.pipe()
    try:
        # Without signals: an interrupt in the child would raise in a copy of all callers, and their clean-up would run.
        with _blocked_signals(), warnings.catch_warnings(action="ignore"):  # of threads beside a fork
            child = os.fork()
            if not child:
                os.close(reading)
                _answer(function, writing, seconds, text_nbytes)
    except OSError as error:
        os.close(reading)
        os.close(writing)
        raise StorageError(f"no process for its tokenizer can start: {error.strerror}", file=directory) from None
    os.close(writing)
    try:
        answer = _read_answer(reading, time.monotonic() + seconds)
    finally:
        os.close(reading)
        with suppress(ProcessLookupError, ChildProcessError):  # of a caller who ignores SIGCHLD
            os.kill(child, signal.SIGKILL)  # no effect on a child that has ended
            os.waitpid(child, 0)
    if answer is None:
        hint = "give less text, or the tokenizer files of another source"
        raise InputError(f"its tokenizer takes more than {seconds:.0f} seconds", file=directory, hint=hint)
    return _value_of(answer, directory)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Signals that interrupt a command wait until the end of the block, in this thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer(function: Callable[[], Any], writing: int, seconds: float, text_nbytes: int) -> NoReturn:
    """Call `function` in the child, write the value or the error as JSON, and end the child."""
    try:
        _confine(seconds, text_nbytes, writing)
        answer = {"value": function()}
    except LoftqError as error:
        place = {"file": error.file, "tensor": error.tensor, "hint": error.hint}
        answer = {"error": type(error).__name__, "message": error.message, **place}
    except BaseException as error:  # a panic of Rust is no Exception
        answer = {"shortage": True} if is_memory_shortage(error) else {"failure": transformers_models.reason_of(error)}
    try:
        data = memoryview(json.dumps(answer).encode())
        while data:
            data = data[os.write(writing, data) :]
    finally:
        os._exit(0)  # nothing of the parent is flushed or closed


def _confine(seconds: float, text_nbytes: int, writing: int) -> None:
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
    _limit(resource.RLIMIT_DATA, _data_nbytes() + _MEMORY_NBYTES + _MEMORY_PER_NBYTE * text_nbytes)
    _limit(resource.RLIMIT_CPU, int(seconds) * (os.cpu_count() or 1) + 1)  # over all threads of a tokenizer


def _limit(kind: int, most: int) -> None:
    """Limit a resource of this process, for good."""
    bound = resource.getrlimit(kind)[1]
    most = most if bound == resource.RLIM_INFINITY else min(most, bound)
    resource.setrlimit(kind, (most, most))


def _data_nbytes() -> int:
    """Bytes that the process may write to in its memory: the memory of the parent counts in a child."""
    with suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[5]) * resource.getpagesize()
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


def _value_of(answer: bytes, directory: Path) -> Any:
    values = json.loads(answer) if answer else {"failure": "its process ended"}
    if "value" in values:
        return values["value"]
    if "shortage" in values:
        raise MemoryError
    if "error" in values:
        place = {key: values[key] for key in ("file", "tensor", "hint")}
        kind: type[LoftqError] = getattr(errors, values["error"])
        raise kind(values["message"], **place)
    message = f"its tokenizer fails on this text: {printable(values['failure'], 300)}"
    raise InputError(message, file=directory, hint="copy the model's tokenizer files into it again")
