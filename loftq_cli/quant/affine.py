"""Group-wise integer formats: a matrix to codes, scales and zero points as they are stored, and back to what a loader
computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from loftq_cli.errors import NumericError
from loftq_cli.tensors import AffineSpec, AffineTensor
from loftq_cli.triton_kernels.affine import dequantize_affine, quantize_affine

_SLAB_NUMEL = 1 << 20  # float64 elements compared at once: 8 MB


@dataclass(frozen=True, slots=True)
class AffineQuantizer:
    """`spec` applied to matrices that a loader decodes to `dtype`; `ranges` is how a group's range is chosen."""

    spec: AffineSpec
    dtype: str
    ranges: str = "minmax"

    def quantize(self, weight: torch.Tensor) -> AffineTensor:
        """The codes and constants of a float32 [out, in] matrix, exactly as they will be stored.

        Raises NumericError when a weight is NaN or infinite, or a scale overflows its dtype.
        """
        spec = self.spec
        groups = quantize_affine(
            weight,
            spec.bits,
            spec.group_size,
            symmetric=spec.symmetric,
            scale_dtype=spec.scale_dtype,
            zero_point=spec.zero_point,
            ranges=self.ranges,
        )
        # A group's constants are non-finite exactly when one of its weights is, or they overflow.
        constants = [groups.scales] if groups.biases is None else [groups.scales, groups.biases]
        if not all(bool(torch.isfinite(constant).all()) for constant in constants):
            if not bool(torch.isfinite(weight).all()):
                raise NumericError("holds NaN or infinite values")
            raise NumericError(f"its scales are too large for {spec.scale_dtype}", hint="--scale-dtype float32")
        return AffineTensor(groups.codes, groups.scales, groups.zero_points, groups.biases, spec, self.dtype)

    def keep_nearer(self, weight: torch.Tensor, previous: AffineTensor, new: AffineTensor) -> AffineTensor:
        """Each group of float32 [out, in] as it is in `previous` or in `new`, whichever is nearer to it."""
        keep = self._group_errors(weight, previous) < self._group_errors(weight, new)  # [out, in / group_size]
        wide = keep.repeat_interleave(self.spec.group_size, dim=1)

        def chosen(old: torch.Tensor | None, fresh: torch.Tensor | None) -> torch.Tensor | None:
            return None if old is None or fresh is None else torch.where(keep, old, fresh)

        return AffineTensor(
            codes=torch.where(wide, previous.codes, new.codes),
            scales=torch.where(keep, previous.scales, new.scales),
            zero_points=chosen(previous.zero_points, new.zero_points),
            biases=chosen(previous.biases, new.biases),
            spec=self.spec,
            dtype=self.dtype,
        )

    def _group_errors(self, weight: torch.Tensor, quantized: AffineTensor) -> torch.Tensor:
        """Squared error of each group in units of the largest weight, float32 [out, in / group_size]."""
        out_features, in_features = weight.shape
        shape = (out_features, in_features // self.spec.group_size, self.spec.group_size)
        largest = weight.abs().max().clamp(min=torch.finfo(torch.float32).tiny)  # a square of it could overflow
        return self.dequantize(quantized).sub_(weight).div_(largest).square_().view(shape).sum(dim=2)

    def dequantize(self, quantized: AffineTensor) -> torch.Tensor:
        """float32 [out, in], rounded to the dtype that the loader decodes to."""
        values = dequantize_affine(
            quantized.codes,
            quantized.scales,
            quantized.zero_points,
            quantized.spec.bits,
            quantized.spec.group_size,
            biases=quantized.biases,
        )
        return values.to(getattr(torch, quantized.dtype)).float()


@dataclass(frozen=True, slots=True)
class OffsetDifference:
    """How far the values of a moved matrix are from the exact ones, (code - zero point) * scale + delta in float64.

    max_difference      largest absolute one
    max_weight          largest absolute exact value
    squared_difference  sum of squares
    """

    max_difference: float
    max_weight: float
    squared_difference: float


def move_offsets(base: AffineTensor, delta: torch.Tensor, spec: AffineSpec, dtype: str) -> AffineTensor:
    """`base` in the format `spec`, with delta[o, k] added to every weight of group k of row o; the codes stay.

    delta: [out, in / group_size], taken in float64. With float zero points, bias' = bias + delta, or
    -zero point * scale + delta (QA-LoRA, arXiv 2309.14717, section 3.3, without its division). With integer ones,
    zero' = round(zero point - delta / scale), clamped to the codes' range: most of a small delta is lost.
    Raises NumericError for what is not finite, before or after.
    """
    scales, offsets = base.scales.double(), _offsets(base)
    if not bool(torch.isfinite(scales).all() and torch.isfinite(offsets).all()):
        raise NumericError("holds NaN or infinite values")
    offsets += delta
    if not bool(torch.isfinite(offsets).all()):
        raise NumericError("what the adapter adds to it is not finite")
    if spec.zero_point == "float":
        # A group of one code is its offset alone: a step that is never taken (that of zeros is 1) would only round it.
        codes = base.codes.view(*base.scales.shape, -1)
        is_constant = codes.amin(dim=2) == codes.amax(dim=2)
        offsets = torch.where(is_constant, offsets + codes[:, :, 0] * scales, offsets)
        scales = scales.masked_fill(is_constant, 0.0)
        return AffineTensor(base.codes, _narrow(scales, spec), None, _narrow(offsets, spec), spec, dtype)
    steps = scales.where(scales != 0, 1.0)
    zero_points = (-offsets / steps).round_().clamp_(0, 2**spec.bits - 1).to(torch.uint8)
    return AffineTensor(base.codes, _narrow(scales, spec), zero_points, None, spec, dtype)


def _narrow(constants: torch.Tensor, spec: AffineSpec) -> torch.Tensor:
    """Scales or offsets in the dtype of a format. Raises NumericError where they overflow it."""
    narrow = constants.to(getattr(torch, spec.scale_dtype))
    if not bool(torch.isfinite(narrow).all()):
        raise NumericError(
            f"its scales or offsets are too large for {spec.scale_dtype}",
            hint="--scale-dtype float32, or --layout dense",
        )
    return narrow


def offset_difference(moved: AffineTensor, base: AffineTensor, delta: torch.Tensor) -> OffsetDifference:
    """What `move_offsets` lost: the decoded values of `moved` in float32 against exact ones, a few rows at a time."""
    size, exact_offsets = base.spec.group_size, _offsets(base) + delta
    biases = None if moved.biases is None else moved.biases.float()
    largest, largest_weight, squares = 0.0, 0.0, []
    step = max(1, _SLAB_NUMEL // base.codes.shape[1])
    for start in range(0, base.codes.shape[0], step):
        rows = slice(start, start + step)
        scales = base.scales[rows].double().repeat_interleave(size, dim=1)
        exact = base.codes[rows] * scales + exact_offsets[rows].repeat_interleave(size, dim=1)
        zero_points = None if moved.zero_points is None else moved.zero_points[rows]
        decoded = dequantize_affine(
            moved.codes[rows],
            moved.scales[rows].float(),
            zero_points,
            moved.spec.bits,
            size,
            biases=None if biases is None else biases[rows],
        )
        difference = exact.sub(decoded)
        largest = max(largest, float(difference.abs().max()))
        largest_weight = max(largest_weight, float(exact.abs().max()))
        squares.append(float(difference.square().sum()))
    return OffsetDifference(largest, largest_weight, math.fsum(squares))


def _offsets(quantized: AffineTensor) -> torch.Tensor:
    """What is added to code * scale, float64 [out, in / group_size]."""
    if quantized.biases is not None:
        return quantized.biases.double()
    middle = 2 ** (quantized.spec.bits - 1)
    zero_points = middle if quantized.zero_points is None else quantized.zero_points.double()
    return -(quantized.scales.double() * zero_points)


def make_quantizer(spec: AffineSpec, dtype: str, ranges: str) -> AffineQuantizer:
    """The quantizer of `spec`; see `loftq_cli.quant.formats`."""
    return AffineQuantizer(spec, dtype, ranges)
