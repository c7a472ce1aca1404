"""The definition of merging in plain torch."""

from __future__ import annotations

import torch

from loftq_cli.triton_kernels.codebook import reference as codebook_reference

PIECE_NUMEL = 1 << 18  # 2 MB of float64


def merge(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    out: torch.Tensor,
) -> None:
    """The merged weight into `out` [out, in]. See merging/contract.py. Peak memory: two float32 matrices, and one in
    `dtype`.
    """
    decoded = torch.empty(out.numel(), dtype=dtype, device=out.device)
    codebook_reference.dequantize(packed, absmax, table, block_size, decoded)
    out.copy_((lora_B.float() @ lora_A.float()).mul_(scaling).add_(decoded.view(out.shape).float()))


def retention(base: torch.Tensor, requantized: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """float64 [3] for flat tensors. See merging/contract.py."""
    totals = torch.zeros(3, dtype=torch.float64, device=base.device)
    for start in range(0, base.numel(), PIECE_NUMEL):
        part = slice(start, start + PIECE_NUMEL)
        b, d = base[part].double(), delta[part].double()
        totals += torch.stack((b.dot(b), d.dot(d), (requantized[part].double() - b).dot(d)))
    return totals
