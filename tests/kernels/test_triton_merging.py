"""Merging with the Triton kernels is float64's up to float32 sums: interpreted where there is no GPU, compiled where
there is one.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.interpreter import interpreted, poisoned_memory

from loftq_cli.triton_kernels.codebook.contract import dequantize_codebook, quantize_codebook
from loftq_cli.triton_kernels.merging.contract import merge_codebook, retention_sums

pytest.importorskip("triton")

pytestmark = pytest.mark.interpreter
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned():
    with poisoned_memory():
        yield


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def quantized(
    shape: tuple[int, int], block_size: int, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Codes and constants, and the float64 matrix that they decode to in `dtype`."""
    codes = quantize_codebook(normal(*shape), "nf4", block_size)
    decoded = dequantize_codebook(*codes, "nf4", block_size, shape[0] * shape[1], dtype)
    return codes, decoded.view(shape).double()


def assert_merged(merged: torch.Tensor, exact: torch.Tensor, out_dtype: torch.dtype) -> None:
    """To half a step of `out_dtype`, and 2^-24 of the sums before: the largest weights here are smaller than 1."""
    assert merged.dtype == out_dtype and merged.shape == exact.shape
    torch.testing.assert_close(merged.double(), exact, rtol=torch.finfo(out_dtype).eps / 2, atol=2e-7)


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_merged_weight_is_what_codes_decode_to_plus_the_adapter(dtype, out_dtype):
    codes, decoded = quantized((70, 192), 64, dtype)
    lora_A, lora_B = normal(8, 192, seed=1), normal(70, 8, seed=2)
    merged = interpreted(merge_codebook, *codes, "nf4", 64, (70, 192), dtype, lora_A, lora_B, 2.0, out_dtype)
    assert_merged(merged, decoded + 2.0 * (lora_B.double() @ lora_A.double()), out_dtype)


@pytest.mark.parametrize("rank", [1, 3, 16, 64])
@pytest.mark.parametrize("shape", [(1, 64), (65, 66), (130, 128), (3, 10), (7, 33)])
def test_any_rank_and_any_shape_is_merged(shape, rank):
    codes, decoded = quantized(shape, 64, torch.bfloat16)
    lora_A, lora_B = normal(rank, shape[1], seed=1), normal(shape[0], rank, seed=2)
    merged = interpreted(merge_codebook, *codes, "nf4", 64, shape, torch.bfloat16, lora_A, lora_B, 0.25, torch.float32)
    assert_merged(merged, decoded + 0.25 * (lora_B.double() @ lora_A.double()), torch.float32)


@pytest.mark.parametrize("block_size", [32, 96, 128, 256])
def test_every_block_size_is_merged_also_where_blocks_cross_rows(block_size):
    shape = (9, 130)
    codes, decoded = quantized(shape, block_size, torch.float32)
    lora_A, lora_B = normal(4, 130, seed=1, dtype=torch.bfloat16), normal(9, 4, seed=2, dtype=torch.float16)
    merged = interpreted(
        merge_codebook, *codes, "nf4", block_size, shape, torch.float32, lora_A, lora_B, 1.0, torch.float32
    )
    assert_merged(merged, decoded + lora_B.double() @ lora_A.double(), torch.float32)


def test_an_adapter_that_adds_nothing_leaves_what_codes_decode_to():
    codes, decoded = quantized((70, 66), 64, torch.bfloat16)
    lora_A, lora_B = normal(4, 66, seed=1), torch.zeros(70, 4)
    merged = interpreted(
        merge_codebook, *codes, "nf4", 64, (70, 66), torch.bfloat16, lora_A, lora_B, 2.0, torch.bfloat16
    )
    assert torch.equal(merged.double(), decoded)


def test_the_reference_merges_the_same():
    codes, decoded = quantized((70, 66), 64, torch.bfloat16)
    lora_A, lora_B = normal(4, 66, seed=1), normal(70, 4, seed=2)
    merged = merge_codebook(*codes, "nf4", 64, (70, 66), torch.bfloat16, lora_A, lora_B, 2.0, torch.float32)
    assert_merged(merged, decoded + 2.0 * (lora_B.double() @ lora_A.double()), torch.float32)


# Retention.


@pytest.mark.parametrize("run", [interpreted, lambda operation, *tensors: operation(*tensors)], ids=["triton", "torch"])
@pytest.mark.parametrize("dtypes", [FLOATS, (torch.bfloat16, torch.float32, torch.float32)], ids=str)
@pytest.mark.parametrize("n", [1, 2047, 2049, 10_000])
def test_retention_is_the_projection_on_the_change(n, dtypes, run):
    base, requantized, delta = (normal(n, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes))
    found = run(retention_sums, base, requantized, delta)
    b, r, d = base.double(), requantized.double(), delta.double()
    expected = torch.stack((b.square().sum(), d.square().sum(), ((r - b) * d).sum()))
    # The order of float64 additions; terms of the third cancel, so its tolerance is that of their magnitudes.
    assert found[:2].tolist() == pytest.approx(expected[:2].tolist(), rel=1e-12)
    assert found[2].item() == pytest.approx(expected[2].item(), abs=1e-12 * float(((r - b) * d).abs().sum()))


def test_a_change_that_survives_whole_is_retained_whole():
    base, delta = normal(50, 60), normal(50, 60, seed=1)
    found = interpreted(retention_sums, base, base + delta, delta)
    assert found[2] / found[1] == pytest.approx(1.0, abs=1e-6)  # base + delta is rounded to float32
    assert interpreted(retention_sums, base, base, delta)[2] == 0.0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_retention_holds_what_float32_does_not(scale):
    base, delta = normal(500) * scale, normal(500, seed=1) * scale
    found = interpreted(retention_sums, base, delta, delta)
    expected = ((delta.double() - base.double()) * delta.double()).sum()
    assert found[2].item() == pytest.approx(expected.item(), rel=1e-10)


def test_nan_is_not_lost():
    base, delta = normal(5000), normal(5000, seed=1)
    delta[4999] = math.nan
    assert interpreted(retention_sums, base, base, delta).isnan().tolist() == [False, True, True]


def test_nothing_is_retained_of_nothing():
    assert interpreted(retention_sums, *(torch.empty(0, 4) for _ in range(3))).tolist() == [0.0, 0.0, 0.0]


def test_what_does_not_fit_is_refused():
    codes, _ = quantized((4, 64), 64, torch.float32)
    options = (torch.float32, normal(2, 64), normal(4, 2), 1.0, torch.float32)
    with pytest.raises(ValueError, match="packed must be uint8 with 160 elements"):
        merge_codebook(*codes, "nf4", 64, (5, 64), *options)
    with pytest.raises(ValueError, match=r"do not make \(2, 128\)"):
        merge_codebook(*codes, "nf4", 64, (2, 128), *options)
    with pytest.raises(ValueError, match=r"shapes differ: \(4,\) and \(5,\)"):
        retention_sums(torch.zeros(4), torch.zeros(5), torch.zeros(4))
    with pytest.raises(ValueError, match="float64 is none of"):
        retention_sums(torch.zeros(4), torch.zeros(4), torch.zeros(4).double())
