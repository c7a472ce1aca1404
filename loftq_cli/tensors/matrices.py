"""Quantized matrices and adapter pairs in memory, as plain records of tensors. torch is needed for annotations only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loftq_cli.tensors.specs import AffineSpec, CodebookSpec, Pooling

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """Double-quantized absmax: `codes` uint8 [n_blocks], `absmax` float32 [ceil(n_blocks / nested_block_size)],
    `code_map` float32 [256], `offset` float32 [].

    Decoded: `code_map[codes] * absmax[block // nested_block_size] + offset`.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    code_map: torch.Tensor
    offset: torch.Tensor


@dataclass(frozen=True, slots=True)
class CodebookTensor:
    """A matrix in a codebook format.

    packed : uint8 [ceil(numel / 2)], two 4-bit codes a byte, the first element in the high nibble
    absmax : float32 [ceil(numel / block_size)], or its double-quantized form
    shape  : [out, in] of the matrix
    dtype  : what a loader decodes to ("bfloat16", ...); values are rounded to it
    """

    packed: torch.Tensor
    absmax: torch.Tensor | NestedAbsmax
    spec: CodebookSpec
    shape: tuple[int, int]
    dtype: str


@dataclass(frozen=True, slots=True)
class AffineTensor:
    """A matrix in a group-wise integer format.

    codes        uint8 [out, in], each below 2^bits
    scales       [out, in / group_size] in `spec.scale_dtype`
    zero_points  uint8 in the shape of the scales; None if symmetric, or where there are biases
    biases       floating point in the shape of the scales, or None
    dtype        what a loader decodes to; values are rounded to it
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    biases: torch.Tensor | None
    spec: AffineSpec
    dtype: str


@dataclass(frozen=True, slots=True)
class LoraPair:
    """lora_A [rank, in / group_size] and lora_B [out, rank] in their stored dtype; to the weight of output o and input
    i they add `scaling * (lora_B @ lora_A)[o, i // group_size]`. Of a pooled adapter, `scaling` holds its factor too.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    group_size: int = 1


def lora_pair(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, pooling: Pooling | None) -> LoraPair:
    """The adapter of these factors; `scaling` is alpha / rank or alpha / sqrt(rank), and the pooling's comes to it."""
    if pooling is None:
        return LoraPair(lora_A, lora_B, scaling)
    return LoraPair(lora_A, lora_B, scaling * pooling.factor(lora_A.shape[1] * pooling.group_size), pooling.group_size)
