"""In which order jobs run: small ones side by side, large ones one after the other with the next one's input read and
the last one's output written meanwhile. Knows nothing of what a job does; results come in the order of the jobs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Generic, TypeVar

from loftq_cli.runtime.workers import SERIAL, Workers

Job = TypeVar("Job")
Input = TypeVar("Input")
Output = TypeVar("Output")
Result = TypeVar("Result")

_STACKS_WRITTEN = 2  # stacks that are being written while another computes
_NUMEL_AHEAD = 1 << 29  # weights that are read before they are needed, 1 GB in bfloat16; two stacks may be more
SMALL_NUMEL = 1 << 22  # several matrices of at most so many weights, 16 MB in float32, may be in memory at once


@dataclass(frozen=True)
class Steps(Generic[Job, Input, Output, Result]):
    """A job in three steps. `compute` may share its work among the workers that it is given."""

    load: Callable[[Job], Input]
    compute: Callable[[Job, Input, Workers], Output]
    write: Callable[[Job, Output], Result]

    def whole(self, job: Job) -> Result:
        """All three in one thread."""
        return self.write(job, self.compute(job, self.load(job), SERIAL))


def in_turn(
    jobs: Sequence[Job],
    work: Callable[[Job, Workers], Result],
    numel: Callable[[Job], int],
    workers: Workers,
    small_numel: int = SMALL_NUMEL,
) -> Generator[Result]:
    """The results of jobs that read and write by themselves: small ones side by side, each of the large ones with all
    workers.
    """
    for is_small, batch in groupby(jobs, lambda job: numel(job) <= small_numel):
        if is_small:
            yield from workers.map(lambda job: work(job, SERIAL), list(batch))
        else:
            yield from (work(job, workers) for job in batch)


def in_order(
    jobs: Sequence[Job],
    steps: Steps[Job, Input, Output, Result],
    numel: Callable[[Job], int],
    workers: Workers,
    started: Callable[[Job], None] = lambda job: None,
) -> Generator[Result]:
    """The results of `jobs`; `started` is told of each in the thread that asks for the results.

    In memory at once: one small job a thread and one more; or, of large jobs, one that computes, the input of the next
    and the output of the last.
    """

    def told(batch: Sequence[Job]) -> Iterator[Job]:
        for job in batch:
            started(job)
            yield job

    for is_small, batch in groupby(jobs, lambda job: numel(job) <= SMALL_NUMEL):
        if is_small or workers.threads == 1:
            yield from workers.map(steps.whole, told(list(batch)))
        else:
            yield from _large(list(batch), steps, workers, started)


def _large(
    jobs: Sequence[Job],
    steps: Steps[Job, Input, Output, Result],
    workers: Workers,
    started: Callable[[Job], None],
) -> Iterator[Result]:
    reader, writer = Workers(1, inline=False), Workers(1, inline=False)
    last: Future[Result] | None = None
    try:
        for job, found in zip(jobs, reader.map(steps.load, jobs), strict=True):
            started(job)
            output = steps.compute(job, found, workers)
            if last is not None:
                yield last.result()
            last = writer.submit(partial(steps.write, job, output))
        if last is not None:
            yield last.result()
    finally:
        reader.close()
        writer.close()


@dataclass(frozen=True)
class StackSteps(Generic[Job, Input, Output, Result]):
    """Jobs that are computed several at once. `compute` gives something for each of a stack, and had better not wait;
    `write` is also told what was loaded, and the job's place in its stack.
    """

    load: Callable[[Job], Input]
    compute: Callable[[Sequence[Job], Sequence[Input]], Sequence[Output]]
    write: Callable[[Job, Input, Output, int], Result]


def in_stacks(
    stacks: Sequence[Sequence[Job]],
    steps: StackSteps[Job, Input, Output, Result],
    numel: Callable[[Job], int],
    threads: int,
    started: Callable[[Job], None] = lambda job: None,
) -> Generator[Result]:
    """The results of all jobs, stack by stack. Reading and writing have threads of their own; computing has the one
    that asks for the results.

    In memory at once: a stack that computes, two that are being written, and those that are being read: two, or more of
    small ones, so that all threads have something to read.
    """
    readers, writers = Workers(threads, inline=False), Workers(threads, inline=False)
    reading: deque[list[Future[Input]]] = deque()
    writing: deque[list[Future[Result]]] = deque()
    try:
        for i, stack in enumerate(stacks):
            for later in stacks[i + len(reading) :]:
                ahead = sum(map(len, reading))
                weights = sum(numel(job) for loaded in stacks[i : i + len(reading)] for job in loaded)
                if len(reading) > 2 and (ahead >= 2 * threads or weights >= _NUMEL_AHEAD):
                    break
                reading.append([readers.submit(partial(steps.load, job)) for job in later])
            for job in stack:
                started(job)
            try:
                found = [future.result() for future in reading.popleft()]
                made = steps.compute(stack, found)
            except Exception:
                while writing:  # what was done before it failed counts
                    yield from (future.result() for future in writing.popleft())
                raise
            written = zip(stack, found, made, range(len(stack)), strict=True)
            writing.append([writers.submit(partial(steps.write, *one)) for one in written])
            if len(writing) > _STACKS_WRITTEN:
                yield from (future.result() for future in writing.popleft())
        while writing:
            yield from (future.result() for future in writing.popleft())
    finally:
        readers.close()
        writers.close()
