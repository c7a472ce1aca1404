"""How the tests run Triton's kernels: interpreted on the CPU, program by program, in NumPy; where there is a GPU,
compiled, with all tensors carried there and back.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch

from loftq_cli.triton_kernels.backend import use_backend


def are_compiled() -> bool:
    """Whether kernels are compiled for a GPU here. On a simulated one they are interpreted."""
    return torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"


def kernel_device() -> torch.device:
    """Where tensors must lie for `triton_kernels`."""
    return torch.device("cuda" if are_compiled() else "cpu")


def interpreted(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the Triton kernels make of it. Tensors of the CPU are given and got, wherever kernels run."""
    if are_compiled():
        return carried(operation, *arguments, **options)
    with triton_kernels():
        return operation(*arguments, **options)


def carried(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The same on the GPU: what it writes to its arguments comes back into them, its results come back as copies.

    Tensors lie there as they lie here: with their strides, and in shared memory where they share it.
    """
    memory: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of each storage: its bytes here and there

    def there(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_cpu:
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata not in memory:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            memory[storage._cdata] = here, here.to("cuda", copy=True)
        flat = memory[storage._cdata][1][: storage.nbytes() // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
        return flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    result = operation(*_mapped(arguments, there), **_mapped(options, there))
    for here, carried_bytes in memory.values():
        here.copy_(carried_bytes)
    return _mapped(result, lambda tensor: tensor.cpu())


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor in it changed, also in containers and dataclasses."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: _mapped(getattr(value, field.name), change) for field in fields(value)})
    return value


@contextmanager
def triton_kernels() -> Any:
    """The Triton kernels for tensors on `kernel_device`, for the length of the block."""
    if are_compiled():
        yield
        return
    compute_as_hardware_does()
    use_backend("cpu", "triton")
    try:
        yield
    finally:
        use_backend("cpu", None)


def compute_as_hardware_does() -> None:
    """Mend what Triton's interpreter computes otherwise, for the rest of the process."""
    pytest.importorskip("triton")
    _convert_bfloat16_as_hardware_does()
    _multiply_bfloat16_as_numbers()
    _count_to_numbers_of_kernels()
    _drop_nan_as_hardware_does()


@contextmanager
def poisoned_memory() -> Any:
    """What torch.empty gives is NaN, or the largest integer, for the length of the block: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialized memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


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


def _multiply_bfloat16_as_numbers() -> None:
    """The interpreter (3.6 to 3.9) keeps bfloat16 as unsigned integers, and multiplies matrices of those."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original = builder.create_dot
    if getattr(original, "is_exact", False):
        return

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return original(self, widened(a), widened(b), *others)

    create_dot.is_exact = True  # type: ignore[attr-defined]
    builder.create_dot = create_dot


def _count_to_numbers_of_kernels() -> None:
    """NumPy 2.4 makes no integer of an array of one element, which is what the end of a loop is to the interpreter of
    Triton 3.6.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor
    if getattr(original, "is_exact", False):
        return

    def patch(tensor: Any, *others: Any) -> None:
        original(tensor, *others)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    patch.is_exact = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch


def _drop_nan_as_hardware_does() -> None:
    """The greater or lesser of a number and NaN is the number, unless a kernel asks otherwise. (3.6 takes the NaN.)"""
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_maxnumf = lambda self, one, other: self.binary_op(one, other, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, one, other: self.binary_op(one, other, np.fmin)
