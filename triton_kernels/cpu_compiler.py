"""What the `*_cpu.py` kernels are compiled with: numba, to machine code that is kept on disk and runs without Python's
global lock. Kernels read and write float32 and bfloat16 as unsigned integers, which numba has both of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

# Elements that a kernel widens, computes on and narrows at once: 4 KB each, so a few such buffers stay in the
# processor's first cache.
BUFFER_NUMEL = 1024


def kernel(*, reassociates: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function at its first call. Arithmetic is IEEE, without fused multiply-adds; `reassociates` lets a
    sum be taken in any order, so that it can use vectors.
    """
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"reassoc"} if reassociates else False,
    }

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            made: Callable[..., Any] = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written
            made = numba.njit(**options)(function)
        return made

    return compiled


def bits_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A flat float32 or bfloat16 tensor as uint32 or uint16, over the same memory."""
    bits: np.ndarray[Any, Any] = tensor.view(torch.uint32 if tensor.dtype == torch.float32 else torch.uint16).numpy()
    return bits


# Loops run over whole arrays, and a part of one is passed as a slice: an index that could be negative to numba, as one
# with an offset could, keeps a loop from using vectors.


@kernel()
def widen(source: Any, bits: Any) -> None:
    """The bits of the floats of `source`, as those of float32, into as many of `bits`."""
    shift = np.uint32(32 - 8 * source.itemsize)
    for i in range(source.size):
        bits[i] = np.uint32(source[i]) << shift


@kernel()
def round_bfloat16(bits: Any) -> None:
    """Round float32 numbers, as bits, to bfloat16 numbers: half to even. NaN may become infinite."""
    for i in range(bits.size):
        u = bits[i]
        bits[i] = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)


@kernel()
def narrow(bits: Any, target: Any) -> None:
    """The inverse of `widen`, for as many as `target` has; what goes into bfloat16 is rounded half to even."""
    if target.itemsize == 2:
        for i in range(target.size):
            u = bits[i]
            target[i] = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    else:
        for i in range(target.size):
            target[i] = bits[i]
