"""What a second thread can give on this machine at all: independent work that shares nothing. Virtual processors may be
halves of one core, and then no program gets twice as fast.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

from loftq_cli.rows import TensorRows
from loftq_cli.workers import started
from tests.benchmarks.contenders import QUANTIZER
from tests.benchmarks.measuring import Settings, Table, interleaved, median_wall, timed
from tests.benchmarks.weights import normal_matrix


def run(settings: Settings) -> Iterator[Table]:
    """The same work once in one thread, and once in each of all threads."""
    buffer, weight = bytes(1 << 20), TensorRows(normal_matrix(2048, torch.float32))
    times = 40 if settings.quick else 200
    work: dict[str, Callable[[int], object]] = {
        "sha256 of 1 MB": lambda _: [hashlib.sha256(buffer).digest() for _ in range(times)],
        "NF4 of 2048²": lambda _: [QUANTIZER.quantize(weight) for _ in range(times // 20)],
    }

    def in_threads(call: Callable[[int], object], threads: int) -> None:
        with started(threads) as workers:
            workers.each(call, range(threads))

    counts = (1, settings.threads)
    calls = {(name, n): partial(timed, partial(in_threads, call, n)) for name, call in work.items() for n in counts}
    runs = interleaved(calls, settings)
    rows = [
        {
            "work": name,
            "ms in one thread": 1e3 * median_wall(runs[name, 1]),
            f"times more work a second, {settings.threads} threads": settings.threads
            * median_wall(runs[name, 1])
            / median_wall(runs[name, settings.threads]),
        }
        for name in work
    ]
    yield Table("ceiling: independent work in threads", rows)
