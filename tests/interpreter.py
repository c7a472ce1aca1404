"""Triton's interpreter as the tests use it: kernels run on the CPU, program by program, in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from loftq_cli.triton_kernels.backend import use_backend


def interpreted(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the Triton kernels make of it: interpreted, or on the GPU for tensors that are there."""
    with triton_kernels():
        return operation(*arguments, **options)


@contextmanager
def triton_kernels() -> Any:
    """The Triton kernels on the CPU, for the length of the block."""
    pytest.importorskip("triton")
    _convert_bfloat16_as_hardware_does()
    _drop_nan_as_hardware_does()
    use_backend("cpu", "triton")
    try:
        yield
    finally:
        use_backend("cpu", None)


def _convert_bfloat16_as_hardware_does() -> None:
    """Exactly, and rounded to nearest, ties to even. The interpreter (3.6 to 3.9) cuts the lower half of a float32 off,
    and mistakes subnormal numbers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float
    if getattr(original, "is_exact", False):
        return

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            flat = torch.from_numpy(np.ascontiguousarray(data).reshape(-1)).to(torch.bfloat16)
            return flat.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return (data.astype(np.uint32) << 16).view(np.float32)
        return original(data, source, target, mode)

    convert.is_exact = True  # type: ignore[attr-defined]
    interpreter._convert_float = convert


def _drop_nan_as_hardware_does() -> None:
    """The greater or lesser of a number and NaN is the number, unless a kernel asks otherwise. (3.6 takes the NaN.)"""
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_maxnumf = lambda self, one, other: self.binary_op(one, other, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, one, other: self.binary_op(one, other, np.fmin)
