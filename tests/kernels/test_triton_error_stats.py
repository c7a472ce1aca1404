"""The error sums of the Triton kernels are those of float64 on the decoded weights: interpreted where there is no GPU,
compiled where there is one.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.interpreter import interpreted, poisoned_memory

from loftq_cli.triton_kernels.backend import use_backend
from loftq_cli.triton_kernels.codebook.contract import dequantize_codebook, quantize_codebook
from loftq_cli.triton_kernels.error_stats.contract import ErrorSums, codebook_error_sums, error_stats

pytest.importorskip("triton")

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def poisoned():
    with poisoned_memory():
        yield


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def assert_sums(found: ErrorSums, weight: torch.Tensor, decoded: torch.Tensor, delta: torch.Tensor | None) -> None:
    w, q = weight.double(), decoded.double()
    d = torch.zeros_like(q) if delta is None else delta.double()
    error = w - (decoded.float() + d.float()).double()
    exact = {"rel": 1e-12, "abs": 0.0}  # float64 sums in another order
    assert found.squared_weight == pytest.approx(float(w.square().sum()), **exact)
    assert found.squared_base_error == pytest.approx(float((w - q).square().sum()), **exact)
    assert found.squared_error == pytest.approx(float(error.square().sum()), **exact)
    assert found.max_error == float(error.abs().max())
    assert found.squared_delta == pytest.approx(float(d.square().sum()), **exact)


@pytest.mark.parametrize("delta_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoded_dtype", FLOATS[:2])
@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_error_sums_are_those_of_float64(dtype, decoded_dtype, delta_dtype):
    for n in (1, 7, 2047, 2048, 2049, 10_000):
        weight, decoded = normal(n, dtype=dtype), normal(n, seed=1, dtype=decoded_dtype)
        delta = None if delta_dtype is None else normal(n, seed=2, dtype=delta_dtype)
        assert_sums(interpreted(error_stats, weight, decoded, delta), weight, decoded, delta)


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-30, 1e30, 1e38])
def test_error_sums_hold_what_float32_does_not(scale):
    weight, decoded, delta = (normal(40, 50, seed=seed) * scale for seed in range(3))
    assert_sums(interpreted(error_stats, weight, decoded, delta), weight, decoded, delta)


@pytest.mark.parametrize("place", [0, 2047, 2048, 4999])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
def test_what_is_not_finite_is_in_the_sums_and_the_largest_error(value, place):
    weight, decoded = normal(5000), normal(5000, seed=1)
    weight[place] = value
    found = interpreted(error_stats, weight, decoded)
    for number in (found.squared_weight, found.squared_base_error, found.squared_error, found.max_error):
        assert math.isnan(number) if math.isnan(value) else number == math.inf
    assert found.squared_delta == 0.0


def test_nothing_has_no_error():
    assert interpreted(error_stats, torch.empty(0), torch.empty(0)) == ErrorSums(0.0, 0.0, 0.0, 0.0, 0.0)


def test_views_that_are_not_contiguous_are_read_as_they_are():
    weight, decoded = normal(100, 3), normal(100, 3, seed=1)
    assert_sums(interpreted(error_stats, weight.T[1], decoded.T[1]), weight[:, 1], decoded[:, 1], None)


# The fused sums.


def expected_sums(weight, decoded, lora_A=None, lora_B=None, scaling=1.0) -> torch.Tensor:
    """From float64 throughout: no q + d is rounded, so comparisons allow for float32's."""
    w, q = weight.double(), decoded.double()
    d = torch.zeros_like(w) if lora_A is None else scaling * (lora_B.double() @ lora_A.double())
    both = q + d
    squares = [float(x.square().sum()) for x in (w, w - q, w - both)]
    flips, zeros = int((w.sign() * both.sign() == -1).sum()), int(((w != 0) & (both == 0)).sum())
    largest = float((w - both).abs().max())
    return torch.tensor([*squares, largest, float(d.square().sum()), flips, zeros], dtype=torch.float64)


