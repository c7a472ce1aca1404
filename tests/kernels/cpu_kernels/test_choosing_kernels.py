"""Which kernels run: with numba and without, and where no cache can be written."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from support.compiled_kernels import COMPILED, assert_sums, bnb, compiled, forget, normal, numba

from loftq_cli.triton_kernels.backend import implementation, use_compiled_kernels, use_reference_kernels
from loftq_cli.triton_kernels.codebook.contract import quantize_codebook
from loftq_cli.triton_kernels.error_stats.contract import error_stats


def test_the_reference_serves_until_the_compiled_kernels_are_asked_for() -> None:
    for op in (*COMPILED, "packing"):
        assert implementation(op, "cpu").__name__.endswith(f".{op}.reference")
    assert use_compiled_kernels() is None
    for op in COMPILED:
        assert implementation(op, "cpu").__name__.endswith(f".{op}.cpu")
    for op in ("packing",):
        assert implementation(op, "cpu").__name__.endswith(f".{op}.reference")
    use_reference_kernels()
    for op in COMPILED:
        assert implementation(op, "cpu").__name__.endswith(f".{op}.reference")


def test_without_numba_a_sentence_says_so_and_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "numba", None)
    missing = use_compiled_kernels()
    assert missing is not None and "numba" in missing and "\n" not in missing
    assert implementation("codebook", "cpu").__name__.endswith(".codebook.reference")
    weight = normal(4, 64)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    found = quantize_codebook(weight, "nf4", 64)
    assert torch.equal(found[0], packed.view(-1)) and torch.equal(found[1], state.absmax)


def test_where_no_cache_can_be_written_kernels_are_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    njit, asked = numba.njit, []

    def without_a_cache(*arguments: Any, cache: bool = False, **options: Any) -> Any:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*arguments, **options)

    forget(monkeypatch)
    monkeypatch.setattr(numba, "njit", without_a_cache)
    weight, decoded = normal(3, 1000), normal(3, 1000, seed=1)
    found = compiled(error_stats, weight, decoded)
    assert True in asked and False in asked
    assert_sums(found, weight, decoded, None)


FULL_DISK = """
import resource, signal, torch
from loftq_cli.triton_kernels import backend
from loftq_cli.triton_kernels.codebook.contract import quantize_codebook
assert backend.use_compiled_kernels() is None
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
print(quantize_codebook(torch.ones(64), "nf4", 64)[0].tolist())
"""


def test_a_disk_that_is_full_keeps_no_kernel_and_computes(tmp_path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", FULL_DISK], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == str([0xFF] * 32), run.stderr
