"""Group-wise integer formats: a matrix becomes stored codes, scales and offsets, and stored numbers become the matrix
of a loader. An adapter of QA-LoRA moves into the offsets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from loftq_cli.errors import NumericError
from loftq_cli.quant.blocks import refine_rows, search_constants
from loftq_cli.quant.formats import Cost, QuantizedTensor, QuantSpec, Refinement, as_affine, as_affine_tensor
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.matrices import AffineTensor, DecodedGroups, LoraPair
from loftq_cli.tensors.metrics import group_delta, layer_error
from loftq_cli.tensors.rows import STREAMED_NUMEL, Rows, not_finite, slabs_of
from loftq_cli.tensors.specs import AffineSpec
from loftq_cli.triton_kernels.affine.contract import AffineGroups, dequantize_affine, quantize_affine
from loftq_cli.triton_kernels.error_stats.contract import error_stats
from loftq_cli.triton_kernels.refinement.contract import Blocks, Levels

_SLAB_NUMEL = 1 << 20  # float64 elements compared at once: 8 MB


@dataclass(frozen=True, slots=True)
class AffineQuantizer:
    """`spec` applied to matrices that a loader decodes to `dtype`.

    scales       how the constants of a group are chosen: a name in SCALES
    importance   float32 [in]: weights of the columns' errors in a search for constants
    """

    spec: AffineSpec
    dtype: str
    scales: str = "absmax"
    importance: torch.Tensor | None = None

    def quantize(
        self,
        weight: Rows,
        *,
        minus: Callable[[slice], torch.Tensor] | None = None,
        start: AffineTensor | None = None,
        sink: Callable[[slice, torch.Tensor], None] | None = None,
        workers: Workers = SERIAL,
    ) -> AffineTensor:
        """The stored codes and constants of a matrix. Rows from `minus` are subtracted before quantizing.

        A search begins with the constants of `start`. A `sink` receives the codes uint8 [rows, in] a few rows at a
        time, in order, and the result then holds no codes.
        Raises NumericError when a weight is NaN or infinite, when a scale or a bias overflows the stored dtype, and
        when a stored number decodes to infinity in a loader's dtype.
        """
        spec = self.spec

        def encode(part: slice) -> AffineGroups:
            target = _target(weight, minus, part)
            groups = self._encode(target, start, part)
            # The constants of a group are finite unless a weight of the group is not finite, or a constant overflows.
            constants = [groups.scales] if groups.biases is None else [groups.scales, groups.biases]
            if not all(bool(torch.isfinite(constant).all()) for constant in constants):
                if not bool(torch.isfinite(target).all()):
                    raise not_finite(weight)
                overflowing = "scales" if groups.biases is None else "scales or biases"
                raise NumericError(f"its {overflowing} are too large for {spec.scale_dtype}", hint=self._overflow_hint)
            if not self._decodes(groups):
                raise NumericError(f"decodes to numbers too large for {self._narrowest}", hint=self._overflow_hint)
            return groups

        groups_shape = (weight.shape[0], weight.shape[1] // spec.group_size)
        scale_dtype = getattr(torch, spec.scale_dtype)
        device = weight.device
        codes = torch.empty((0, weight.shape[1]) if sink else weight.shape, dtype=torch.uint8, device=device)
        scales = torch.empty(groups_shape, dtype=scale_dtype, device=device)
        has_zeros, has_biases = spec.zero_point == "int" and not spec.symmetric, spec.zero_point == "float"
        zero_points = torch.empty(groups_shape, dtype=torch.uint8, device=device) if has_zeros else None
        biases = torch.empty(groups_shape, dtype=scale_dtype, device=device) if has_biases else None
        parts = slabs_of(weight, numel=STREAMED_NUMEL)
        for part, groups in zip(parts, workers.map(encode, parts), strict=True):
            if sink:
                sink(part, groups.codes)
            else:
                codes[part] = groups.codes
            scales[part] = groups.scales
            if zero_points is not None and groups.zero_points is not None:
                zero_points[part] = groups.zero_points
            if biases is not None and groups.biases is not None:
                biases[part] = groups.biases
        return AffineTensor(codes, scales, zero_points, biases, spec, self.dtype)

    def refine(
        self,
        weight: Rows,
        quantized: AffineTensor,
        cost: Cost,
        *,
        fits_scales: bool = True,
        workers: Workers = SERIAL,
    ) -> Refinement | None:
        """A pass over codes and constants; integer zero points stay. See `Quantizer`."""
        offsets = quantized.zero_points if quantized.biases is None else quantized.biases
        blocks = Blocks(quantized.codes.clone(), quantized.scales.clone(), None if offsets is None else offsets.clone())
        costs = refine_rows(
            weight, blocks, self.spec.group_size, self._levels, cost, fits_scales=fits_scales, workers=workers
        )
        if costs is None:
            return None
        zero_points, biases = (blocks.offsets, None) if quantized.biases is None else (None, blocks.offsets)
        tensor = replace(quantized, codes=blocks.codes, scales=blocks.scales, zero_points=zero_points, biases=biases)
        return Refinement(tensor, *costs)

    def _encode(self, target: torch.Tensor, start: AffineTensor | None, part: slice) -> AffineGroups:
        """The groups of some rows, float32."""
        spec = self.spec
        if self.scales != "search":
            return quantize_affine(
                target,
                spec.bits,
                spec.group_size,
                symmetric=spec.symmetric,
                scale_dtype=spec.scale_dtype,
                zero_point=spec.zero_point,
            )
        start_constants = None
        if start is not None:
            offsets = start.zero_points if start.biases is None else start.biases
            start_constants = (start.scales[part], None if offsets is None else offsets[part])
        blocks = search_constants(target, spec.group_size, self._levels, start_constants, self.importance)
        shape = (len(target), -1)
        scales = blocks.scales.view(shape)
        offsets = None if blocks.offsets is None else blocks.offsets.view(shape)
        zero_points, biases = (None, offsets) if spec.zero_point == "float" else (offsets, None)
        return AffineGroups(blocks.codes.view(target.shape), scales, zero_points, biases)

    @property
    def _levels(self) -> Levels:
        spec = self.spec
        return Levels(None, spec.bits, spec.zero_point_kind or "none", getattr(torch, spec.scale_dtype))

    @property
    def _narrowest(self) -> str:
        """The dtype of the least range among the dtypes in which a loader computes values."""
        return min(self.spec.scale_dtype, self.dtype, key=lambda name: torch.finfo(getattr(torch, name)).max)

    @property
    def _overflow_hint(self) -> str:
        """The hint for too large numbers. A range of 3e38 on both sides of 0 is twice the range of float32."""
        if self.spec.scale_dtype == "float16":
            return "--scale-dtype float32 where the layout has it, or --exclude it"
        has_other_form = self.spec.zero_point == "int" and not self.spec.symmetric
        return "--symmetric, or --exclude it" if has_other_form else "--exclude it"

    def _decodes(self, groups: AffineGroups) -> bool:
        """True if all values are finite in every dtype of a loader's arithmetic: a product of code and scale can
        overflow although the scale does not, and so can the end of a range after rounding up.
        """
        constants = [groups.scales] if groups.biases is None else [groups.scales, groups.biases]
        largest = sum(max(map(abs, map(float, torch.aminmax(c)))) for c in constants if c.numel())
        if 2**self.spec.bits * largest < torch.finfo(getattr(torch, self._narrowest)).max:
            return True
        values = dequantize_affine(
            groups.codes,
            groups.scales,
            groups.zero_points,
            self.spec.bits,
            self.spec.group_size,
            biases=groups.biases,
        )
        return bool(torch.isfinite(values.to(getattr(torch, self.dtype))).all())

    def residual(self, weight: Rows, quantized: AffineTensor, out: torch.Tensor, *, workers: Workers = SERIAL) -> float:
        """Write weight - dequant(quantized) into `out` [out, in], float32 or bfloat16; return the sum of squares."""
        decoded = self.decoded(quantized)

        def subtract(part: slice) -> float:
            difference = weight.rows(part).float() - decoded.rows(part)
            out[part] = difference
            return error_stats(difference, difference).squared_weight

        return sum(workers.map(subtract, slabs_of(weight, numel=STREAMED_NUMEL)))

    def keep_nearer(
        self,
        weight: Rows,
        minus: Callable[[slice], torch.Tensor],
        previous: AffineTensor,
        new: AffineTensor,
        *,
        workers: Workers = SERIAL,
    ) -> bool:
        """Replace each group of `new` by the group of `previous` if the older group is closer to weight - minus.
        Returns True.
        """
        size = self.spec.group_size
        olds, news = self.decoded(previous), self.decoded(new)

        def choose(part: slice) -> None:
            target = _target(weight, minus, part)
            largest = target.abs().max().clamp(min=torch.finfo(torch.float32).tiny)  # larger squares could overflow
            squared_errors = [
                (decoded.rows(part).float() - target).div_(largest).square_().view(len(target), -1, size).sum(dim=2)
                for decoded in (olds, news)
            ]
            keep = squared_errors[0] < squared_errors[1]  # [rows, in / group_size]
            pairs = [(previous.scales, new.scales), (previous.zero_points, new.zero_points)]
            for old, fresh in [*pairs, (previous.biases, new.biases)]:
                if old is not None and fresh is not None:
                    fresh[part] = torch.where(keep, old[part], fresh[part])
            keeps_column = keep.repeat_interleave(size, dim=1)
            new.codes[part] = torch.where(keeps_column, previous.codes[part], new.codes[part])

        workers.each(choose, slabs_of(weight, numel=STREAMED_NUMEL))
        return True

    def decoded(self, quantized: AffineTensor, codes: Callable[[slice], torch.Tensor] | None = None) -> DecodedGroups:
        """The matrix that a loader computes; see `AffineTensor.decoded`."""
        return quantized.decoded(codes)

    def dequantize(self, quantized: AffineTensor) -> torch.Tensor:
        """The whole of `decoded` as float32 [out, in]."""
        return quantized.dequantize()


def _target(weight: Rows, minus: Callable[[slice], torch.Tensor] | None, part: slice) -> torch.Tensor:
    rows = weight.rows(part).float()
    return rows if minus is None else rows - minus(part)


@dataclass(frozen=True, slots=True)
class OffsetDifference:
    """The distance of a matrix with moved offsets from the exact (code - zero point) * scale + delta in float64.

    max_difference      largest absolute difference of a value
    max_weight          largest absolute exact value
    squared_difference  sum of the squared differences
    """

    max_difference: float
    max_weight: float
    squared_difference: float


@dataclass(frozen=True, slots=True)
class OffsetMerge:
    """A matrix of integers with an adapter in its offsets.

    quantized       the codes of the base with moved offsets
    difference      the distance of the decoded values from the exact sum
    squared_weight  the squared norm of the base as a loader decodes it
    squared_delta   the squared norm of s·B·A over all inputs
    """

    quantized: AffineTensor
    difference: OffsetDifference
    squared_weight: float
    squared_delta: float


def merge_into_offsets(
    base: QuantizedTensor, pair: LoraPair | None, spec: QuantSpec, dtype: str, *, workers: Workers = SERIAL
) -> OffsetMerge:
    """The integers of `base` in the format `spec`, with a pooled adapter added to the offsets; the codes stay.

    `base` and `spec` are of an integer format. A pooled group of inputs of `pair` is a union of groups of `base`.
    A loader decodes the result to `dtype` ("bfloat16", ...).
    Raises NumericError for NaN or infinite numbers; TypeError for a codebook format.
    """
    stored, target = as_affine_tensor(base), as_affine(spec)
    size = stored.spec.group_size
    delta = stored.scales.new_zeros(stored.scales.shape).double()
    if pair is not None:
        delta = group_delta(pair).repeat_interleave(pair.group_size // size, dim=1)
    merged = move_offsets(stored, delta, target, dtype)
    difference, squared_weight = offset_difference(merged, stored, delta), 0.0
    if pair is not None:
        values = stored.decoded()
        squared_weight = layer_error(values, values, None, workers).squared_weight
    return OffsetMerge(merged, difference, squared_weight, size * float(delta.double().square().sum()))


def move_offsets(base: AffineTensor, delta: torch.Tensor, spec: AffineSpec, dtype: str) -> AffineTensor:
    """`base` in the format `spec`, with delta[o, k] added to every weight of group k of row o; the codes stay.

    delta: float64 [out, in / group_size]. Float zero points become bias' = bias + delta, or -zero point * scale + delta
    (QA-LoRA, arXiv 2309.14717, section 3.3, without the division). Integer zero points become
    zero' = round(zero point - delta / scale), clamped to the codes' range: most of a small delta is lost.
    Raises NumericError for constants that are not finite, before or after.

    >>> base = AffineTensor(torch.tensor([[7, 9]], dtype=torch.uint8), torch.ones(1, 1), None, None,
    ...                     AffineSpec(4, 2, symmetric=True), "float32")
    >>> spec = AffineSpec(4, 2, symmetric=False, zero_point="float")
    >>> move_offsets(base, torch.full((1, 1), 0.25, dtype=torch.float64), spec, "float32").dequantize().tolist()
    [[-0.75, 1.25]]
    """
    scales, offsets = base.scales.double(), _offsets(base)
    if not bool(torch.isfinite(scales).all() and torch.isfinite(offsets).all()):
        raise NumericError("holds NaN or infinite values")
    offsets += delta
    if not bool(torch.isfinite(offsets).all()):
        raise NumericError("what the adapter adds to it is not finite")
    if spec.zero_point == "float":
        # All weights of a group with a single code are equal: an offset alone holds the value, and a scale would round.
        codes = base.codes.view(*base.scales.shape, -1)
        is_constant = codes.amin(dim=2) == codes.amax(dim=2)
        offsets = torch.where(is_constant, offsets + codes[:, :, 0] * scales, offsets)
        scales = scales.masked_fill(is_constant, 0.0)
        return AffineTensor(base.codes, _narrow(scales, spec), None, _narrow(offsets, spec), spec, dtype)
    steps = scales.where(scales != 0, 1.0)
    zero_points = (-offsets / steps).round_().clamp_(0, 2**spec.bits - 1).to(torch.uint8)
    return AffineTensor(base.codes, _narrow(scales, spec), zero_points, None, spec, dtype)


def _narrow(constants: torch.Tensor, spec: AffineSpec) -> torch.Tensor:
    """Scales or offsets in the dtype of a format. Raises NumericError for an overflow."""
    narrow = constants.to(getattr(torch, spec.scale_dtype))
    if not bool(torch.isfinite(narrow).all()):
        raise NumericError(
            f"its scales or offsets are too large for {spec.scale_dtype}",
            hint="--scale-dtype float32",
        )
    return narrow


def offset_difference(moved: AffineTensor, base: AffineTensor, delta: torch.Tensor) -> OffsetDifference:
    """The loss of `move_offsets(base, delta, ...)`: decoded values of `moved` in float32 against exact values in
    float64. delta: float64 [out, in / group_size]. The comparison takes a few rows at a time.
    """
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
    """The offsets in value = code * scale + offset, float64 [out, in / group_size]."""
    if quantized.biases is not None:
        return quantized.biases.double()
    middle = 2 ** (quantized.spec.bits - 1)
    zero_points = middle if quantized.zero_points is None else quantized.zero_points.double()
    return -(quantized.scales.double() * zero_points)


def make_quantizer(spec: AffineSpec, dtype: str, scales: str, importance: torch.Tensor | None) -> AffineQuantizer:
    """The quantizer of an integer format; parameters as in `loftq_cli.quant.formats.make_quantizer`.

    >>> make_quantizer(AffineSpec(4, 64, symmetric=True), "bfloat16", "search", None).scales
    'search'
    """
    return AffineQuantizer(spec, dtype, scales, importance)