def quantized(
    weight: torch.Tensor, block_size: int, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    codes = quantize_codebook(weight, "nf4", block_size)
    return codes, dequantize_codebook(*codes, "nf4", block_size, weight.numel(), dtype).view(weight.shape)


def measured(weight, codes, block_size, dtype, *adapter) -> torch.Tensor:
    found = interpreted(codebook_error_sums, weight, *codes, "nf4", block_size, dtype, *adapter)
    assert found.dtype == torch.float64 and found.device == weight.device
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    # d is a float32 product and q + d a float32 sum: 2^-24 of either, which the errors of both are about as large as.
    torch.testing.assert_close(found[:5], expected[:5], rtol=2e-6, atol=0.0)
    assert found[5:].tolist() == expected[5:].tolist()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
def test_fused_sums_are_those_of_the_decoded_weight(weight_dtype, dtype):
    weight = normal(70, 192, dtype=weight_dtype)
    codes, decoded = quantized(weight, 64, dtype)
    assert_close(measured(weight, codes, 64, dtype), expected_sums(weight, decoded))


@pytest.mark.parametrize("rank", [1, 3, 16, 64])
@pytest.mark.parametrize("shape", [(1, 64), (65, 66), (130, 128), (3, 10)])
def test_fused_sums_add_an_adapter_of_any_rank_and_shape(shape, rank):
    weight = normal(*shape, dtype=torch.bfloat16)
    codes, decoded = quantized(weight, 64, torch.bfloat16)
    adapter = normal(rank, shape[1], seed=1), normal(shape[0], rank, seed=2)
    assert_close(
        measured(weight, codes, 64, torch.bfloat16, *adapter, 2.0), expected_sums(weight, decoded, *adapter, 2.0)
    )


@pytest.mark.parametrize("block_size", [32, 64, 96, 128, 256])
def test_fused_sums_know_every_block_size_also_where_blocks_cross_rows(block_size):
    weight = normal(9, 130)
    codes, decoded = quantized(weight, block_size, torch.float32)
    assert_close(measured(weight, codes, block_size, torch.float32), expected_sums(weight, decoded))


def test_fused_sums_of_rows_that_share_a_byte_are_the_same():
    weight = normal(7, 33)
    codes, decoded = quantized(weight, 64, torch.float32)
    adapter = normal(4, 33, seed=1), normal(7, 4, seed=2)
    assert_close(measured(weight, codes, 64, torch.float32, *adapter), expected_sums(weight, decoded, *adapter))


@pytest.mark.parametrize("factor_dtype", FLOATS)
def test_factors_are_read_in_their_own_dtype(factor_dtype):
    weight = normal(20, 64)
    codes, decoded = quantized(weight, 64, torch.bfloat16)
    adapter = normal(8, 64, seed=1, dtype=factor_dtype), normal(20, 8, seed=2, dtype=factor_dtype)
    assert_close(
        measured(weight, codes, 64, torch.bfloat16, *adapter, 0.5), expected_sums(weight, decoded, *adapter, 0.5)
    )


@pytest.mark.parametrize("row", [0, 4])
def test_the_largest_error_is_found_in_every_piece_of_a_large_matrix(row):
    weight = torch.full((5, 1 << 17), 0.01)  # more than PIECE_NUMEL
    codes, decoded = quantized(weight, 64, torch.float32)
    weight[row, 77] = 3.0
    found = codebook_error_sums(weight, *codes, "nf4", 64, torch.float32)
    assert found[3] == 3.0 - decoded[row, 77].double()


@pytest.mark.parametrize("columns", [64, 65])
def test_signs_and_zeros_are_counted_without_underflow(columns):
    """A block of one 1.0: the small weights decode to 0, and an adapter of 1e-30 gives them a sign. 1e-30 * 1e-30 is
    zero in float32.
    """
    weight = torch.zeros(1, columns)
    weight[0, 0], weight[0, 1:11], weight[0, 11:31] = 1.0, 1e-30, -1e-30
    codes, decoded = quantized(weight, 128, torch.float32)
    assert decoded[0, 1:31].abs().max() == 0
    assert measured(weight, codes, 128, torch.float32)[5:].tolist() == [0, 30]
    adapter = torch.full((1, columns), 1e-15), torch.full((1, 1), 1e-15)
    assert measured(weight, codes, 128, torch.float32, *adapter)[5:].tolist() == [20, 0]


@pytest.mark.parametrize("columns", [63, 64])
def test_a_zero_matrix_has_no_error_of_any_kind(columns):
    weight = torch.zeros(5, columns)
    codes, _ = quantized(weight, 64, torch.bfloat16)
    assert measured(weight, codes, 64, torch.bfloat16).tolist() == [0.0] * 7


@pytest.mark.parametrize("columns", [129, 130])
@pytest.mark.parametrize("place", [(0, 0), (65, 127), (69, 128)])
def test_fused_sums_and_the_largest_error_keep_nan(place, columns):
    weight = normal(70, columns)
    codes, _ = quantized(weight, 64, torch.float32)
    weight[place] = math.nan
    found = measured(weight, codes, 64, torch.float32)
    assert found[:4].isnan().all() and found[4] == 0.0


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_factor_that_is_not_finite_shows_in_what_holds_it_alone():
    weight = normal(3, 66)
    codes, decoded = quantized(weight, 64, torch.float32)
    adapter = normal(2, 66, seed=1).abs(), normal(3, 2, seed=2).abs()
    adapter[1][1, 0] = math.inf
    found = measured(weight, codes, 64, torch.float32, *adapter)
    assert found[2:5].tolist() == [math.inf] * 3
    assert_close(
        torch.cat([found[:2], torch.zeros(5)]), torch.cat([expected_sums(weight, decoded)[:2], torch.zeros(5)])
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_backend_has_the_fused_sums(backend):
    if backend == "cpu":
        pytest.importorskip("numba")
    weight = normal(70, 130)
    codes, decoded = quantized(weight, 64, torch.bfloat16)
    adapter = normal(4, 130, seed=1), normal(70, 4, seed=2)
    use_backend("cpu", backend)
    try:
        found = codebook_error_sums(weight, *codes, "nf4", 64, torch.bfloat16, *adapter)
    finally:
        use_backend("cpu", None)
    assert_close(found, expected_sums(weight, decoded, *adapter))


def test_what_does_not_fit_is_refused():
    weight = normal(4, 64)
    codes, _ = quantized(weight, 64, torch.float32)
    A, B = normal(2, 64), normal(4, 2)
    with pytest.raises(ValueError, match="contiguous matrix"):
        codebook_error_sums(normal(64, 4).T, *codes, "nf4", 64, torch.float32)
    with pytest.raises(ValueError, match="float64 is none of"):
        codebook_error_sums(weight.double(), *codes, "nf4", 64, torch.float32)
    with pytest.raises(ValueError, match="packed must be uint8 with 64 elements"):
        codebook_error_sums(normal(2, 64), *codes, "nf4", 64, torch.float32)
    with pytest.raises(ValueError, match="belong together"):
        codebook_error_sums(weight, *codes, "nf4", 64, torch.float32, A)
    with pytest.raises(ValueError, match=r"lora_A \(2, 64\) and lora_B \(3, 2\) do not make \(4, 64\)"):
        codebook_error_sums(weight, *codes, "nf4", 64, torch.float32, A, B[:3])
    with pytest.raises(ValueError, match="lora_B must be a float32"):
        codebook_error_sums(weight, *codes, "nf4", 64, torch.float32, A, B.long())
