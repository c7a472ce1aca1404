"""Products with a codebook matrix that is decoded on the way, plus an adapter: the contract."""

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
    """x·Qᵀ + scaling·(x·lora_Aᵀ)·lora_Bᵀ, [tokens, out] in the dtype of x [tokens, in].

    Q [out, in] holds the codes decoded in `dtype` and rounded to the dtype of x. lora_A [rank, in], lora_B [out, rank].
    Sums are float32. x is float32, bfloat16 or float16; no gradient is recorded.
    Raises ValueError when x, codes, constants (see codebook/contract.py) or factors do not fit `shape`.

    >>> packed, absmax = torch.tensor([0xF7], dtype=torch.uint8), torch.tensor([2.0])
    >>> dequant_matmul(torch.tensor([[1.0, 3.0]]), packed, absmax, "nf4", 2, (1, 2), torch.float32)
    tensor([[2.]])
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
    """The gradient of `dequant_matmul` by x: gradient·Q + scaling·(gradient·lora_B)·lora_A, [tokens, in] in the dtype
    of `gradient` [tokens, out]. Raises as `dequant_matmul` does.

    >>> packed, absmax = torch.tensor([0xF7], dtype=torch.uint8), torch.tensor([2.0])
    >>> dequant_matmul_input_gradient(torch.ones(1, 1), packed, absmax, "nf4", 2, (1, 2), torch.float32)
    tensor([[2., 0.]])
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
    """The table of the codebook and the factors of the adapter, checked."""
    if tokens.dim() != 2 or tokens.shape[1] != width:
        raise ValueError(f"{tuple(tokens.shape)} is not [tokens, {width}]")
    if tokens.dtype not in FLOATS:
        raise ValueError(f"{tokens.dtype} is none of float32, bfloat16 and float16")
    check_constants(packed, absmax, block_size, shape[0] * shape[1])
    return codebook_table(codebook, tokens.device), checked_factors(lora_A, lora_B, shape)
