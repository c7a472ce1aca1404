"""One measurement in a process of its own, so that its peak memory is its own too: `python -m tests.benchmarks.probe
NAME FILE ARGUMENT...` prints what NAME below measured as JSON; `probe` runs that. What is measured when is not here.

Memory is Linux's VmHWM: `ru_maxrss` of a new process begins at that of the one that started it.
"""

from __future__ import annotations

import cProfile
import ctypes
import importlib
import json
import os
import pstats
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.measuring import Timed, timed

_ROOT = Path(__file__).parent.parent.parent
_FILE = "model.safetensors"

# By a part of a function's file or name, what its time goes to; in this order.
_KINDS = {
    "sha256": ("sha256", "HASH"),
    "reading": ("pread", "readinto", "posix.read", "_read_exactly"),
    "writing": ("pwrite", "fsync", "posix.write", "ftruncate", "fallocate"),
    "kernels": ("triton_kernels",),
}


@dataclass(frozen=True, slots=True)
class Probe(Timed):
    """process_cpu: CPU seconds of the whole process. peak_nbytes: its largest resident memory, with files it maps."""

    process_cpu: float = 0.0
    peak_nbytes: int = 0


def probe(name: str, *arguments: object, warm: Path | None = None) -> Probe:
    """Run one of MEASUREMENTS in a new process; `warm`: see `_warm`. Raises RuntimeError with what it said when it
    fails.
    """
    command = [sys.executable, "-m", "tests.benchmarks.probe", name, str(warm or ""), *map(str, arguments)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


def _imports(*modules: str) -> Callable[[], None]:
    """What a process takes that does nothing else."""
    for module in modules:
        importlib.import_module(module)
    return lambda: None


def _copy(how: str, source: str, output: str) -> Callable[[], None]:
    from safetensors.torch import load_file, save_file

    def work() -> None:
        os.makedirs(output)
        if how == "load save":
            save_file(load_file(f"{source}/{_FILE}"), f"{output}/{_FILE}", metadata={"format": "pt"})
            return
        shutil.copyfile(f"{source}/{_FILE}", f"{output}/{_FILE}")
        if how == "copyfile fsync":
            with open(f"{output}/{_FILE}", "rb+") as file:
                os.fsync(file.fileno())

    return work


def _command(name: str, first: str, second: str, threads: str, *verify: str) -> Callable[[], None]:
    """A function of commands.py."""
    from tests.benchmarks import commands
    from tests.benchmarks.contenders import warm_up_kernels

    warm_up_kernels()
    options = {"verify": verify[0] == "True"} if verify else {}
    return partial(getattr(commands, name), Path(first), Path(second), int(threads), **options)


def _unsynced(*arguments: str) -> Callable[[], None]:
    """The same without the calls that bring files and names to the disk."""
    from loftq_cli.output import disk

    work = _command(*arguments)
    disk.sync = lambda descriptor, path: None
    disk.sync_directory = lambda path: None
    return work


def _profile(*arguments: str) -> Callable[[], dict[str, object]]:
    """Seconds of `_command` by what they went to, and its most expensive functions; of the first thread."""
    work, profiler = _command(*arguments), cProfile.Profile()

    def profiled() -> dict[str, object]:
        profiler.runcall(work)
        seconds: dict[str, float] = dict.fromkeys([*_KINDS, "other"], 0.0)
        functions = []
        stats: dict[tuple[str, int, str], Any] = vars(pstats.Stats(profiler))["stats"]
        for (file, _, function), (_, calls, own, _, _) in stats.items():
            where = f"{Path(file).parent.name}/{Path(file).name}:{function}" if "/" in file else function
            kind = next((kind for kind, marks in _KINDS.items() if any(mark in where for mark in marks)), "other")
            seconds[kind] += own
            functions.append((own, calls, where))
        top = [{"function": f, "calls": n, "seconds": own} for own, n, f in sorted(functions, reverse=True)[:20]]
        return {"seconds": seconds, "top": top}

    return profiled


def _scratch(name: str, size: str, rank: str) -> Callable[[], float]:
    """Bytes for each weight that LoftQ of a bfloat16 matrix adds to what is resident before, its result included."""
    import torch

    from tests.benchmarks.contenders import CONTENDERS, warm_up
    from tests.benchmarks.weights import normal_matrix

    warm_up([name], int(rank))
    weight = normal_matrix(int(size), torch.bfloat16)

    def work() -> float:
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would hide what is taken now
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins again
        before = _resident_nbytes("VmRSS")
        kept = CONTENDERS[name]([weight], int(rank), 1)
        return (_resident_nbytes("VmHWM") - before) / weight.numel() if kept else 0.0

    return work


def _warm(file: Path) -> None:
    """Read a file, and use twice as many bytes of the page cache: memory that a virtual machine's host took back while
    nobody used it comes again several times slower.
    """
    copies = [file.with_suffix(f".{place}") for place in range(2)]
    for copy in copies:
        shutil.copyfile(file, copy)
    for copy in copies:
        copy.unlink()


def _resident_nbytes(key: str) -> int:
    """VmHWM or VmRSS of this process: the most memory that was resident, or what is."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{key}:"))


# What imports and gets ready, and gives the work to be timed.
MEASUREMENTS: dict[str, Callable[..., Callable[[], Any]]] = {
    "imports": _imports,
    "copy": _copy,
    "command": _command,
    "unsynced": _unsynced,
    "profile": _profile,
    "scratch": _scratch,
}


def main() -> None:
    """Measure and print. torch is imported whatever is measured."""
    import torch

    torch.set_num_threads(1)
    name, warm, *arguments = sys.argv[1:]
    work = MEASUREMENTS[name](*arguments)
    before = time.process_time()
    if warm:
        _warm(Path(warm))
    warming = time.process_time() - before
    done = timed(work)
    process_cpu, peak_nbytes = time.process_time() - warming, _resident_nbytes("VmHWM")
    print(json.dumps(asdict(Probe(done.cpu, done.wall, done.result, process_cpu, peak_nbytes))))


if __name__ == "__main__":
    main()
