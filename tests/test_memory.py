"""One layer in memory: the peak depends on the largest matrix, not on their number."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

PROGRAM = """
import resource, sys, torch
from loftq_cli.cli.main import _run
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert _run(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
SHAPE = (64, 16384)  # 4 MB of float32, and quick to decompose


def peak_kb(*arguments: object) -> int:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def deep_models(tmp_path_factory):
    paths = {}
    for layers in (4, 40):
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
def test_ten_times_the_layers_take_the_same_memory(deep_models, tmp_path, method, quant_type):
    options = ("--rank", 8, "--iterations", 2, "--method", method, "--quant-type", quant_type, "-q")
    peaks = {n: peak_kb("quantize", path, tmp_path / f"{method}{n}", *options) for n, path in deep_models.items()}
    # 36 more matrices of 4 MB: holding them would show as 151,000 KB.
    assert peaks[40] - peaks[4] < 24_000


@pytest.mark.parametrize(("method", "quant_type"), [("loftq", "nf4"), ("qalora", "int4")])
def test_merging_and_inspecting_take_the_same_memory(deep_models, tmp_path, method, quant_type):
    peaks = {}
    for n, path in deep_models.items():
        out = tmp_path / f"out{n}"
        options = ("--rank", 8, "--iterations", 1, "-q", "--no-verify", "--method", method, "--quant-type", quant_type)
        peak_kb("quantize", path, out, *options)
        peaks[n] = (
            peak_kb("merge", out, out / f"{method}_init", tmp_path / f"merged{n}", "-q"),
            peak_kb("inspect", out, "--against", path),
        )
    assert peaks[40][0] - peaks[4][0] < 24_000
    assert peaks[40][1] - peaks[4][1] < 24_000
