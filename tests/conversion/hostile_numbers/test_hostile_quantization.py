"""A matrix of any finite numbers stays within what its format can hold, or is refused with a remedy."""

from __future__ import annotations

import math

import pytest
import torch
from support.hostile_matrices import (
    COLUMNS,
    LARGE,
    MATRICES,
    ROWS,
    SIZE,
    SPECS,
    evenly,
    farthest,
    normal,
    quantizer_of,
    with_one,
)

from loftq_cli.errors import NumericError
from loftq_cli.methods.method import Fitting, load_method
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec, LoraSpec, Pooling
from loftq_cli.triton_kernels.backend import use_compiled_kernels, use_reference_kernels


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("form", SPECS)
def test_a_matrix_stays_within_what_the_format_can_hold_or_is_refused(form, name):
    spec, matrix = SPECS[form], MATRICES[name]
    quantizer = quantizer_of(spec)
    try:
        values = quantizer.dequantize(quantizer.quantize(TensorRows(matrix)))
    except NumericError as error:
        assert name in LARGE
        assert "too large" in error.message or "differ too much" in error.message
        assert error.hint
        return
    assert bool(values.isfinite().all())
    error = (matrix.double() - values.double()).abs().view(-1, SIZE)
    assert bool((error <= farthest(spec, matrix)).all())
    has_zero = not isinstance(spec, AffineSpec) or spec.zero_point == "int"
    zeros = matrix == 0 if has_zero else (matrix.view(-1, SIZE) == 0).all(dim=1).repeat_interleave(SIZE).view_as(matrix)
    assert not bool(values[zeros].any())


@pytest.mark.parametrize("form", SPECS)
def test_compiled_kernels_accept_and_refuse_the_same(form):
    def outcome(matrix):
        quantizer = quantizer_of(SPECS[form])
        try:
            return quantizer.dequantize(quantizer.quantize(TensorRows(matrix)))
        except NumericError as error:
            return str(error)

    expected = {name: outcome(matrix) for name, matrix in MATRICES.items()}
    missing = use_compiled_kernels()
    if missing:
        pytest.skip(missing)
    try:
        for name, matrix in MATRICES.items():
            found = outcome(matrix)
            if isinstance(found, str):
                assert found == expected[name], name
            else:
                assert not isinstance(expected[name], str), name
                assert torch.equal(found.view(torch.int32), expected[name].view(torch.int32)), name
    finally:
        use_reference_kernels()


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("nf4", "up to 3.4e38"),
        ("nf4", "1e-30 and 1e30"),
        ("nf4", "one of 1e38"),
        ("nf4, nested", "a dying row"),
        ("nf4, nested", "outlier columns"),
        ("nf4, nested", "half zero"),
        ("int4, symmetric", "1e37"),
        ("int4, symmetric", "3e38"),
        ("int4, zero points", "3e38"),
        ("int4, float offsets", "the largest"),
        ("int4, symmetric, float16", "below float16"),
    ],
)
def test_what_a_format_can_hold_is_not_refused(form, name):
    quantizer_of(SPECS[form]).quantize(TensorRows(MATRICES[name]))


