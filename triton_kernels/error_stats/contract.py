"""The error of an approximation against a weight: the contract. A single pass, float64 sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq_cli.triton_kernels.backend import implementation
from loftq_cli.triton_kernels.codebook.contract import FLOATS, check_constants, codebook_table
from loftq_cli.triton_kernels.factors import checked_factors


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """Sums over all elements: w^2, (w - q)^2, (w - (q + d))^2, d^2, and the largest |w - (q + d)|."""

    squared_weight: float
    squared_base_error: float
    squared_error: float
    max_error: float
    squared_delta: float


def error_stats(weight: torch.Tensor, decoded: torch.Tensor, delta: torch.Tensor | None = None) -> ErrorSums:
    """The sums for w = weight, q = decoded and d = delta (0 without a delta); q + d is rounded to float32.

    All tensors have equal shapes and are float32 or bfloat16. Raises ValueError when shapes or dtypes do not match.

    >>> error_stats(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 2.0])).squared_base_error
    4.0
    """
    for tensor in (weight, decoded, delta):
        if tensor is None:
            continue
        if tensor.shape != weight.shape:
            raise ValueError(f"shapes differ: {tuple(weight.shape)} and {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{tensor.dtype} is neither float32 nor bfloat16")
    sums: tuple[float, float, float, float, float] = implementation("error_stats", weight.device.type).sums(
        weight.reshape(-1), decoded.reshape(-1), None if delta is None else delta.reshape(-1)
    )
    return ErrorSums(*sums)


def codebook_error_sums(
    weight: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: str,
    block_size: int,
    dtype: torch.dtype,
    lora_A: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """float64 [7] on the device of `weight` [out, in], without waiting for the device: the fields of ErrorSums, the
    count of weights whose sign flipped, and the count of nonzero weights that became zero.

    w = weight, q = codes decoded in `dtype`, d = scaling·lora_B·lora_A in float32 (0 without an adapter); q + d is
    rounded to float32. lora_A [rank, in], lora_B [out, rank].
    Raises ValueError unless the weight is a contiguous float32, bfloat16 or float16 matrix, and codes, constants (see
    codebook/contract.py) and factors fit the weight.

    >>> packed, absmax = torch.tensor([0xF7], dtype=torch.uint8), torch.tensor([2.0])
    >>> codebook_error_sums(torch.tensor([[2.5, 0.0]]), packed, absmax, "nf4", 2, torch.float32).tolist()
    [6.25, 0.25, 0.25, 0.5, 0.0, 0.0, 0.0]
    """
    if weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError("weight must be a contiguous matrix")
    if weight.dtype not in FLOATS:
        raise ValueError(f"{weight.dtype} is none of float32, bfloat16 and float16")
    check_constants(packed, absmax, block_size, weight.numel())
    factors = checked_factors(lora_A, lora_B, (weight.shape[0], weight.shape[1]))
    table = codebook_table(codebook, weight.device)
    sums: torch.Tensor = implementation("error_stats", weight.device.type).codebook_sums(
        weight, packed.reshape(-1), absmax.reshape(-1), table, block_size, dtype, *factors, scaling
    )
    return sums
