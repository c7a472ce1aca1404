"""Threads that share the work on a matrix, on a file, or on many small matrices. Results come in the order of the work,
whatever finished first, so that nothing depends on the number of threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_threads() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """`threads` threads that last until `close`. With one, everything runs in the thread that asks, unless `inline` is
    false. What runs in them must not wait for the same workers.
    """

    def __init__(self, threads: int = 1, *, inline: bool = True) -> None:
        self.threads = threads
        is_inline = threads == 1 and inline
        self._pool = None if is_inline else ThreadPoolExecutor(threads, "loftq", initializer=_one_blas_thread)

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
                running.append(self._pool.submit(work, item))
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
        return self._pool.submit(work)

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
    import torch

    before = torch.get_num_threads()
    workers = Workers(threads)
    torch.set_num_threads(1)
    try:
        yield workers
    finally:
        workers.close()
        torch.set_num_threads(before)


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


def _one_blas_thread() -> None:
    import torch

    torch.set_num_threads(1)
