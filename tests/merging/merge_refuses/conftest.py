"""Checkpoints of several families, and a conversion of the llama."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import models
from support.conversions import run_conversion


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("llama", "tied llama", "gpt2", "bert", "t5"):
        models.BUILDERS[name](folder / name.replace(" ", "_"))
    run_conversion(folder / "llama", folder / "converted", rank=4, method="qlora")
    return folder
