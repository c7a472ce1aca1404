"""The definition of group-wise integer quantization in plain torch.

The work is split into pieces that stay in the cache of a processor, so scratch memory does not grow with the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PIECE_NUMEL = 1 << 17  # elements a pass, as in codebook/reference.py


def quantize(
    groups: torch.Tensor, bits: int, offset: str, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes uint8 [n, group_size], scales [n] and offsets [n] of float32 [n, group_size]. See affine/contract.py.

    `offset` is "none" (symmetric: no offsets are returned), "int" (uint8 zero points) or "float" (biases).
    """
    return quantize_as(Form(bits, offset, scale_dtype), groups)


def quantize_as(form: Form, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`quantize` for the meaning of codes that `form` defines."""
    n, group_size = groups.shape
    offset, scale_dtype = form.offset, form.scale_dtype
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
    scales = torch.empty(n, dtype=scale_dtype, device=groups.device)
    offset_dtype = scale_dtype if offset == "float" else torch.uint8
    offsets = None if offset == "none" else torch.empty(n, dtype=offset_dtype, device=groups.device)
    step = max(PIECE_NUMEL // group_size, 1)
    for start in range(0, n, step):
        part = slice(start, start + step)
        piece = groups[part]
        scale, shift = form.fit(*form.extremes(piece))
        codes[part] = form.encode(piece, scale, shift)
        scales[part] = scale.view(-1)
        if offsets is not None:
            offsets[part] = shift.view(-1)
    return codes, scales, offsets


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, biases: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """float32 [n, group_size]. See affine/contract.py."""
    n, group_size = codes.shape
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    offsets = zero_points if biases is None else biases
    if offsets is None:
        offsets = torch.tensor(2 ** (bits - 1), dtype=torch.uint8, device=codes.device).expand(n)
    step = max(PIECE_NUMEL // group_size, 1)
    for start in range(0, n, step):
        part = slice(start, start + step)
        values[part] = _decode(codes[part], scales[part, None], offsets[part, None], biases is not None)
    return values


def _decode(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, is_bias: bool) -> torch.Tensor:
    """float32 values of a piece [groups, group_size]; scale and offset are [groups, 1]."""
    if is_bias:
        return (codes * scale.float()).add_(offset.float())
    # Integers up to 256 are exact in each dtype of a scale.
    return (codes.to(scale.dtype) - offset.to(scale.dtype)).mul_(scale)


@dataclass(frozen=True, slots=True)
class Form:
    """The meaning of codes of a piece [groups, group_size]. Constants of a group are [groups, 1]."""

    bits: int
    offset: str
    scale_dtype: torch.dtype

    def extremes(self, piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Least and greatest weight of each group; NaN where the group holds NaN."""
        lowest, highest = torch.aminmax(piece, dim=1, keepdim=True)
        return lowest, highest

    def fit(self, lowest: torch.Tensor, highest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale in the scale dtype, and the offset: a bias in the scale dtype or a zero point in float32."""
        top = 2**self.bits - 1
        if self.offset != "float":
            lowest, highest = lowest.clamp(max=0.0), highest.clamp(min=0.0)
        is_symmetric = self.offset == "none"
        span, steps = (torch.maximum(-lowest, highest), top / 2) if is_symmetric else (highest - lowest, top)
        # Divide by a tensor: given a number, torch on CUDA multiplies by the reciprocal, and the quotient differs.
        scale = (span / span.new_full((), steps)).to(self.scale_dtype)
        scale.masked_fill_(scale == 0, 1.0)
        if self.offset == "float":
            return scale, lowest.to(self.scale_dtype)
        if is_symmetric:
            return scale, torch.full_like(span, 2 ** (self.bits - 1))
        return scale, (-lowest / scale.float()).round_().nan_to_num_(0.0).clamp_(0, top)

    def encode(self, piece: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Codes as float32. A quotient that is not finite, from such a scale or bias, counts as 0 steps."""
        if self.offset == "float":
            codes = ((piece - offset.float()) / scale.float()).round_().nan_to_num_(0.0, 0.0, 0.0)
        else:
            codes = (piece / scale.float()).round_().nan_to_num_(0.0).add_(offset)
        return codes.clamp_(0, 2**self.bits - 1)
