"""Double quantization keeps every constant near itself, or is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support import models
from support.hostile_matrices import BUILTIN, SIZE, nearness, normal

from loftq_cli.errors import NumericError
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.tensors.matrices import NestedAbsmax
from loftq_cli.tensors.metrics import layer_error
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import CodebookSpec
from loftq_cli.triton_kernels.codebook.contract import quantize_codebook
from loftq_cli.triton_kernels.double_quant.contract import double_dequantize, double_quantize, dynamic_map


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


@pytest.mark.parametrize(("size", "is_taken"), [(0.004, False), (0.006, True)])
def test_three_blocks_in_ten_may_be_as_small_as_an_error_of_double_quantization(size, is_taken):
    """The smallest number of a nested group is wrong by 0.7 % of the largest distance from the mean, here 0.7."""
    matrix = torch.ones(256, SIZE)
    matrix[:77] = size
    true = quantize_codebook(matrix, "nf4", SIZE)[1]
    codes, nested_absmax, offset = double_quantize(true, 256)
    error = (double_dequantize(codes, nested_absmax, dynamic_map(), offset, 256) - true).abs()
    assert bool((error[:77] < true[:77]).all()) == is_taken

    quantizer, weight = make_quantizer(CodebookSpec(), "float32"), TensorRows(matrix)
    if is_taken:
        quantizer.quantize(weight)
    else:
        with pytest.raises(NumericError):
            quantizer.quantize(weight)


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
