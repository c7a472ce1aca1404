"""The passes of an alternation of LoftQ (arXiv 2310.08659, Algorithm 1) over a stack of equal matrices: the contract.

A pass quantizes a matrix minus a product of low rank, or multiplies the quantization error by a few vectors from either
side. Neither the product nor the error ever lies in memory. Factors and errors are multiplied as bfloat16 and summed in
float32; measured against float32, the error at the end of an alternation changes by less than 0.05 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq_cli.triton_kernels.backend import implementation
from loftq_cli.triton_kernels.codebook.contract import FLOATS, codebook_table


@dataclass(frozen=True, slots=True)
class CodedStack:
    """n quantized matrices [out, in] of a common codebook format.

    packed       uint8 [n, ceil(out * in / 2)]
    absmax       float32 [n, ceil(out * in / block_size)], as a loader decodes the constants
    dtype        the dtype to which a loader decodes and rounds values
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    codebook: str
    block_size: int
    dtype: torch.dtype


def quantize_difference(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, codebook: str, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize weight - left @ right: packed codes uint8 [n, bytes] and absmax float32 [n, blocks], as
    `quantize_codebook` returns for a single matrix.

    weight: float32, bfloat16 or float16 [n, out, in]; left float32 [n, out, rank]; right float32 [n, rank, in].
    Raises ValueError when shapes do not fit.

    >>> weight, left, right = torch.tensor([[[3.0, 1.0]]]), torch.ones(1, 1, 1), torch.ones(1, 1, 2)
    >>> packed, absmax = quantize_difference(weight, left, right, "nf4", block_size=2)
    >>> packed.tolist(), absmax.tolist()
    ([[247]], [[2.0]])
    """
    n, out_features, in_features = _shape(weight)
    rank = left.shape[2] if left.dim() == 3 else -1
    _check("left", left, (n, out_features, rank))
    _check("right", right, (n, rank, in_features))
    numel = out_features * in_features
    packed = torch.empty((n, (numel + 1) // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty((n, -(-numel // block_size)), dtype=torch.float32, device=weight.device)
    table = codebook_table(codebook, weight.device)
    implementation("residual", weight.device.type).quantize_difference(
        weight, left.bfloat16().contiguous(), right.bfloat16().contiguous(), table, block_size, packed, absmax
    )
    return packed, absmax


def residual_product(
    weight: torch.Tensor, coded: CodedStack, vectors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight - decoded) @ vectors, float32 [n, out, rank], and the sum of squares of weight - decoded, float64 [n].

    vectors: float32 [n, in, rank]. Raises ValueError when shapes do not fit.

    >>> coded = CodedStack(torch.tensor([[0xF7]], dtype=torch.uint8), torch.tensor([[2.0]]), "nf4", 2, torch.float32)
    >>> product, squares = residual_product(torch.tensor([[[3.0, 1.0]]]), coded, torch.ones(1, 2, 1))
    >>> product.tolist(), squares.tolist()
    ([[[2.0]]], [2.0])
    """
    n, _, in_features = _check_coded(weight, coded)
    rank = vectors.shape[2] if vectors.dim() == 3 else -1
    _check("vectors", vectors, (n, in_features, rank))
    table = codebook_table(coded.codebook, weight.device)
    product: torch.Tensor
    squares: torch.Tensor
    product, squares = implementation("residual", weight.device.type).residual_product(
        weight, coded, table, vectors.bfloat16().contiguous()
    )
    return product, squares


def transposed_residual_product(weight: torch.Tensor, coded: CodedStack, vectors: torch.Tensor) -> torch.Tensor:
    """vectors^T @ (weight - decoded), float32 [n, rank, in].

    vectors: float32 [n, out, rank]. Raises ValueError when shapes do not fit.

    >>> coded = CodedStack(torch.tensor([[0xF7]], dtype=torch.uint8), torch.tensor([[2.0]]), "nf4", 2, torch.float32)
    >>> transposed_residual_product(torch.tensor([[[3.0, 1.0]]]), coded, torch.ones(1, 1, 1)).tolist()
    [[[1.0, 1.0]]]
    """
    n, out_features, _ = _check_coded(weight, coded)
    rank = vectors.shape[2] if vectors.dim() == 3 else -1
    _check("vectors", vectors, (n, out_features, rank))
    table = codebook_table(coded.codebook, weight.device)
    product: torch.Tensor = implementation("residual", weight.device.type).transposed_residual_product(
        weight, coded, table, vectors.bfloat16().contiguous()
    )
    return product


def _shape(weight: torch.Tensor) -> tuple[int, int, int]:
    if weight.dim() != 3 or weight.dtype not in FLOATS or not weight.is_contiguous():
        raise ValueError("weight must be contiguous float32, bfloat16 or float16 with three dimensions")
    n, out_features, in_features = weight.shape
    return n, out_features, in_features


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float32 or tensor.shape != shape or 0 in shape or -1 in shape:
        raise ValueError(f"{name} must be float32 with shape {shape}, not {tensor.dtype} {tuple(tensor.shape)}")


def _check_coded(weight: torch.Tensor, coded: CodedStack) -> tuple[int, int, int]:
    n, out_features, in_features = _shape(weight)
    numel = out_features * in_features
    if coded.packed.shape != (n, (numel + 1) // 2) or coded.packed.dtype != torch.uint8:
        raise ValueError(f"packed must be uint8 with shape {(n, (numel + 1) // 2)}")
    _check("absmax", coded.absmax, (n, -(-numel // coded.block_size)))
    return n, out_features, in_features
