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
    _compute_as_hardware_does()
    use_backend("cpu", "triton")
    try:
        yield
    finally:
        use_backend("cpu", None)


def _compute_as_hardware_does() -> None:
    """With bfloat16, rounded to nearest, ties to even. The interpreter (3.6 to 3.9) cuts the lower half of a float32
    off, mistakes subnormal numbers, and multiplies the bits of bfloat16 matrices as if they were integers.
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

    def dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return multiply(self, *map(widened, (a, b)), *others)

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle(convert(operand.data, tl.bfloat16, tl.float32, None), tl.float32)

    convert.is_exact = True  # type: ignore[attr-defined]
    interpreter._convert_float = convert
    multiply = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = dot
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> Any:
        patch(tensor, scope)
        # Triton 3.6 makes an integer of an array with one dimension, which newer NumPy refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched
