"""What LoftQ of one bfloat16 matrix needs beside it, in bytes a weight: the peak above the state in which the matrix is
in memory and everything is warm. The process's other memory is in conversion.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

from tests.benchmarks.contenders import PEFT
from tests.benchmarks.measuring import Settings, Table, interleaved
from tests.benchmarks.probe import probe


def run(settings: Settings) -> Iterator[Table]:
    """Each solver in a process of its own, in one thread."""
    rank = 64
    sizes = (1024,) if settings.quick else (2048, 4096)
    for_peer = sizes[0]
    names = ("fast, 8", "faithful, 5")
    cases = [(name, size) for size in sizes for name in (*names, PEFT) if name != PEFT or size == for_peer]
    runs = interleaved({case: partial(probe, "scratch", *case, rank) for case in cases}, settings)
    nbytes = {case: statistics.median(run.result for run in runs[case]) for case in cases}
    rows = [
        {
            "solver": name,
            "size": size,
            "rank": rank,
            "bytes a weight": nbytes[name, size],
            "PEFT / this": nbytes[PEFT, for_peer] / nbytes[name, size],
            "n": len(runs[name, size]),
        }
        for name, size in cases
    ]
    notes = (f"The result is counted. PEFT, which makes float32 of the matrix first, is measured at {for_peer}² only.",)
    yield Table("scratch: memory of LoftQ beside the matrix", rows, notes)
