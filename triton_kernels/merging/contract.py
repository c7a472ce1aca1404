"""A codebook matrix and an adapter become a single weight, and the share of a change that survives quantizing again:
the contract.

Affine codes need no kernel: torch adds the product to the decoded matrix, a single extra pass. Pooled adapters need
none either: their product is repeated over the columns of a group first.
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
    """Merge to `out_dtype` [out, in]: codes decoded in `dtype`, plus scaling·lora_B·lora_A, added in float32 and
    rounded once. lora_A [rank, in], lora_B [out, rank].

    Raises ValueError when codes, constants (see codebook/contract.py) or factors do not fit `shape`.

    >>> packed, absmax = torch.tensor([0xF7], dtype=torch.uint8), torch.tensor([2.0])
    >>> lora_A, lora_B = torch.ones(1, 2), torch.ones(1, 1)
    >>> merge_codebook(packed, absmax, "nf4", 2, (1, 2), torch.float32, lora_A, lora_B, 0.5, torch.bfloat16)
    tensor([[2.5000, 0.5000]], dtype=torch.bfloat16)
    """
    check_constants(packed, absmax, block_size, shape[0] * shape[1])
    factor_A, factor_B = checked_factors(lora_A, lora_B, shape)
    out = torch.empty(shape, dtype=out_dtype, device=packed.device)
    table = codebook_table(codebook, packed.device)
    implementation("merging", packed.device.type).merge(
        packed.reshape(-1), absmax.reshape(-1), table, block_size, dtype, factor_A, factor_B, scaling, out
    )
    return out


def retention_sums(base: torch.Tensor, requantized: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """float64 [3] on the device of the tensors: sum base², sum delta² and <requantized − base, delta>.

    `requantized` is base + delta after quantizing again; the third sum is the part of the second that survives. All
    tensors have equal shapes and are float32, bfloat16 or float16. Raises ValueError when shapes or dtypes do not
    match.

    >>> retention_sums(torch.tensor([3.0]), torch.tensor([4.0]), torch.tensor([2.0])).tolist()
    [9.0, 4.0, 2.0]
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
