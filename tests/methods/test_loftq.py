"""What the methods compute, against the paper's algorithm written again in float64 with bitsandbytes' own quantizer."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from support import models

from loftq_cli.methods.lowrank import truncated_svd
from loftq_cli.methods.method import Fitting, load_method
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.tensors.metrics import adapter_delta, layer_error, total_error
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import CodebookSpec, LoraSpec

bnb = pytest.importorskip("bitsandbytes.functional")


def loftq(weight, lora, *, spec=None, iterations=5, dtype="float32", method="loftq", seed=0):
    quantizer = make_quantizer(spec or CodebookSpec(), dtype)
    generator = torch.Generator().manual_seed(seed)
    fitting = Fitting(iterations=iterations, svd="exact")
    initial = load_method(method)(TensorRows(weight), quantizer, lora, fitting, generator=generator)
    return initial, quantizer.dequantize(initial.quantized)


def error_of(weight, dequantized, lora):
    return layer_error(TensorRows(weight), TensorRows(dequantized), lora)


def papers_loftq(weight, rank, iterations, *, double_quant):
    """Algorithm 1 of arXiv 2310.08659, with a full SVD in float64 and bitsandbytes for the quantizer."""
    low_rank = torch.zeros_like(weight, dtype=torch.float64)
    errors = []
    for _ in range(iterations):
        packed, state = bnb.quantize_4bit(
            (weight - low_rank.float()).contiguous(), blocksize=64, quant_type="nf4", compress_statistics=double_quant
        )
        residual = weight.double() - bnb.dequantize_4bit(packed, state).double()
        u, s, vt = torch.linalg.svd(residual, full_matrices=False)
        low_rank = (u[:, :rank] * s[:rank]) @ vt[:rank]
        errors.append(float((residual - low_rank).norm() / weight.double().norm()))
    return errors


def gaussian(out_features=192, in_features=128, seed=0, scale=0.05):
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * scale


def minilm_matrices(*layers):
    tensors = load_file(models.minilm() / "model.safetensors")
    names = [n for n in tensors if any(f"layer.{i}." in n for i in layers) and n.endswith("weight")]
    return [tensors[n] for n in names if tensors[n].dim() == 2]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("out_features", "in_features", "rank"), [(192, 128, 8), (128, 192, 16), (64, 64, 64)])
def test_every_iteration_has_the_error_of_the_papers_algorithm(out_features, in_features, rank, double_quant):
    weight = gaussian(out_features, in_features)
    spec = CodebookSpec(double_quant=double_quant)
    initial, _ = loftq(weight, LoraSpec(rank, rank), spec=spec)
    expected = papers_loftq(weight, rank, 5, double_quant=double_quant)
    # float32 factors; a rounding at a threshold may change a code, which changes the error by its share of the matrix
    assert initial.iteration_errors == pytest.approx(expected, rel=2e-3, abs=1e-7)
    assert initial.iteration_errors[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("rank", "expected"), [(16, 0.0787), (64, 0.0612)])
def test_minilm_reaches_the_known_error(rank, expected):
    errors = []
    for weight in minilm_matrices(0, 5):
        initial, dequantized = loftq(weight, LoraSpec(rank, rank), spec=CodebookSpec(double_quant=False))
        errors.append(error_of(weight, dequantized, initial.lora))
    assert len(errors) == 12
    assert total_error(errors).error == pytest.approx(expected, abs=0.0005)


def test_minilm_quantized_alone_has_the_known_error():
    errors = []
    for weight in minilm_matrices(0, 5):
        _, dequantized = loftq(weight, LoraSpec(16, 16), spec=CodebookSpec(double_quant=False), method="qlora")
        errors.append(error_of(weight, dequantized, None))
    assert total_error(errors).error == pytest.approx(0.0932, abs=0.0005)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_error_is_the_same_for_every_alpha(rslora):
    weight = gaussian()
    errors = [
        loftq(weight, LoraSpec(16, alpha, rslora))[0].iteration_errors[-1] for alpha in (1.0, 8.0, 16.0, 32.0, 500.0)
    ]
    assert errors == pytest.approx([errors[0]] * 5, rel=1e-3)


def test_the_best_iterate_is_returned_and_says_which():
    weight = gaussian(seed=4)
    initial, dequantized = loftq(weight, LoraSpec(4, 4), iterations=12)
    best = min(range(12), key=lambda i: initial.iteration_errors[i])
    assert initial.best_iteration == best + 1
    assert error_of(weight, dequantized, initial.lora).error == pytest.approx(min(initial.iteration_errors), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_rounding_of_a_16_bit_adapter_is_inside_the_loop(dtype):
    weight = gaussian()
    initial, dequantized = loftq(weight, LoraSpec(16, 16, dtype=dtype), spec=CodebookSpec(double_quant=False))
    assert initial.lora.lora_A.dtype == initial.lora.lora_B.dtype == getattr(torch, dtype)
    by_hand = weight.double() - dequantized.double() - initial.lora.lora_B.double() @ initial.lora.lora_A.double()
    assert min(initial.iteration_errors) == pytest.approx(float(by_hand.norm() / weight.double().norm()), rel=1e-5)


def test_a_bfloat16_base_is_measured_as_the_loader_rounds_it():
    weight = gaussian().bfloat16().float()
    initial, dequantized = loftq(weight, LoraSpec(8, 8), dtype="bfloat16")
    assert torch.equal(dequantized, dequantized.bfloat16().float())
    assert error_of(weight, dequantized, initial.lora).error == pytest.approx(min(initial.iteration_errors), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, -0.25, 1e-30])
def test_constant_and_zero_matrices_are_held_exactly_or_nearly(value):
    weight = torch.full((64, 64), value)
    initial, dequantized = loftq(weight, LoraSpec(4, 4))
    assert torch.isfinite(initial.lora.lora_A).all()
    assert torch.isfinite(initial.lora.lora_B).all()
    assert error_of(weight, dequantized, initial.lora).error <= 1e-6


def test_qlora_starts_with_an_adapter_that_adds_nothing():
    weight = gaussian()
    initial, dequantized = loftq(weight, LoraSpec(16, 32), method="qlora", spec=CodebookSpec(double_quant=True))
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(initial.quantized.packed, packed.view(-1))
    assert torch.equal(dequantized, bnb.dequantize_4bit(packed, state))
    assert not initial.lora.lora_B.any()
    assert initial.iteration_errors == ()


def test_qloras_lora_a_is_drawn_as_peft_draws_it():
    initial, _ = loftq(gaussian(64, 4096), LoraSpec(32, 32), method="qlora")
    expected = torch.empty(32, 4096)
    torch.nn.init.kaiming_uniform_(expected, a=math.sqrt(5))
    assert float(initial.lora.lora_A.abs().max()) == pytest.approx(float(expected.abs().max()), rel=1e-3)
    assert float(initial.lora.lora_A.std()) == pytest.approx(float(expected.std()), rel=0.01)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64), (1, 64), (64, 1)])
def test_the_low_rank_product_is_the_best_one(shape):
    matrix = gaussian(*shape)
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    for rank in {1, min(shape) // 3 + 1, min(shape)}:
        left, right = truncated_svd(matrix, rank)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert float((left.double() @ right.double() - best).norm()) <= 1e-5 * float(matrix.norm())
        # balanced: both factors carry the root of the singular values
        assert left.double().norm(dim=0) == pytest.approx(s[:rank].sqrt(), rel=1e-4)
        assert right.double().norm(dim=1) == pytest.approx(s[:rank].sqrt(), rel=1e-4)
        assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_matrix_of_lower_rank_than_asked_for_gives_zero_columns_and_no_nan():
    matrix = gaussian(64, 3) @ gaussian(3, 48)
    left, right = truncated_svd(matrix, 8)
    assert float((left @ right - matrix).norm()) <= 1e-5 * float(matrix.norm())
    assert torch.isfinite(left).all()
    zero_left, zero_right = truncated_svd(torch.zeros(16, 8), 4)
    assert not zero_left.any()
    assert not zero_right.any()


def test_a_rank_that_the_matrix_does_not_have_is_refused():
    with pytest.raises(ValueError, match="rank 9"):
        truncated_svd(torch.zeros(16, 8), 9)


def test_delta_is_scaling_times_b_times_a():
    initial, _ = loftq(gaussian(), LoraSpec(16, 4.0, rslora=True))
    assert initial.lora.scaling == 1.0
    expected = initial.lora.lora_B.double() @ initial.lora.lora_A.double()
    assert float((adapter_delta(initial.lora) - expected).abs().max()) <= 1e-7


@pytest.mark.parametrize("svd", ["fast", "faithful", "exact"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_factors_carry_the_root_of_the_singular_values_with_every_solver(svd, dtype):
    weight = gaussian(320, 384)
    quantizer = make_quantizer(CodebookSpec(), "float32")
    initial = load_method("loftq")(
        TensorRows(weight),
        quantizer,
        LoraSpec(8, 8.0, dtype=dtype),
        Fitting(iterations=3, svd=svd),
        generator=torch.Generator().manual_seed(0),
    )
    rows, columns = initial.lora.lora_A.float().norm(dim=1), initial.lora.lora_B.float().norm(dim=0)
    assert torch.allclose(
        rows, columns, rtol=2e-3 if dtype == "float32" else 2e-2
    )  # U from iteration is orthonormal to 3e-4
