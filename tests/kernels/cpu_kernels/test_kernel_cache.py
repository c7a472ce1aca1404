"""The cache of compiled kernels: cut, emptied, changed or unreadable files, and several first runs at once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.compiled_kernels import numba

SOURCE = """
from loftq_cli.triton_kernels.cpu_kernels import kernel

@kernel()
def triple(number):
    return 3 * number
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Loads one small kernel anew, as the next process would."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    (tmp_path / "small.py").write_text(SOURCE)

    def load() -> Any:
        spec = importlib.util.spec_from_file_location("small", tmp_path / "small.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.triple

    return load


def cached(folder: Path) -> list[Path]:
    return sorted((folder / "__pycache__").glob("small.triple*.nb?"))


def hits(kernel: Any) -> int:
    return sum(kernel.stats.cache_hits.values())


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda data: b"",
    "cut by a byte": lambda data: data[:-1],
    "cut in half": lambda data: data[: len(data) // 2],
    "a bit at the beginning": lambda data: flip(data, 14),
    "a bit in the middle": lambda data: flip(data, len(data) // 2),
    "a bit at the end": lambda data: flip(data, len(data) - 1),
    "of something else": lambda data: b"cos\nsystem\n(S'touch ran'\ntR." + data,
}


def test_a_whole_cache_is_used(load: Callable[[], Any], tmp_path: Path) -> None:
    first, second = load(), load()
    assert (first(5), hits(first)) == (15, 0)
    assert [path.suffix for path in cached(tmp_path)] == [".nbc", ".nbi"]
    assert (second(5), hits(second)) == (15, 1)


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_compiled_anew_and_mended(
    load: Callable[[], Any],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    load()(5)
    path = next(path for path in cached(tmp_path) if path.suffix == suffix)
    path.write_bytes(damage(path.read_bytes()))
    again, third = load(), load()
    assert (again(5), hits(again)) == (15, 0)
    assert (third(5), hits(third)) == (15, 1)
    assert not (tmp_path / "ran").exists()


def test_a_folder_in_place_of_a_file_costs_the_cache_only(load: Callable[[], Any], tmp_path: Path) -> None:
    load()(5)
    for path in cached(tmp_path):
        path.unlink()
        path.mkdir()
    assert load()(5) == 15


FIRST_RUN = """
import torch
from loftq_cli.triton_kernels import backend
from loftq_cli.triton_kernels.codebook.contract import quantize_codebook
assert backend.use_compiled_kernels() is None
print(quantize_codebook(torch.linspace(-1, 1, 64), "nf4", 64)[0].tolist())
"""


@pytest.mark.slow
def test_three_first_runs_at_once_share_a_cold_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FIRST_RUN]
    runs = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], said
    assert len({out for out, _ in said}) == 1 and said[0][0].startswith("[")
    assert not list(tmp_path.rglob("*.tmp.*"))
    fourth = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert fourth.stdout == said[0][0]
