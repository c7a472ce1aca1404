"""One layer in memory: the peak depends on the largest matrix, not on their number; and not on that either where each
weight is looked at once.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from support.conversions import run_conversion

PROGRAM = """
import sys, torch
from loftq_cli.cli.render.console import peak_nbytes
from loftq_cli.cli.main import _run
from loftq_cli.runtime.allocator import keep_freed_buffers
keep_freed_buffers()
torch.zeros(1) + 1
before = peak_nbytes()
assert _run(sys.argv[1:]) == 0
print(peak_nbytes() - before)
"""
SHAPE = (64, 16384)  # 4 MB of float32, and quick to decompose


def peak_kb(*arguments: object) -> int:
    """What a command takes beyond importing torch."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(run.stdout.splitlines()[-1]) // 1000


@pytest.fixture(scope="module")
def deep_models(tmp_path_factory):
    paths = {}
    for layers in (4, 24):
        directory = paths[layers] = tmp_path_factory.mktemp(f"layers{layers}") / "model"
        directory.mkdir()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(SHAPE, generator=generator) * 0.02
        tensors = {f"layers.{i}.proj.weight": weight * (1 + i / 100) for i in range(layers)}
        tensors["embed.weight"] = torch.zeros(1024, 1024)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps({"dtype": "float32"}))
    return paths


@pytest.mark.parametrize(("method", "quant_type"), [("loftq", "nf4"), ("qlora", "nf4"), ("qalora", "int4")])
def test_six_times_the_layers_take_the_same_memory(deep_models, tmp_path, method, quant_type):
    options = ("--rank", 8, "--method", method, "--quant-type", quant_type, "-q", "--threads", 1)
    options += () if method == "qlora" else ("--fit", "loftq", "--iterations", 1)
    peaks = {n: peak_kb("quantize", path, tmp_path / f"{method}{n}", *options) for n, path in deep_models.items()}
    # 20 more matrices of 4 MB: holding them would show as 84,000 KB. (Too few to load the compiled kernels for, but
    # for searches.)
    assert peaks[24] - peaks[4] < 48_000


@pytest.mark.slow
@pytest.mark.parametrize(("method", "quant_type"), [("loftq", "nf4"), ("qalora", "int4")])
def test_merging_and_inspecting_take_the_same_memory(deep_models, tmp_path, method, quant_type):
    peaks = {}
    for n, path in deep_models.items():
        out = tmp_path / f"out{n}"
        run_conversion(path, out, rank=8, iterations=1, method=method, quant_type=quant_type)
        peaks[n] = (
            peak_kb("merge", out, out / f"{method}_init", tmp_path / f"merged{n}", "-q", "--threads", 1),
            peak_kb("inspect", out, "--against", path, "--threads", 1),
            peak_kb("inspect", out, "--verify", "--threads", 1),
        )
    assert all(deep - shallow < 48_000 for shallow, deep in zip(peaks[4], peaks[24], strict=True))


WIDTH = 16384
SIZES = {"small": 256, "large": 1280}  # rows: 8 MB and 42 MB of bfloat16


@pytest.fixture(scope="module")
def wide_models(tmp_path_factory):
    paths = {}
    for name, rows in SIZES.items():
        directory = paths[name] = tmp_path_factory.mktemp(name) / "model"
        directory.mkdir()
        weight = (torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
        save_file({"layers.0.proj.weight": weight}, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    return paths


def test_verifying_the_original_takes_64_mb_whatever_the_number_and_size_of_its_matrices(deep_models, wide_models):
    peaks = [peak_kb("inspect", path, "--verify", "--threads", 1) for path in (deep_models[24], *wide_models.values())]
    assert max(peaks) <= 64_000 and max(peaks) - min(peaks) < 20_000


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", ["nf4", "int4"])
def test_qlora_merging_and_inspecting_take_64_mb_whatever_the_size_of_a_matrix(wide_models, tmp_path, quant_type):
    """The reference kernels: numba alone takes more than that."""
    peaks = {}
    for name, path in wide_models.items():
        out = tmp_path / name
        options = ("--method", "qlora", "--rank", 8, "--quant-type", quant_type, "--threads", 1, "-q")
        peaks[name] = (
            peak_kb("quantize", path, out, *options),
            peak_kb("merge", out, out / "qlora_init", tmp_path / f"{name}-merged", "--threads", 1, "-q"),
            peak_kb("inspect", out, "--against", path, "--threads", 1),
            peak_kb("inspect", out, "--verify", "--threads", 1),
        )
    assert max(peaks["large"]) <= 64_000
    # 34 MB more of weights: one copy of them would show.
    assert all(large - small < 20_000 for small, large in zip(peaks["small"], peaks["large"], strict=True))
