"""Whole conversions on a GPU beside reading the same files, from the page cache and from the disk, and what they are
bound by. In one process whose kernels are compiled: what starting costs is a row of its own.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from loftq_cli.conversion.prepare import prepare_conversion
from loftq_cli.conversion.run import convert_checkpoint
from loftq_cli.planning.settle import make_recipe
from tests.benchmarks.gpu_card import failure
from tests.benchmarks.gpu_checkpoint import LlamaShape, drop_from_cache, reading_seconds, write_llama
from tests.benchmarks.gpu_timeline import RESOURCES, busy, chart, recorded
from tests.benchmarks.measuring import Settings, Table
from tests.support.conversions import Silent

Row = dict[str, object]
_DRAWN = ("qlora, cached", "LoftQ, cached")  # the others' charts are in the JSON
_STILL_CACHED = 0.05  # of a file's bytes, from which reading it says nothing about the disk


@dataclass(frozen=True, slots=True)
class Run:
    """A conversion to time, by its name."""

    name: str
    method: str
    is_cached: bool = True
    verifies: bool = False


RUNS = (
    Run("qlora, cached", "qlora"),
    Run("LoftQ, cached", "loftq"),
    Run("qlora, from disk", "qlora", is_cached=False),
    Run("LoftQ, from disk", "loftq", is_cached=False),
    Run("qlora, cached, verified", "qlora", verifies=True),
)


class Phases(Silent):
    """An observer that notes when each phase begins, in seconds since the conversion did."""

    def __init__(self) -> None:
        super().__init__()
        self._start = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.last_layer = 0.0

    def layer_converted(self, layer: Any, *, resumed: bool) -> None:
        self.last_layer = time.perf_counter() - self._start

    def phase(self, text: str) -> None:
        self.phases[text] = time.perf_counter() - self._start


def conversion_tables(
    settings: Settings, shape: LlamaShape, recipe: dict[str, Any], is_late: Callable[[], bool]
) -> Iterator[Table]:
    """A table of all runs, and one chart for each method."""
    with TemporaryDirectory(dir=settings.directory) as folder:
        first = Path(folder) / "first"
        write_llama(first, LlamaShape(1, shape.hidden, shape.intermediate, shape.vocabulary), settings.threads)
        rows = [_cold(first, Path(folder) / "out", method, settings, recipe) for method in ("qlora", "loftq")]
        shutil.rmtree(first)
        start = time.perf_counter()
        files = write_llama(Path(folder) / "source", shape, settings.threads)
        gb = sum(path.stat().st_size for path in files) / 1e9
        _say(f"wrote {gb:.2f} GB in {time.perf_counter() - start:.0f} s")
        details: dict[str, object] = {"GB": gb, "layers": shape.layers}
        charts: list[Row] = []
        for run in RUNS:
            row, raw = ({"note": "no time was left"}, {}) if is_late() else _measured(run, files, settings, recipe)
            rows.append(_NOTHING | {"run": run.name} | row)
            details[run.name] = raw
            if run.name in _DRAWN:
                charts += [{"run": run.name, "chart": line} for line in raw.get("chart", ())]
            _say(f"{run.name}: {row.get('convert s', row.get('note'))}")
        notes = (
            f"{gb:.2f} GB, {shape.layers} layers, {settings.threads} threads, {recipe}.",
            "× reading: the files in as many threads, in the same state of the cache.",
            "jobs: until the last layer; what follows is fsync, and verifying where that is said.",
            "Shares of the jobs' time in which at least one thread, or the stream, was at it.",
        )
        if charts:
            yield Table("gpu: what happened when", charts)
        yield Table("gpu: whole conversions", rows, notes, details)


_NOTHING: Row = {
    **dict.fromkeys(("run", "read s", "read + sha256 s", "convert s", "× reading", "GB/s", "jobs s")),
    **dict.fromkeys(RESOURCES),
    **dict.fromkeys(("GPU GB", "pinned GB", "error", "note")),
}


def _cold(source: Path, output: Path, method: str, settings: Settings, recipe: dict[str, Any]) -> Row:
    """The first conversion of a process, of one layer: it compiles."""
    row = _NOTHING | {"run": f"{method}, starting", "note": "the first run of one layer, compiling"}
    try:
        error, _, seconds = _converted(source, output, Run("", method), settings, recipe)
        return row | {"convert s": seconds, "error": error}
    except Exception as error:
        return row | {"note": failure(error)}
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _measured(
    run: Run, files: Sequence[Path], settings: Settings, recipe: dict[str, Any]
) -> tuple[Row, dict[str, Any]]:
    output = files[0].parent.with_name("out")
    try:
        reading, hashing, cached = _readings(run, files, settings)
        if not run.is_cached and cached > _STILL_CACHED:
            return {"note": f"not run: {100 * cached:.0f} % stays in the cache"}, {}
        torch.cuda.reset_peak_memory_stats()
        with recorded() as timeline:
            error, phases, seconds = _converted(files[0].parent, output, run, settings, recipe)
            spans = timeline.spans()
        found, gb = busy(spans), sum(path.stat().st_size for path in files) / 1e9
        row: Row = {
            "read s": reading,
            "read + sha256 s": hashing,
            "convert s": seconds,
            "× reading": seconds / reading,
            "GB/s": gb / seconds,
            "jobs s": phases.last_layer,
            **found.shares,
            "GPU GB": torch.cuda.max_memory_allocated() / 1e9,
            "pinned GB": _pinned_gb(),
            "error": error,
            "note": "",
        }
        raw = {"phases": phases.phases, "stacks s": found.seconds, "spans": spans, "chart": chart(spans)}
        return row, raw
    except Exception as error:
        return {"note": failure(error)}, {}
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _readings(run: Run, files: Sequence[Path], settings: Settings) -> tuple[float, float | None, float]:
    """Seconds of reading and of reading and hashing, and the share of the bytes in the cache when a conversion begins.

    What is on its way to the disk from earlier is waited for.
    """
    cached = drop_from_cache(files)
    reading = reading_seconds(files, settings.threads)
    if not run.is_cached:
        return reading, None, max(cached, drop_from_cache(files))
    return (
        min(reading_seconds(files, settings.threads) for _ in range(2)),
        reading_seconds(files, settings.threads, hashes=True),
        1.0,
    )


def _converted(
    source: Path, output: Path, run: Run, settings: Settings, recipe: dict[str, Any]
) -> tuple[float, Phases, float]:
    """Its relative error, when its phases began, and its seconds on the wall."""
    options = (
        recipe if run.method == "loftq" else {key: recipe[key] for key in recipe if key not in ("fit", "iterations")}
    )
    start, phases = time.perf_counter(), Phases()
    prepared = prepare_conversion(str(source), output, make_recipe(method=run.method, **options))
    outcome = convert_checkpoint(
        prepared,
        phases,
        overwrite=False,
        restart=False,
        verify=run.verifies,
        threads=settings.threads,
        device="cuda",
    )
    return outcome.total.error, phases, time.perf_counter() - start


def _pinned_gb() -> float | None:
    """The most pinned memory that torch held so far, where it says so."""
    try:
        statistics = torch.cuda.host_memory_stats()
    except (AttributeError, RuntimeError):
        return None
    peak = statistics.get("allocated_bytes.peak", statistics.get("allocated_bytes.allocated"))
    return None if peak is None else float(peak) / 1e9


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
