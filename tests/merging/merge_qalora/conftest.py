"""A llama of one block, QA-LoRA bases of it that are each made once, and the merge command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from support.qalora_merges import Conversions, Ran, Trained

from loftq_cli.cli.main import _run


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One block, in two dtypes: rows of 128 and 192."""
    folder = tmp_path_factory.mktemp("models")
    return {name: models.llama(folder / name, layers=1, dtype=getattr(torch, name)) for name in ("bfloat16", "float32")}


@pytest.fixture(scope="session")
def converted(llamas: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Conversions:
    return Conversions(llamas, tmp_path_factory.mktemp("bases"))


@pytest.fixture
def merge(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(base: Path, adapter: Path | Trained, out: Path, *arguments: object) -> Ran:
        path = adapter.path if isinstance(adapter, Trained) else adapter
        capsys.readouterr()
        status = _run(["merge", *map(str, (base, path, out, "--quiet", *arguments))])
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return run
