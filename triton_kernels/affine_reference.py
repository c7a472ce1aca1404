"""The definition of group-wise integer quantization in plain torch.

Works in pieces that stay in the processor's cache, so its scratch does not grow with the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

PIECE_NUMEL = 1 << 17  # elements a pass, as in codebook_reference.py

# The factors of a range that "mse" tries: the same for both ends, then for one end at a time, by smaller and smaller
# shifts. Powers of two, so that a factor is exact. Relative errors of MiniLM's linears, measured (group_size 64, 2, 3
# and 4 bits, bfloat16 scales and biases): min-max 0.470, 0.201, 0.094; the best of the factors 1, 0.95 .. 0.3 common to
# both ends 0.346, 0.180, 0.090; these 0.333, 0.173, 0.087. A quarter is for far outliers at both ends of a long group;
# where only one end is far the search falls short of trying all pairs of factors, which costs their square.
COMMON_SHIFTS = (-0.25, -0.5, -0.75)
END_SHIFTS = (0.125, 0.0625, 0.03125)


def quantize(
    groups: torch.Tensor, bits: int, offset: str, scale_dtype: torch.dtype, ranges: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes uint8 [n, group_size], scales [n] and offsets [n] of float32 [n, group_size]. See affine.py.

    `offset` is "none" (symmetric: no offsets are returned), "int" (uint8 zero points) or "float" (biases).
    """
    return quantize_as(Form(bits, offset, scale_dtype), groups, ranges)


def quantize_as(
    form: Form, groups: torch.Tensor, ranges: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The same for codes that mean what `form` says."""
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
        ends = form.min_max(piece)
        if ranges == "mse":
            ends = _least_error_ends(piece, ends, form)
        scale, shift = form.fit(ends)
        codes[part] = form.encode(piece, scale, shift)
        scales[part] = scale.view(-1)
        if offsets is not None:
            offsets[part] = shift.view(-1)
    return codes, scales, offsets


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, biases: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """float32 [n, group_size]. See affine.py."""
    n, group_size = codes.shape
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    offsets = zero_points if biases is None else biases
    if offsets is None:
        offsets = torch.tensor(2 ** (bits - 1), dtype=torch.uint8, device=codes.device).expand(n)
    step = max(PIECE_NUMEL // group_size, 1)
    for start in range(0, n, step):
        part = slice(start, start + step)
        values[part] = decode(codes[part], scales[part, None], offsets[part, None], biases is not None)
    return values


def decode(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, is_bias: bool) -> torch.Tensor:
    """float32 values of a piece [groups, group_size]; scale and offset are [groups, 1]."""
    if is_bias:
        return (codes * scale.float()).add_(offset.float())
    # Integers up to 256 are exact in each dtype of a scale.
    return (codes.to(scale.dtype) - offset.to(scale.dtype)).mul_(scale)


@dataclass(frozen=True, slots=True)
class Form:
    """What the codes of a piece [groups, group_size] mean. Scales and offsets are [groups, 1]. The ends of the ranges
    are [2, groups, 1], lowest and highest; without offsets [1, groups, 1], the largest magnitude.
    """

    bits: int
    offset: str
    scale_dtype: torch.dtype

    def min_max(self, piece: torch.Tensor) -> torch.Tensor:
        lowest, highest = self.extremes(piece)
        if self.offset == "float":
            return torch.stack((lowest, highest))
        lowest, highest = lowest.clamp(max=0.0), highest.clamp(min=0.0)
        return torch.maximum(-lowest, highest)[None] if self.offset == "none" else torch.stack((lowest, highest))

    def extremes(self, piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the greatest of each group; NaN where it holds one."""
        lowest, highest = torch.aminmax(piece, dim=1, keepdim=True)
        return lowest, highest

    def fit(self, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale in its dtype, and the offset: a bias in the same dtype or a zero point in float32."""
        top = 2**self.bits - 1
        span, steps = (ends[0], top / 2) if self.offset == "none" else (ends[1] - ends[0], top)
        # By a tensor, not a number: on CUDA torch multiplies by the reciprocal of a number, which is not the quotient.
        scale = (span / span.new_full((), steps)).to(self.scale_dtype)
        scale.masked_fill_(scale == 0, 1.0)
        if self.offset == "float":
            return scale, ends[0].to(self.scale_dtype)
        if self.offset == "none":
            return scale, torch.full_like(span, 2 ** (self.bits - 1))
        return scale, (-ends[0] / scale.float()).round_().nan_to_num_(0.0).clamp_(0, top)

    def encode(self, piece: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Codes as float32. What is not finite, because the scale or bias is not, counts as 0 steps."""
        if self.offset == "float":
            codes = ((piece - offset.float()) / scale.float()).round_().nan_to_num_(0.0, 0.0, 0.0)
        else:
            codes = (piece / scale.float()).round_().nan_to_num_(0.0).add_(offset)
        return codes.clamp_(0, 2**self.bits - 1)

    def squared_error(self, piece: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """float64 [groups, 1]: then the order of a sum, which depends on the machine, does not change a choice."""
        scale, offset = self.fit(ends)
        decoded = decode(self.encode(piece, scale, offset), scale, offset, self.offset == "float")
        return (piece - decoded).square_().sum(1, keepdim=True, dtype=torch.float64)


def _least_error_ends(piece: torch.Tensor, widest: torch.Tensor, form: Form) -> torch.Tensor:
    """The ends with the least squared error among those that affine.py documents; the earliest of equals."""
    # Around 0 there is one rounding: 0 + factor * (end - 0).
    centre = (widest[0] + widest[1]) / 2 if form.offset == "float" else torch.zeros_like(widest[0])
    reach = widest - centre
    best, best_error = widest, form.squared_error(piece, widest)
    factors = torch.ones_like(widest)
    for shifts in search_rounds(len(widest)):
        before = factors
        for shift in shifts:
            tried = before + shift.to(widest.device)
            ends = centre + tried * reach
            error = form.squared_error(piece, ends)
            is_less = error < best_error  # never where the unshrunk range has no finite scale: its error is NaN
            best_error = torch.where(is_less, error, best_error)
            best = torch.where(is_less, ends, best)
            factors = torch.where(is_less, tried, factors)
    return best


def search_rounds(n_ends: int) -> Iterator[list[torch.Tensor]]:
    """The shifts [n_ends, 1, 1] of each round of the search."""
    yield [torch.full((n_ends, 1, 1), shift) for shift in COMMON_SHIFTS]
    for shift in END_SHIFTS:
        for end in torch.eye(n_ends).view(n_ends, n_ends, 1, 1):
            yield [-shift * end, shift * end]
