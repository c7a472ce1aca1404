"""The definition of group-wise integer quantization in plain torch.

Works in pieces that stay in the processor's cache, so its scratch does not grow with the tensor.
"""

from __future__ import annotations

import torch

PIECE_NUMEL = 1 << 17  # elements a pass, as in codebook_reference.py


def quantize(
    groups: torch.Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """uint8 [n, group_size], scales [n] and uint8 [n] or None of float32 [n, group_size]. See affine.py."""
    n, group_size = groups.shape
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
    scales = torch.empty(n, dtype=scale_dtype, device=groups.device)
    zero_points = None if symmetric else torch.empty(n, dtype=torch.uint8, device=groups.device)
    top = 2**bits - 1
    # A tensor, not a number: on CUDA torch multiplies by the reciprocal of a number, which is not the quotient.
    steps = torch.tensor(top / 2 if symmetric else top, dtype=torch.float32, device=groups.device)
    piece = max(PIECE_NUMEL // group_size, 1)
    for start in range(0, n, piece):
        part = slice(start, start + piece)
        lowest, highest = torch.aminmax(groups[part], dim=1)  # NaN where the group holds one
        lowest, highest = lowest.clamp(max=0.0), highest.clamp(min=0.0)
        span = torch.maximum(-lowest, highest) if symmetric else highest - lowest
        rounded = (span / steps).to(scale_dtype)
        scales[part] = rounded.masked_fill_(rounded == 0, 1.0)
        scale = rounded.float()[:, None]  # [groups, 1]
        quotients = (groups[part] / scale).round_().nan_to_num_(0.0)  # NaN: the scale is not finite
        if zero_points is None:
            quotients += 2 ** (bits - 1)
        else:
            zero = (-lowest[:, None] / scale).round_().nan_to_num_(0.0).clamp_(0, top)
            zero_points[part] = zero.view(-1)
            quotients += zero
        codes[part] = quotients.clamp_(0, top)
    return codes, scales, zero_points


def dequantize(codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, bits: int) -> torch.Tensor:
    """float32 [n, group_size]. See affine.py."""
    n, group_size = codes.shape
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    if zero_points is None:
        zero_points = torch.tensor(2 ** (bits - 1), dtype=torch.uint8, device=codes.device).expand(n)
    dtype = torch.promote_types(scales.dtype, zero_points.dtype)  # integers up to 256 are exact in each of them
    piece = max(PIECE_NUMEL // group_size, 1)
    for start in range(0, n, piece):
        part = slice(start, start + piece)
        centred = codes[part].to(dtype) - zero_points[part, None].to(dtype)
        values[part] = centred.mul_(scales[part, None])
    return values
