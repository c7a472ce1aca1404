"""How every kernel is launched: on its tensors' device, and compiled without fused multiply-adds, which would change
the last bit of what a code is decided by. The default of Triton differs between versions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton


def launch(
    kernel: triton.JITFunction[Any], grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any
) -> None:
    """`kernel` over a grid of programs. The first argument is a tensor: it runs where that is.

    `constants` are the kernel's compile-time ones. Nothing is validated here: the contract has done it.
    """
    if 0 in grid:
        return
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        kernel[grid](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)
