"""The launch of every Triton kernel: on the device of the tensors, and compiled without fused multiply-adds.

A fused multiply-add changes the last bit of a number that decides a code. Triton's default differs between versions, so
each launch names the choice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton


def launch(
    kernel: triton.JITFunction[Any], grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any
) -> None:
    """Run `kernel` over a grid of programs, on the device of the first argument (a tensor).

    `constants` are compile-time constants of the kernel. The contract of the operation has validated all arguments.
    """
    if 0 in grid:
        return
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        kernel[grid](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient, rounded up: `cdiv(5, 2) == 3`."""
    return -(-numerator // denominator)
