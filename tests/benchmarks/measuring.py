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
from typing import Generic, TypeVar

Result = TypeVar("Result")
Key = TypeVar("Key")

_PACKAGES = ("torch", "numba", "numpy", "safetensors", "peft", "bitsandbytes", "transformers")


@dataclass(frozen=True, slots=True)
class Settings:
    """threads: "all threads"; rounds and budget_s: see `interleaved`; directory: where checkpoints are written."""

    quick: bool
    threads: int
    directory: Path
    rounds: int = 3
    budget_s: float = 4.0


@dataclass(frozen=True, slots=True)
class Timed(Generic[Result]):
    """What a call gave, and its seconds: of all threads of the process, and on the wall."""

    cpu: float
    wall: float
    result: Result


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of equal columns. `notes` say what a number is; `details` are for the JSON alone."""

    title: str
    rows: Sequence[Mapping[str, object]]
    notes: Sequence[str] = ()
    details: Mapping[str, object] = field(default_factory=dict)


def timed(call: Callable[[], Result]) -> Timed[Result]:
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
            if not results[key] or spent[key] < settings.budget_s:
                start = time.perf_counter()
                results[key].append(call())
                spent[key] += time.perf_counter() - start
    return results


def median_cpu(runs: Iterable[Timed[Result]]) -> float:
    """CPU seconds."""
    return statistics.median(run.cpu for run in runs)


def median_wall(runs: Iterable[Timed[Result]]) -> float:
    """Seconds on the wall."""
    return statistics.median(run.wall for run in runs)


def ratio(peer: float | None, ours: float | None) -> float | None:
    """How many times `ours` goes into `peer`; None where one was not measured."""
    return None if peer is None or ours is None else peer / ours


def machine() -> dict[str, object]:
    """What the numbers belong to."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "processors": len(models) or os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "date": datetime.date.today().isoformat(),
    }


def rendered(table: Table) -> str:
    """A Markdown table under its title, then the notes."""
    columns = list(table.rows[0])
    cells = [columns, *([_cell(row[column]) for column in columns] for row in table.rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    is_text = [all(isinstance(row[column], str) for row in table.rows) for column in columns]
    lines = [
        "| " + " | ".join(c.ljust(w) if t else c.rjust(w) for c, w, t in zip(row, widths, is_text, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) if t else "-" * (w + 1) + ":" for w, t in zip(widths, is_text, strict=True))
    return "\n".join([f"## {table.title}", "", lines[0], f"{rule}|", *lines[1:], "", *table.notes, ""])


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return "-" if value is None else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
