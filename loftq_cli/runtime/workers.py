"""Threads that share the work on a matrix, on a file, or on many small matrices. Results come in the order of the work,
in whatever order the work ends: no result depends on the number of threads.
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

_THREAD_COUNTS = Lock()  # held until `use_torch_threads` has restored the number of threads for the process


def available_threads() -> int:
    """The number of processors available to the process.

    >>> available_threads() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Threads that last until `close`.

    threads   number of threads
    inline    with a single thread, work runs in the calling thread; False starts a thread

    Work runs in a copy of the caller's context (contextvars), and so with the kernels that the caller chose. Work must
    not wait for other work of the same workers.

    >>> list(Workers(1).map(abs, [-2, 3]))
    [2, 3]
    """

    def __init__(self, threads: int = 1, *, inline: bool = True) -> None:
        self.threads = threads
        is_inline = threads == 1 and inline
        self._pool = None
        if not is_inline:  # torch computes with a single thread in each
            self._pool = ThreadPoolExecutor(threads, "loftq", initializer=use_torch_threads, initargs=(1,))

    def map(self, work: Callable[[Item], Result], items: Iterable[Item], ahead: int = 1) -> Iterator[Result]:
        """Yield `work(item)` for each item, in the order of `items`. An item is taken from `items` when a thread is
        free, or earlier: at most `ahead` items wait for a thread.

        Raises the first exception of `work`, in the order of the items, after the running work is done.
        """
        if self._pool is None:
            yield from map(work, items)
            return
        running: deque[Future[Result]] = deque()
        try:
            for item in items:
                running.append(self._pool.submit(copy_context().run, work, item))
                if len(running) >= self.threads + ahead:
                    yield _take_first(running)
            while running:
                yield _take_first(running)
        finally:
            for future in running:
                future.cancel()
            for future in running:
                if not future.cancelled():
                    future.exception()

    def each(self, work: Callable[[Item], object], items: Iterable[Item]) -> None:
        """Run `work(item)` for each item. Raises as `map` does."""
        for _ in self.map(work, items):
            pass

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Run `work` in a thread. Only for workers with threads, see `inline`."""
        assert self._pool is not None
        return self._pool.submit(copy_context().run, work)

    def close(self) -> None:
        """End the threads after the running work is done; waiting work is cancelled."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


SERIAL = Workers(1)


@contextmanager
def started(threads: int) -> Iterator[Workers]:
    """Workers until the context ends. torch computes with a single thread meanwhile: two pools would compete for the
    processors, and sums over torch's threads depend on the number of threads.

    >>> with started(2) as workers:
    ...     list(workers.map(abs, [-2, 3]))
    [2, 3]
    """
    workers = Workers(threads)
    with torch_threads(1):
        try:
            yield workers
        finally:
            workers.close()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes with `count` threads until the context ends, in the calling thread only.

    >>> import torch
    >>> with torch_threads(1):
    ...     torch.get_num_threads()
    1
    """
    before = use_torch_threads(count)
    try:
        yield
    finally:
        use_torch_threads(before)


def use_torch_threads(count: int) -> int:
    """Let torch compute with `count` threads in the calling thread. Returns the earlier number.

    torch.set_num_threads sets two numbers: the number of the calling thread, and the number for all threads that start
    later. The second number belongs to the process: a short-lived thread puts the second number back.
    """
    import torch

    with _THREAD_COUNTS:
        before = torch.get_num_threads()
        if before != count:
            of_process = _run_in_new_thread(torch.get_num_threads)
            torch.set_num_threads(count)
            _run_in_new_thread(partial(torch.set_num_threads, of_process))
    return before


def _run_in_new_thread(work: Callable[[], Result]) -> Result:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@contextmanager
def beside(work: Callable[[], Result], workers: Workers) -> Iterator[Callable[[], Result]]:
    """Run `work` in a background thread, and yield a function that returns the result of `work`, or raises the
    exception. With a single thread in `workers`, `work` runs when the function is called.

    >>> with beside(lambda: 6 * 7, Workers(1)) as result:
    ...     result()
    42
    """
    if workers.threads == 1:
        yield work
        return
    background = Workers(1, inline=False)
    try:
        yield background.submit(work).result
    finally:
        background.close()


def _take_first(running: deque[Future[Result]]) -> Result:
    """The first result. The future leaves `running` after the result has come: an interrupted caller still waits for
    the future.
    """
    result = running[0].result()
    running.popleft()
    return result
