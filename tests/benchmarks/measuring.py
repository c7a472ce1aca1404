"""How benchmarks measure: CPU and wall seconds of calls that take turns, the machine's name, tables. Measures nothing
by itself and judges nothing: no time is a failure.
"""

from __future__ import annotations

import datetime
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
Key = TypeVar("Key")

_PACKAGES = ("torch", "numba", "numpy", "safetensors", "peft", "bitsandbytes", "transformers")


@dataclass(frozen=True, slots=True)
class Settings:
    """threads: "all threads"; rounds and budget_s: see `interleaved`; directory: where checkpoints are written;
    checkpoint_gb: of the one that a GPU converts.
    """

    quick: bool
    threads: int
    directory: Path
    rounds: int
    budget_s: float = 3.0
    checkpoint_gb: float = 13.5


@dataclass(frozen=True, slots=True)
class Timed:
    """What a call gave, and its seconds: of all threads of the process, and on the wall."""

    cpu: float
    wall: float
    result: Any = None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of equal columns. `notes` say what a number is; `details` are for the JSON alone."""

    title: str
    rows: Sequence[Mapping[str, object]]
    notes: Sequence[str] = ()
    details: Mapping[str, object] = field(default_factory=dict)


def timed(call: Callable[[], Any]) -> Timed:
    """One call, after what garbage there is has been collected."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    result = call()
    return Timed(time.process_time() - cpu, time.perf_counter() - wall, result)


def interleaved(calls: Mapping[Key, Callable[[], Result]], settings: Settings) -> dict[Key, list[Result]]:
    """The results of `calls`, each called once a round, so that all see the same changes of the machine. A call that
    has taken `budget_s` is left out of further rounds: slow ones run once.
    """
    results: dict[Key, list[Result]] = {key: [] for key in calls}
    spent = dict.fromkeys(calls, 0.0)
    for _ in range(settings.rounds):
        for key, call in calls.items():
            if spent[key] < settings.budget_s:
                start = time.perf_counter()
                results[key].append(call())
                spent[key] += time.perf_counter() - start
    return results


def median_cpu(runs: Iterable[Timed]) -> float:
    """CPU seconds."""
    return statistics.median(run.cpu for run in runs)


def median_wall(runs: Iterable[Timed]) -> float:
    """Seconds on the wall."""
    return statistics.median(run.wall for run in runs)


def best_wall(runs: Mapping[tuple[str, int], Sequence[Timed]], name: str) -> float:
    """`median_wall` with the number of threads that is best for `name`: where processors are busy, or halves of one
    core, threads that wait for each other take longer than one.
    """
    return min(median_wall(found) for (who, _), found in runs.items() if who == name)


def ratio(first: float | None, second: float | None) -> float | None:
    """first / second; None where one was not measured."""
    return None if first is None or second is None else first / second


def machine() -> dict[str, object]:
    """What the numbers belong to."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "processors": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: package_version(name) for name in _PACKAGES},
        "load before": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
    }


def package_version(package: str) -> str | None:
    """The version of an installed package; None for what is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def rendered(table: Table) -> str:
    """A Markdown table under its title, then the notes."""
    columns = list(table.rows[0])
    lines = [columns, *([_cell(row[column]) for column in columns] for row in table.rows)]
    widths = [max(2, *map(len, cells)) for cells in zip(*lines, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join([f"## {table.title}", "", *(f"| {' | '.join(line)} |" for line in padded), "", *table.notes, ""])


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return "-" if value is None else str(value)
