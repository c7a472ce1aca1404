"""The compiled integer kernels give the codes and constants of the definition."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from support.compiled_kernels import BAD, FORMS, bit_patterns, compiled, normal, same

from loftq_cli.triton_kernels.affine.contract import AFFINE_BITS, SCALE_DTYPES, AffineGroups, quantize_affine


def matrix_of(kind: str, group_size: int) -> torch.Tensor:
    weight = normal(24, 3 * group_size, seed=group_size)
    if kind == "zero groups":
        weight[:, :group_size] = 0.0
        weight[-1] = 0.0
    elif kind == "signed zeros":
        weight[:, ::2], weight[:, 1::2] = 0.0, -0.0
        weight[6:12] = normal(6, 3 * group_size).relu() * weight[6:12].add(1.0)
        weight[12:] = torch.where(normal(12, 3 * group_size) > 0.0, 0.0, -0.0)
        weight[18:, ::3] = -0.25
    elif kind == "constant":
        weight.fill_(-0.25)
        weight[::2] = 0.3
    elif kind == "one sided":
        weight = weight.abs() + 0.5
        weight[::2] *= -1.0
    elif kind == "outliers":
        weight[::3, ::17] *= 300.0
    elif kind == "huge":
        weight *= 3e38
        weight[3, 5], weight[3, 6] = 3e38, -3e38
    elif kind == "beyond float16":  # a bias can be infinite where the scale is not, and the other way round
        weight = weight * 100.0 + torch.tensor([-70000.0, 70000.0]).repeat(12)[:, None]
        weight[-2:] *= 1000.0
    elif kind == "subnormal":
        weight *= 1e-42
    elif kind == "quarters":
        weight = torch.arange(weight.numel()).mul(7).remainder(65).sub(32).div(4).view(24, -1)
    elif kind == "mirrored":
        weight[:, group_size // 2 : group_size] = -weight[:, : group_size // 2].flip(1)
        weight[:, group_size:] = torch.linspace(-1.0, 1.0, 2 * group_size)
    elif kind == "any":
        weight = bit_patterns(weight.numel(), 5, torch.float32).view(24, -1)
    elif kind == "not finite":
        for row, value in enumerate(BAD.values()):
            weight[row, row], weight[row + 6, -1], weight[row + 12, group_size:] = value, value, value
        weight[-1, 0], weight[-1, 1] = math.inf, -math.inf
    return weight.float().contiguous()


MATRICES = (
    "normal",
    "zero groups",
    "signed zeros",
    "constant",
    "one sided",
    "outliers",
    "huge",
    "beyond float16",
    "subnormal",
    "quarters",
    "mirrored",
    "any",
    "not finite",
)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_bits", AFFINE_BITS)
def test_integer_codes_and_constants_are_those_of_the_definition(n_bits, form, scale_dtype):
    options = {"scale_dtype": scale_dtype, **FORMS[form]}
    for kind in MATRICES:
        for group_size in (16, 64, 200):
            weight = matrix_of(kind, group_size)
            expected = quantize_affine(weight, n_bits, group_size, **options)
            found = compiled(quantize_affine, weight, n_bits, group_size, **options)
            for field in fields(AffineGroups):
                tensor, other = getattr(found, field.name), getattr(expected, field.name)
                assert (tensor is None) == (other is None), (kind, group_size, field.name)
                assert tensor is None or same(tensor, other), (kind, group_size, field.name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_an_empty_matrix_has_no_groups(shape, form):
    groups = compiled(quantize_affine, torch.empty(shape), 4, 32, scale_dtype="float32", **FORMS[form])
    assert groups.codes.shape == shape and groups.scales.shape == (shape[0], shape[1] // 32)
