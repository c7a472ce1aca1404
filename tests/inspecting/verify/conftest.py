"""A converted llama, a plain checkpoint in two files, fresh copies of both, and `loftq inspect --verify --json`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from support.conversions import run_conversion
from support.verified_results import sign

from loftq_cli.cli.main import _run


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = models.llama(tmp_path_factory.mktemp("original") / "llama", layers=2)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    return directory


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, original: Path) -> Path:
    output = tmp_path_factory.mktemp("converted") / "base"
    run_conversion(original, output, rank=4, alpha=8.0, iterations=1, verify=False)
    return sign(output)


@pytest.fixture
def result(converted: Path, tmp_path: Path) -> Path:
    """A fresh copy of a converted directory."""
    shutil.copytree(converted, tmp_path / "result")
    return tmp_path / "result"


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint in two files."""
    directory = tmp_path_factory.mktemp("sharded") / "model"
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    names = {f"model.layers.{i}.mlp.up_proj.weight": f"model-0000{1 + i}-of-00002.safetensors" for i in range(2)}
    for name, file in names.items():
        tensors = {
            name: torch.randn(64, 64, generator=generator),
            f"{name.removesuffix('weight')}bias": torch.zeros(64),
        }
        save_file(tensors, directory / file)
    weight_map = {tensor: file for file in names.values() for tensor in load_file(directory / file)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    shutil.copytree(sharded, tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What --json says, with the problems as (file, tensor, what); the exit status must agree with it."""

    def run(path: object, *options: object) -> dict[str, Any]:
        capsys.readouterr()
        status = _run(["inspect", str(path), "--verify", "--json", "--threads", "1", *map(str, options)])
        out, err = capsys.readouterr()
        values: dict[str, Any] = json.loads(out)
        assert values["verified"] == (status == 0) == (not values["problems"])
        assert status in (0, 2) and "Traceback" not in err
        values["problems"] = [(p["file"], p["tensor"], p["what"]) for p in values["problems"]]
        return values

    return run
