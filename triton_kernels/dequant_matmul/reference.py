"""The definition of products with a codebook matrix in plain torch: in float32, rounded at the end."""

from __future__ import annotations

import torch

from loftq_cli.triton_kernels.codebook import reference as codebook_reference


def product(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """x·Qᵀ + scaling·(x·lora_Aᵀ)·lora_Bᵀ [tokens, out]. See dequant_matmul/contract.py."""
    widened = x.float()
    output = widened @ _decoded(packed, absmax, table, block_size, shape, dtype, x.dtype).float().T
    if lora_A is not None and lora_B is not None:
        output += (widened @ lora_A.float().T) @ lora_B.float().T * scaling
    return output.to(x.dtype)


def input_gradient(
    gradient: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """gradient·Q + scaling·(gradient·lora_B)·lora_A [tokens, in]. See dequant_matmul/contract.py."""
    widened = gradient.float()
    for_input = widened @ _decoded(packed, absmax, table, block_size, shape, dtype, gradient.dtype).float()
    if lora_A is not None and lora_B is not None:
        for_input += (widened @ lora_B.float()) @ lora_A.float() * scaling
    return for_input.to(gradient.dtype)


def _decoded(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    read_as: torch.dtype,
) -> torch.Tensor:
    """Q [out, in] in `read_as`."""
    values = torch.empty(shape[0] * shape[1], dtype=dtype, device=packed.device)
    codebook_reference.dequantize(packed, absmax, table, block_size, values)
    return values.view(shape).to(read_as)
