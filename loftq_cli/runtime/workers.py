"""Threads that share the work on a matrix, on a file, or on many small matrices. Results come in the order of the work,
whatever finished first, so that nothing depends on the number of threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from threading import Lock
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREAD_COUNTS = Lock()  # held while torch's number of threads for the whole process differs from the caller's


def available_threads() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """`threads` threads that last until `close`. With one, everything runs in the thread that asks, unless `inline` is
    false. What runs in them must not wait for the same workers, and runs in the context (contextvars) of the thread
    that asks: with the kernels chosen there.
    """

    def __init__(self, threads: int = 1, *, inline: bool = True) -> None:
        self.threads = threads
        is_inline = threads == 1 and inline
        self._pool = None
        if not is_inline:  # BLAS gets one thread in each
            self._pool = ThreadPoolExecutor(threads, "loftq", initializer=use_torch_threads, initargs=(1,))

    def map(self, work: Callable[[Item], Result], items: Iterable[Item], ahead: int = 1) -> Iterator[Result]:
        """work(item) of each item in order; items are taken when a thread is free for them, and at most `ahead` of
        them beyond the threads. The first exception ends it, when what has begun is done.
        """
        if self._pool is None:
            yield from map(work, items)
            return
        running: deque[Future[Result]] = deque()
        try:
            for item in items:
                running.append(self._pool.submit(copy_context().run, work, item))
                if len(running) >= self.threads + ahead:
                    yield _first(running)
            while running:
                yield _first(running)
        finally:
            for future in running:
                future.cancel()
            for future in running:
                if not future.cancelled():
                    future.exception()

    def each(self, work: Callable[[Item], object], items: Iterable[Item]) -> None:
        """`map` for work without results."""
        for _ in self.map(work, items):
            pass

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """One call, in one of the threads. Only where there are any."""
        assert self._pool is not None
        return self._pool.submit(copy_context().run, work)

    def close(self) -> None:
        """End the threads, when what has begun is done."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


SERIAL = Workers(1)


@contextmanager
def started(threads: int) -> Iterator[Workers]:
    """Workers for the length of the block, in which torch itself uses one thread: two pools would fight for the
    processors, and sums over torch's own threads depend on their number.
    """
    workers = Workers(threads)
    with torch_threads(1):
        try:
            yield workers
        finally:
            workers.close()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes with `count` threads of its own for the length of the block, in the calling thread only."""
    before = use_torch_threads(count)
    try:
        yield
    finally:
        use_torch_threads(before)


def use_torch_threads(count: int) -> int:
    """Let torch compute with `count` threads of its own in the calling thread. Gives the number before.

    torch.set_num_threads sets two numbers: the number of the calling thread, and the number for all threads that start
    later. The second number belongs to the process: a short-lived thread puts the second number back.
    """
    import torch

    with _THREAD_COUNTS:
        before = torch.get_num_threads()
        if before != count:
            of_process = _in_a_new_thread(torch.get_num_threads)
            torch.set_num_threads(count)
            _in_a_new_thread(partial(torch.set_num_threads, of_process))
    return before


def _in_a_new_thread(work: Callable[[], Result]) -> Result:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@contextmanager
def beside(work: Callable[[], Result], workers: Workers) -> Iterator[Callable[[], Result]]:
    """What gives the result of `work`, which runs in a thread of its own during the block; where `workers` have only
    one thread, when it is asked for.
    """
    if workers.threads == 1:
        yield work
        return
    background = Workers(1, inline=False)
    try:
        yield background.submit(work).result
    finally:
        background.close()


def _first(running: deque[Future[Result]]) -> Result:
    """The first result; one that an interrupt keeps from coming stays listed among those to wait for."""
    result = running[0].result()
    running.popleft()
    return result
