"""The order of jobs: small jobs run side by side. Large jobs run in turn, while a thread reads the next input and a
thread writes the last output. Results come in the order of the jobs. Knows no job.
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

_STACKS_WRITTEN = 2  # stacks to write while a stack computes: bounds the memory
_NUMEL_AHEAD = 1 << 29  # weights to read ahead, 1 GB in bfloat16; two stacks are read ahead at any size
SMALL_NUMEL = 1 << 22  # most weights of a small job, 16 MB in float32: memory holds several small jobs at once


@dataclass(frozen=True)
class Steps(Generic[Job, Input, Output, Result]):
    """The three steps of a job.

    load      reads the input of a job
    compute   takes the job, the input, and workers to share the work among
    write     takes the job and the output, and returns the result
    """

    load: Callable[[Job], Input]
    compute: Callable[[Job, Input, Workers], Output]
    write: Callable[[Job, Output], Result]

    def run(self, job: Job) -> Result:
        """Run all three steps in the calling thread."""
        return self.write(job, self.compute(job, self.load(job), SERIAL))


def in_turn(
    jobs: Sequence[Job],
    work: Callable[[Job, Workers], Result],
    numel: Callable[[Job], int],
    workers: Workers,
    small_numel: int = SMALL_NUMEL,
) -> Generator[Result]:
    """Yield the results of jobs that read and write in `work`, in the order of `jobs`.

    work          takes a job and workers: SERIAL for a small job, `workers` for a large job
    numel         the number of weights of a job
    small_numel   most weights of a small job. Small jobs run side by side; a large job runs alone.

    >>> list(in_turn([3, 1, 2], lambda job, workers: job * 10, lambda job: 1, SERIAL))
    [30, 10, 20]
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
    """Yield the results of `jobs` in the order of `jobs`; small jobs, of at most SMALL_NUMEL weights, run side by side.

    numel     the number of weights of a job
    started   takes each job before the job runs, in the thread that asks for the results

    Memory holds a small job per thread and another small job; or a computing large job, the next input, and the last
    output.

    >>> steps = Steps(load=str, compute=lambda job, text, workers: text * job, write=lambda job, text: text)
    >>> list(in_order([3, 1, 2], steps, lambda job: 1, SERIAL))
    ['333', '1', '22']
    """

    def announce(batch: Sequence[Job]) -> Iterator[Job]:
        for job in batch:
            started(job)
            yield job

    for is_small, batch in groupby(jobs, lambda job: numel(job) <= SMALL_NUMEL):
        if is_small or workers.threads == 1:
            yield from workers.map(steps.run, announce(list(batch)))
        else:
            yield from _run_large(list(batch), steps, workers, started)


def _run_large(
    jobs: Sequence[Job],
    steps: Steps[Job, Input, Output, Result],
    workers: Workers,
    started: Callable[[Job], None],
) -> Iterator[Result]:
    reader, writer = Workers(1, inline=False), Workers(1, inline=False)
    last: Future[Result] | None = None
    try:
        for job, loaded in zip(jobs, reader.map(steps.load, jobs), strict=True):
            started(job)
            output = steps.compute(job, loaded, workers)
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
    """The three steps of jobs that compute in stacks.

    load      reads the input of a job
    compute   takes the jobs and inputs of a stack, and returns an output per job; should not wait for the outputs
    write     takes the job, the input, the output, and the job's place in the stack; returns the result
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
    """Yield the results of all jobs, stack by stack. `threads` threads read and `threads` threads write; the caller's
    thread computes.

    numel     the number of weights of a job
    started   takes each job before the stack computes, in the thread that asks for the results

    Memory holds a computing stack, two stacks to write, and the stacks to read: two stacks, or more small stacks, so
    all threads have a job to read. Results of earlier stacks come before an exception of `load` or `compute`.

    >>> steps = StackSteps(str, lambda jobs, texts: [text * 2 for text in texts], lambda job, text, twice, place: twice)
    >>> list(in_stacks([[3, 1], [2]], steps, lambda job: 1, threads=1))
    ['33', '11', '22']
    """
    readers, writers = Workers(threads, inline=False), Workers(threads, inline=False)
    reading: deque[list[Future[Input]]] = deque()
    writing: deque[list[Future[Result]]] = deque()
    try:
        for i, stack in enumerate(stacks):
            for next_stack in stacks[i + len(reading) :]:
                ahead = sum(map(len, reading))
                weights = sum(numel(job) for loaded in stacks[i : i + len(reading)] for job in loaded)
                if len(reading) > 2 and (ahead >= 2 * threads or weights >= _NUMEL_AHEAD):
                    break
                reading.append([readers.submit(partial(steps.load, job)) for job in next_stack])
            for job in stack:
                started(job)
            try:
                inputs = [future.result() for future in reading.popleft()]
                outputs = steps.compute(stack, inputs)
            except Exception:
                while writing:  # earlier stacks are complete: their results count
                    yield from (future.result() for future in writing.popleft())
                raise
            arguments = zip(stack, inputs, outputs, range(len(stack)), strict=True)
            writing.append([writers.submit(partial(steps.write, *values)) for values in arguments])
            if len(writing) > _STACKS_WRITTEN:
                yield from (future.result() for future in writing.popleft())
        while writing:
            yield from (future.result() for future in writing.popleft())
    finally:
        readers.close()
        writers.close()
