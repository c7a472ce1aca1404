"""A codebook matrix and an adapter made one weight, and what of a change survives quantizing again: the contract.

Affine codes need no kernel of their own: torch adds the product to what they decode to, which is one more pass over the
merged weight. Neither do pooled adapters, whose product is repeated over the columns of a group first.
"""

from __future__ import annotations

import torch

from loftq_cli.triton_kernels.backend import implementation
from loftq_cli.triton_kernels.codebook.contract import FLOATS, check_constants, codebook_table
from loftq_cli.triton_kernels.factors import checked_factors


def merge_codebook(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: str,
    block_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`out_dtype` [out, in]: what the codes of a matrix of this shape decode to in `dtype`, plus scaling·lora_B·lora_A,
    added in float32 and rounded once. lora_A [rank, in], lora_B [out, rank].

    Raises ValueError where codes, constants (see codebook.py) or factors do not belong to `shape`.
    """
    check_constants(packed, absmax, block_size, shape[0] * shape[1])
    left, right = checked_factors(lora_A, lora_B, shape)
    out = torch.empty(shape, dtype=out_dtype, device=packed.device)
    table = codebook_table(codebook, packed.device)
    implementation("merging", packed.device.type).merge(
        packed.reshape(-1), absmax.reshape(-1), table, block_size, dtype, left, right, scaling, out
    )
    return out


def retention_sums(base: torch.Tensor, requantized: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """float64 [3] on the device of the tensors: sum base², sum delta² and <requantized − base, delta>, where `delta`
    was added to `base` before it was quantized again: the third is the part of the second that survives.

    Tensors of one shape, float32, bfloat16 or float16. Raises ValueError when they do not match.
    """
    for tensor in (base, requantized, delta):
        if tensor.shape != base.shape:
            raise ValueError(f"shapes differ: {tuple(base.shape)} and {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{tensor.dtype} is none of float32, bfloat16 and float16")
    sums: torch.Tensor = implementation("merging", base.device.type).retention(
        base.reshape(-1), requantized.reshape(-1), delta.reshape(-1)
    )
    return sums
