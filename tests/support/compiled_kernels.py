"""The compiled CPU kernels beside the reference: calls, inputs of every kind, and comparisons bit for bit."""

from __future__ import annotations

import importlib
import math
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from loftq_cli.triton_kernels import backend
from loftq_cli.triton_kernels.backend import use_compiled_kernels, use_reference_kernels
from loftq_cli.triton_kernels.codebook.contract import CODEBOOKS
from loftq_cli.triton_kernels.error_stats.contract import ErrorSums

numba = pytest.importorskip("numba")
bnb = pytest.importorskip("bitsandbytes.functional")


COMPILED = ("affine", "codebook", "double_quant", "error_stats")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float32, torch.bfloat16)
MAYBE_FLOATS = (None, *FLOATS)
DECODED = (*FLOATS, torch.float16)
TABLE = torch.tensor(CODEBOOKS["nf4"])
FORMS = {
    "symmetric": {"symmetric": True},
    "int": {"symmetric": False},
    "float": {"symmetric": False, "zero_point": "float"},
}
BAD = {
    "NaN": float("nan"),
    "negative NaN": struct.unpack("f", struct.pack("I", 0xFFC00000))[0],
    "NaN of a GPU": struct.unpack("f", struct.pack("I", 0x7FFFFFFF))[0],
    "Inf": float("inf"),
    "-Inf": -float("inf"),
}


# Quiet ones, a signalling one, and those whose upper half would carry into the sign if it were rounded like a number.
NAN_PATTERNS = (0x7F800001, 0x7FC00000, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF)


def compiled(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the compiled kernels make of it."""
    assert use_compiled_kernels() is None
    try:
        return operation(*arguments, **options)
    finally:
        use_reference_kernels()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=generator(seed)) * 0.05).to(dtype)


def bit_patterns(numel: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Finite numbers of every size and both signs, subnormal ones too."""
    low, high, integers = (-(2**31), 2**31, torch.int32) if dtype == torch.float32 else (-(2**15), 2**15, torch.int16)
    values = torch.randint(low, high, (numel,), generator=generator(seed), dtype=integers).view(dtype)
    return values.where(torch.isfinite(values), 0.0).to(dtype)


def of_bits(pattern: int) -> torch.Tensor:
    return torch.tensor([pattern], dtype=torch.uint32).view(torch.float32)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What is compared: -0.0 is not 0.0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.view(integers[tensor.element_size()])


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether all bits are equal; one NaN is as good as another."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(found, expected)
    nan = torch.isnan(expected)
    return torch.equal(torch.isnan(found), nan) and torch.equal(bits(found)[~nan], bits(expected)[~nan])


def repeated(constants: torch.Tensor, block_size: int, numel: int) -> torch.Tensor:
    return constants.repeat_interleave(block_size)[:numel]


def sizes(block_size: int) -> list[int]:
    """Numbers of weights: parts of a block, one, several, ragged ends of both parities, more than a buffer holds."""
    return [1, 2, 3, block_size - 1, block_size, block_size + 1, 3 * block_size + 7, 2 * 4096 + 5 * block_size + 30]


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop what has been imported of the compiled kernels, until the end of a test."""
    for name in ("cpu_kernels", *(f"{op}.cpu" for op in COMPILED)):
        full_name = f"{backend.__package__}.{name}"
        importlib.import_module(full_name)  # or there would be nothing to put back
        monkeypatch.delitem(sys.modules, full_name)


def assert_sums(found: ErrorSums, weight: torch.Tensor, decoded: torch.Tensor, delta: torch.Tensor | None) -> None:
    w, q = (tensor.float().numpy().reshape(-1) for tensor in (weight, decoded))
    d = np.zeros_like(q) if delta is None else delta.float().numpy().reshape(-1)
    both = q + d
    assert both.dtype == np.float32
    w, q, both, d = (array.astype(np.float64) for array in (w, q, both, d))
    expected = {
        "squared_weight": math.fsum(w * w),
        "squared_base_error": math.fsum((w - q) ** 2),
        "squared_error": math.fsum((w - both) ** 2),
        "squared_delta": math.fsum(d * d),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12, abs=0.0), name
    assert found.max_error == float(np.abs(w - both).max())
