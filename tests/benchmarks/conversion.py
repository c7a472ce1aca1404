"""A whole checkpoint, beside copying its file: QLoRA conversion, merge, and inspection against the original. Each run is
a process of its own, and what it writes is deleted before the next. How good the numbers are is not asked here.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from tests.benchmarks.measuring import Settings, Table, interleaved, median_cpu, median_wall
from tests.benchmarks.probe import Probe, probe
from tests.benchmarks.weights import normal_matrix

COPIES = ("copyfile", "copyfile, fsync", "load_file, save_file")
_NOTES = (
    "copyfile / and load, save /: how many times as long the copy takes; below 1 this is slower than the copy.",
    "CPU and wall: of the work alone, without Python's start and torch's import, with that of numba and of our modules.",
    "What we write is synced to the disk, as in `copyfile, fsync`; the other copies are left to the page cache.",
)


def write_checkpoint(directory: Path, layers: int, size: int, dtype: torch.dtype) -> Path:
    """A llama's config.json and `layers` linears of [size, size], normal."""
    directory.mkdir()
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": normal_matrix(size, dtype, seed=i) for i in range(layers)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    name = str(dtype).removeprefix("torch.")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": name}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def run_convert(settings: Settings) -> Iterator[Table]:
    """`loftq quantize --method qlora`, with and without reading back what was written."""
    for dtype in (torch.bfloat16,) if settings.quick else (torch.bfloat16, torch.float32):
        with TemporaryDirectory(dir=settings.directory) as folder:
            source = write_checkpoint(Path(folder) / "source", *_shape(settings), dtype)
            output = Path(folder) / "output"
            variants = {
                f"convert{'' if verify == 'verify' else ' --no-verify'}, {threads} threads": partial(
                    probe, "convert", source, output, threads, verify
                )
                for verify in ("verify", "no-verify")
                for threads in sorted({1, settings.threads})
            }
            rows = list(_beside_copies(source, output, variants, settings))
            profile = probe("profile", source, output).result
        title = f"convert: QLoRA of {_size_of(settings, dtype)}"
        yield Table(title, rows, (*_NOTES, _baseline()), {"profile of one thread": profile})


def run_merge(settings: Settings) -> Iterator[Table]:
    """`loftq merge` and `loftq inspect --against` of what a conversion wrote, with an adapter that adds something."""
    with TemporaryDirectory(dir=settings.directory) as folder:
        source = write_checkpoint(Path(folder) / "source", *_shape(settings), torch.bfloat16)
        base, output = Path(folder) / "base", Path(folder) / "output"
        probe("convert", source, base, settings.threads, "no-verify")
        _train(base / "qlora_init" / "adapter_model.safetensors")
        variants = {}
        for threads in sorted({1, settings.threads}):
            variants[f"merge, {threads} threads"] = partial(probe, "merge", base, output, threads)
            variants[f"inspect --against, {threads} threads"] = partial(probe, "inspect", base, source, threads)
        rows = list(_beside_copies(source, output, variants, settings))
    title = f"merge: merge and inspection of the conversion of {_size_of(settings, torch.bfloat16)}"
    yield Table(title, rows, (*_NOTES, _baseline()))


def _beside_copies(
    source: Path, output: Path, variants: Mapping[str, Callable[[], Probe]], settings: Settings
) -> Iterator[dict[str, object]]:
    """One row for each kind of copy and each variant. The first run of each warms caches and is not counted."""
    copies = {name: partial(probe, name, source, output) for name in COPIES}
    calls = {name: partial(_cleared, output, call) for name, call in {**copies, **variants}.items()}
    for call in (calls[COPIES[0]], *(calls[name] for name in list(variants)[:2])):
        call()
    runs = interleaved(calls, settings)
    cpu = {name: median_cpu(runs[name]) for name in calls}
    wall = {name: median_wall(runs[name]) for name in calls}
    peak = {name: statistics.median(run.peak_nbytes for run in runs[name]) for name in calls}
    torch_nbytes, numba_nbytes = _baselines()
    for name in calls:
        yield {
            "run": name,
            "CPU s": cpu[name],
            "wall s": wall[name],
            "copyfile / this, CPU": cpu[COPIES[0]] / cpu[name],
            "wall": wall[COPIES[0]] / wall[name],
            "copyfile, fsync / this, wall": wall[COPIES[1]] / wall[name],
            "load, save / this, CPU": cpu[COPIES[2]] / cpu[name],
            "wall ": wall[COPIES[2]] / wall[name],
            "MB above torch": (peak[name] - torch_nbytes) / 1e6,
            "MB above torch and numba": (peak[name] - numba_nbytes) / 1e6,
            "n": len(runs[name]),
        }


def _cleared(output: Path, call: Callable[[], Probe]) -> Probe:
    shutil.rmtree(output, ignore_errors=True)
    try:
        return call()
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _baselines() -> tuple[int, int]:
    """Peak memory of importing torch, and of importing torch and numba, in bytes."""
    return probe("nothing").peak_nbytes, probe("nothing", "numba").peak_nbytes


def _baseline() -> str:
    torch_nbytes, numba_nbytes = _baselines()
    return f"Importing torch takes {torch_nbytes / 1e6:.0f} MB, torch and numba {numba_nbytes / 1e6:.0f} MB."


def _train(adapter: Path) -> None:
    """Random values in every lora_B."""
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(adapter)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensors[name] = torch.randn(tensor.shape, generator=generator).mul_(0.01).to(tensor.dtype)
    save_file(tensors, adapter, metadata={"format": "pt"})


def _shape(settings: Settings) -> tuple[int, int]:
    """Layers, and the sides of their matrices: enough work for compiled kernels, see loftq_cli/kernels.py."""
    return (17, 2048) if settings.quick else (30, 4096)


def _size_of(settings: Settings, dtype: torch.dtype) -> str:
    layers, size = _shape(settings)
    name = str(dtype).removeprefix("torch.")
    return f"{layers} × {size}² {name}, {layers * size**2 * dtype.itemsize / 1e9:.2f} GB"
