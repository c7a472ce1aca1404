"""What numbers may do to a conversion: nothing that is not finite gets in or out, zero stays zero, and what is finite
stays near what it was, or one line names the tensor and the remedy and nothing is published.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models

from loftq_cli.cli.main import _run
from loftq_cli.errors import NumericError
from loftq_cli.methods.lowrank import make_solver, truncated_svd
from loftq_cli.methods.method import Fitting, load_method
from loftq_cli.model.stored import BaseModel
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.tensors.matrices import NestedAbsmax
from loftq_cli.tensors.metrics import group_errors, layer_error
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec, LoraSpec, Pooling
from loftq_cli.triton_kernels.backend import use_compiled_kernels, use_reference_kernels
from loftq_cli.triton_kernels.codebook.contract import CODEBOOKS, quantize_codebook
from loftq_cli.triton_kernels.double_quant.contract import double_dequantize, double_quantize, dynamic_map

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


@pytest.fixture(scope="module", autouse=True)
def reference_kernels():
    use_reference_kernels()
    yield
    use_reference_kernels()


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


# Double quantization.


def real_matrices():
    for path in (models.minilm() / "model.safetensors", *BUILTIN.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if tensor.dim() == 2:
                yield f"{path.parent.name}: {name}", tensor.float()


def realistic_matrices():
    generator = torch.Generator().manual_seed(0)
    for factor in (10, 20, 50):
        for columns in (1, 4, 16):
            matrix = torch.randn(256, 512, generator=generator) * 0.02
            matrix[:, torch.randperm(512, generator=generator)[:columns]] *= factor
            yield f"{columns} columns {factor} times as large", matrix
            matrix = matrix.clamp(-0.02 * factor, 0.02 * factor)
            yield f"{columns} columns up to {factor} times as large", matrix
    for factor in (100.0, 500.0):
        matrix = torch.randn(256, 512, generator=generator) * 0.02
        matrix[17, 300] = 0.02 * factor
        yield f"one weight of {factor} times", matrix
    for value in (0.0, 1e-6, 1e-30):
        matrix = torch.randn(256, 512, generator=generator) * 0.02
        matrix[64:112] *= value
        yield f"48 dead rows of {value} times", matrix
    matrix = torch.randn(256, 512, generator=generator) * 0.02
    matrix[64:] = 0
    yield "three quarters pruned", matrix
    yield "heavy tails", torch.distributions.StudentT(2.0).sample((256, 512))
    yield "rows of many sizes", torch.randn(256, 512, generator=generator) * normal(256, 1).exp()
    matrix = torch.randn(256, 512, generator=generator) * 0.02
    matrix[:86] *= 0.05
    yield "a third of the rows 20 times smaller", matrix


def test_double_quantization_takes_real_and_realistic_matrices_and_its_bytes_are_as_they_were():
    for name, matrix in [*real_matrices(), *realistic_matrices()]:
        for block_size in (32, 64):
            spec = CodebookSpec(block_size=block_size)
            stored = make_quantizer(spec, "float32").quantize(TensorRows(matrix)).absmax
            assert isinstance(stored, NestedAbsmax)
            codes, nested_absmax, offset = double_quantize(quantize_codebook(matrix, "nf4", block_size)[1], 256)
            assert torch.equal(stored.codes, codes), name
            assert torch.equal(stored.absmax, nested_absmax), name
            assert torch.equal(stored.offset, offset), name


def ruined_matrices():
    for shape in ((64, 64), (128, 128), (256, 512)):
        for size in (1e6, 1e20, 1e38):
            matrix = normal(*shape) * 0.02
            matrix[-1, -1] = 0.02 * size
            yield f"one weight of {size} times in {shape}", matrix
    matrix = normal(256, 512)
    matrix[1::2] *= 1e-30
    yield "every other row", matrix
    matrix = normal(256, 512)
    matrix[:86] *= 0.001
    yield "a third of the rows 1000 times smaller", matrix
    matrix = normal(256, 512)
    matrix[:, 128:141] *= 1000
    yield "13 columns 1000 times as large", matrix


def test_double_quantization_is_refused_where_it_swallows_ordinary_blocks():
    accepted = []
    for name, matrix in ruined_matrices():
        try:
            make_quantizer(CodebookSpec(), "float32").quantize(TensorRows(matrix))
            accepted.append(name)
        except NumericError as error:
            assert "--no-double-quant" in str(error.hint)
        rows, remedy = TensorRows(matrix), make_quantizer(CodebookSpec(double_quant=False), "float32")
        assert layer_error(rows, remedy.decoded(remedy.quantize(rows)), None).error < 0.2
    assert not accepted


@pytest.mark.parametrize("seed", range(40))
def test_what_double_quantization_takes_keeps_every_constant_near_itself_or_the_lower_quartile(seed):
    """Sizes drawn from narrow to wide, so that some are taken and some refused; the criterion by its definition."""
    generator = torch.Generator().manual_seed(seed)
    constants = (torch.randn(40, 16, generator=generator) * (seed / 8)).exp()
    if seed % 2:
        constants[torch.rand(40, 16, generator=generator) < 0.3] = 0.0
    matrix = constants.repeat_interleave(SIZE, dim=1) * (torch.rand(40, 16 * SIZE, generator=generator) * 2 - 1)
    true = quantize_codebook(matrix, "nf4", SIZE)[1]
    codes, nested_absmax, offset = double_quantize(true, 256)
    decoded = double_dequantize(codes, nested_absmax, dynamic_map(), offset, 256)
    is_near = (decoded.double() - true.double()).abs() < nearness(true.double())
    try:
        make_quantizer(CodebookSpec(), "float32").quantize(TensorRows(matrix))
    except NumericError:
        assert not bool(is_near[true > 0].all())
    else:
        assert bool(is_near[true > 0].all())


# Decompositions.


@pytest.mark.parametrize("svd", ["fast", "faithful", "exact"])
@pytest.mark.parametrize("size", [1e-42, 1e-36, 1e-18, 1e18, 1e30, 1e36])
def test_a_residual_of_any_size_is_decomposed_like_one_of_usual_size(svd, size):
    matrix = normal(96, 128)
    factors = make_solver(svd, 4, (96, 128), torch.Generator().manual_seed(0))(matrix * size)
    product = factors.left.double() @ factors.right.double()
    left = float((matrix.double() * size - product).norm() / (matrix.double() * size).norm())
    singular = torch.linalg.svdvals(matrix.double())
    least = float(singular[4:].norm() / singular.norm())
    # Of subnormal numbers a few digits are left, and the root of their singular values rounds.
    assert left <= least * (1.02 if size > 1e-40 else 1.2)
    if size > 1e-40:
        assert factors.gain == pytest.approx(size**2 * float(singular[:4].square().sum()), rel=0.1)


@pytest.mark.parametrize("svd", ["fast", "faithful"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_iteration_goes_on_after_a_matrix_that_had_to_be_scaled(svd, dtype):
    solve = make_solver(svd, 4, (96, 128), torch.Generator().manual_seed(0))
    for size in (1e37, 1.0, 1e37, 1e37):
        matrix = (normal(96, 128) * size).to(dtype)
        factors = solve(matrix)
        left = (matrix.double() - factors.left.double() @ factors.right.double()).norm() / matrix.double().norm()
        assert float(left) < 0.95


def without_convergence(function, only=None):
    """`function` of LAPACK that does not converge: always, or on one dtype."""

    def fail(matrix, *arguments, **options):
        if only is None or matrix.dtype == only:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return function(matrix, *arguments, **options)

    return fail


@pytest.mark.parametrize("svd", ["fast", "faithful", "exact"])
def test_lapack_is_asked_again_in_float64_and_by_another_algorithm(monkeypatch, svd):
    matrix = normal(96, 128)
    expected = make_solver(svd, 4, (96, 128), torch.Generator().manual_seed(0))(matrix)
    for only in (torch.float32, None):
        monkeypatch.setattr(torch.linalg, "eigh", without_convergence(torch.linalg.eigh, only))
        found = make_solver(svd, 4, (96, 128), torch.Generator().manual_seed(0))(matrix)
        torch.testing.assert_close(found.left @ found.right, expected.left @ expected.right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("svd", ["fast", "faithful", "exact"])
def test_a_decomposition_that_is_not_found_says_what_to_do(monkeypatch, svd):
    for name in ("eigh", "svd"):
        monkeypatch.setattr(torch.linalg, name, without_convergence(getattr(torch.linalg, name)))
    with pytest.raises(NumericError, match="no singular value decomposition") as caught:
        make_solver(svd, 4, (96, 128), torch.Generator().manual_seed(0))(normal(96, 128))
    assert "--svd exact" in str(caught.value.hint)
    assert "--method qlora" in str(caught.value.hint)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_residual_that_is_not_finite_is_no_crash(value):
    matrix = normal(96, 128)
    matrix[5, 7] = value
    for svd in ("fast", "faithful"):
        with pytest.raises(NumericError):
            make_solver(svd, 4, (96, 128), torch.Generator().manual_seed(0))(matrix)
    with pytest.raises(NumericError):
        truncated_svd(matrix, 4)


# Errors.


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-23, 1.0, 1e19, 1e30, 3e38])
def test_errors_of_weights_of_any_size_are_those_of_float64(size):
    weight, decoded = evenly(ROWS, COLUMNS) * size, evenly(ROWS, COLUMNS) * (size * 0.9)
    error = layer_error(TensorRows(weight), TensorRows(decoded), None)
    difference = (weight - decoded).double()
    assert error.error == pytest.approx(float(difference.norm() / weight.double().norm()))
    assert error.max_error == pytest.approx(float(difference.abs().max()))
    groups = group_errors(TensorRows(weight), TensorRows(decoded), None, SIZE)
    ratios = difference.view(-1, SIZE).norm(dim=1) / weight.double().view(-1, SIZE).norm(dim=1)
    assert groups.mean_error == pytest.approx(float(ratios.mean()))
    assert groups.max_error == pytest.approx(float(ratios.max()))


# Whole conversions.

NAME = "layers.0.proj.weight"
FAST = ("--rank", 1, "--iterations", 1, "-q")


def fast(options, rank=1, iterations=1):
    """What takes the least time, before `options`; qlora has no alternations to count."""
    counted = () if "qlora" in options else ("--iterations", iterations)
    return ("--rank", rank, *counted, "-q", *options)


ONCE = ("--rank", 1, "--method", "qlora", "-q")


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run a command in an empty directory of this process: (status, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: object) -> tuple[int, str]:
        status = _run([str(argument) for argument in arguments])
        return status, capsys.readouterr().err

    return run_command


def save(tensors, path):
    """A checkpoint of one file, in the format that its name says."""
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)
    return path.name


def refused(ran, output, file, *parts):
    """One line that names file and tensor, and nothing published."""
    status, err = ran
    assert status == 2, err
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: {file}: tensor {NAME}: ")
    assert all(part in err for part in parts), err
    assert not output.exists()


def published(output):
    """Every tensor of a result and its adapter, after it was seen that all are finite."""
    tensors = {}
    for path in output.rglob("*.safetensors"):
        tensors |= load_file(path)
    for name, tensor in tensors.items():
        assert not tensor.is_floating_point() or bool(tensor.float().isfinite().all()), name
    return tensors


PLACES = {"first": (0, 0), "middle": (40, 77), "last": (63, 127)}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_wherever_it_is(run, tmp_path, value, place, dtype, suffix):
    weight = (normal(64, 128) * 0.02).to(getattr(torch, dtype))
    weight[PLACES[place]] = value
    file = save({NAME: weight}, tmp_path / f"w.{suffix}")
    ran = run("quantize", file, "out", *(ONCE if place == "middle" else FAST))
    refused(ran, tmp_path / "out", file, "holds NaN or infinite values")


@pytest.mark.parametrize(
    "options",
    [
        ("--no-double-quant",),
        ("--quant-type", "int4"),
        ("--quant-type", "int8"),
        ("--quant-type", "int3", "--layout", "gptq"),
        ("--quant-type", "int4", "--layout", "mlx"),
        ("--quant-type", "int2", "--layout", "metal"),
        ("--quant-type", "int4", "--layout", "dense"),
        ("--quant-type", "int4", "--method", "qalora"),
        ("--quant-type", "int4", "--scales", "search"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_is_refused_in_every_format(run, tmp_path, value, options):
    weight = normal(64, 128) * 0.02
    weight[63, 127] = value
    file = save({NAME: weight}, tmp_path / "w.safetensors")
    refused(run("quantize", file, "out", *fast(options)), tmp_path / "out", file, "holds NaN or infinite values")


@pytest.mark.parametrize("options", [(), ("--quant-type", "int4"), ("--method", "qlora")], ids=" ".join)
@pytest.mark.parametrize("value", [1e300, -1e39])
def test_a_float64_weight_beyond_float32_is_called_too_large_and_not_infinite(run, tmp_path, value, options):
    weight = normal(64, 128).double()
    weight[3, 5] = value
    file = save({NAME: weight}, tmp_path / "w.safetensors")
    ran = run("quantize", file, "out", "--rank", 1, "-q", *options)
    refused(ran, tmp_path / "out", file, "has numbers too large for float32", "--exclude")
    assert "infinite" not in ran[1]


def test_a_float64_weight_below_float32_becomes_zero(run, tmp_path):
    file = save({NAME: normal(64, 128).double() * 1e-300}, tmp_path / "w.safetensors")
    assert run("quantize", file, "out", *FAST) == (0, "")
    published(tmp_path / "out")
    assert not bool(BaseModel.open(tmp_path / "out").matrix(NAME).any())


def test_the_remedy_of_double_quantization_works_for_all_and_for_one(run, tmp_path):
    tensors = {NAME: with_one(2e4, 0.02), "layers.1.proj.weight": normal(64, 128)}
    tensors[NAME] = torch.cat([tensors[NAME], normal(40, 128)])
    file = save(tensors, tmp_path / "w.safetensors")
    refused(run("quantize", file, "out", *ONCE), tmp_path / "out", file, "--no-double-quant", "[[override]]")
    assert run("quantize", file, "all", *ONCE, "--no-double-quant")[0] == 0
    recipe = "[[override]]\nmatch = 'layers.0.proj'\ndouble_quant = false\n"
    (tmp_path / "recipe.toml").write_text(recipe)
    assert run("quantize", file, "one", *ONCE, "--recipe", "recipe.toml")[0] == 0
    stored = published(tmp_path / "one")
    assert f"{NAME}.nested_absmax" not in stored
    assert "layers.1.proj.weight.nested_absmax" in stored


CONVERSIONS = [
    ("--no-double-quant",),
    (),
    ("--method", "qlora"),
    ("--quant-type", "int4"),
    ("--quant-type", "int2", "--symmetric", "--scales", "search"),
    ("--quant-type", "int3", "--layout", "gptq", "--method", "qlora"),
    ("--quant-type", "int4", "--layout", "mlx"),
    ("--quant-type", "int4", "--method", "qalora"),
    ("--quant-type", "int8", "--layout", "dense"),
]


@pytest.mark.parametrize("options", CONVERSIONS, ids=" ".join)
def test_a_conversion_of_any_finite_matrix_is_finite_or_refused_in_one_line(run, tmp_path, options):
    usual = ("zero", "constant", "one float32 subnormal", "subnormals", "at float16's least", "half zero", "rank 1")
    for number, name in enumerate([*usual, *LARGE]):
        matrix = MATRICES[name]
        weight = torch.cat([matrix] * 4)  # 96 rows: containers want multiples of 32
        file, output = save({NAME: weight}, tmp_path / f"{number}.safetensors"), tmp_path / f"out{number}"
        ran = run("quantize", file, output.name, *fast(options, 2, 2))
        if ran[0] == 0:
            published(output)
            values = BaseModel.open(output).matrix(NAME)
            assert bool(values.isfinite().all()), name
            assert bool(matrix.any()) or not bool(values.any()), name
        else:
            assert name in LARGE, ran[1]
            refused(ran, output, file, "(--")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_what_is_copied_is_copied_bit_for_bit(run, tmp_path, suffix):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (64, 128), generator=generator).to(torch.uint8)
    others = {
        "float8_e4m3fn": raw.clone().view(torch.float8_e4m3fn),  # every bit pattern, NaN too
        "float8_e5m2": raw.clone().view(torch.float8_e5m2),
        "int8": raw.clone().view(torch.int8),
        "int64": raw.clone().view(torch.int64),
        "uint8": raw,
        "bool": raw > 127,
        "empty rows": torch.empty(0, 64),
        "empty columns": torch.empty(64, 0),
        "empty vector": torch.empty(0),
        "empty and huge": torch.empty(0, 2**40),
        "a number": torch.tensor(3.5),
        "an integer": torch.tensor(7),
        "one of one": torch.tensor([[2.0]]),
    }
    copies = {f"layers.0.{name.replace(' ', '_')}.weight": tensor for name, tensor in others.items()}
    if suffix == "bin":
        copies["layers.0.strided"] = torch.arange(12.0)[::2]
        copies["layers.0.expanded"] = torch.tensor([1.0, 2.0]).view(2, 1)[:, :1].t()
    file = save({NAME: normal(64, 128), **copies}, tmp_path / f"w.{suffix}")
    assert run("quantize", file, "out", *ONCE, "--exclude", "one_of_one") == (0, "")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in copies.items():
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tensor.shape), name
        if tensor.numel():
            expected = tensor.contiguous().reshape(-1).view(torch.uint8)
            assert torch.equal(stored[name].reshape(-1).view(torch.uint8), expected), name


@pytest.mark.parametrize("options", [(), ("--quant-type", "int4", "--method", "qlora")], ids=" ".join)
def test_views_in_a_torch_file_are_the_matrices_that_they_show(run, tmp_path, options):
    matrix = normal(128, 192)
    views = {
        "transposed": matrix.t(),
        "columns": torch.cat([matrix, matrix], dim=1)[:, 96 : 96 + 192],
        "rows": torch.cat([matrix, matrix])[::2],
        "offset": torch.cat([torch.full((1, 192), math.nan), matrix])[1:],
    }
    for name, view in views.items():
        file = save({NAME: view}, tmp_path / f"{name}.bin")
        plain = save({NAME: view.contiguous()}, tmp_path / f"{name}.safetensors")
        assert run("quantize", file, f"a {name}", *ONCE[:2], "-q", *options)[0] == 0
        assert run("quantize", plain, f"b {name}", *ONCE[:2], "-q", *options)[0] == 0
        a, b = published(tmp_path / f"a {name}"), published(tmp_path / f"b {name}")
        assert set(a) == set(b)
        assert all(torch.equal(a[key], b[key]) for key in a), name


SHAPES = [(1, 64), (32, 1), (1, 1), (3, 5), (32, 32), (7, 128), (5, 100), (2, 4096), (4096, 2), (64, 65)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_any_shape_is_quantized_or_kept_or_refused(run, tmp_path, shape):
    """Where the container does not take it, it is copied if there is something else to quantize."""
    weight = normal(*shape)
    alone = save({NAME: weight}, tmp_path / "alone.safetensors")
    beside = save({NAME: weight, "layers.1.proj.weight": normal(64, 128)}, tmp_path / "beside.safetensors")
    # A base of the joint fit is near to its weights only with its adapter.
    for number, form in enumerate([(), ("--quant-type", "int4"), ("--layout", "dense")]):
        options = ("--fit", "loftq", *form)
        status, err = run("quantize", alone, f"alone{number}", *fast(options))
        assert status in (0, 2)
        if status:
            assert len(err.splitlines()) == 1
            assert "no weight to quantize: " in err
            assert not (tmp_path / f"alone{number}").exists()
        assert run("quantize", beside, f"beside{number}", *fast(options))[0] == 0
        published(tmp_path / f"beside{number}")
        values = BaseModel.open(tmp_path / f"beside{number}").matrix(NAME)
        assert values.shape == weight.shape
        if status:
            assert torch.equal(values, weight)
        else:
            assert float((values - weight).norm() / weight.norm()) < 0.25


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


def test_inspect_says_the_same_of_hostile_weights(run, tmp_path):
    weight = normal(64, 128).double()
    weight[3, 5] = 1e300
    save({NAME: weight}, tmp_path / "w.safetensors")
    status, err = run("inspect", "w.safetensors", "--try", "int4")
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"tensor {NAME}: has numbers too large for float32" in err
    save({NAME: with_one(2e4, 0.02, (0, 0)).repeat(4, 1)}, tmp_path / "v.safetensors")
    status, err = run("inspect", "v.safetensors", "--try", "nf4")
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"tensor {NAME}: its block constants differ too much" in err
    for options in ((), ("--quant-type", "int4")):
        save({NAME: weight.clamp(-4, 4)}, tmp_path / "u.safetensors")
        run("quantize", "u.safetensors", "out", *fast(options), "--overwrite")
        status, err = run("inspect", "out", "--against", "w.safetensors")
        assert (status, len(err.splitlines())) == (2, 1)
        assert f"w.safetensors: tensor {NAME}: has numbers too large for float32" in err
