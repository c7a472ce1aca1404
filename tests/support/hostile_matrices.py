"""Matrices of every finite size, all formats, and the distance of a decoded weight that a format allows."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from loftq_cli.quant.formats import make_quantizer
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec
from loftq_cli.triton_kernels.codebook.contract import CODEBOOKS

BUILTIN = Path(__file__).parents[2] / "loftq_cli" / "model" / "builtin_models"


ROWS, COLUMNS, SIZE = 24, 128, 64  # SIZE: of blocks and groups


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def evenly(*shape):
    """Between -1 and 1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def with_one(value, background=0.0, place=(3, 5)):
    matrix = torch.zeros(ROWS, COLUMNS) if background == 0.0 else normal(ROWS, COLUMNS) * background
    matrix[place] = value
    return matrix


def with_rows(value, rows):
    matrix = normal(ROWS, COLUMNS)
    matrix[rows] *= value
    return matrix


def with_columns(value, columns):
    matrix = normal(ROWS, COLUMNS)
    matrix[:, columns] *= value
    return matrix


USUAL = {
    "normal": normal(ROWS, COLUMNS) * 0.02,
    "zero": torch.zeros(ROWS, COLUMNS),
    "negative zero": torch.full((ROWS, COLUMNS), -0.0),
    "constant": torch.full((ROWS, COLUMNS), 0.37),
    "negative constant": torch.full((ROWS, COLUMNS), -0.37),
    "constant blocks": normal(ROWS, COLUMNS // SIZE).repeat_interleave(SIZE, dim=1),
    "one weight": with_one(-2.5),
    "one float32 subnormal": with_one(1e-45),
    "one float16 subnormal": with_one(6e-8),
    "one bfloat16 subnormal": with_one(9.2e-41),
    "subnormals": normal(ROWS, COLUMNS) * 1e-40,
    "the least subnormal": torch.full((ROWS, COLUMNS), 1e-45),
    "below float16": normal(ROWS, COLUMNS) * 1e-9,
    "at float16's least": normal(ROWS, COLUMNS) * 1e-7,
    "a zero row": with_rows(0.0, slice(7, 8)),
    "half zero": with_rows(0.0, slice(0, 12)),
    "a zero column": with_columns(0.0, slice(9, 10)),
    "rank 1": normal(ROWS, 1) @ normal(1, COLUMNS, seed=1),
    "a dying row": with_rows(1e-30, slice(4, 5)),
    "outlier columns": with_columns(50.0, slice(0, 128, 40)),
    "positive": evenly(ROWS, COLUMNS).abs() + 3,
}
LARGE = {
    "1e30": normal(ROWS, COLUMNS) * 1e30,
    "1e37": normal(ROWS, COLUMNS) * 1e37,
    "rank 1, large": evenly(ROWS, 1) @ evenly(1, COLUMNS) * 3e38,
    "3e38": torch.full((ROWS, COLUMNS), 3e38),
    "3e38 of both signs": 3e38 * evenly(ROWS, COLUMNS).sign(),
    "up to 3.4e38": evenly(ROWS, COLUMNS) * 3.4e38,
    "the largest": torch.full((ROWS, COLUMNS), torch.finfo(torch.float32).max),
    "1e-30 and 1e30": normal(ROWS, COLUMNS) * torch.tensor([1e-30, 1e30]).repeat(ROWS // 2)[:, None],
    "one of 1e38": with_one(1e38, 0.02),
    "one of 2e4": with_one(2e4, 0.02),
    "float16's range": evenly(ROWS, COLUMNS) * 65504,
}
MATRICES = {**USUAL, **LARGE}


SPECS = {"nf4": CodebookSpec(double_quant=False), "nf4, nested": CodebookSpec()}
for _bits in (2, 3, 4, 8):
    SPECS[f"int{_bits}, symmetric"] = AffineSpec(_bits, SIZE, True)
    SPECS[f"int{_bits}, zero points"] = AffineSpec(_bits, SIZE, False)
    SPECS[f"int{_bits}, float offsets"] = AffineSpec(_bits, SIZE, False, zero_point="float")
for _dtype in ("float16", "bfloat16"):
    SPECS[f"int4, symmetric, {_dtype}"] = AffineSpec(4, SIZE, True, scale_dtype=_dtype)
    SPECS[f"int4, zero points, {_dtype}"] = AffineSpec(4, SIZE, False, scale_dtype=_dtype)
    SPECS[f"int4, float offsets, {_dtype}"] = AffineSpec(4, SIZE, False, zero_point="float", scale_dtype=_dtype)


def decoded_dtype(spec):
    return spec.scale_dtype if isinstance(spec, AffineSpec) else "float32"


def quantizer_of(spec):
    return make_quantizer(spec, decoded_dtype(spec))


def block_constants(matrix):
    """float64 [blocks]: the largest magnitude of each."""
    return matrix.double().abs().view(-1, SIZE).amax(dim=1)


def nearness(constants):
    """How near double quantization keeps constants: to within themselves, small ones to the lower quartile."""
    stored = constants[constants > 0]
    quartile = stored.sort().values[math.ceil(len(stored) / 4) - 1] if len(stored) else 0.0
    return constants.clamp(min=float(quartile))


def farthest(spec, matrix):
    """float64 [blocks, SIZE]: how far a format may move each weight, by arithmetic that is not the program's."""
    groups = matrix.double().view(-1, SIZE)
    largest = groups.abs().amax(dim=1, keepdim=True)
    kind = torch.finfo(getattr(torch, decoded_dtype(spec)))
    # Constants and values are rounded to the dtype; below its normal numbers to multiples of its least one.
    least = kind.smallest_normal * kind.eps
    if isinstance(spec, CodebookSpec):
        table = torch.tensor(CODEBOOKS["nf4"], dtype=torch.float64)
        step = float(table.diff().max() / 2)
        # bitsandbytes divides by no less than 1e-38: smaller numbers may decode to zero.
        bound = torch.where(largest < 1e-38, largest, step * largest) + 4 * kind.eps * largest
        return bound + (nearness(largest) if spec.double_quant else 0.0)
    top = 2**spec.bits - 1
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    if spec.symmetric:
        step, steps = largest / (top / 2), 0.5
    elif spec.zero_point == "int":
        step, steps = (high.clamp(min=0) - low.clamp(max=0)) / top, 1.0  # half for the zero point's rounding
    else:
        step, steps = (high - low) / top, 0.5
    return step * steps + 4 * kind.eps * largest + 2 * (top + 1) * least
