"""One measurement in a process of its own, so that its peak memory is its own too: `python -m tests.benchmarks.probe
NAME ARGUMENT...` prints what NAME below measured as JSON; `probe` runs that. Which measurements are made is not here.

Memory is Linux's VmHWM: `ru_maxrss` of a new process begins at that of the one that started it.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.measuring import timed

_ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True, slots=True)
class Probe:
    """Seconds of the measured call, and the process's largest resident memory in bytes, files that it maps included.
    `result` is what else the call gave.
    """

    cpu: float
    wall: float
    peak_nbytes: int
    result: Any = None


def probe(name: str, *arguments: object) -> Probe:
    """Run one of MEASUREMENTS in a new process. Raises RuntimeError with what it said when it fails."""
    command = [sys.executable, "-m", "tests.benchmarks.probe", name, *map(str, arguments)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


def resident_nbytes(key: str) -> int:
    """VmHWM or VmRSS of this process: the most memory that was resident, or what is."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{key}:"))


def _nothing() -> None:
    """What a process takes that does nothing but import."""


def _copyfile(source: str, output: str) -> None:
    os.makedirs(output)
    shutil.copyfile(f"{source}/model.safetensors", f"{output}/model.safetensors")


def _copyfile_fsync(source: str, output: str) -> None:
    _copyfile(source, output)
    with open(f"{output}/model.safetensors", "rb+") as file:
        os.fsync(file.fileno())


def _safetensors(source: str, output: str) -> None:
    from safetensors.torch import load_file, save_file

    os.makedirs(output)
    save_file(load_file(f"{source}/model.safetensors"), f"{output}/model.safetensors", metadata={"format": "pt"})


def _convert(source: str, output: str, threads: str, verify: str) -> None:
    from loftq_cli import convert
    from loftq_cli.recipe import Recipe
    from tests.conversions import Silent

    prepared = convert.prepare(source, Path(output), Recipe(method="qlora"))
    convert.run(prepared, Silent(), overwrite=False, restart=False, verify=verify == "verify", threads=int(threads))


def _profile(source: str, output: str) -> dict[str, object]:
    """Seconds of a conversion in one thread by what they went to, and its most expensive functions."""
    profiler = cProfile.Profile()
    profiler.runcall(_convert, source, output, "1", "verify")
    kinds = {
        "sha256": ("sha256", "HASH"),
        "reading": ("pread", "readinto", "posix.read"),
        "writing": ("pwrite", "fsync", "posix.write", "ftruncate", "fallocate"),
        "kernels": ("triton_kernels",),
    }
    seconds, functions = dict.fromkeys([*kinds, "other"], 0.0), []
    for (file, _, function), (_, calls, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        where = f"{Path(file).parent.name}/{Path(file).name}:{function}" if "/" in file else function
        kind = next((kind for kind, marks in kinds.items() if any(mark in where for mark in marks)), "other")
        seconds[kind] += own
        functions.append({"function": where, "calls": calls, "seconds": own})
    functions.sort(key=lambda entry: -entry["seconds"])
    return {"seconds": seconds, "top": functions[:20]}


def _merge(base: str, output: str, threads: str) -> None:
    from loftq_cli import merge, merge_plan
    from loftq_cli.merge_form import MergeOptions
    from tests.conversions import Silent

    adapter = Path(base) / "qlora_init"
    prepared = merge_plan.prepare(Path(base), adapter, Path(output), MergeOptions(), overwrite=False)
    merge.run(prepared, Silent(), overwrite=False, restart=False, threads=int(threads))


def _inspect(base: str, original: str, threads: str) -> None:
    from loftq_cli.base_model import BaseModel
    from loftq_cli.inspection import inspect_converted

    with BaseModel.open(Path(base)) as opened:
        inspect_converted(opened, Path(original), int(threads))


def _scratch(name: str, size: str, rank: str) -> float:
    """Bytes for each weight that LoftQ of a bfloat16 matrix adds to what is resident before, its result included."""
    import torch

    from tests.benchmarks.contenders import peft, warm_up
    from tests.benchmarks.matrix import CONTENDERS, PEFT
    from tests.benchmarks.weights import normal_matrix

    torch.set_num_threads(1)
    warm_up(int(rank))
    if name == PEFT:
        peft([torch.eye(512, dtype=torch.bfloat16)], int(rank), 1)
    weight = normal_matrix(int(size), torch.bfloat16)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins again
    before = resident_nbytes("VmRSS")
    kept = CONTENDERS[name]([weight], int(rank), 1)
    assert kept
    return (resident_nbytes("VmHWM") - before) / weight.numel()


MEASUREMENTS: dict[str, Callable[..., Any]] = {
    "nothing": _nothing,
    "copyfile": _copyfile,
    "copyfile, fsync": _copyfile_fsync,
    "load_file, save_file": _safetensors,
    "convert": _convert,
    "profile": _profile,
    "merge": _merge,
    "inspect": _inspect,
    "scratch": _scratch,
}


def main() -> None:
    """Measure and print. Everything is measured in a process that has imported torch; "nothing" takes more imports."""
    import importlib

    import torch

    torch.set_num_threads(1)
    name, *arguments = sys.argv[1:]
    if name == "nothing":
        for module in arguments:
            importlib.import_module(module)
        arguments = []
    done = timed(lambda: MEASUREMENTS[name](*arguments))
    values = {"cpu": done.cpu, "wall": done.wall, "peak_nbytes": resident_nbytes("VmHWM"), "result": done.result}
    print(json.dumps(values))


if __name__ == "__main__":
    main()
