"""Base and adapter fitted to each other: what no step may raise, what the best adapter is, and what stays the same when
weights are scaled or their rows change places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support import models

from loftq_cli.errors import NumericError
from loftq_cli.methods.method import Fitting, Initialization, load_method
from loftq_cli.methods.weighting import Weighting, make_weighting
from loftq_cli.quant.formats import Quantizer, make_quantizer
from loftq_cli.tensors.metrics import adapter_delta
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec, LoraSpec, Pooling
from loftq_cli.triton_kernels.backend import use_compiled_kernels, use_reference_kernels

FORMATS = {
    "nf4": CodebookSpec(),
    "nf4, plain constants": CodebookSpec(double_quant=False),
    "int4": AffineSpec(4, 32, symmetric=False, scale_dtype="bfloat16"),
    "int3, symmetric": AffineSpec(3, 32, symmetric=True, scale_dtype="float16"),
    "int2, float offsets": AffineSpec(2, 32, symmetric=False, zero_point="float"),
}
INTEGERS = [name for name in FORMATS if name.startswith("int") and "symmetric" not in name]
STATISTICS = ("none", "diagonal", "full")
JOINT = Fitting(iterations=3, fit="joint", start="principal", rounds=3, svd="exact")


@pytest.fixture(autouse=True, scope="module")
def compiled_kernels() -> Iterator[None]:
    """The definition says the same, in ten times the time."""
    use_compiled_kernels()
    yield
    use_reference_kernels()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(out_features: int = 96, in_features: int = 128, seed: int = 0) -> torch.Tensor:
    """Noise, and a few strong directions, as weights have."""
    noise = torch.randn(out_features, in_features, generator=generator(seed)) * 0.05
    left = torch.randn(out_features, 4, generator=generator(seed + 1))
    return noise + left @ torch.randn(4, in_features, generator=generator(seed + 2)) * 0.02


def second_moment(in_features: int = 128, seed: int = 5) -> torch.Tensor:
    """E[x·xᵀ] of inputs with correlations and a few channels far larger than the others."""
    x = torch.randn(1000, in_features, generator=generator(seed)) @ torch.randn(
        in_features, in_features, generator=generator(seed + 1)
    )
    x[:, :3] *= 20.0
    return x.T @ x / len(x)


def statistics(kind: str, in_features: int = 128) -> torch.Tensor | None:
    moment = second_moment(in_features)
    return {"none": None, "diagonal": moment.diagonal().contiguous(), "full": moment}[kind]


def fitted(
    weight: torch.Tensor,
    name: str,
    fitting: Fitting = JOINT,
    kind: str = "none",
    *,
    lora: LoraSpec | None = None,
    method: str = "loftq",
    given: torch.Tensor | None = None,
) -> tuple[Initialization, Quantizer, Weighting]:
    lora = lora or LoraSpec(8, 8)
    found = statistics(kind, weight.shape[1]) if given is None else given
    weighting = make_weighting(found, lora.group_size)
    quantizer = make_quantizer(FORMATS[name], "float32", "search", weighting.importance)
    made = load_method(method)(TensorRows(weight), quantizer, lora, fitting, generator=generator(), weighting=weighting)
    return made, quantizer, weighting


def damped(kind: str, in_features: int = 128) -> torch.Tensor:
    """H in float64 as errors are to be weighed by it: in units of its mean diagonal, to which a tenth is added; the
    products of a full one are shrunk by 0.3.
    """
    found = statistics(kind, in_features)
    if found is None:
        return torch.eye(in_features, dtype=torch.float64)
    h = (torch.diag(found) if found.dim() == 1 else found).double()
    h, one = h / h.diagonal().mean(), torch.eye(in_features, dtype=torch.float64)
    return 0.7 * h + (0.3 * h.diagonal() + 0.1) * one


def cost(error: torch.Tensor, h: torch.Tensor) -> float:
    """tr(E·H·Eᵀ) in float64."""
    return float(((error.double() @ h) * error.double()).sum())


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("name", FORMATS)
def test_no_round_raises_what_errors_cost(name, kind):
    for seed in range(3):
        made, _, _ = fitted(matrix(seed=seed), name, replace(JOINT, iterations=2), kind)
        alternations, rounds = made.iteration_errors[:2], made.iteration_errors[2:]
        assert len(rounds) == 3
        # One that gained nothing was not kept, and the next one began where it had.
        assert rounds[0] < min(alternations)
        assert all(later < 1.003 * min(rounds[:place]) for place, later in enumerate(rounds) if place)


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("name", FORMATS)
def test_the_best_is_returned_and_its_error_is_that_of_what_is_stored(name, kind):
    weight = matrix()
    made, quantizer, _ = fitted(weight, name, JOINT, kind)
    error = weight - quantizer.dequantize(made.quantized) - adapter_delta(made.lora)
    h = damped(kind)
    assert made.iteration_errors[made.best_iteration - 1] == min(made.iteration_errors)
    assert min(made.iteration_errors) == pytest.approx(math.sqrt(cost(error, h) / cost(weight, h)), rel=2e-3)


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("group_size", [1, 32])
def test_no_other_adapter_of_the_same_form_costs_less(group_size, kind):
    """The best one in float64, by the symmetric root of what pooled inputs have of H."""
    weight, rank, h = matrix(), 3, damped(kind)
    lora = LoraSpec(rank, rank, pooling=None if group_size == 1 else Pooling("paper", group_size))
    fitting = replace(JOINT, rounds=0, init="residual" if group_size > 1 else None)
    method = "loftq" if group_size == 1 else "qalora"
    made, quantizer, _ = fitted(weight, "int4", fitting, kind, lora=lora, method=method)
    lost = (weight - quantizer.dequantize(made.quantized)).double()
    pool = torch.eye(128, dtype=torch.float64).view(128, 128 // group_size, group_size).sum(dim=2)
    values, vectors = torch.linalg.eigh(pool.T @ h @ pool)
    inverse = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    u, s, vt = torch.linalg.svd(lost @ h @ pool @ inverse, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank] @ inverse @ pool.T
    assert cost(lost - adapter_delta(made.lora), h) <= (1 + 1e-5) * cost(lost - best, h)


@pytest.mark.parametrize("name", FORMATS)
def test_statistics_lower_what_errors_do_to_outputs(name):
    weight, lost = matrix(), {}
    h = statistics("full", 128).double()  # of the outputs themselves, without shrinking
    for kind in STATISTICS:
        made, quantizer, _ = fitted(weight, name, JOINT, kind)
        lost[kind] = cost(weight - quantizer.dequantize(made.quantized) - adapter_delta(made.lora), h)
    assert lost["full"] < 0.75 * lost["diagonal"]
    assert lost["full"] < 0.1 * lost["none"]


def layer_of_minilm() -> torch.Tensor:
    return load_file(models.minilm() / "model.safetensors")["encoder.layer.3.attention.output.dense.weight"].float()


@pytest.mark.parametrize(("name", "most"), [("nf4", 0.84), ("int4", 0.86), ("int2, float offsets", 0.67)])
def test_the_joint_fit_leaves_less_of_a_real_layer_than_the_papers(name, most):
    """By the same adapter on the same number of bits."""
    weight, lora = layer_of_minilm(), LoraSpec(16, 16)
    made, quantizer, _ = fitted(weight, name, Fitting(iterations=11, fit="joint", start="principal"), lora=lora)
    paper = make_quantizer(FORMATS[name], "float32")
    theirs = load_method("loftq")(
        TensorRows(weight), paper, lora, Fitting(iterations=5, svd="exact"), generator=generator()
    )
    ours = (weight - quantizer.dequantize(made.quantized) - adapter_delta(made.lora)).norm()
    assert ours <= most * (weight - paper.dequantize(theirs.quantized) - adapter_delta(theirs.lora)).norm()


@pytest.mark.parametrize("kind", STATISTICS)
def test_qlora_refines_its_codes_where_it_is_known_what_errors_cost(kind):
    weight, h = matrix(), statistics(kind, 128)  # of the outputs themselves, without shrinking
    h = damped(kind) if h is None or h.dim() == 1 else h.double()
    plain, quantizer, _ = fitted(weight, "int3, symmetric", Fitting(), kind, method="qlora")
    made, _, _ = fitted(weight, "int3, symmetric", Fitting(rounds=4), kind, method="qlora")
    before, after = (cost(weight - quantizer.dequantize(m.quantized), h) for m in (plain, made))
    # Without correlations every code is the nearest already.
    assert after < 0.6 * before if kind == "full" else after == pytest.approx(before, rel=1e-3)
    assert not made.lora.lora_B.any()


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "nf4"])
def test_weights_and_statistics_in_other_units_give_the_same_codes(name, kind):
    """Powers of two: nothing is rounded otherwise. (Double quantization has steps of its own.)"""
    weight, found = matrix(), statistics(kind)
    made, quantizer, _ = fitted(weight, name, JOINT, given=found)
    scaled, _, _ = fitted(weight * 0.25, name, JOINT, given=None if found is None else found * 64.0)
    assert torch.equal(quantizer.dequantize(made.quantized) * 0.25, quantizer.dequantize(scaled.quantized))
    assert torch.allclose(adapter_delta(made.lora) * 0.25, adapter_delta(scaled.lora), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "nf4"])
def test_rows_in_another_order_give_the_same_rows_in_that_order(name, kind):
    """But for codes whose decision hangs on the last bits of a sum over all rows."""
    weight, order = matrix(), torch.randperm(96, generator=generator())
    made, quantizer, _ = fitted(weight, name, JOINT, kind)
    turned, _, _ = fitted(weight[order].contiguous(), name, JOINT, kind)
    ours, theirs = quantizer.dequantize(made.quantized)[order], quantizer.dequantize(turned.quantized)
    assert float((ours != theirs).double().mean()) < 0.01
    assert min(made.iteration_errors) == pytest.approx(min(turned.iteration_errors), rel=1e-3)


def test_blocks_that_cross_rows_are_searched_and_not_refined():
    weight = matrix(64, 96)
    made, quantizer, _ = fitted(weight, "nf4", replace(JOINT, iterations=2))
    assert len(made.iteration_errors) == 2
    plain = make_quantizer(FORMATS["nf4"], "float32")
    alone = weight - plain.dequantize(plain.quantize(TensorRows(weight)))
    assert (weight - quantizer.dequantize(made.quantized) - adapter_delta(made.lora)).norm() < 0.9 * alone.norm()


@pytest.mark.parametrize("group_size", [1, 32])
@pytest.mark.parametrize("rank", [1, 40])
def test_inputs_of_few_directions_are_no_obstacle(rank, group_size):
    """Fewer than the adapter has, and channels that are always zero."""
    x = torch.zeros(50, 128)
    x[:, ::3] = torch.randn(50, 2, generator=generator()) @ torch.randn(2, 43, generator=generator(1))
    lora = LoraSpec(rank, rank, pooling=None if group_size == 1 else Pooling("peft", group_size))
    fitting = replace(JOINT, init="residual" if group_size > 1 else None)
    method = "loftq" if group_size == 1 else "qalora"
    made, quantizer, _ = fitted(matrix(), "int4", fitting, lora=lora, method=method, given=x.T @ x / 50)
    assert all(map(math.isfinite, made.iteration_errors))
    assert bool((quantizer.dequantize(made.quantized) + adapter_delta(made.lora)).isfinite().all())


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(8), -torch.ones(8), torch.full((8,), torch.nan), torch.zeros(8, 8), 4.0 - 3.0 * torch.eye(8)],
    ids=["zero", "negative", "NaN", "zero matrix", "indefinite"],
)
def test_what_no_inputs_have_is_refused(wrong):
    with pytest.raises(NumericError, match="statistics of its inputs are not"):
        make_weighting(wrong, 1)


def test_statistics_are_symmetric_up_to_the_rounding_of_float32_sums():
    """2·4096·2⁻²⁴ of √(H_ii·H_jj): twice the bound of a float32 sum over 4096 rows. A product that nobody symmetrized
    passes."""
    x = torch.randn(4096, 128, generator=generator()) * torch.logspace(-2, 2, 128)
    make_weighting(x.T @ x / len(x), 1)
    hessian = second_moment(128)
    scale = float((hessian[3, 3] * hessian[70, 70]).sqrt())
    for share, is_refused in ((0.9, False), (1.1, True)):
        wrong = hessian.clone()
        wrong[3, 70] += share * 2 * 4096 * 2.0**-24 * scale
        if is_refused:
            with pytest.raises(NumericError, match="the statistics of its inputs are not symmetric"):
                make_weighting(wrong, 1)
        else:
            make_weighting(wrong, 1)
