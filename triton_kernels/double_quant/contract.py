"""Double quantization of block constants (QLoRA, arXiv 2305.14314, section 3): the contract.

absmax ~ dynamic_map[code] * nested_absmax[block // nested_block_size] + offset, with the 8-bit dynamic map of
"8-bit Approximations for Parallelism in Deep Learning" (arXiv 1511.04561) and offset = mean(absmax).
"""

from __future__ import annotations

from functools import cache

import torch

from loftq_cli.triton_kernels.backend import implementation


@cache
def dynamic_map(device: torch.device | str = "cpu") -> torch.Tensor:
    """The signed 8-bit dynamic map, float32 [256], ascending; read-only.

    Seven decades 10^-6 .. 10^0; decade i has 2^i values, the means of neighbouring points of an even grid on
    [0.1, 1], with both signs; then 0 and 1.

    >>> dynamic_map().shape, dynamic_map()[-1].item()
    (torch.Size([256]), 1.0)
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        grid = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (grid[:-1] + grid[1:]) / 2.0
        decade = (10 ** (exponent - 6)) * means
        values += decade.tolist() + (-decade).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def double_quantize(absmax: torch.Tensor, nested_block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize constants float32 [n]: codes uint8 [n], nested absmax float32 [ceil(n / nested_block_size)], offset
    float32 []. A stack [m, n] gives the results with a first dimension m.

    The offset is infinite where the mean overflows float32 (on a CPU, where the float32 sum does): the caller decides
    how to react. On a GPU the mean is exact before rounding, so the last bits can differ from a CPU. Raises ValueError
    unless `absmax` is contiguous float32 with one or two dimensions.

    >>> codes, nested_absmax, offset = double_quantize(torch.tensor([1.0, 3.0]), 256)
    >>> codes.shape, nested_absmax.item(), offset.item()
    (torch.Size([2]), 1.0, 2.0)
    """
    if absmax.dtype != torch.float32 or absmax.dim() not in (1, 2) or not absmax.is_contiguous():
        raise ValueError("absmax must be contiguous float32 with one or two dimensions")
    backend = implementation("double_quant", absmax.device.type)
    if absmax.dim() == 2 and not backend.TAKES_STACKS:
        parts = [double_quantize(constants, nested_block_size) for constants in absmax]
        codes, nested_absmax, offset = (torch.stack(part) for part in zip(*parts, strict=True))
    else:
        codes, nested_absmax, offset = backend.quantize(absmax, dynamic_map(absmax.device), nested_block_size)
    return codes, nested_absmax, offset


def double_dequantize(
    codes: torch.Tensor,
    nested_absmax: torch.Tensor,
    code_map: torch.Tensor,
    offset: torch.Tensor,
    nested_block_size: int,
) -> torch.Tensor:
    """float32 [n], or [m, n] for a stack: the absmax that a loader computes from stored constants. `code_map` has 256
    entries.

    >>> codes = torch.tensor([255], dtype=torch.uint8)
    >>> double_dequantize(codes, torch.tensor([0.5]), dynamic_map(), torch.tensor(2.0), 256).tolist()
    [2.5]
    """
    if codes.dtype != torch.uint8 or code_map.numel() != 256:
        raise ValueError("codes must be uint8 and code_map must have 256 entries")
    n_nested = -(-codes.shape[-1] // nested_block_size)
    if nested_absmax.shape != (*codes.shape[:-1], n_nested) or offset.shape != codes.shape[:-1]:
        raise ValueError(f"nested_absmax must have {n_nested} elements, and offset one")
    backend = implementation("double_quant", codes.device.type)
    if codes.dim() == 2 and not backend.TAKES_STACKS:
        parts = zip(codes, nested_absmax, offset, strict=True)
        return torch.stack([double_dequantize(*part[:2], code_map, part[2], nested_block_size) for part in parts])
    absmax: torch.Tensor = backend.dequantize(codes, nested_absmax, code_map, offset, nested_block_size)
    return absmax
