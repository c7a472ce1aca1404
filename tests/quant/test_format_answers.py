"""Formats and quantized matrices answer for themselves: no user asks for the kind."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import loftq_cli
from loftq_cli.quant.formats import (
    FORMATS,
    QuantSpec,
    as_affine,
    as_affine_tensor,
    as_codebook,
    as_codebook_tensor,
    make_quantizer,
    override_spec,
    requantized_spec,
    specs_of_sizes,
    tensor_from_buffers,
)
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec

PACKAGE = Path(loftq_cli.__file__).parent
KINDS = {"AffineSpec", "CodebookSpec", "AffineTensor", "CodebookTensor"}
SPECS: dict[str, QuantSpec] = {
    "nf4": CodebookSpec("nf4", 64, double_quant=False),
    "nf4 nested": CodebookSpec("nf4", 64, double_quant=True),
    "fp4": CodebookSpec("fp4", 32, double_quant=True),
    "int2": AffineSpec(2, 32, symmetric=False),
    "int3 float": AffineSpec(3, 32, symmetric=False, zero_point="float", scale_dtype="bfloat16"),
    "int8": AffineSpec(8, 64, symmetric=True, scale_dtype="float16"),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def quantized(spec: QuantSpec, dtype: str = "float32"):
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(3)) * 0.02
    return make_quantizer(spec, dtype).quantize(TensorRows(weight))


def test_no_kind_of_format_is_asked_for_outside_formats_and_containers():
    asked = []
    for path in PACKAGE.rglob("*.py"):
        if {"layouts", "quant", "triton_kernels"} & set(path.relative_to(PACKAGE).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            is_question = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "cast")
            if is_question and KINDS & {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}:
                asked.append(f"{path.name}:{node.lineno}")
    assert asked == []


@every_spec
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_matrix_comes_back_from_its_buffers(spec, dtype):
    matrix = quantized(spec, dtype)
    back = tensor_from_buffers(matrix.to_buffers(), spec, matrix.shape, dtype)
    assert type(back) is type(matrix)
    assert (back.shape, back.spec, back.dtype) == ((24, 128), spec, dtype)
    assert torch.equal(back.dequantize(), matrix.dequantize())
    assert back.to_buffers().keys() == matrix.to_buffers().keys()
    assert all(torch.equal(tensor, matrix.to_buffers()[name]) for name, tensor in back.to_buffers().items())


@every_spec
def test_rows_decode_alone_as_they_decode_together(spec):
    matrix = quantized(spec)
    rows = matrix.decoded()
    first = 4 * rows.multiple
    assert torch.equal(rows.rows(slice(first, 24)).float(), matrix.dequantize()[first:])


@every_spec
def test_a_matrix_knows_its_shape_without_its_codes(spec):
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(3)) * 0.02
    codes: list[torch.Tensor] = []
    matrix = make_quantizer(spec, "float32").quantize(TensorRows(weight), sink=lambda part, rows: codes.append(rows))
    assert (matrix.shape, sum(map(len, codes)) > 0) == ((24, 128), True)
    whole = quantized(spec).dequantize()
    assert torch.equal(matrix.decoded(lambda part: torch.cat(codes)).rows(slice(0, 24)).float(), whole)


@every_spec
def test_kernels_read_the_codes_of_codebooks_only(spec):
    operand = quantized(spec).operand()
    assert (operand is not None) == spec.has_code_kernels == (not spec.is_affine)


def test_double_quantized_constants_are_decoded_for_kernels():
    matrix = quantized(SPECS["nf4 nested"])
    operand, absmax = matrix.operand(), matrix.absmax
    # bitsandbytes' double quantization: value = map[code] * absmax of 256 blocks + offset
    expected = absmax.code_map[absmax.codes.long()] * absmax.absmax[0] + absmax.offset
    assert torch.equal(operand.absmax, expected)
    assert (operand.codebook, operand.block_size) == ("nf4", 64)


@pytest.mark.parametrize(
    ("spec", "kind", "size", "text", "options"),
    [
        (CodebookSpec("fp4", 128), None, None, "block 128", {"block_size": 128}),
        (AffineSpec(3, 32, symmetric=True), "none", 32, "group 32", {"quant_type": "int3", "group_size": 32}),
        (AffineSpec(4, 64, symmetric=False), "int", 64, "group 64", {"quant_type": "int4", "group_size": 64}),
        (AffineSpec(8, 64, False, "float"), "float", 64, "group 64", {"quant_type": "int8", "group_size": 64}),
    ],
)
def test_a_format_describes_itself(spec, kind, size, text, options):
    assert (spec.zero_point_kind, spec.group_size_or_none, spec.size_text, spec.layer_options) == (
        kind,
        size,
        text,
        options,
    )
    assert spec.is_affine == FORMATS[spec.quant_type].is_affine


def test_columns_are_whole_groups_of_integers_or_no_groups():
    spec = AffineSpec(4, 32, symmetric=False)
    assert [columns for columns in (31, 32, 33, 64) if spec.has_whole_groups_in(columns)] == [32, 64]
    assert not CodebookSpec(block_size=32).has_whole_groups_in(64)


def test_an_override_changes_what_it_names_and_nothing_else():
    codebook, integers = CodebookSpec("nf4", 64, double_quant=True), AffineSpec(4, 64, symmetric=False)
    assert override_spec(codebook) == codebook and override_spec(integers) == integers
    assert override_spec(codebook, block_size=128) == CodebookSpec("nf4", 128, double_quant=True)
    assert override_spec(codebook, quant_type="fp4", double_quant=False) == CodebookSpec("fp4", 64, double_quant=False)
    assert override_spec(integers, quant_type="int8") == AffineSpec(8, 64, symmetric=False)
    assert override_spec(integers, group_size=32) == AffineSpec(4, 32, symmetric=False)


def test_candidates_are_all_bits_and_sizes_of_the_kind():
    integers = specs_of_sizes(AffineSpec(4, 64, symmetric=True), ("int8", "nf4", "int2"), (32, 64))
    assert [(spec.bits, spec.group_size) for spec in integers] == [(2, 32), (2, 64), (8, 32), (8, 64)]
    assert all(spec.symmetric for spec in integers)
    codebooks = specs_of_sizes(CodebookSpec("fp4", 64, double_quant=False), ("nf4", "fp4"), (32, 128))
    assert codebooks == [CodebookSpec("fp4", size, double_quant=False) for size in (32, 128)]


def test_codebooks_that_are_quantized_again_keep_their_blocks():
    stored = CodebookSpec("nf4", 128, double_quant=False)
    assert requantized_spec(stored, CodebookSpec("fp4", 64)) == CodebookSpec("fp4", 128, double_quant=False)
    assert requantized_spec(AffineSpec(4, 32, symmetric=True), CodebookSpec("fp4", 64)) == CodebookSpec("fp4", 64)
    assert requantized_spec(stored, AffineSpec(4, 32, symmetric=True)) == AffineSpec(4, 32, symmetric=True)


def test_a_format_of_the_other_kind_is_a_type_error():
    affine, codebook = SPECS["int8"], SPECS["nf4"]
    assert as_affine(affine) is affine and as_codebook(codebook) is codebook
    for narrow, other in ((as_affine, codebook), (as_codebook, affine)):
        with pytest.raises(TypeError, match=f"{other.quant_type} is no"):
            narrow(other)
    for narrow, other in ((as_affine_tensor, codebook), (as_codebook_tensor, affine)):
        with pytest.raises(TypeError, match=f"{other.quant_type} is no"):
            narrow(quantized(other))
