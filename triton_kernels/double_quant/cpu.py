"""Double quantization compiled for a processor; bytes equal double_quant/reference.py."""

from __future__ import annotations

import torch

from loftq_cli.triton_kernels.cpu_kernels import decode_constants, encode_constants
from loftq_cli.triton_kernels.double_quant import reference as double_quant_reference

TAKES_STACKS = False  # a stack goes matrix by matrix


def quantize(
    absmax: torch.Tensor, code_map: torch.Tensor, nested_block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See double_quant/reference.py."""
    offset = double_quant_reference.mean(absmax)
    codes = torch.empty(absmax.shape, dtype=torch.uint8)
    nested_absmax = torch.empty(-(-absmax.numel() // nested_block_size), dtype=torch.float32)
    nearest = double_quant_reference.nearest_entry(code_map)
    encode_constants(
        absmax.numpy(), offset.numpy(), nearest.numpy(), nested_block_size, codes.numpy(), nested_absmax.numpy()
    )
    return codes, nested_absmax, offset


def dequantize(
    codes: torch.Tensor,
    nested_absmax: torch.Tensor,
    code_map: torch.Tensor,
    offset: torch.Tensor,
    nested_block_size: int,
) -> torch.Tensor:
    """See double_quant/reference.py."""
    absmax = torch.empty(codes.shape, dtype=torch.float32)
    decode_constants(
        codes.numpy(), nested_absmax.numpy(), code_map.numpy(), offset.numpy(), nested_block_size, absmax.numpy()
    )
    return absmax
