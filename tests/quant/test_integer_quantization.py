"""Integer codes, scales and zero points are those of compressed-tensors, and of float64 where ours differ on purpose:

- A zero point is chosen with the scale as stored; theirs with the scale before it is rounded to its dtype.
- A code is round(w / scale) + zero point; theirs is round(w / scale + zero point): other codes at (near) midpoints
  when the zero point is odd, and the sum loses bits before the rounding. Without zero points the two are one.
- A scale of 0 becomes 1; theirs the epsilon of its dtype. Both decode to 0.
- A scale that overflows its dtype is Inf, so that the caller can refuse; theirs the largest number.

Biases and their codes are those of transformers' Metal quantizer.
"""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch

from loftq_cli.triton_kernels.affine.contract import SCALE_DTYPES, AffineGroups, dequantize_affine, quantize_affine
from loftq_cli.triton_kernels.affine.reference import PIECE_NUMEL
from loftq_cli.triton_kernels.packing.contract import pack_rows

quantization = pytest.importorskip("compressed_tensors.quantization")
forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
calculate_qparams = pytest.importorskip("compressed_tensors.quantization.utils").calculate_qparams
pack_quantized = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
metal = pytest.importorskip("transformers.integrations.metal_quantization")

COLUMNS = 384
ALL_BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 128, COLUMNS)
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

FORMS = {
    "symmetric": {"symmetric": True},
    "int": {"symmetric": False},
    "float": {"symmetric": False, "zero_point": "float"},
}


def every_size(test):
    return pytest.mark.parametrize("bits", ALL_BITS)(pytest.mark.parametrize("group_size", GROUP_SIZES)(test))


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


DESIGNED = {kind: designed(kind) for kind in KINDS}


def decode(groups: AffineGroups, bits: int, group_size: int) -> torch.Tensor:
    return dequantize_affine(groups.codes, groups.scales, groups.zero_points, bits, group_size, biases=groups.biases)


