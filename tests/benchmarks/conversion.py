"""A whole checkpoint, beside copying its file: QLoRA conversion, merge, and inspection against the original. Each run
is a process of its own, and what it writes is deleted before the next. How good the numbers are is not asked here.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from tests.benchmarks.measuring import Settings, Table, interleaved, median_cpu, median_wall
from tests.benchmarks.probe import Probe, probe
from tests.benchmarks.weights import normal_matrix

COPIES = ("copyfile", "copyfile fsync", "load save")


def write_checkpoint(directory: Path, layers: int, size: int, dtype: torch.dtype) -> Path:
    """A llama's config.json and `layers` linears of [size, size], normal."""
    directory.mkdir()
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": normal_matrix(size, dtype, seed=i) for i in range(layers)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": _name(dtype)}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def run_convert(settings: Settings) -> Iterator[Table]:
    """`loftq quantize --method qlora`, with and without reading back what was written."""
    for dtype in (torch.bfloat16,) if settings.quick else (torch.bfloat16, torch.float32):
        with TemporaryDirectory(dir=settings.directory) as folder:
            source, output = write_checkpoint(Path(folder) / "source", *shape(settings), dtype), Path(folder) / "out"
            checks = {"convert": True}
            if dtype == torch.bfloat16 and not settings.quick:
                checks["convert --no-verify"] = False
            commands = {
                f"{name}, {n} threads": ("run_convert", source, output, n, verify)
                for name, verify in checks.items()
                for n in _counts(settings)
            }
            rows = _beside_copies(source, output, commands, settings)
            profile = probe("profile", "run_convert", source, output, 1).result
        title = f"convert: QLoRA of {about(settings, dtype)}"
        yield Table(title, rows, _notes(), {"profile of one thread": profile})


@contextmanager
def converted(settings: Settings) -> Iterator[tuple[Path, Path, Path]]:
    """A checkpoint, its QLoRA conversion with an adapter that adds something, and a name for what comes of them."""
    with TemporaryDirectory(dir=settings.directory) as folder:
        source = write_checkpoint(Path(folder) / "source", *shape(settings), torch.bfloat16)
        base = Path(folder) / "base"
        probe("command", "run_convert", source, base, settings.threads)
        _train(base / "qlora_init" / "adapter_model.safetensors")
        yield source, base, Path(folder) / "out"


def run_merge(settings: Settings) -> Iterator[Table]:
    """`loftq merge` and `loftq inspect --against` of what a conversion wrote, with an adapter that adds something."""
    with converted(settings) as (source, base, output):
        commands = {f"merge, {n} threads": ("run_merge", base, output, n) for n in _counts(settings)}
        commands |= {f"inspect, {n} threads": ("run_inspect", base, source, n) for n in _counts(settings)}
        rows = _beside_copies(source, output, commands, settings)
    yield Table(f"merge: merge and inspect --against of {about(settings, torch.bfloat16)}", rows, _notes())


def _beside_copies(
    source: Path, output: Path, commands: Mapping[str, tuple[object, ...]], settings: Settings
) -> list[dict[str, object]]:
    """One row for each kind of copy and each command."""

    def call(*arguments: object) -> Probe:
        try:
            return probe(*map(str, arguments), warm=source / "model.safetensors")
        finally:
            shutil.rmtree(output, ignore_errors=True)

    calls = {how: partial(call, "copy", how, source, output) for how in COPIES}
    calls |= {name: partial(call, "command", *command) for name, command in commands.items()}
    runs = interleaved(calls, replace(settings, rounds=min(settings.rounds, 3), budget_s=math.inf))
    cpu = {name: median_cpu(runs[name]) for name in calls}
    wall = {name: median_wall(runs[name]) for name in calls}
    peak = {name: statistics.median(run.peak_nbytes for run in runs[name]) for name in calls}
    return [
        {
            "run": name,
            "CPU s": cpu[name],
            "wall s": wall[name],
            **{f"CPU / {copy}": cpu[name] / cpu[copy] for copy in COPIES if "fsync" not in copy},
            **{f"wall / {copy}": wall[name] / wall[copy] for copy in COPIES},
            "process CPU s": statistics.median(run.process_cpu for run in runs[name]),
            **{f"MB above {what}": (peak[name] - nbytes) / 1e6 for what, nbytes in _baselines().items()},
            "n": len(runs[name]),
        }
        for name in calls
    ]


@cache
def _baselines() -> dict[str, int]:
    """Peak memory, in bytes, of importing only these."""
    return {"torch": probe("imports").peak_nbytes, "torch and numba": probe("imports", "numba").peak_nbytes}


def _notes() -> tuple[str, ...]:
    return (
        "CPU and wall: after all imports, with kernels loaded. process CPU: with Python's start and all imports.",
        "What we write is synced to the disk, as in `copyfile fsync`; the other copies are left to the page cache.",
        ", ".join(f"importing {what} takes {nbytes / 1e6:.0f} MB" for what, nbytes in _baselines().items()),
    )


def _train(adapter: Path) -> None:
    """Put random values into every lora_B."""
    tensors, generator = load_file(adapter), torch.Generator().manual_seed(0)
    for tensor in (tensors[name] for name in sorted(tensors) if "lora_B" in name):
        tensor.normal_(0.0, 0.01, generator=generator)
    save_file(tensors, adapter, metadata={"format": "pt"})


def _counts(settings: Settings) -> list[int]:
    return sorted({1, settings.threads})


def shape(settings: Settings) -> tuple[int, int]:
    """Layers, and the sides of their matrices: enough work for compiled kernels, see loftq_cli/kernels.py."""
    return (17, 2048) if settings.quick else (30, 4096)


def about(settings: Settings, dtype: torch.dtype) -> str:
    """What the checkpoint of `shape` is called."""
    layers, size = shape(settings)
    return f"{layers} × {size}² {_name(dtype)}, {layers * size**2 * dtype.itemsize / 1e9:.2f} GB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