@pytest.mark.parametrize(
    ("form", "name", "message", "hint"),
    [
        ("nf4, nested", "up to 3.4e38", "too large to be double-quantized", "--no-double-quant"),
        ("nf4, nested", "one of 1e38", "differ too much to be double-quantized", "--no-double-quant"),
        ("nf4, nested", "one of 2e4", "differ too much to be double-quantized", "--no-double-quant"),
        ("nf4, nested", "1e-30 and 1e30", "differ too much to be double-quantized", "--no-double-quant"),
        ("int4, zero points", "up to 3.4e38", "its scales are too large for float32", "--symmetric"),
        ("int4, float offsets", "up to 3.4e38", "its scales or biases are too large for float32", "--exclude"),
        ("int4, symmetric, float16", "float16's range", "decodes to numbers too large for float16", "--scale-dtype"),
        ("int4, symmetric, float16", "1e30", "its scales are too large for float16", "--scale-dtype float32"),
        ("int4, symmetric, bfloat16", "up to 3.4e38", "decodes to numbers too large for bfloat16", "--exclude it"),
    ],
)
def test_a_refusal_says_what_is_too_large_and_what_to_do(form, name, message, hint):
    with pytest.raises(NumericError, match=message) as caught:
        quantizer_of(SPECS[form]).quantize(TensorRows(MATRICES[name]))
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("value", [0.37, -0.37, 3e38, 1e-30])
def test_a_constant_is_exact_where_the_format_can_hold_it(value):
    matrix = torch.full((ROWS, COLUMNS), value)
    for form in ("nf4", "int4, float offsets"):
        quantizer = quantizer_of(SPECS[form])
        assert torch.equal(quantizer.dequantize(quantizer.quantize(TensorRows(matrix))), matrix), form


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_constant_that_rounds_to_infinity_in_the_models_dtype_is_refused(dtype, double_quant):
    quantizer = make_quantizer(CodebookSpec(double_quant=double_quant), dtype)
    limit = torch.finfo(getattr(torch, dtype)).max
    with pytest.raises(NumericError, match=r"too large (for|to be)"):
        quantizer.quantize(TensorRows(torch.full((ROWS, COLUMNS), limit * 1.003)))
    quantizer = make_quantizer(CodebookSpec(double_quant=False), dtype)
    kept = quantizer.dequantize(quantizer.quantize(TensorRows(with_one(limit, 0.02))))
    assert float(kept.max()) == limit


ADAPTERS = {
    "loftq": LoraSpec(4, 4),
    "loftq, bfloat16": LoraSpec(4, 8, dtype="bfloat16"),
    "qlora": LoraSpec(4, 4),
    "qalora": LoraSpec(4, 4, pooling=Pooling("paper", SIZE)),
}


@pytest.mark.parametrize("svd", ["fast", "faithful", "exact"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_method_gives_finite_numbers_or_a_numeric_error(adapter, svd):
    """Whatever else torch raises for a finite matrix would show a traceback."""
    lora, method = ADAPTERS[adapter], adapter.partition(",")[0]
    for name, matrix in MATRICES.items():
        # Only matrices far above the rank are not decomposed.
        wide = matrix.repeat(3, 2) * normal(3 * ROWS, 1).sign() if svd != "exact" else matrix
        for form in ("nf4", "nf4, nested", "int2, symmetric", "int3, zero points", "int4, float offsets, float16"):
            spec = SPECS[form]
            if method == "qalora" and (isinstance(spec, CodebookSpec) or spec.symmetric):
                continue
            quantizer, rows = quantizer_of(spec), TensorRows(wide)
            try:
                found = load_method(method)(
                    rows,
                    quantizer,
                    lora,
                    Fitting(iterations=2, svd=svd, init="residual" if method == "qalora" else None),
                    generator=torch.Generator().manual_seed(0),
                )
            except NumericError as error:
                assert name in LARGE, (name, form)
                assert error.hint, error
                continue
            assert bool(found.lora.lora_A.isfinite().all() and found.lora.lora_B.isfinite().all()), (name, form)
            assert bool(quantizer.dequantize(found.quantized).isfinite().all()), (name, form)
            assert all(map(math.isfinite, found.iteration_errors)), (name, form)


@pytest.mark.parametrize("size", [1, 31, 63, 64, 65, 127, 129])
def test_the_last_block_may_be_short(size):
    """NF4 blocks run over the flat matrix, so that any size ends with whatever is left."""
    for scale in (1e-45, 1e-39, 1.0, 3e38):
        matrix = (evenly(1, size) * scale).clone()
        for quantizer in (quantizer_of(SPECS["nf4"]), quantizer_of(CodebookSpec(block_size=32, double_quant=False))):
            values = quantizer.dequantize(quantizer.quantize(TensorRows(matrix)))
            largest = float(matrix.double().abs().max())
            assert bool(values.isfinite().all())
            bound = max(0.153 * largest, 1e-38)
            assert float((values.double() - matrix.double()).abs().max()) <= bound
        zeros = quantizer_of(SPECS["nf4, nested"])
        assert not bool(zeros.dequantize(zeros.quantize(TensorRows(matrix * 0))).any())
