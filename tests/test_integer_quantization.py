"""Integer codes, scales and zero points are those of compressed-tensors, and of float64 where ours differ on purpose:

- A zero point is chosen with the scale as stored; theirs with the scale before it is rounded to its dtype.
- A code is round(w / scale) + zero point; theirs is round(w / scale + zero point): other codes at (near) midpoints
  when the zero point is odd, and the sum loses bits before the rounding. Without zero points the two are one.
- A scale of 0 becomes 1; theirs the epsilon of its dtype. Both decode to 0.
- A scale that overflows its dtype is Inf, so that the caller can refuse; theirs the largest number.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from loftq_cli.triton_kernels.affine import SCALE_DTYPES, dequantize_affine, quantize_affine
from loftq_cli.triton_kernels.affine_reference import PIECE_NUMEL
from loftq_cli.triton_kernels.packing import pack_rows

quantization = pytest.importorskip("compressed_tensors.quantization")
forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
calculate_qparams = pytest.importorskip("compressed_tensors.quantization.utils").calculate_qparams
pack_quantized = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")

COLUMNS = 384
ALL_BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, COLUMNS)
KINDS = (
    "normal",
    "positive",
    "zero groups",
    "negative zero",
    "one outlier",
    "constant",
    "huge",
    "subnormal",
    "midpoints",
)

bits_group_kind = [
    pytest.mark.parametrize("kind", KINDS),
    pytest.mark.parametrize("group_size", GROUP_SIZES),
    pytest.mark.parametrize("bits", ALL_BITS),
]


def every_case(test):
    for mark in bits_group_kind:
        test = mark(test)
    return test


def designed(kind: str) -> torch.Tensor:
    weight = torch.randn(24, COLUMNS, generator=torch.Generator().manual_seed(11)) * 0.05
    if kind == "positive":
        weight = weight.abs() + 0.5
    elif kind == "zero groups":
        weight[:, :128] = 0.0
        weight[-1] = 0.0
    elif kind == "negative zero":
        weight[:8] = -0.0
        weight[8:, ::3] = -0.0
    elif kind == "one outlier":
        weight[3, 5] = 40.0
    elif kind == "constant":
        weight.fill_(-0.25)
        weight[::2] = 0.25
    elif kind == "huge":
        weight *= 3e38  # the span of a group stays below the largest float32
    elif kind == "subnormal":
        weight *= 1e-42
    elif kind == "midpoints":  # quarters from -8 to 8: scales that are powers of two or thirds of them, and many ties
        weight = torch.arange(24 * COLUMNS, dtype=torch.float32).mul(7).remainder(65).sub(32).div(4).view(24, -1)
    return weight.contiguous()


def their_arguments(bits, group_size, symmetric, scale_dtype="float32"):
    return quantization.QuantizationArgs(
        num_bits=bits,
        type="int",
        strategy="group",
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=SCALE_DTYPES[scale_dtype],
    )


def their_scales(weight, bits, group_size, symmetric, scale_dtype):
    groups = weight.unflatten(1, (-1, group_size))
    arguments = their_arguments(bits, group_size, symmetric, scale_dtype)
    scales, zero_points = calculate_qparams(groups.amin(2), groups.amax(2), arguments)
    return scales.to(SCALE_DTYPES[scale_dtype]), zero_points.int() + 2 ** (bits - 1)


def in_float64(weight, bits, group_size, symmetric, scale_dtype):
    """Codes, scales and zero points by the definition in numpy. A float64 quotient of two float32 rounds to the
    float32 quotient (53 >= 2 * 24 + 2 bits), so only the roundings that the definition names happen.
    """
    top = 2**bits - 1
    groups = weight.numpy().astype(np.float64).reshape(weight.shape[0], -1, group_size)
    lowest, highest = np.minimum(groups.min(2), 0.0), np.maximum(groups.max(2), 0.0)
    span = np.maximum(-lowest, highest) * 2 if symmetric else (highest - lowest).astype(np.float32).astype(np.float64)
    scales = torch.from_numpy((span / top).astype(np.float32)).to(SCALE_DTYPES[scale_dtype])
    scales[scales == 0] = 1.0
    scale = scales.double().numpy()
    with np.errstate(invalid="ignore"):
        zero = np.clip(np.rint((-lowest / scale).astype(np.float32)), 0, top)
        zero = np.full_like(scale, 2 ** (bits - 1)) if symmetric else zero
        steps = np.rint((groups / scale[..., None]).astype(np.float32))
    codes = np.clip(steps + zero[..., None], 0, top).reshape(weight.shape)
    return torch.from_numpy(codes), scales, torch.from_numpy(zero)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@every_case
def test_codes_scales_and_zero_points_follow_the_definition(bits, group_size, kind, symmetric, scale_dtype):
    weight = designed(kind)
    codes, scales, zero_points = quantize_affine(weight, bits, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    expected_codes, expected_scales, expected_zero_points = in_float64(weight, bits, group_size, symmetric, scale_dtype)
    assert codes.dtype == torch.uint8 and scales.dtype == SCALE_DTYPES[scale_dtype]
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes.double(), expected_codes.double())
    if symmetric:
        assert zero_points is None
    else:
        assert zero_points.dtype == torch.uint8
        assert torch.equal(zero_points.double(), expected_zero_points.double())


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@every_case
def test_symmetric_codes_and_scales_are_those_of_compressed_tensors(bits, group_size, kind, scale_dtype):
    weight = designed(kind)
    codes, scales, _ = quantize_affine(weight, bits, group_size, symmetric=True, scale_dtype=scale_dtype)
    expected, _ = their_scales(weight, bits, group_size, True, scale_dtype)
    arguments = their_arguments(bits, group_size, True, scale_dtype)
    quantized = forward.quantize(weight, expected, None, arguments, dtype=torch.int8)
    comparable = torch.isfinite(scales) & (expected != torch.finfo(expected.dtype).eps)
    assert torch.equal(scales[comparable], expected[comparable])
    signed = (codes.int() - 2 ** (bits - 1)).unflatten(1, (-1, group_size))
    assert torch.equal(signed[comparable], quantized.int().unflatten(1, (-1, group_size))[comparable])
    assert comparable.any() or kind in ("subnormal", "huge")


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@every_case
def test_asymmetric_scales_are_those_of_compressed_tensors(bits, group_size, kind, scale_dtype):
    weight = designed(kind)
    _, scales, _ = quantize_affine(weight, bits, group_size, symmetric=False, scale_dtype=scale_dtype)
    expected, _ = their_scales(weight, bits, group_size, False, scale_dtype)
    comparable = torch.isfinite(scales) & (expected != torch.finfo(expected.dtype).eps)
    assert torch.equal(scales[comparable], expected[comparable])
    assert comparable.any() or kind in ("subnormal", "huge")


@pytest.mark.parametrize("kind", ["normal", "positive", "one outlier", "constant", "huge"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_asymmetric_zero_points_and_codes_are_those_of_compressed_tensors_off_midpoints(bits, group_size, kind):
    weight = designed(kind)
    codes, scales, zero_points = quantize_affine(weight, bits, group_size, symmetric=False, scale_dtype="float32")
    _, expected = their_scales(weight, bits, group_size, False, "float32")
    groups = weight.double().unflatten(1, (-1, group_size))
    plain = off_midpoints(groups.amin(2) / scales)
    assert torch.equal(zero_points.int()[plain], expected[plain]) and plain.any()
    half = 2 ** (bits - 1)
    arguments = their_arguments(bits, group_size, False)
    quantized = forward.quantize(weight, scales, (zero_points.int() - half).to(torch.int8), arguments, dtype=torch.int8)
    plain = off_midpoints(groups / scales[..., None]).flatten(1)
    assert torch.equal(codes.int()[plain], (quantized.int() + half)[plain])
    assert plain.float().mean() > 0.9


def off_midpoints(quotients: torch.Tensor) -> torch.Tensor:
    """True where a quotient is farther from a midpoint of two integers than float32 errs at 2^8."""
    return (quotients - quotients.floor() - 0.5).abs() > 2.0**-15


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@every_case
def test_decoded_values_are_those_of_compressed_tensors(bits, group_size, kind, symmetric, scale_dtype):
    weight = designed(kind)
    codes, scales, zero_points = quantize_affine(weight, bits, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    half = 2 ** (bits - 1)
    signed = (codes.int() - half).to(torch.int8)
    signed_zero_points = None if zero_points is None else (zero_points.int() - half).to(torch.int8)
    expected = forward.dequantize(
        signed, scales, signed_zero_points, their_arguments(bits, group_size, symmetric, scale_dtype)
    )
    decoded = dequantize_affine(codes, scales, zero_points, bits, group_size)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded.nan_to_num(7.0), expected.float().nan_to_num(7.0))


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_compressor_of_compressed_tensors_unpacks_to_our_values(bits, symmetric, scale_dtype):
    weight = designed("normal")
    codes, scales, zero_points = quantize_affine(weight, bits, 64, symmetric=symmetric, scale_dtype=scale_dtype)
    stored = {
        "weight_packed": pack_rows(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if zero_points is not None:
        stored["weight_zero_point"] = pack_rows(zero_points.T, bits).T.contiguous()
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=their_arguments(bits, 64, symmetric, scale_dtype), format="pack-quantized"
    )
    loaded = pack_quantized.PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert loaded.dtype == scales.dtype
    assert torch.equal(loaded.float(), dequantize_affine(codes, scales, zero_points, bits, 64))


@pytest.mark.parametrize("symmetric", [True, False])
@every_case
def test_no_weight_is_farther_than_half_a_step_from_its_value(bits, group_size, kind, symmetric):
    weight = designed(kind)
    codes, scales, zero_points = quantize_affine(weight, bits, group_size, symmetric=symmetric, scale_dtype="float32")
    decoded = dequantize_affine(codes, scales, zero_points, bits, group_size)
    half_a_step = (scales.double() / 2).repeat_interleave(group_size, dim=1)
    # 2^-15: the quotient errs by 2^-24 of at most 2^8. 2^-149: one subnormal, by which a subnormal scale itself errs
    # (half of it), times the codes that it is multiplied with.
    allowed = half_a_step * (1 + 2.0**-15) + 2.0**-150 * 2**bits
    assert bool(((weight.double() - decoded.double()).abs() <= allowed).all())


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_weights_inside_the_range_of_a_rounded_scale_stay_within_half_a_step(bits, symmetric, scale_dtype):
    weight = designed("normal")
    codes, scales, zero_points = quantize_affine(weight, bits, 64, symmetric=symmetric, scale_dtype=scale_dtype)
    scale = scales.double().repeat_interleave(64, dim=1)
    zero = 2 ** (bits - 1) if zero_points is None else zero_points.double().repeat_interleave(64, dim=1)
    exact = (codes.double() - zero) * scale  # what rounds to the scale's dtype in `dequantize_affine`
    inside = ((0.0 - zero) * scale <= weight) & (weight <= (2**bits - 1.0 - zero) * scale)
    assert inside.float().mean() > 0.9
    assert bool(((weight - exact).abs() <= scale / 2 * (1 + 2.0**-15))[inside].all())


def test_exact_midpoints_round_to_even_before_the_zero_point_is_added():
    # The span -7 .. 8 gives scale 1 and the odd zero point 7: 0.5 -> 0 -> 7, where round(0.5 + 7) would be 8.
    weight = torch.tensor([[-7.0, 8.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5]])
    codes, scales, zero_points = quantize_affine(weight, 4, 8, symmetric=False, scale_dtype="float32")
    assert scales.tolist() == [[1.0]] and zero_points.tolist() == [[7]]
    assert codes.tolist() == [[0, 15, 7, 7, 9, 5, 9, 5]]


def test_symmetric_ends_by_hand():
    # absmax 7.5 gives scale 1: -7.5 rounds to -8, the lowest code; 7.5 rounds to 8, which clamps to 7, the highest.
    weight = torch.tensor([[-7.5, 7.5, 0.5, -0.5, 1.5, 2.5, 0.0, -0.0]])
    codes, scales, _ = quantize_affine(weight, 4, 8, symmetric=True, scale_dtype="float32")
    assert scales.tolist() == [[1.0]]
    assert codes.tolist() == [[0, 15, 8, 8, 10, 10, 8, 8]]


def test_a_zero_point_is_chosen_with_the_rounded_scale():
    # Scale 32.81 / 255 = 0.12867 becomes 0.12890625 in bfloat16: 27.65 / scale is 214.497 then, 214.895 before.
    weight = torch.tensor([[-27.65, 5.16]])
    _, scales, zero_points = quantize_affine(weight, 8, 2, symmetric=False, scale_dtype="bfloat16")
    assert scales.item() == 0.12890625
    assert zero_points.item() == round(27.65 / 0.12890625) != round(27.65 / (32.81 / 255))


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
# 1e-45 is 2^-149, the smallest float32; with 2 bits, a symmetric scale of 2^-149 / 1.5 rounds to it again.
@pytest.mark.parametrize(("bits", "value"), [*product(ALL_BITS, (0.0, -0.0)), *product((3, 4, 8), (1e-45,))])
def test_a_group_whose_scale_rounds_to_zero_has_scale_one_and_decodes_to_zero(bits, value, symmetric, scale_dtype):
    weight = torch.ones(2, 64)
    weight[1, 32:] = value
    codes, scales, zero_points = quantize_affine(weight, bits, 32, symmetric=symmetric, scale_dtype=scale_dtype)
    decoded = dequantize_affine(codes, scales, zero_points, bits, 32)
    assert scales[1, 1] == 1.0
    assert bool((codes[1, 32:] == (2 ** (bits - 1) if symmetric else zero_points[1, 1])).all())
    assert bool((decoded[1, 32:] == 0.0).all()) and bool((decoded[0] != 0.0).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_is_not_finite_exactly_where_its_group_is_not(bad, symmetric):
    weight = designed("normal")
    clean_codes, clean_scales, _ = quantize_affine(weight, 4, 64, symmetric=symmetric, scale_dtype="bfloat16")
    weight[5, 70] = bad
    codes, scales, zero_points = quantize_affine(weight, 4, 64, symmetric=symmetric, scale_dtype="bfloat16")
    assert torch.isfinite(scales).logical_not().nonzero().tolist() == [[5, 1]]
    assert bool((codes[5, 64:128] == (8 if symmetric else zero_points[5, 1])).all())
    scales[5, 1], codes[5, 64:128] = clean_scales[5, 1], clean_codes[5, 64:128]
    assert torch.equal(scales, clean_scales) and torch.equal(codes, clean_codes)


def test_a_scale_beyond_its_dtype_is_infinite():
    weight = torch.tensor([[-3e38, 3e38], [1e6, 0.0]])
    _, scales, _ = quantize_affine(weight, 4, 2, symmetric=False, scale_dtype="float32")
    assert scales[0, 0] == float("inf") and scales[1, 0] < float("inf")  # the span 6e38 is beyond float32
    _, scales, _ = quantize_affine(weight, 4, 2, symmetric=True, scale_dtype="float16")
    assert torch.isinf(scales).all()  # 1e6 / 7.5 is beyond 65504


def test_a_finite_float16_scale_can_decode_to_infinity():
    weight = torch.tensor([[-65408.0, 1.0]])  # / 7.5 = 8721.07: 8720 in float16, and -7.501 steps
    codes, scales, _ = quantize_affine(weight, 4, 2, symmetric=True, scale_dtype="float16")
    assert torch.isfinite(scales).all() and codes.tolist() == [[0, 8]]
    assert dequantize_affine(codes, scales, None, 4, 2)[0, 0] == -float("inf")  # -8 * 8720 is below -65504


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_zero_points_of_any_integer_dtype_decode_alike(dtype):
    codes, scales, zero_points = quantize_affine(designed("normal"), 4, 64, symmetric=False, scale_dtype="bfloat16")
    expected = dequantize_affine(codes, scales, zero_points, 4, 64)
    assert torch.equal(dequantize_affine(codes, scales, zero_points.to(dtype), 4, 64), expected)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_float_zero_points_are_used_as_they_are(scale_dtype):
    codes, scales, zero_points = quantize_affine(designed("normal"), 4, 64, symmetric=False, scale_dtype=scale_dtype)
    zero = zero_points + 0.01171875 * torch.arange(6) - 3.0  # multiples of 3 / 256: exact beside any code
    exact = (codes.double() - zero.double().repeat_interleave(64, 1)) * scales.double().repeat_interleave(64, 1)
    decoded = dequantize_affine(codes, scales, zero, 4, 64)
    assert torch.equal(decoded, exact.float())  # the difference is exact, so one rounding happens in both


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tensor_of_many_pieces_is_quantized_like_its_rows(symmetric):
    weight = torch.randn(PIECE_NUMEL // 192 * 2 + 5, 192, generator=torch.Generator().manual_seed(3))
    whole = quantize_affine(weight, 3, 96, symmetric=symmetric, scale_dtype="bfloat16")
    rows = [quantize_affine(row[None], 3, 96, symmetric=symmetric, scale_dtype="bfloat16") for row in weight]
    for i, tensor in enumerate(whole):
        assert tensor is None or torch.equal(tensor, torch.cat([row[i] for row in rows]))
    decoded = dequantize_affine(*whole, 3, 96)
    assert torch.equal(decoded, torch.cat([dequantize_affine(*row, 3, 96) for row in rows]))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_an_empty_weight_has_no_groups(shape):
    codes, scales, zero_points = quantize_affine(torch.empty(shape), 4, 32, symmetric=False, scale_dtype="float32")
    assert codes.shape == shape and scales.shape == zero_points.shape == (shape[0], shape[1] // 32)
    assert dequantize_affine(codes, scales, zero_points, 4, 32).shape == shape


def test_what_cannot_be_quantized_is_refused():
    def quantize(weight, bits=4, group_size=32, scale_dtype="float32"):
        quantize_affine(weight, bits, group_size, symmetric=True, scale_dtype=scale_dtype)

    for weight in (torch.zeros(2, 64).half(), torch.zeros(64), torch.zeros(64, 64).T[:, :32], torch.zeros(1, 2, 64)):
        with pytest.raises(ValueError, match="weight must be contiguous float32 with two dimensions"):
            quantize(weight)
    with pytest.raises(ValueError, match="100 columns do not split into groups of 64"):
        quantize(torch.zeros(2, 100), group_size=64)
    with pytest.raises(ValueError, match="64 columns do not split into groups of 0"):
        quantize(torch.zeros(2, 64), group_size=0)
    with pytest.raises(ValueError, match="bits must be one of 2, 3, 4, 8"):
        quantize(torch.zeros(2, 64), bits=5)
    with pytest.raises(ValueError, match="unknown scale dtype 'float64'; known: float32, bfloat16, float16"):
        quantize(torch.zeros(2, 64), scale_dtype="float64")


def test_what_cannot_be_decoded_is_refused():
    codes, scales = torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 2)
    with pytest.raises(ValueError, match="codes must be uint8 with two dimensions"):
        dequantize_affine(codes.int(), scales, None, 4, 32)
    for bad in (scales.double(), scales.T[:1], scales[0]):
        with pytest.raises(ValueError, match=r"scales must be one of .* with shape \(2, 2\)"):
            dequantize_affine(codes, bad, None, 4, 32)
    for bad in (scales.half(), scales.bool(), torch.zeros(2, 1, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"zero_points must be integers or float32 with shape \(2, 2\)"):
            dequantize_affine(codes, scales, bad, 4, 32)
