"""What every test starts from."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# The matrices of these tests are small: on a busy machine a second thread costs LAPACK more than it brings. Set before
# anything computes, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

# Benchmarks are a package, and run as `python -m tests.benchmarks`; last, so that what is installed comes before it.
sys.path.append(str(Path(__file__).parent.parent))

# Without a GPU, Triton's kernels are interpreted. Read when a kernel is defined, so set before any is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The number of test processes: one a processor, at most 8. The slow tests measure memory and kill processes, and
    tests on a GPU measure its memory: such runs stay in a single process.
    """
    if torch.cuda.is_available() or config.option.markexpr != "not slow" or config.option.usepdb:
        config.option.dist = "no"
        return 0
    return min(len(os.sched_getaffinity(0)), 8)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, tests of kernels run on it, compiled: `-m gpu` has them too. Where there is none, tests
    that are for a GPU alone are skipped.
    """
    for item in items:
        if torch.cuda.is_available() and item.get_closest_marker("interpreter"):
            item.add_marker("gpu")
        elif not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`out` in an empty working directory: the output's name as typed is in some of its files."""
    monkeypatch.chdir(tmp_path)
    return Path("out")


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in an empty directory of this process: (status, stdout, stderr)."""
    from loftq_cli.cli.main import _run

    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: object) -> tuple[int, str, str]:
        status = _run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_command