def assert_same(groups: AffineGroups, expected: AffineGroups) -> None:
    for field in fields(AffineGroups):
        tensor, other = getattr(groups, field.name), getattr(expected, field.name)
        assert (tensor is None) == (other is None), field.name
        if tensor is not None:
            assert tensor.dtype == other.dtype and tensor.shape == other.shape, field.name
            assert torch.equal(tensor.nan_to_num(7.0), other.nan_to_num(7.0)), field.name


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
@every_size
def test_codes_scales_and_zero_points_follow_the_definition(bits, group_size, symmetric, scale_dtype):
    for kind, weight in DESIGNED.items():
        groups = quantize_affine(weight, bits, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
        codes, scales, zero_points = in_float64(weight, bits, group_size, symmetric, scale_dtype)
        expected = AffineGroups(codes.byte(), scales, None if symmetric else zero_points.byte(), None)
        try:
            assert_same(groups, expected)
        except AssertionError as error:
            raise AssertionError(kind) from error


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@every_size
def test_symmetric_codes_and_scales_are_those_of_compressed_tensors(bits, group_size, scale_dtype):
    for kind, weight in DESIGNED.items():
        groups = quantize_affine(weight, bits, group_size, symmetric=True, scale_dtype=scale_dtype)
        expected, _ = their_scales(weight, bits, group_size, True, scale_dtype)
        arguments = their_arguments(bits, group_size, True, scale_dtype)
        quantized = forward.quantize(weight, expected, None, arguments, dtype=torch.int8)
        comparable = torch.isfinite(groups.scales) & (expected != torch.finfo(expected.dtype).eps)
        assert torch.equal(groups.scales[comparable], expected[comparable]), kind
        signed = (groups.codes.int() - 2 ** (bits - 1)).unflatten(1, (-1, group_size))
        assert torch.equal(signed[comparable], quantized.int().unflatten(1, (-1, group_size))[comparable]), kind
        assert comparable.any() or kind in ("subnormal", "huge")


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@every_size
def test_asymmetric_scales_are_those_of_compressed_tensors(bits, group_size, scale_dtype):
    for kind, weight in DESIGNED.items():
        scales = quantize_affine(weight, bits, group_size, symmetric=False, scale_dtype=scale_dtype).scales
        expected, _ = their_scales(weight, bits, group_size, False, scale_dtype)
        comparable = torch.isfinite(scales) & (expected != torch.finfo(expected.dtype).eps)
        assert torch.equal(scales[comparable], expected[comparable]), kind
        assert comparable.any() or kind in ("subnormal", "huge")


@every_size
def test_asymmetric_zero_points_and_codes_are_those_of_compressed_tensors_off_midpoints(bits, group_size):
    for kind in ("normal", "positive", "one outlier", "constant", "huge"):
        weight = DESIGNED[kind]
        ours = quantize_affine(weight, bits, group_size, symmetric=False, scale_dtype="float32")
        _, expected = their_scales(weight, bits, group_size, False, "float32")
        groups = weight.double().unflatten(1, (-1, group_size))
        plain = off_midpoints(groups.amin(2) / ours.scales)
        assert torch.equal(ours.zero_points.int()[plain], expected[plain]) and plain.any(), kind
        half = 2 ** (bits - 1)
        signed_zero_points = (ours.zero_points.int() - half).to(torch.int8)
        arguments = their_arguments(bits, group_size, False)
        quantized = forward.quantize(weight, ours.scales, signed_zero_points, arguments, dtype=torch.int8)
        plain = off_midpoints(groups / ours.scales[..., None]).flatten(1)
        assert torch.equal(ours.codes.int()[plain], (quantized.int() + half)[plain]), kind
        assert plain.float().mean() > 0.9, kind


def off_midpoints(quotients: torch.Tensor) -> torch.Tensor:
    """True where a quotient is farther from a midpoint of two integers than float32 errs at 2^8."""
    return (quotients - quotients.floor() - 0.5).abs() > 2.0**-15


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@every_size
def test_decoded_values_are_those_of_compressed_tensors(bits, group_size, symmetric, scale_dtype):
    half = 2 ** (bits - 1)
    for kind, weight in DESIGNED.items():
        groups = quantize_affine(weight, bits, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
        signed = (groups.codes.int() - half).to(torch.int8)
        signed_zero_points = None if symmetric else (groups.zero_points.int() - half).to(torch.int8)
        arguments = their_arguments(bits, group_size, symmetric, scale_dtype)
        expected = forward.dequantize(signed, groups.scales, signed_zero_points, arguments)
        decoded = decode(groups, bits, group_size)
        assert decoded.dtype == torch.float32
        assert torch.equal(decoded.nan_to_num(7.0), expected.float().nan_to_num(7.0)), kind


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_compressor_of_compressed_tensors_unpacks_to_our_values(bits, symmetric, scale_dtype):
    weight = DESIGNED["normal"]
    groups = quantize_affine(weight, bits, 64, symmetric=symmetric, scale_dtype=scale_dtype)
    stored = {
        "weight_packed": pack_rows(groups.codes, bits),
        "weight_scale": groups.scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if groups.zero_points is not None:
        stored["weight_zero_point"] = pack_rows(groups.zero_points.T, bits).T.contiguous()
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=their_arguments(bits, 64, symmetric, scale_dtype), format="pack-quantized"
    )
    loaded = pack_quantized.PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert loaded.dtype == groups.scales.dtype
    assert torch.equal(loaded.float(), decode(groups, bits, 64))


@pytest.mark.parametrize("symmetric", [True, False])
@every_size
def test_no_weight_is_farther_than_half_a_step_from_its_value(bits, group_size, symmetric):
    for kind, weight in DESIGNED.items():
        groups = quantize_affine(weight, bits, group_size, symmetric=symmetric, scale_dtype="float32")
        half_a_step = (groups.scales.double() / 2).repeat_interleave(group_size, dim=1)
        # 2^-15: the quotient errs by 2^-24 of at most 2^8. 2^-149: one subnormal, by which a subnormal scale itself
        # errs (half of it), times the codes that it is multiplied with.
        allowed = half_a_step * (1 + 2.0**-15) + 2.0**-150 * 2**bits
        assert bool(((weight.double() - decode(groups, bits, group_size).double()).abs() <= allowed).all()), kind


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_weights_inside_the_range_of_a_rounded_scale_stay_within_half_a_step(bits, symmetric, scale_dtype):
    weight = DESIGNED["normal"]
    groups = quantize_affine(weight, bits, 64, symmetric=symmetric, scale_dtype=scale_dtype)
    scale = groups.scales.double().repeat_interleave(64, dim=1)
    zero = 2 ** (bits - 1) if symmetric else groups.zero_points.double().repeat_interleave(64, dim=1)
    exact = (groups.codes.double() - zero) * scale  # what rounds to the scale's dtype in `dequantize_affine`
    inside = ((0.0 - zero) * scale <= weight) & (weight <= (2**bits - 1.0 - zero) * scale)
    assert inside.float().mean() > 0.9
    assert bool(((weight - exact).abs() <= scale / 2 * (1 + 2.0**-15))[inside].all())


def test_exact_midpoints_round_to_even_before_the_zero_point_is_added():
    # The span -7 .. 8 gives scale 1 and the odd zero point 7: 0.5 -> 0 -> 7, where round(0.5 + 7) would be 8.
    weight = torch.tensor([[-7.0, 8.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5]])
    groups = quantize_affine(weight, 4, 8, symmetric=False, scale_dtype="float32")
    assert groups.scales.tolist() == [[1.0]] and groups.zero_points.tolist() == [[7]]
    assert groups.codes.tolist() == [[0, 15, 7, 7, 9, 5, 9, 5]]


def test_symmetric_ends_by_hand():
    # absmax 7.5 gives scale 1: -7.5 rounds to -8, the lowest code; 7.5 rounds to 8, which clamps to 7, the highest.
    weight = torch.tensor([[-7.5, 7.5, 0.5, -0.5, 1.5, 2.5, 0.0, -0.0]])
    groups = quantize_affine(weight, 4, 8, symmetric=True, scale_dtype="float32")
    assert groups.scales.tolist() == [[1.0]] and groups.zero_points is None and groups.biases is None
    assert groups.codes.tolist() == [[0, 15, 8, 8, 10, 10, 8, 8]]


def test_a_zero_point_is_chosen_with_the_rounded_scale():
    # Scale 32.81 / 255 = 0.12867 becomes 0.12890625 in bfloat16: 27.65 / scale is 214.497 then, 214.895 before.
    groups = quantize_affine(torch.tensor([[-27.65, 5.16]]), 8, 2, symmetric=False, scale_dtype="bfloat16")
    assert groups.scales.item() == 0.12890625
    assert groups.zero_points.item() == round(27.65 / 0.12890625) != round(27.65 / (32.81 / 255))


def test_float_zero_points_by_hand():
    # min 1, max 4: the range does not reach 0. Scale 1: 1.5 is half a step above the bias and goes to the even code 0.
    weight = torch.tensor([[1.0, 4.0, 1.5, 2.5, 3.5, 2.0, 3.0, 3.75]])
    groups = quantize_affine(weight, 2, 8, symmetric=False, zero_point="float", scale_dtype="float16")
    assert groups.scales.tolist() == groups.biases.tolist() == [[1.0]] and groups.zero_points is None
    assert groups.codes.tolist() == [[0, 3, 0, 2, 2, 1, 2, 3]]
    assert decode(groups, 2, 8).tolist() == [[1.0, 4.0, 1.0, 3.0, 3.0, 2.0, 3.0, 4.0]]


@pytest.mark.parametrize("group_size", [32, COLUMNS])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_float_zero_points_are_those_of_transformers_metal_quantizer(bits, group_size):
    for kind in ("normal", "positive", "one outlier", "huge", "midpoints"):
        weight = DESIGNED[kind]
        groups = quantize_affine(weight, bits, group_size, symmetric=False, zero_point="float", scale_dtype="float32")
        packed, scales, biases = metal._affine_quantize_tensor(weight, group_size, bits)
        assert torch.equal(groups.scales, scales) and torch.equal(groups.biases, biases), kind
        assert torch.equal(pack_rows(groups.codes, bits), packed.view(torch.int32)), kind


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@every_size
def test_float_zero_points_follow_the_definition_in_float64(bits, group_size, scale_dtype):
    top, dtype = 2**bits - 1, SCALE_DTYPES[scale_dtype]
    for kind, weight in DESIGNED.items():
        groups = quantize_affine(weight, bits, group_size, symmetric=False, zero_point="float", scale_dtype=scale_dtype)
        values = weight.double().unflatten(1, (-1, group_size))
        lowest, highest = values.amin(2), values.amax(2)
        # A float64 result of two float32 rounds to the float32 result, so only the roundings of the definition happen.
        scales = ((highest - lowest).float().double() / top).float().to(dtype)
        scales[scales == 0] = 1.0
        biases = lowest.float().to(dtype)
        steps = (values - biases.double()[..., None]).float().double() / scales.double()[..., None]
        codes = steps.float().round().clamp(0, top)
        codes[~(torch.isfinite(scales) & torch.isfinite(biases))] = 0
        try:
            assert_same(groups, AffineGroups(codes.flatten(1).byte(), scales, None, biases))
        except AssertionError as error:
            raise AssertionError(kind) from error


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_weights_between_bias_and_last_code_stay_within_half_a_step(bits, scale_dtype):
    for kind in ("normal", "positive", "one outlier", "midpoints"):
        weight = DESIGNED[kind].double()
        groups = quantize_affine(DESIGNED[kind], bits, 64, symmetric=False, zero_point="float", scale_dtype=scale_dtype)
        scale, bias = (tensor.double().repeat_interleave(64, 1) for tensor in (groups.scales, groups.biases))
        inside = (bias <= weight) & (weight <= bias + (2**bits - 1) * scale)
        # Two float32 roundings on the way there and two on the way back, each of at most 2^-24 of the largest number.
        allowed = scale / 2 * (1 + 2.0**-15) + 2.0**-22 * (bias.abs() + (2**bits - 1) * scale)
        assert inside.double().mean() > 0.9, kind
        assert bool(((weight - decode(groups, bits, 64).double()).abs() <= allowed)[inside].all()), kind


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_a_constant_group_decodes_to_its_bias(scale_dtype):
    weight = torch.tensor([0.0, -0.0, 0.3, -0.7, 100.5, 1e-30]).repeat_interleave(32).view(2, 96)
    for bits in ALL_BITS:
        groups = quantize_affine(weight, bits, 32, symmetric=False, zero_point="float", scale_dtype=scale_dtype)
        assert bool((groups.scales == 1.0).all()) and not groups.codes.any()
        assert torch.equal(decode(groups, bits, 32), weight.to(SCALE_DTYPES[scale_dtype]).float())


def test_a_constant_far_from_its_rounded_bias_is_whole_steps_away_from_it():
    weight = torch.full((1, 32), 1001.25)  # a bfloat16 of this size is a multiple of 4
    groups = quantize_affine(weight, 4, 32, symmetric=False, zero_point="float", scale_dtype="bfloat16")
    assert groups.biases.item() == 1000.0 and groups.scales.item() == 1.0
    assert bool((decode(groups, 4, 32) == 1001.0).all())


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_whose_scale_rounds_to_zero_has_scale_one_and_decodes_to_zero(symmetric, scale_dtype):
    # 1e-45 is 2^-149, the smallest float32; with 2 bits, a symmetric scale of 2^-149 / 1.5 rounds to it again.
    for bits, value in [(bits, value) for bits in ALL_BITS for value in (0.0, -0.0, 1e-45) if bits > 2 or value == 0.0]:
        weight = torch.ones(2, 64)
        weight[1, 32:] = value
        groups = quantize_affine(weight, bits, 32, symmetric=symmetric, scale_dtype=scale_dtype)
        decoded = decode(groups, bits, 32)
        assert groups.scales[1, 1] == 1.0
        assert bool((groups.codes[1, 32:] == (2 ** (bits - 1) if symmetric else groups.zero_points[1, 1])).all())
        assert bool((decoded[1, 32:] == 0.0).all()) and bool((decoded[0] != 0.0).all())


@pytest.mark.parametrize("form", FORMS)
def test_a_scale_is_not_finite_exactly_where_its_group_is_not(form):
    arguments = {"scale_dtype": "bfloat16", **FORMS[form]}
    clean = quantize_affine(DESIGNED["normal"], 4, 64, **arguments)
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = DESIGNED["normal"].clone()
        weight[5, 70] = bad
        groups = quantize_affine(weight, 4, 64, **arguments)
        assert torch.isfinite(groups.scales).logical_not().nonzero().tolist() == [[5, 1]]
        zero = {"symmetric": 8, "int": groups.zero_points is not None and groups.zero_points[5, 1], "float": 0}[form]
        assert bool((groups.codes[5, 64:128] == zero).all())
        groups.codes[5, 64:128] = clean.codes[5, 64:128]
        for field in ("scales", "zero_points", "biases"):
            if getattr(groups, field) is not None:
                getattr(groups, field)[5, 1] = getattr(clean, field)[5, 1]
        assert_same(groups, clean)


def test_a_scale_beyond_its_dtype_is_infinite():
    weight = torch.tensor([[-3e38, 3e38], [1e6, 0.0]])
    groups = quantize_affine(weight, 4, 2, symmetric=False, scale_dtype="float32")
    assert groups.scales[0, 0] == float("inf") and groups.scales[1, 0] < float("inf")  # 6e38 is beyond float32
    groups = quantize_affine(weight, 4, 2, symmetric=True, scale_dtype="float16")
    assert torch.isinf(groups.scales).all()  # 1e6 / 7.5 is beyond 65504


def test_a_bias_beyond_its_dtype_is_infinite_and_its_codes_are_zero():
    weight = torch.tensor([[-70000.0, -69000.0], [70000.0, 69000.0]])
    groups = quantize_affine(weight, 4, 2, symmetric=False, zero_point="float", scale_dtype="float16")
    assert groups.biases.tolist() == [[-float("inf")], [float("inf")]] and torch.isfinite(groups.scales).all()
    assert not groups.codes.any()


def test_a_finite_float16_scale_can_decode_to_infinity():
    weight = torch.tensor([[-65408.0, 1.0]])  # / 7.5 = 8721.07: 8720 in float16, and -7.501 steps
    groups = quantize_affine(weight, 4, 2, symmetric=True, scale_dtype="float16")
    assert torch.isfinite(groups.scales).all() and groups.codes.tolist() == [[0, 8]]
    assert decode(groups, 4, 2)[0, 0] == -float("inf")  # -8 * 8720 is below -65504


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_zero_points_of_any_integer_dtype_decode_alike(dtype):
    groups = quantize_affine(DESIGNED["normal"], 4, 64, symmetric=False, scale_dtype="bfloat16")
    expected = decode(groups, 4, 64)
    assert torch.equal(dequantize_affine(groups.codes, groups.scales, groups.zero_points.to(dtype), 4, 64), expected)


@pytest.mark.parametrize("bias_dtype", SCALE_DTYPES.values())
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES.values())
def test_biases_are_added_to_the_product_in_float32(scale_dtype, bias_dtype):
    generator = torch.Generator().manual_seed(5)
    scales = torch.rand(24, 6, generator=generator).to(scale_dtype)
    biases = torch.randn(24, 6, generator=generator).to(bias_dtype)
    for bits in ALL_BITS:
        codes = torch.randint(2**bits, (24, COLUMNS), generator=generator, dtype=torch.uint8)
        products = codes.double() * scales.double().repeat_interleave(64, 1)  # exact: 8 and 24 bits
        sums = products.float().double() + biases.double().repeat_interleave(64, 1)  # rounds to the float32 sum
        decoded = dequantize_affine(codes, scales, None, bits, 64, biases=biases)
        assert decoded.dtype == torch.float32
        assert torch.equal(decoded, sums.float())
        if bits != 3:  # transformers packs 3 bits ten to a word, we without gaps
            words = pack_rows(codes, bits).view(torch.uint32)
            assert torch.equal(decoded, metal._affine_dequantize_tensor(words, scales, biases, 64, bits))


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_of_many_pieces_is_quantized_like_its_rows(form):
    weight = torch.randn(PIECE_NUMEL // 192 * 2 + 5, 192, generator=torch.Generator().manual_seed(3))
    arguments = {"scale_dtype": "bfloat16", **FORMS[form]}
    whole = quantize_affine(weight, 3, 96, **arguments)
    decoded = decode(whole, 3, 96)
    ends = [0, 1, 2, *range(100, len(weight), 97), len(weight)]  # not where the pieces end
    for start, stop in pairwise(ends):
        rows = quantize_affine(weight[start:stop], 3, 96, **arguments)
        biases, zero_points = (None if t is None else t[start:stop] for t in (whole.biases, whole.zero_points))
        assert_same(rows, AffineGroups(whole.codes[start:stop], whole.scales[start:stop], zero_points, biases))
        assert torch.equal(decode(rows, 3, 96), decoded[start:stop])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_an_empty_weight_has_no_groups(shape, form):
    groups = quantize_affine(torch.empty(shape), 4, 32, scale_dtype="float32", **FORMS[form])
    assert groups.codes.shape == shape and groups.scales.shape == (shape[0], shape[1] // 32)
    for offsets in (groups.zero_points, groups.biases):
        assert offsets is None or offsets.shape == groups.scales.shape
    assert decode(groups, 4, 32).shape == shape


def test_what_cannot_be_quantized_is_refused():
    def quantize(weight, bits=4, group_size=32, scale_dtype="float32", **arguments):
        quantize_affine(weight, bits, group_size, **{"symmetric": True, "scale_dtype": scale_dtype, **arguments})

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
    with pytest.raises(ValueError, match="unknown zero point 'half'; known: int, float"):
        quantize(torch.zeros(2, 64), symmetric=False, zero_point="half")
    with pytest.raises(ValueError, match="symmetric quantization has no float zero point"):
        quantize(torch.zeros(2, 64), zero_point="float")


def test_what_cannot_be_decoded_is_refused():
    codes, scales = torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 2)
    with pytest.raises(ValueError, match="codes must be uint8 with two dimensions"):
        dequantize_affine(codes.int(), scales, None, 4, 32)
    for bad in (scales.double(), scales.T[:1], scales[0]):
        with pytest.raises(ValueError, match=r"scales must be one of .* with shape \(2, 2\)"):
            dequantize_affine(codes, bad, None, 4, 32)
        with pytest.raises(ValueError, match=r"biases must be one of .* with shape \(2, 2\)"):
            dequantize_affine(codes, scales, None, 4, 32, biases=bad)
    for bad in (scales, scales.half(), scales.bool(), torch.zeros(2, 1, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"zero_points must be integers with shape \(2, 2\)"):
            dequantize_affine(codes, scales, bad, 4, 32)
    with pytest.raises(ValueError, match="zero_points and biases exclude each other"):
        dequantize_affine(codes, scales, torch.zeros(2, 2, dtype=torch.uint8), 4, 32, biases=scales)
