"""What it costs that a result is on the disk when a command ends: a QLoRA conversion and the merge of it, with and
without the calls that bring files and names there. How the disk does that is not asked.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tests.benchmarks.conversion import about, converted
from tests.benchmarks.measuring import Settings, Table, interleaved, median_cpu, median_wall
from tests.benchmarks.probe import Probe, probe


def run(settings: Settings) -> Iterator[Table]:
    """In pairs, one after the other: the difference of the two in each pair, and its median."""
    with converted(settings) as (source, base, output):

        def call(kind: str, name: str, given: Path, threads: int) -> Probe:
            try:
                return probe(kind, name, given, output, threads, warm=source / "model.safetensors")
            finally:
                shutil.rmtree(output, ignore_errors=True)

        rows = []
        for name, given in (("run_convert", source), ("run_merge", base)):
            for threads in sorted({1, settings.threads}):
                kinds = ("command", "unsynced")
                calls = {kind: partial(call, kind, name, given, threads) for kind in kinds}
                runs = interleaved(calls, replace(settings, budget_s=math.inf))
                pairs = list(zip(runs["command"], runs["unsynced"], strict=True))
                rows.append(
                    {
                        "run": f"{name.removeprefix('run_')}, {threads} threads",
                        "wall s": median_wall(runs["command"]),
                        "without syncs": median_wall(runs["unsynced"]),
                        "wall +%": statistics.median(100 * (a.wall / b.wall - 1) for a, b in pairs),
                        "CPU s": median_cpu(runs["command"]),
                        "CPU +%": statistics.median(100 * (a.cpu / b.cpu - 1) for a, b in pairs),
                        "n": len(pairs),
                    }
                )
    yield Table(f"durability: what fsync takes of {about(settings, torch.bfloat16)}", rows)
