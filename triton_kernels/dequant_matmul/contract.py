"""Products with a codebook matrix that is decoded on the way, and with an adapter beside it: the contract."""

from __future__ import annotations

import torch

from loftq_cli.triton_kernels.backend import implementation
from loftq_cli.triton_kernels.codebook.contract import FLOATS, check_constants, codebook_table
from loftq_cli.triton_kernels.factors import checked_factors


def dequant_matmul(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: str,
    block_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    lora_A: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """[tokens, out] of x [tokens, in], in its dtype: x·Qᵀ + scaling·(x·lora_Aᵀ)·lora_Bᵀ, where Q [out, in] is what the
    codes of a matrix of this shape decode to in `dtype`, rounded to that of x. lora_A [rank, in], lora_B [out, rank].

    Products are added up in float32. x is float32, bfloat16 or float16; nothing is differentiated.
    Raises ValueError where x, codes, constants (see codebook.py) or factors do not belong to `shape`.
    """
    table, factors = _checked(x, shape[1], packed, absmax, codebook, block_size, shape, lora_A, lora_B)
    output: torch.Tensor = implementation("dequant_matmul", x.device.type).product(
        x.contiguous(), packed.reshape(-1), absmax.reshape(-1), table, block_size, shape, dtype, *factors, scaling
    )
    return output


def dequant_matmul_input_gradient(
    gradient: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: str,
    block_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    lora_A: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """[tokens, in] of the gradient [tokens, out] of what `dequant_matmul` returns, in its dtype:
    gradient·Q + scaling·(gradient·lora_B)·lora_A. Otherwise as there.
    """
    table, factors = _checked(gradient, shape[0], packed, absmax, codebook, block_size, shape, lora_A, lora_B)
    for_input: torch.Tensor = implementation("dequant_matmul", gradient.device.type).input_gradient(
        gradient.contiguous(),
        packed.reshape(-1),
        absmax.reshape(-1),
        table,
        block_size,
        shape,
        dtype,
        *factors,
        scaling,
    )
    return for_input


def _checked(
    tokens: torch.Tensor,
    width: int,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: str,
    block_size: int,
    shape: tuple[int, int],
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """The table and the factors."""
    if tokens.dim() != 2 or tokens.shape[1] != width:
        raise ValueError(f"{tuple(tokens.shape)} is not [tokens, {width}]")
    if tokens.dtype not in FLOATS:
        raise ValueError(f"{tokens.dtype} is none of float32, bfloat16 and float16")
    check_constants(packed, absmax, block_size, shape[0] * shape[1])
    return codebook_table(codebook, tokens.device), checked_factors(lora_A, lora_B, shape)
