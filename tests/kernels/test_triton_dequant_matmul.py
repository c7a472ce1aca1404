"""Products with a codebook matrix on the Triton kernels are float64's on the decoded weights, up to float32 sums:
interpreted where there is no GPU, compiled where there is one.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.interpreter import interpreted, poisoned_memory

from loftq_cli.triton_kernels.codebook.contract import codebook_table, dequantize_codebook, quantize_codebook
from loftq_cli.triton_kernels.dequant_matmul.contract import dequant_matmul, dequant_matmul_input_gradient

pytest.importorskip("triton")
dequant_matmul_triton = pytest.importorskip("loftq_cli.triton_kernels.dequant_matmul.triton")

pytestmark = pytest.mark.interpreter
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPERATIONS = (dequant_matmul, dequant_matmul_input_gradient)


@pytest.fixture(autouse=True)
def poisoned():
    with poisoned_memory():
        yield


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(
    shape: tuple[int, int], block_size: int, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Codes and constants, and the matrix that they decode to in `dtype`."""
    codes = quantize_codebook(normal(*shape) * 0.05, "nf4", block_size)
    return codes, dequantize_codebook(*codes, "nf4", block_size, shape[0] * shape[1], dtype).view(shape)


def exact(operation, x: torch.Tensor, decoded: torch.Tensor, adapter=None, scaling: float = 1.0) -> torch.Tensor:
    """In float64, on the weight as operands of the dtype of x have it."""
    weight = decoded.to(x.dtype).double()
    if adapter is not None:
        weight = weight + scaling * (adapter[1].double() @ adapter[0].double())
    return x.double() @ (weight.T if operation is dequant_matmul else weight)


def assert_product(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, roundings: float = 1.0) -> None:
    """To half a step of the dtype for each rounding, and float32 sums of a few hundred products of about 0.05."""
    assert found.dtype == dtype and found.shape == expected.shape
    step = torch.finfo(dtype).eps / 2 * roundings
    torch.testing.assert_close(found.double(), expected, rtol=1.01 * step, atol=3e-6 + (roundings - 1) * step)


def tokens_for(operation, tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return normal(tokens, shape[1] if operation is dequant_matmul else shape[0], dtype=dtype, seed=5)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_tokens_of_any_dtype_are_multiplied_with_what_codes_decode_to(x_dtype, dtype, operation):
    shape = (70, 192)
    codes, decoded = quantized(shape, 64, dtype)
    for tokens in (3, 40):  # each of the two tiles
        x = tokens_for(operation, tokens, shape, x_dtype)
        found = interpreted(operation, x, *codes, "nf4", 64, shape, dtype)
        assert_product(found, exact(operation, x, decoded), x_dtype)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("rank", [1, 3, 16, 64])
@pytest.mark.parametrize("shape", [(1, 64), (33, 66), (130, 128), (3, 10), (7, 33)])
def test_an_adapter_of_any_rank_and_shape_is_added(shape, rank, operation):
    codes, decoded = quantized(shape, 64, torch.bfloat16)
    adapter = normal(rank, shape[1], seed=1) * 0.1, normal(shape[0], rank, seed=2) * 0.1
    x = tokens_for(operation, 17, shape, torch.bfloat16)
    found = interpreted(operation, x, *codes, "nf4", 64, shape, torch.bfloat16, *adapter, 0.5)
    assert_product(found, exact(operation, x, decoded, adapter, 0.5), torch.bfloat16)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 130])
