"""A conversion of 300 MB, really killed at random moments: it can always be continued, ends with the same bytes, and
shows nothing before.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.conversions import Silent

from loftq_cli.conversion.prepare import is_conversion_done, prepare_conversion
from loftq_cli.conversion.run import convert_checkpoint
from loftq_cli.output.checksums import file_sha256, files_in
from loftq_cli.planning.settle import make_recipe
from loftq_cli.triton_kernels.backend import use_reference_kernels

pytestmark = pytest.mark.slow
KILLS = 50
SHAPE = (2048, 4096)  # 16.8 MB of bfloat16


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("large") / "model"
    directory.mkdir()
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02
    tensors = {f"layers.{i}.proj.weight": (weight * (1 + i / 50)).bfloat16() for i in range(18)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert (directory / "model.safetensors").stat().st_size > 300_000_000
    (directory / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    return directory


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    yield
    use_reference_kernels()  # a conversion of this size takes the compiled ones


def quantize(source: Path, threads: int) -> None:
    """Into `out` of the working directory, in as many files as the size allows to have written in part."""
    recipe = make_recipe(method="qlora", rank=8, max_shard_size="20MB")
    conversion = prepare_conversion(str(source), Path("out"), recipe)
    if not is_conversion_done(conversion, overwrite=False):
        convert_checkpoint(conversion, Silent(), overwrite=False, restart=False, verify=True, threads=threads)


def sums(directory: Path) -> dict[str, str]:
    return {name: file_sha256(directory / name) for name in files_in(directory)}


def killed_after(seconds: float, source: Path, threads: int) -> bool:
    """Whether a conversion in a process of its own was still running when it was killed."""
    process = os.fork()
    if process == 0:
        try:
            quantize(source, threads)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def test_a_kill_at_50_random_moments_of_300_mb(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quantize(source, 1)  # compiles what has to be compiled
    expected = sums(tmp_path / "out")
    shutil.rmtree("out")
    started = time.monotonic()
    quantize(source, 1)
    whole = time.monotonic() - started
    shutil.rmtree("out")
    dice = random.Random(0)
    stopped = turns = 0
    while stopped < KILLS:
        turns += 1
        assert turns < 4 * KILLS, "conversions end before they are killed"
        threads = 1 + turns % 2
        was_running = killed_after(dice.uniform(0, whole), source, threads)
        stopped += was_running
        if not was_running:  # the machine has become faster, or two threads are
            whole *= 0.95
        if os.path.exists("out"):
            assert sums(tmp_path / "out") == expected
        quantize(source, 1)
        assert sums(tmp_path / "out") == expected
        assert os.listdir(tmp_path) == ["out"]
        shutil.rmtree("out")
