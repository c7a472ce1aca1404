"""What more layers and larger matrices cost: CPU time of whole LoftQ conversions in one thread, as ratios to the
smallest. No peers here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch

from loftq_cli.conversion import run as conversion_run
from tests.benchmarks.commands import run_convert
from tests.benchmarks.conversion import write_checkpoint
from tests.benchmarks.measuring import Settings, Table, interleaved, median_cpu, timed


def run(settings: Settings) -> Iterator[Table]:
    """Layers × 1, 4, 16 and sides × 1, 2, 4; rank 16, the default solver, verified."""
    side = 512 if settings.quick else 1024
    series = {"layers": [(1, side), (4, side), (16, side)], "size": [(1, side), (1, 2 * side), (1, 4 * side)]}
    cases = sorted({case for group in series.values() for case in group})
    with TemporaryDirectory(dir=settings.directory) as folder:
        calls = {}
        for layers, size in cases:
            source = write_checkpoint(Path(folder) / f"{layers}x{size}", layers, size, torch.bfloat16)
            calls[layers, size] = partial(_converted, source, Path(folder) / "output")
        _converted(Path(folder) / f"1x{side}", Path(folder) / "output")
        runs = interleaved({case: partial(timed, call) for case, call in calls.items()}, settings)
    cpu = {case: median_cpu(runs[case]) for case in cases}
    rows = [
        {
            "more": kind,
            "layers": layers,
            "size": size,
            "weights / first": layers * size**2 / side**2,
            "CPU s": cpu[layers, size],
            "CPU / first": cpu[layers, size] / cpu[1, side],
            "n": len(runs[layers, size]),
        }
        for kind, group in series.items()
        for layers, size in group
    ]
    yield Table("growth: CPU of whole LoftQ conversions", rows, ("Compiled kernels for all, whatever their size.",))


def _converted(source: Path, output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)
    # Which kernels run depends on the work; here it must not.
    with mock.patch.object(conversion_run, "choose_kernels", lambda work: None):
        run_convert(source, output, method="loftq")
