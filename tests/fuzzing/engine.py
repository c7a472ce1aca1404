"""Runs targets on numbered inputs. An input depends on the seed, the target's name and its number alone, so that any of
them can be made again; how the work is divided among processes changes nothing.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory, gettempdir
from types import FrameType
from typing import Any, NoReturn

import torch

from loftq_cli.errors import LoftqError

_CHUNK = 5000
_SECONDS = 5.0  # of processor time for one input: more is a hang
_SHOWN = 3000


@dataclass(frozen=True)
class Session:
    """A target, ready: `make` an input, `read` it. What `read` raises beside LoftqError is a bug."""

    make: Callable[[Random], Any]
    read: Callable[[Any], object]


@dataclass(frozen=True)
class Target:
    """`start` gets a directory of its own; `share` is its part of all inputs, in comparison with the others."""

    start: Callable[[Path], Session]
    share: int


@dataclass(frozen=True)
class Chunk:
    """Inputs [start, stop) of one target."""

    target: str
    seed: int
    start: int
    stop: int


@dataclass(frozen=True)
class Tally:
    """What came out of a chunk; `failure` describes the first input that something escaped from."""

    target: str
    inputs: int
    accepted: int
    seconds: float
    failure: str | None = None


class TookTooLong(Exception):
    """An input that is worked on for seconds."""


def divided(targets: dict[str, Target], inputs: int, seed: int) -> list[Chunk]:
    """All inputs in chunks, by the shares of `targets`."""
    total, chunks = sum(target.share for target in targets.values()), []
    for name, target in targets.items():
        count = -(-inputs * target.share // total)
        chunks += [Chunk(name, seed, at, min(at + _CHUNK, count)) for at in range(0, count, _CHUNK)]
    return chunks


def run(chunks: list[Chunk], processes: int) -> Iterator[Tally]:
    """The outcome of each chunk, in order; stops after a failure."""
    if processes == 1:
        yield from map(run_chunk, chunks)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run_chunk, chunks)


def run_chunk(chunk: Chunk) -> Tally:
    """Read every input of a chunk, up to the first that something escapes from."""
    session, random = _session(chunk.target), Random()
    accepted, began = 0, time.process_time()
    failure, number = None, chunk.start
    for number in range(chunk.start, chunk.stop):
        random.seed((chunk.seed << 64) + (zlib.crc32(chunk.target.encode()) << 32) + number)
        data = session.make(random)
        try:
            with _at_most(_SECONDS):
                session.read(data)
            accepted += 1
        except LoftqError as error:
            if not str(error).isprintable():
                failure = _described(chunk, number, data, "its message is not printable")
        except (Exception, SystemExit):
            failure = _described(chunk, number, data, traceback.format_exc(limit=-12))
        if failure is not None:
            break
    return Tally(chunk.target, number - chunk.start + 1, accepted, time.process_time() - began, failure)


@cache
def _session(name: str) -> Session:
    from tests.fuzzing.targets import TARGETS

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of regular expressions that may be read otherwise one day
    directory = Path(_scratch().name) / name
    directory.mkdir()
    return TARGETS[name].start(directory)


@cache
def _scratch() -> TemporaryDirectory[str]:
    """In memory where there is such a place: every other input is a file. Removed with the process."""
    memory = "/dev/shm"
    return TemporaryDirectory(prefix="fuzzing-", dir=memory if os.access(memory, os.W_OK) else gettempdir())


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    signal.signal(signal.SIGPROF, _end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise TookTooLong


def _described(chunk: Chunk, number: int, data: Any, what: str) -> str:
    again = f"--only {chunk.target} --seed {chunk.seed} --number {number}"
    return f"{chunk.target}: input {number} ({again})\n{repr(data)[:_SHOWN]}\n{what}"
