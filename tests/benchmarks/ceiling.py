"""What a second thread can give on this machine at all: independent work that shares nothing. Virtual processors may be
halves of one core, and then no program gets twice as fast.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

from loftq_cli.runtime.workers import started
from loftq_cli.triton_kernels.codebook.contract import quantize_codebook
from tests.benchmarks.measuring import Settings, Table, interleaved, median_wall, timed
from tests.benchmarks.weights import normal_matrix


def run(settings: Settings) -> Iterator[Table]:
    """The same work once in one thread, and once in each of all threads."""
    threads = settings.threads
    buffers = [bytes(1 << 20) for _ in range(threads)]
    weights = [normal_matrix(1024, torch.float32) for _ in range(threads)]
    places = [quantize_codebook(weight, "nf4", 64) for weight in weights]

    def hashes(place: int) -> None:
        for _ in range(200):
            hashlib.sha256(buffers[place]).digest()

    def encodes(place: int) -> None:
        for _ in range(100):
            quantize_codebook(weights[place], "nf4", 64, out=places[place])

    def in_threads(work: Callable[[int], None], threads: int) -> None:
        with started(threads) as workers:
            workers.each(work, range(threads))

    kinds = {"sha256 of 1 MB, 200 times": hashes, "NF4 of 1024², 100 times": encodes}
    calls = {(k, n): partial(timed, partial(in_threads, work, n)) for k, work in kinds.items() for n in {1, threads}}
    runs = interleaved(calls, settings)
    alone, together = ({kind: median_wall(runs[kind, n]) for kind in kinds} for n in (1, threads))
    speed = f"{threads} threads / one, work a second"
    rows = [{"work": k, "ms alone": 1e3 * alone[k], speed: threads * alone[k] / together[k]} for k in kinds]
    yield Table("ceiling: independent work in threads", rows)
