"""The definition of the passes of an alternation in plain torch, matrix after matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loftq_cli.triton_kernels.codebook import reference as codebook_reference

if TYPE_CHECKING:
    from loftq_cli.triton_kernels.residual.contract import CodedStack


def quantize_difference(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    packed: torch.Tensor,
    absmax: torch.Tensor,
) -> None:
    """Codes and constants of weight - left @ right; the factors are bfloat16. See residual/contract.py."""
    for i in range(len(weight)):
        update = left[i].float() @ right[i].float()
        codebook_reference.quantize(weight[i].view(-1), update.view(-1), table, block_size, packed[i], absmax[i])


def residual_product(
    weight: torch.Tensor, coded: CodedStack, table: torch.Tensor, vectors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [n, out, rank] and float64 [n]; the vectors are bfloat16. See residual/contract.py."""
    residuals = [_residual(weight, coded, table, i) for i in range(len(weight))]
    products = [lost.bfloat16().float() @ vectors[i].float() for i, lost in enumerate(residuals)]
    return torch.stack(products), torch.stack([lost.double().square().sum() for lost in residuals])


def transposed_residual_product(
    weight: torch.Tensor, coded: CodedStack, table: torch.Tensor, vectors: torch.Tensor
) -> torch.Tensor:
    """float32 [n, rank, in]; the vectors are bfloat16. See residual/contract.py."""
    residuals = (_residual(weight, coded, table, i) for i in range(len(weight)))
    return torch.stack([vectors[i].float().T @ lost.bfloat16().float() for i, lost in enumerate(residuals)])


def _residual(weight: torch.Tensor, coded: CodedStack, table: torch.Tensor, i: int) -> torch.Tensor:
    decoded = torch.empty(weight[i].numel(), dtype=coded.dtype, device=weight.device)
    codebook_reference.dequantize(coded.packed[i], coded.absmax[i], table, coded.block_size, decoded)
    return weight[i].float() - decoded.view(weight[i].shape).float()
