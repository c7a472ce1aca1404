"""The factors of an adapter, as fused operations take them."""

from __future__ import annotations

import torch

from loftq_cli.triton_kernels.codebook.contract import FLOATS


def checked_factors(
    lora_A: torch.Tensor | None, lora_B: torch.Tensor | None, shape: tuple[int, int]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """lora_A [rank, in] and lora_B [out, rank] in contiguous memory, or None for both.

    Raises ValueError when one factor is missing, or when dtype (float32, bfloat16, float16) or shape do not fit.
    """
    if lora_A is None and lora_B is None:
        return None, None
    if lora_A is None or lora_B is None:
        raise ValueError("lora_A and lora_B belong together")
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if factor.dtype not in FLOATS or factor.dim() != 2:
            raise ValueError(f"{name} must be a float32, bfloat16 or float16 matrix")
    if (lora_B.shape[0], lora_A.shape[1]) != shape or lora_B.shape[1] != lora_A.shape[0]:
        raise ValueError(f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not make {shape}")
    return lora_A.contiguous(), lora_B.contiguous()
