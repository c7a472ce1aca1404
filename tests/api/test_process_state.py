"""A call leaves the process as it was, after an error too, and two calls at once are both right."""

from __future__ import annotations

import gc
import logging
import os
import random
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.conversions import files_of

import loftq_cli as loftq
from loftq_cli.activations import transformers_models
from loftq_cli.triton_kernels import backend

ONE_LAYER: dict[str, Any] = {"rank": 4, "iterations": 1, "include": r"layers\.0\.self_attn\.q_proj"}


def in_a_new_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def process_state() -> dict[str, Any]:
    """Everything that a call could leave changed, by name."""
    return {
        "torch's threads": torch.get_num_threads(),
        "torch's threads of threads to come": in_a_new_thread(torch.get_num_threads),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "default dtype and device": (torch.get_default_dtype(), torch.get_default_device()),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 products": torch.get_float32_matmul_precision(),
        "random numbers": (torch.get_rng_state().tolist(), random.getstate()),
        "backends": {op: backend.implementation(op, "cpu").__name__ for op in backend.BACKENDS["cpu"]["cpu"]},
        "context": dict(copy_context().items()),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "timers": signal.getitimer(signal.ITIMER_VIRTUAL),
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "warnings": list(warnings.filters),
        "logging": {
            name: (logger.level, list(logger.handlers), logger.disabled)
            for name, logger in [("root", logging.root), *logging.root.manager.loggerDict.items()]
            if isinstance(logger, logging.Logger)
        },
        "transformers": transformers.utils.logging.get_verbosity(),
        "hooks of modules": (torch.nn.Module.register_parameter, torch.nn.Module.register_buffer),
        "threads": {thread.name for thread in threading.enumerate()},
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a converted model, an adapter and a text. Every library has been loaded once then: importing one
    may change a process.
    """
    directory = tmp_path_factory.mktemp("prepared")
    backend.use_compiled_kernels()
    backend.use_reference_kernels()
    transformers_models.check_installed()
    (directory / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    (directory / "empty.txt").write_text("")
    loftq.quantize("builtin:tiny-llama", directory / "base", threads=2, **ONE_LAYER)
    loftq.calibrate("builtin:tiny-llama", directory / "text.txt", directory / "statistics", tokens=32, context=16)
    return directory


@pytest.fixture
def directory(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it as the working directory, in a process whose settings are none that a call makes by itself."""
    shutil.copytree(prepared, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    threads, verbosity = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    torch.set_num_threads(3)
    in_a_new_thread(lambda: torch.set_num_threads(2))  # of threads to come, and not of this one
    transformers.utils.logging.set_verbosity_info()
    yield tmp_path / "copy"
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity(verbosity)


CALLS: dict[str, Callable[[], object]] = {
    "quantize": lambda: loftq.quantize("builtin:tiny-llama", "out", threads=2, **ONE_LAYER),
    "quantize, planned": lambda: loftq.quantize("builtin:tiny-llama", "out", dry_run=True),
    "quantize, under a target": lambda: loftq.quantize(
        "builtin:tiny-llama", "out", method="qlora", lora_budget="8kB", include=ONE_LAYER["include"], threads=2
    ),
    "merge": lambda: loftq.merge("base", "base/loftq_init", "out", threads=2),
    "inspect": lambda: loftq.inspect("base", against="builtin:tiny-llama", threads=2),
    "inspect, tried": lambda: loftq.inspect("builtin:tiny-llama", try_="nf4", threads=2),
    "inspect, verified": lambda: loftq.inspect("base", verify=True, threads=2),
    "inspect, outputs": lambda: loftq.inspect(
        "base", reference="builtin:tiny-llama", text="text.txt", tokens=32, context=16, threads=2
    ),
    "calibrate": lambda: loftq.calibrate("builtin:tiny-llama", "text.txt", "out", tokens=32, context=16, threads=2),
}


class Stopping(loftq.Observer):
    """Ends a call in the middle of its work."""

    def layer_converted(self, layer: object, *, resumed: bool) -> None:
        raise KeyboardInterrupt

    def layer_merged(self, layer: object) -> None:
        raise KeyboardInterrupt

    def block_calibrated(self, block: str, inputs: int) -> None:
        raise KeyboardInterrupt

    def phase(self, text: str) -> None:
        raise KeyboardInterrupt


FAILURES: dict[str, Callable[[], object]] = {
    "quantize": lambda: loftq.quantize("builtin:tiny-llama", "out", threads=2, observer=Stopping(), **ONE_LAYER),
    "merge": lambda: loftq.merge("base", "base/loftq_init", "out", threads=2, observer=Stopping()),
    "merge, refused": lambda: loftq.merge("builtin:tiny-llama", "base/loftq_init", "out"),
    "inspect": lambda: loftq.inspect("base", against="base", threads=2),
    "inspect, outputs": lambda: loftq.inspect(
        "base", reference="builtin:tiny-llama", text="text.txt", tokens=32, context=16, observer=Stopping()
    ),
    "calibrate": lambda: loftq.calibrate(
        "builtin:tiny-llama", "text.txt", "out", tokens=32, context=16, observer=Stopping()
    ),
    "calibrate, refused": lambda: loftq.calibrate("builtin:tiny-llama", "empty.txt", "out"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_leaves_the_process_as_it_was(call, directory, monkeypatch):
    monkeypatch.setattr("loftq_cli.runtime.kernel_choice.WORTH_COMPILING", 0)
    before = process_state()
    call()
    gc.collect()
    assert process_state() == before


@pytest.mark.parametrize("call", FAILURES.values(), ids=FAILURES)
def test_a_call_that_fails_leaves_the_process_as_it_was(call, directory, monkeypatch):
    monkeypatch.setattr("loftq_cli.runtime.kernel_choice.WORTH_COMPILING", 0)
    before = process_state()
    with pytest.raises((loftq.LoftqError, KeyboardInterrupt)):
        call()
    gc.collect()
    assert process_state() == before


def test_the_caller_keeps_the_kernels_that_it_chose(directory):
    backend.use_backend("cpu", "triton")
    try:
        loftq.quantize("builtin:tiny-llama", "out", threads=2, **ONE_LAYER)
        assert backend.implementation("codebook", "cpu").__name__.endswith("codebook.triton")
    finally:
        backend.use_reference_kernels()


class Meeting(loftq.Observer):
    """Two calls wait for each other in the middle of their work, and say which kernels and threads they have there."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier
        self.kernels, self.threads = "", 0

    def layer_started(self, name: str) -> None:
        self.barrier.wait(60)
        self.kernels, self.threads = backend.implementation("codebook", "cpu").__name__, torch.get_num_threads()
        self.barrier.wait(60)


def test_two_calls_at_once_have_kernels_of_their_own_and_write_what_each_writes_alone(directory, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr("loftq_cli.runtime.kernel_choice.is_worth_compiling", lambda work: work > 100_000)
    observers = [Meeting(barrier := threading.Barrier(2)), Meeting(barrier)]
    with ThreadPoolExecutor(2) as pool:
        before = process_state()
        # One pass over 36,864 weights is too little to compile for, and eight are enough.
        few = pool.submit(_convert, Path("one/out"), 1, 1, observers[0])
        many = pool.submit(_convert, Path("two/out"), 8, 2, observers[1])
        few.result(), many.result()
        after = process_state()
    names = [observer.kernels.rpartition(".")[2] for observer in observers]
    assert names == ["reference", "cpu"]
    assert [observer.threads for observer in observers] == [1, 1]
    assert {name for name in before if before[name] != after[name]} <= {"threads"}  # of the pool
    for output, iterations, other in ((Path("one/out"), 1, Path("three/out")), (Path("two/out"), 8, Path("four/out"))):
        _convert(other, iterations, 1, loftq.Observer())
        concurrent, alone = (
            {name: data for name, data in files_of(path).items() if name.endswith(".safetensors")}
            for path in (output, other)
        )
        assert concurrent == alone


def _convert(output: Path, iterations: int, threads: int, observer: loftq.Observer) -> None:
    output.parent.mkdir()
    options = {**ONE_LAYER, "iterations": iterations, "fit": "loftq"}
    loftq.quantize("builtin:tiny-llama", output, threads=threads, observer=observer, **options)


@pytest.mark.parametrize("method", ["loftq", "pissa"])
def test_results_do_not_depend_on_the_dtype_that_the_process_gives_new_tensors(tmp_path, method):
    """A failed load in diffusers leaves float16 behind."""
    expected = loftq.quantize("builtin:tiny-llama", tmp_path / "expected", **{**ONE_LAYER, "method": method})
    torch.set_default_dtype(torch.float16)
    try:
        made = loftq.quantize("builtin:tiny-llama", tmp_path / "made", **{**ONE_LAYER, "method": method})
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("model.safetensors", f"{expected.adapter.name}/adapter_model.safetensors"):
        assert (made.output / name).read_bytes() == (expected.output / name).read_bytes()
