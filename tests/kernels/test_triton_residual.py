"""The passes of an alternation over a stack of matrices: the definition against float64, the kernels against both."""

from __future__ import annotations

import math

import pytest
import torch
from support.interpreter import interpreted

from loftq_cli.triton_kernels.codebook.contract import CODEBOOKS, dequantize_codebook, quantize_codebook
from loftq_cli.triton_kernels.residual.contract import (
    CodedStack,
    quantize_difference,
    residual_product,
    transposed_residual_product,
)

pytest.importorskip("triton")

pytestmark = pytest.mark.interpreter

# [n, out, in], rank and block size: whole tiles; ragged rows and ranks; long blocks, and rows that are no whole blocks,
# which take another way.
CASES = {
    "whole tiles": ((2, 128, 128), 16, 64),
    "ragged rows": ((1, 70, 192), 3, 32),
    "many vectors": ((1, 65, 128), 70, 128),
    "one row": ((3, 1, 64), 1, 64),
    "a long block": ((2, 4, 1024), 5, 512),
    "blocks across rows": ((2, 10, 100), 4, 64),
}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def stack(shape: tuple[int, int, int], rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, rows, columns = shape
    return normal(*shape, dtype=torch.bfloat16), normal(n, rows, rank, seed=1), normal(n, rank, columns, seed=2)


def coded_stack(weight: torch.Tensor, block_size: int) -> CodedStack:
    pairs = [quantize_codebook(matrix.reshape(-1), "nf4", block_size) for matrix in weight]
    packed, absmax = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return CodedStack(packed, absmax * 1.01, "nf4", block_size, torch.bfloat16)  # as after double quantization


def lost(weight: torch.Tensor, coded: CodedStack) -> torch.Tensor:
    """weight - decoded, float64."""
    numel = weight[0].numel()
    decoded = [
        dequantize_codebook(codes, absmax, "nf4", coded.block_size, numel, coded.dtype)
        for codes, absmax in zip(coded.packed, coded.absmax, strict=True)
    ]
    return weight.double() - torch.stack(decoded).view(weight.shape).double()


def as_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().bfloat16().double()


@pytest.fixture(params=["reference", "triton"])
def run(request):
    return interpreted if request.param == "triton" else lambda operation, *arguments: operation(*arguments)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_codes_are_those_of_the_difference(case, codebook, run):
    shape, rank, block_size = case
    weight, left, right = stack(shape, rank)
    packed, absmax = run(quantize_difference, weight, left, right, codebook, block_size)
    midpoints = torch.tensor(CODEBOOKS[codebook], dtype=torch.float64).unfold(0, 2, 1).mean(dim=1)
    product = torch.bmm(as_bfloat16(left), as_bfloat16(right))
    if block_size == 512 or shape[2] % block_size:
        product = as_bfloat16(product) if run is interpreted else product  # the update lies in memory there
    target = (weight.double() - product).view(shape[0], -1)
    blocks = torch.nn.functional.pad(target, (0, -target.shape[1] % block_size)).view(shape[0], -1, block_size)
    assert torch.allclose(absmax.double(), blocks.abs().amax(dim=2), rtol=1e-5)
    scaled = (blocks / blocks.abs().amax(dim=2, keepdim=True)).view(shape[0], -1)[:, : target.shape[1]]
    codes = torch.stack((packed >> 4, packed & 15), dim=2).view(shape[0], -1)[:, : target.shape[1]].long()
    # In float32 a number may be on the other side of a midpoint that it almost is.
    for slack in (1e-4, -1e-4):
        counted = (scaled[..., None] > midpoints - slack).sum(dim=-1)
        assert bool((codes <= counted).all() if slack > 0 else (codes >= counted).all())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_residual_is_multiplied_from_the_right_and_its_squares_are_summed(case, run):
    shape, rank, block_size = case
    weight, _, right = stack(shape, rank)
    coded, vectors = coded_stack(weight, block_size), right.transpose(1, 2).contiguous()
    product, squares = run(residual_product, weight, coded, vectors)
    expected = torch.bmm(as_bfloat16(lost(weight, coded)), as_bfloat16(vectors))
    assert float((product - expected).norm() / expected.norm()) < 1e-5
    assert squares.dtype == torch.float64
    assert torch.allclose(squares, lost(weight, coded).square().sum(dim=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_residual_is_multiplied_from_the_left(case, run):
    shape, rank, block_size = case
    weight, left, _ = stack(shape, rank)
    coded = coded_stack(weight, block_size)
    product = run(transposed_residual_product, weight, coded, left)
    expected = torch.bmm(as_bfloat16(left).transpose(1, 2), as_bfloat16(lost(weight, coded)))
    assert float((product - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_dtype_of_a_weight_is_read_as_what_it_is(dtype):
    weight = normal(1, 64, 64, dtype=dtype)
    coded, vectors = coded_stack(weight, 64), normal(1, 64, 16, seed=3)
    product, _ = interpreted(residual_product, weight, coded, vectors)
    expected = torch.bmm(as_bfloat16(lost(weight, coded)), as_bfloat16(vectors))
    assert float((product - expected).norm() / expected.norm()) < 1e-5


def test_vectors_may_lie_column_after_column():
    """As a triangular solve leaves them."""
    weight, left, right = stack((2, 64, 128), 16)
    coded = coded_stack(weight, 64)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (left, right, right.transpose(1, 2).contiguous())]
    straight = [left, right, right.transpose(1, 2).contiguous()]
    for a, b in zip(turned, straight, strict=True):
        assert not a.is_contiguous() and torch.equal(a, b)
    codes = [interpreted(quantize_difference, weight, *pair, "nf4", 64)[0] for pair in (turned[:2], straight[:2])]
    assert torch.equal(*codes)
    products = [interpreted(residual_product, weight, coded, vectors)[0] for vectors in (turned[2], straight[2])]
    assert torch.equal(*products)
    transposed = [interpreted(transposed_residual_product, weight, coded, v) for v in (turned[0], straight[0])]
    assert torch.equal(*transposed)


def test_a_stack_is_cut_into_parts_that_cover_every_row_and_column():
    """One tall and one wide matrix, for which a sum is taken in several programs."""
    for shape in ((1, 64 * 9 + 5, 64), (1, 64, 64 * 9)):
        weight, left, right = stack(shape, 16)
        coded = coded_stack(weight, 64)
        product, squares = interpreted(residual_product, weight, coded, right.transpose(1, 2).contiguous())
        expected = torch.bmm(as_bfloat16(lost(weight, coded)), as_bfloat16(right).transpose(1, 2))
        assert float((product - expected).norm() / expected.norm()) < 1e-5
        assert torch.allclose(squares, lost(weight, coded).square().sum(dim=(1, 2)), rtol=1e-5)
        transposed = interpreted(transposed_residual_product, weight, coded, left)
        expected = torch.bmm(as_bfloat16(left).transpose(1, 2), as_bfloat16(lost(weight, coded)))
        assert float((transposed - expected).norm() / expected.norm()) < 1e-5


def test_a_weight_that_is_not_a_number_is_seen_in_the_constants_and_the_squares():
    weight, left, right = stack((2, 64, 64), 16)
    weight[1, 3, 5] = math.nan
    _, absmax = interpreted(quantize_difference, weight, left, right, "nf4", 64)
    assert absmax.isfinite().all(dim=1).tolist() == [True, False]
    _, squares = interpreted(residual_product, weight, coded_stack(weight.nan_to_num(), 64), normal(2, 64, 16))
    assert squares.isfinite().tolist() == [True, False]


def test_equal_runs_give_equal_bytes():
    weight, _, right = stack((1, 130, 640), 16)
    coded, vectors = coded_stack(weight, 64), right.transpose(1, 2).contiguous()
    first, second = (interpreted(residual_product, weight, coded, vectors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("wrong", ["left", "right", "vectors", "absmax"])
def test_shapes_that_do_not_fit_are_refused_by_name(wrong):
    weight, left, right = stack((1, 64, 64), 4)
    coded = coded_stack(weight, 64)
    with pytest.raises(ValueError, match=wrong):
        if wrong == "left":
            quantize_difference(weight, left[:, :5], right, "nf4", 64)
        elif wrong == "right":
            quantize_difference(weight, left, right[:, :2], "nf4", 64)
        elif wrong == "vectors":
            residual_product(weight, coded, left[:, :7])
        else:
            residual_product(weight, CodedStack(coded.packed, coded.absmax[:, 1:], "nf4", 64, torch.float32), left)
