"""The Triton kernels of integer formats compute what the plain-torch definition does, bit for bit: interpreted where
there is no GPU, compiled where there is one.
"""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from support.interpreter import interpreted

from loftq_cli.triton_kernels.affine.contract import (
    AFFINE_BITS,
    SCALE_DTYPES,
    AffineGroups,
    dequantize_affine,
    quantize_affine,
)

triton = pytest.importorskip("triton")
affine_triton = pytest.importorskip("loftq_cli.triton_kernels.affine.triton")

pytestmark = [
    pytest.mark.interpreter,
    # NumPy warns of what the interpreter computes on purpose: overflows, 0 / 0, and NaN in what is not used.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
FORMS = {
    "symmetric": {"symmetric": True},
    "int": {"symmetric": False},
    "float": {"symmetric": False, "zero_point": "float"},
}
every_form = pytest.mark.parametrize("form", FORMS)
every_scale_dtype = pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
all_bits = pytest.mark.parametrize("bits", AFFINE_BITS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def designed() -> torch.Tensor:
    """Groups of 48 by rows of 96: what rounds, what ties, and what leaves the range of a dtype."""
    rows = normal(30, 96, seed=1)
    rows[0] = 0.0
    rows[1] = -0.0
    rows[2, :48], rows[2, 48:] = 0.25, -0.25
    rows[3] = rows[3].abs() + 0.5  # zero points at the edge
    rows[4] = -rows[3]
    rows[5, 7], rows[5, 60] = 40.0, -40.0
    rows[6] = torch.arange(96).mul(7).remainder(65).sub(32) / 4  # scales of 2, 3 and 4 bits that make ties
    rows[7] = rows[6].abs()
    rows[8] = torch.arange(96).remainder(31) - 15.0  # scale 2 of symmetric 4 bits: each odd number is a tie
    rows[9] = torch.arange(96).remainder(16) * 0.5 - 2.5
    rows[10, :48] = torch.linspace(-1, 1, 48)  # both ends alike
    rows[10, 48:] = torch.cat([torch.linspace(0.1, 1, 24), torch.linspace(-0.1, -1, 24)])
    rows[11] *= 3e38
    rows[12] = torch.linspace(-1, 1, 96) * 3.4e38  # max - min of a group does not overflow
    rows[13, ::2], rows[13, 1::2] = 3.4e38, -3.4e38  # here it does
    rows[14] *= 1e-42
    rows[15] = torch.arange(96).remainder(5) * 2.0**-149
    rows[16] *= 1e-8  # a scale that rounds to 0 in float16
    rows[17] *= 1e6  # float16: scales that fit under biases that do not
    rows[18] = 65500.0 + torch.arange(96)
    rows[19] *= 1e9  # no scale of float16 fits
    rows[20] = 1.0
    rows[20, 5] = 1.0 + 2.0**-23
    rows[21] = torch.full((96,), 1e-45)
    rows[22] = 3.4028234663852886e38  # its bias rounds to infinity in half precisions
    rows[23, :48] = torch.tensor([1.0, -1.0]).repeat(24)
    rows[24, ::3] = -0.0
    rows[25] = torch.linspace(3.3e38, 3.4e38, 96)
    return rows


DESIGNED = designed()


def assert_same(groups: AffineGroups, expected: AffineGroups) -> None:
    for field in fields(AffineGroups):
        tensor, other = getattr(groups, field.name), getattr(expected, field.name)
        assert (tensor is None) == (other is None), field.name
        if tensor is not None:
            assert_same_bits(tensor, other)


def assert_same_bits(tensor: torch.Tensor, expected: torch.Tensor) -> None:
    """Of a NaN only that it is one."""
    assert tensor.dtype == expected.dtype and tensor.shape == expected.shape
    bits, other = ((t.nan_to_num(7.0, math.inf, -math.inf).contiguous().view(torch.uint8)) for t in (tensor, expected))
    assert torch.equal(bits, other)


@every_scale_dtype
@every_form
@all_bits
def test_designed_groups_are_quantized_like_the_reference_does(bits, form, scale_dtype):
    options = {"scale_dtype": scale_dtype, **FORMS[form]}
    expected = quantize_affine(DESIGNED, bits, 48, **options)
    assert_same(interpreted(quantize_affine, DESIGNED, bits, 48, **options), expected)


@every_scale_dtype
@every_form
@all_bits
def test_numbers_of_any_magnitude_are_quantized_like_the_reference_does(bits, form, scale_dtype):
    """Rows of small integers, where ties abound, times powers of two; and rows of random bits, NaN and Inf included."""
    generator = torch.Generator().manual_seed(bits)
    powers = torch.randint(-149, 120, (60, 1), generator=generator).float().exp2()
    integers = torch.randint(-20, 21, (60, 48), generator=generator) * powers
    patterns = torch.randint(-(2**31), 2**31, (20, 48), generator=generator).int().view(torch.float32)
    weight = torch.cat([integers, patterns])
    options = {"scale_dtype": scale_dtype, **FORMS[form]}
    expected = quantize_affine(weight, bits, 48, **options)
    assert_same(interpreted(quantize_affine, weight, bits, 48, **options), expected)


@every_form
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("group_size", [1, 3, 16, 64, 100, 1024])
def test_every_group_size_gives_what_the_reference_does(group_size, bits, form):
    weight = normal(5, group_size * 3, seed=group_size)
    options = {"scale_dtype": "bfloat16", **FORMS[form]}
    expected = quantize_affine(weight, bits, group_size, **options)
    assert_same(interpreted(quantize_affine, weight, bits, group_size, **options), expected)


@every_form
@pytest.mark.parametrize("group_size", [5000, affine_triton.WIDEST, affine_triton.WIDEST + 1])
def test_a_group_of_a_whole_row_is_quantized_too(group_size, form):
    weight = normal(2, group_size)
    options = {"scale_dtype": "float32", **FORMS[form]}
    expected = quantize_affine(weight, 4, group_size, **options)
    assert_same(interpreted(quantize_affine, weight, 4, group_size, **options), expected)


@pytest.mark.parametrize("rows", [0, 1, 64, 65, 127, 128, 129, 300])
def test_a_ragged_number_of_groups_is_quantized_to_the_last(rows):
    weight = normal(rows, 64, seed=rows)
    options = {"symmetric": False, "scale_dtype": "float16"}
    expected = quantize_affine(weight, 4, 64, **options)
    assert_same(interpreted(quantize_affine, weight, 4, 64, **options), expected)


@every_form
@pytest.mark.parametrize("group_size", [48, 64])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_group_that_is_not_finite_has_such_a_scale_and_codes_of_zero_and_its_neighbours_do_not(
    value, group_size, form
):
    weight = normal(5, group_size)
    weight[1, 17] = value
    weight[2] = value
    options = {"scale_dtype": "bfloat16", **FORMS[form]}
    groups = interpreted(quantize_affine, weight, 4, group_size, **options)
    assert groups.scales[:, 0].isfinite().tolist() == [True, False, False, True, True]
    assert (groups.codes[1:3] == (8 if form == "symmetric" else 0)).all()
    assert_same(groups, quantize_affine(weight, 4, group_size, **options))


@every_form
def test_nan_of_any_sign_is_not_lost_beside_infinities_of_both(form):
    weight = normal(4, 32)
    weight[:, 3], weight[:, 4] = math.inf, -math.inf
    weight[0, 5], weight[1, 5] = math.nan, -math.nan
    weight[2:, 3:5] = torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)  # NaN of other bits
    groups = interpreted(quantize_affine, weight, 8, 32, scale_dtype="float32", **FORMS[form])
    assert groups.scales.isnan().all()
    assert groups.biases is None or groups.biases.isnan().all()


@all_bits
def test_of_zeros_of_both_signs_the_bias_is_zero(bits):
    weight = torch.tensor([0.0, -0.0, 1.0, 2.0]).repeat(2, 8)
    groups = interpreted(quantize_affine, weight, bits, 32, scale_dtype="float32", **FORMS["float"])
    expected = quantize_affine(weight, bits, 32, scale_dtype="float32", **FORMS["float"])
    assert torch.equal(groups.codes, expected.codes)
    assert torch.equal(groups.scales, expected.scales)
    assert (groups.biases == 0).all()


@every_scale_dtype
@every_form
@all_bits
@pytest.mark.parametrize(("rows", "group_size"), [(1, 1), (3, 48), (300, 16), (67, 64), (2, 5000)])
def test_codes_decode_to_what_the_reference_decodes_them_to(rows, group_size, bits, form, scale_dtype):
    weight = normal(rows, group_size * (1 if group_size > 1000 else 2), seed=rows)
    groups = quantize_affine(weight, bits, group_size, scale_dtype=scale_dtype, **FORMS[form])
    arguments = (groups.codes, groups.scales, groups.zero_points, bits, group_size)
    decoded = interpreted(dequantize_affine, *arguments, biases=groups.biases)
    assert_same_bits(decoded, dequantize_affine(*arguments, biases=groups.biases))


@every_scale_dtype
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_zero_points_of_any_kind_are_subtracted_in_the_dtype_of_the_scales(dtype, scale_dtype):
    codes = torch.arange(256, dtype=torch.uint8).repeat(6, 1)
    info = torch.iinfo(dtype)
    zero_points = torch.tensor([info.min, info.max, 7, 100, info.max // 3, info.min // 3], dtype=dtype)[:, None]
    scales = torch.tensor([1.0, 1e-7, 0.3, 3e38, -0.7, 0.01])[:, None].to(SCALE_DTYPES[scale_dtype])
    decoded = interpreted(dequantize_affine, codes, scales, zero_points, 8, 256)
    assert_same_bits(decoded, dequantize_affine(codes, scales, zero_points, 8, 256))


@every_scale_dtype
@pytest.mark.parametrize("bias_dtype", SCALE_DTYPES)
def test_biases_of_another_dtype_than_the_scales_are_added_in_float32(bias_dtype, scale_dtype):
    codes = torch.arange(256, dtype=torch.uint8).repeat(4, 1)
    scales, biases = normal(4, 4).to(SCALE_DTYPES[scale_dtype]), normal(4, 4, seed=1).to(SCALE_DTYPES[bias_dtype])
    decoded = interpreted(dequantize_affine, codes, scales, None, 8, 64, biases=biases)
    assert_same_bits(decoded, dequantize_affine(codes, scales, None, 8, 64, biases=biases))


def test_strides_are_free_where_codes_are_decoded():
    codes = torch.randint(0, 16, (128, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).T
    scales, zero_points = normal(4, 6).bfloat16().T, torch.arange(48, dtype=torch.int32).view(6, 8)[:, ::2]
    decoded = interpreted(dequantize_affine, codes, scales, zero_points, 4, 32)
    assert_same_bits(decoded, dequantize_affine(codes, scales, zero_points, 4, 32))


@all_bits
def test_symmetric_codes_and_scales_are_those_of_compressed_tensors(bits):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    weight = normal(40, 128)
    arguments = quantization.QuantizationArgs(
        num_bits=bits, type="int", strategy="group", group_size=64, symmetric=True, scale_dtype=torch.float32
    )
    split = weight.unflatten(1, (-1, 64))
    scales, _ = utils.calculate_qparams(split.amin(2), split.amax(2), arguments)
    codes = forward.quantize(weight, scales, None, arguments, dtype=torch.int8)
    groups = interpreted(quantize_affine, weight, bits, 64, symmetric=True, scale_dtype="float32")
    assert torch.equal(groups.scales, scales)
    assert torch.equal(groups.codes.int() - 2 ** (bits - 1), codes.int())