def test_any_number_of_tokens_is_multiplied_by_the_kernel(tokens, operation):
    shape = (48, 96)
    codes, decoded = quantized(shape, 64, torch.float32)
    x = tokens_for(operation, tokens, shape, torch.float32)
    options = {"is_gradient": operation is dequant_matmul_input_gradient}
    table = codebook_table("nf4")
    found = interpreted(dequant_matmul_triton.fused, x, *codes, table, 64, shape, torch.float32, None, **options)
    assert_product(found, exact(operation, x, decoded), torch.float32)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_many_tokens_are_multiplied_with_a_matrix_decoded_once(x_dtype, operation):
    shape = (48, 96)
    codes, decoded = quantized(shape, 64, torch.bfloat16)
    adapter = normal(4, 96, seed=1) * 0.1, normal(48, 4, seed=2) * 0.1
    x = tokens_for(operation, dequant_matmul_triton.FUSED_TOKENS + 1, shape, x_dtype)
    found = interpreted(operation, x, *codes, "nf4", 64, shape, torch.bfloat16)
    assert_product(found, exact(operation, x, decoded), x_dtype)
    found = interpreted(operation, x, *codes, "nf4", 64, shape, torch.bfloat16, *adapter, 0.5)
    # The first product is rounded before the second is added, and so are the factors of the second.
    assert_product(found, exact(operation, x, decoded, adapter, 0.5), x_dtype, roundings=4)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("block_size", [32, 96, 128, 256])
def test_every_block_size_is_decoded_also_where_blocks_cross_rows(block_size, operation):
    shape = (20, 130)
    codes, decoded = quantized(shape, block_size, torch.float32)
    x = tokens_for(operation, 5, shape, torch.float32)
    found = interpreted(operation, x, *codes, "nf4", block_size, shape, torch.float32)
    assert_product(found, exact(operation, x, decoded), torch.float32)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_reference_gives_the_same(operation):
    shape = (20, 130)
    codes, decoded = quantized(shape, 64, torch.bfloat16)
    adapter = normal(3, 130, seed=1) * 0.1, normal(20, 3, seed=2) * 0.1
    x = tokens_for(operation, 5, shape, torch.float16)
    found = operation(x, *codes, "nf4", 64, shape, torch.bfloat16, *adapter, 2.0)
    assert_product(found, exact(operation, x, decoded, adapter, 2.0), torch.float16)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_zero_weights_give_zeros_and_nan_stays_in_its_token(operation):
    shape = (20, 64)
    codes = quantize_codebook(torch.zeros(shape), "nf4", 64)
    x = tokens_for(operation, 5, shape, torch.bfloat16)
    assert not interpreted(operation, x, *codes, "nf4", 64, shape, torch.bfloat16).any()
    x[3, 2] = math.nan
    found = interpreted(operation, x, *codes, "nf4", 64, shape, torch.bfloat16)
    assert found.isnan().all(dim=1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_tokens_give_none(operation):
    shape = (20, 64)
    codes, _ = quantized(shape, 64, torch.bfloat16)
    x = tokens_for(operation, 0, shape, torch.bfloat16)
    found = interpreted(operation, x, *codes, "nf4", 64, shape, torch.bfloat16)
    assert found.shape == (0, 20 if operation is dequant_matmul else 64)


def test_the_gradient_is_that_of_the_product():
    """Of the decoded weight and its adapter, by torch's own differentiation."""
    shape = (20, 64)
    codes, decoded = quantized(shape, 64, torch.float32)
    lora_A, lora_B = normal(4, 64, seed=1), normal(20, 4, seed=2)
    x, gradient = normal(6, 64).double().requires_grad_(), normal(6, 20, seed=3)
    output = x @ (decoded.double() + 0.5 * (lora_B.double() @ lora_A.double())).T
    output.backward(gradient.double())
    found = interpreted(
        dequant_matmul_input_gradient, gradient, *codes, "nf4", 64, shape, torch.float32, lora_A, lora_B, 0.5
    )
    torch.testing.assert_close(found.double(), x.grad, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused():
    codes, _ = quantized((4, 64), 64, torch.float32)
    options = (*codes, "nf4", 64, (4, 64), torch.float32)
    with pytest.raises(ValueError, match=r"\(2, 63\) is not \[tokens, 64\]"):
        dequant_matmul(normal(2, 63), *options)
    with pytest.raises(ValueError, match=r"\(2, 64\) is not \[tokens, 4\]"):
        dequant_matmul_input_gradient(normal(2, 64), *options)
    with pytest.raises(ValueError, match="float64 is none of"):
        dequant_matmul(normal(2, 64).double(), *options)
    with pytest.raises(ValueError, match="belong together"):
        dequant_matmul(normal(2, 64), *options, lora_B=normal(4, 2))
