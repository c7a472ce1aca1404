"""The definition of double quantization in plain torch; bytes equal bitsandbytes on a CPU."""

from __future__ import annotations

from functools import lru_cache

import torch

TAKES_STACKS = False  # a stack goes matrix by matrix
GRID = 65535  # steps on [-1, 1] to which bitsandbytes rounds on a CPU before the look-up of the nearest map entry


def quantize(
    absmax: torch.Tensor, code_map: torch.Tensor, nested_block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 [n], float32 [ceil(n / nested_block_size)], float32 []. See double_quant/contract.py."""
    return quantize_around(mean(absmax), absmax, code_map, nested_block_size)


def quantize_around(
    offset: torch.Tensor, absmax: torch.Tensor, code_map: torch.Tensor, nested_block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize` around a given offset."""
    numel = absmax.numel()
    centred = absmax - offset
    n_nested = -(-numel // nested_block_size)
    padded = torch.zeros(n_nested * nested_block_size, dtype=torch.float32, device=absmax.device)
    padded[:numel] = centred
    padded = padded.view(n_nested, nested_block_size)
    nested_absmax = padded.abs().amax(dim=1)
    # Equal constants leave nothing to store: the scale is 0, and any code decodes to the offset.
    reciprocal = torch.where(nested_absmax > 0, 1.0 / nested_absmax, torch.zeros_like(nested_absmax))
    # A mean beyond float32 leaves nothing to scale. The infinite offset tells; codes still have to be valid indices.
    scaled = (padded * reciprocal[:, None]).clamp_(-1.0, 1.0).nan_to_num_(0.0)
    cell = ((scaled + 1.0) * 0.5 * GRID + 0.5).to(torch.int64)
    codes = nearest_entry(code_map)[cell]
    codes = torch.where(nested_absmax[:, None] > 0, codes, torch.zeros_like(codes))
    return codes.view(-1)[:numel].contiguous(), nested_absmax, offset


def dequantize(
    codes: torch.Tensor,
    nested_absmax: torch.Tensor,
    code_map: torch.Tensor,
    offset: torch.Tensor,
    nested_block_size: int,
) -> torch.Tensor:
    """float32 [n]. See double_quant/contract.py."""
    scales = nested_absmax.repeat_interleave(nested_block_size)[: codes.numel()]
    return code_map[codes.int()] * scales + offset


@lru_cache(maxsize=4)  # keyed by identity: the contract passes a cached map
def nearest_entry(code_map: torch.Tensor) -> torch.Tensor:
    """uint8 [GRID + 1]: the index of the map entry nearest to each grid point."""
    # Computed on the CPU for all devices: torch on CUDA multiplies by the reciprocal, and the quotient differs.
    points = torch.arange(GRID + 1, dtype=torch.float32) / GRID * 2.0 - 1.0
    midpoints = (code_map[:-1] + code_map[1:]).cpu() / 2
    return torch.bucketize(points, midpoints).to(torch.uint8).to(code_map.device)


def mean(absmax: torch.Tensor) -> torch.Tensor:
    """The float32 mean in the order of a single thread. torch's order of summation depends on the number of threads, so
    bytes would differ between machines.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not absmax.is_cpu:  # setting the number changes it for threads that start later, too
        return absmax.mean()
    torch.set_num_threads(1)
    try:
        return absmax.mean()
    finally:
        torch.set_num_threads(threads)
