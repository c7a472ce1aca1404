"""Checkpoints of several families, and two conversions of a llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import models
from support.conversions import run_conversion


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("llama", "tied llama", "gpt2", "bert"):
        models.BUILDERS[name](folder / name)
    models.gpt2_without_prefix(folder / "gpt2 of the hub")
    models.torch_llama(folder / "torch llama")
    return folder


@pytest.fixture(scope="session")
def converted(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama in NF4 with a LoftQ adapter of rank 8 and scaling 2."""
    output = tmp_path_factory.mktemp("converted") / "base"
    run_conversion(checkpoints / "llama", output, rank=8, alpha=16.0)
    return output


@pytest.fixture(scope="session")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 llama in INT4 with a fitted QA-LoRA adapter: with bfloat16 scales, every decoded weight is rounded to
    8 bits, and those of a merged model with float32 offsets are not.
    """
    folder = tmp_path_factory.mktemp("pooled")
    output = folder / "base"
    run_conversion(
        models.llama(folder / "llama", dtype=torch.float32),
        output,
        method="qalora",
        quant_type="int4",
        group_size=32,
        rank=4,
    )
    return output
