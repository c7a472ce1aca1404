"""`keep_base`: a base that counts alone too. Between base + adapter only (0) and the base alone (1), a step costs
(1 − keep_base)·c(E − D) + keep_base·c(E), with E = W − dequant(Q), D = s·B·A and c(X) = tr(X·H·Xᵀ); γ = 1 − keep_base.
Expected values are float64 arithmetic on the stored numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import models

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
    "int4": AffineSpec(4, 32, symmetric=False, scale_dtype="float32"),
    "int2, float offsets": AffineSpec(2, 32, symmetric=False, zero_point="float"),
}
STATISTICS = ("none", "diagonal", "full")
SHARES = (0.25, 0.5, 0.75, 1.0)
PLAIN, POOLED = LoraSpec(8, 8), LoraSpec(3, 3, pooling=Pooling("paper", 32))
ADAPTERS = {"plain": ("loftq", PLAIN), "pooled": ("qalora", POOLED)}
# A pooled adapter needs integers with zero points.
PAIRS = [*((name, "plain") for name in FORMATS), ("int4", "pooled")]
every_format = pytest.mark.parametrize("name", FORMATS)
every_statistic = pytest.mark.parametrize("kind", STATISTICS)
every_share = pytest.mark.parametrize("keep_base", SHARES)


@pytest.fixture(autouse=True, scope="module")
def compiled_kernels() -> Iterator[None]:
    use_compiled_kernels()
    yield
    use_reference_kernels()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(seed: int = 0) -> torch.Tensor:
    """Noise, and a few strong directions, as weights have."""
    return 0.05 * draw(96, 128, seed=seed) + 0.02 * draw(96, 4, seed=seed + 1) @ draw(4, 128, seed=seed + 2)


def statistics(kind: str) -> torch.Tensor | None:
    """E[x·xᵀ] of correlated inputs with a few large channels; the diagonal alone; or None."""
    inputs = draw(1000, 128, seed=5) @ draw(128, 128, seed=6)
    inputs[:, :3] *= 20.0
    moment = inputs.T @ inputs / len(inputs)
    return {"none": None, "diagonal": moment.diagonal().contiguous(), "full": moment}[kind]


def hessian_of(kind: str) -> torch.Tensor:
    """H in float64, with a mean diagonal of 1 and a tenth added; the products of a full H are shrunk by 0.3."""
    moment = statistics(kind)
    if moment is None:
        return torch.eye(128, dtype=torch.float64)
    hessian = (torch.diag(moment) if moment.dim() == 1 else moment).double()
    hessian, one = hessian / hessian.diagonal().mean(), torch.eye(128, dtype=torch.float64)
    return 0.7 * hessian + (0.3 * hessian.diagonal() + 0.1) * one


def cost(error: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((error.double() @ hessian) * error.double()).sum())


def initialize(
    weight: torch.Tensor,
    name: str,
    kind: str = "none",
    *,
    adapter: str = "plain",
    method: str | None = None,
    **fit: Any,
) -> tuple[Initialization, Quantizer, Weighting]:
    default_method, lora = ADAPTERS[adapter]
    weighting = make_weighting(statistics(kind), lora.group_size)
    scales = "absmax" if fit.get("fit") == "loftq" else "search"
    quantizer = make_quantizer(FORMATS[name], "float32", scales, weighting.importance)
    init = "residual" if adapter == "pooled" else None
    fitting = Fitting(**{"fit": "joint", "iterations": 3, "svd": "exact", "init": init, **fit})
    generator = torch.Generator().manual_seed(0)
    initialization = load_method(method or default_method)(
        TensorRows(weight), quantizer, lora, fitting, generator=generator, weighting=weighting
    )
    return initialization, quantizer, weighting


def objective(
    weight: torch.Tensor, initialization: Initialization, quantizer: Quantizer, keep_base: float, hessian: torch.Tensor
) -> float:
    """(1 − keep_base)·c(E − D) + keep_base·c(E) of the stored base and adapter."""
    error = weight - quantizer.dequantize(initialization.quantized)
    adapted = error - adapter_delta(initialization.lora)
    return (1.0 - keep_base) * cost(adapted, hessian) + keep_base * cost(error, hessian)


@every_share
@every_statistic
@pytest.mark.parametrize(("name", "adapter"), [pair for pair in PAIRS if pair[0] != "nf4"])
def test_the_returned_step_is_the_cheapest_and_its_error_is_the_objective_of_what_is_stored(
    name: str, kind: str, keep_base: float, adapter: str
) -> None:
    weight, hessian = matrix(), hessian_of(kind)
    initialization, quantizer, _ = initialize(weight, name, kind, adapter=adapter, rounds=2, keep_base=keep_base)
    least = min(initialization.iteration_errors)
    expected = objective(weight, initialization, quantizer, keep_base, hessian) / cost(weight, hessian)
    assert initialization.iteration_errors[initialization.best_iteration - 1] == least
    assert least == pytest.approx(math.sqrt(expected), rel=1e-3)


@every_share
@pytest.mark.parametrize(("name", "adapter"), [pair for pair in PAIRS if pair[0].startswith("int")])
def test_no_alternation_of_the_papers_fit_raises_the_objective(name: str, adapter: str, keep_base: float) -> None:
    """Without statistics, groups that would be farther from W − γ·D keep their older codes."""
    for seed in range(3):
        options = {"fit": "loftq", "iterations": 6, "keep_base": keep_base}
        initialization, _, _ = initialize(matrix(seed), name, adapter=adapter, **options)
        errors = initialization.iteration_errors
        assert len(errors) == (1 if keep_base == 1.0 else 6)
        assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))


@every_share
@every_statistic
@pytest.mark.parametrize(("name", "adapter"), PAIRS)
def test_no_round_raises_the_objective(name: str, kind: str, keep_base: float, adapter: str) -> None:
    initialization, _, _ = initialize(
        matrix(), name, kind, adapter=adapter, iterations=2, rounds=3, keep_base=keep_base
    )
    count = 1 if keep_base == 1.0 else 2
    alternations, rounds = initialization.iteration_errors[:count], initialization.iteration_errors[count:]
    assert rounds[0] < min(alternations) * (1 + 1e-6)
    # A round that gains nothing is not kept; the next round begins where that round began.
    assert all(later < 1.003 * min(rounds[:place]) for place, later in enumerate(rounds) if place)


@every_statistic
@every_format
def test_a_share_of_almost_nothing_is_the_fit_of_base_and_adapter(name: str, kind: str) -> None:
    weight = matrix()
    codes = []
    for keep_base in (0.0, 1e-12):
        initialization, quantizer, _ = initialize(weight, name, kind, rounds=2, keep_base=keep_base)
        codes.append(quantizer.dequantize(initialization.quantized))
    assert torch.equal(*codes)


@pytest.mark.parametrize("rounds", [0, 2])
@every_statistic
@every_format
def test_a_base_that_counts_wholly_is_the_base_of_qlora(name: str, kind: str, rounds: int) -> None:
    weight, hessian = matrix(), hessian_of(kind)
    alone, quantizer, _ = initialize(weight, name, kind, method="qlora", rounds=rounds)
    initialization, _, _ = initialize(weight, name, kind, rounds=rounds, keep_base=1.0)
    decoded = quantizer.dequantize(initialization.quantized)
    if rounds and kind != "full":
        # Every code is the nearest already: rounds may tie, and the fit then keeps the step before the round.
        different = (decoded - quantizer.dequantize(alone.quantized)).abs() > 1e-5
        assert float(different.double().mean()) < 0.01
    else:
        assert torch.equal(decoded, quantizer.dequantize(alone.quantized))
    # The adapter is the best of rank 8 for the error of the base: the SVD of E·C, in float64.
    error, root = (weight - decoded).double(), torch.linalg.cholesky(hessian)
    dropped = torch.linalg.svdvals(error @ root)[PLAIN.rank :]
    assert cost(error - adapter_delta(initialization.lora), hessian) == pytest.approx(
        float(dropped.square().sum()), rel=1e-4
    )


@every_statistic
def test_a_pooled_adapter_over_a_base_that_counts_wholly_is_fitted_too(kind: str) -> None:
    weight = matrix()
    initialization, quantizer, _ = initialize(weight, "int4", kind, adapter="pooled", keep_base=1.0)
    alone = quantizer.quantize(TensorRows(weight))
    assert torch.equal(quantizer.dequantize(initialization.quantized), quantizer.dequantize(alone))
    assert bool(initialization.lora.lora_B.any())


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.75, 1.0])
def test_the_best_base_for_an_adapter_is_nearest_to_the_weights_less_gamma_times_the_adapter(gamma: float) -> None:
    """Every base of a tiny matrix: two rows of four columns, codes of two bits, under a full H."""
    scale, inputs = 0.4, draw(20, 4, seed=3).double()
    hessian = inputs.T @ inputs / 20
    levels = torch.tensor(list(itertools.product(range(-2, 2), repeat=4)), dtype=torch.float64) * scale
    weight, added = draw(2, 4, seed=1).double() * 0.5, draw(2, 4, seed=2).double() * 0.5
    for row in range(2):
        errors = weight[row] - levels  # [256, 4]
        adapted, target = errors - added[row], weight[row] - gamma * added[row]
        with_adapter, alone, distances = (
            ((rows @ hessian) * rows).sum(dim=1) for rows in (adapted, errors, target - levels)
        )
        costs = gamma * with_adapter + (1 - gamma) * alone
        assert int(costs.argmin()) == int(distances.argmin())
        # Both differ by a constant: the completed square of the derivation.
        constant = gamma * (1 - gamma) * float(added[row] @ hessian @ added[row])
        torch.testing.assert_close(costs, distances + constant)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.75, 1.0])
@pytest.mark.parametrize("group_size", [1, 32])
@every_statistic
def test_what_an_adapter_leaves_of_an_error_is_the_least_squares_minimum_over_its_lora_B(
    kind: str, group_size: int, gamma: float
) -> None:
    hessian, weighting = hessian_of(kind), make_weighting(statistics(kind), group_size)
    error = matrix(seed=7).double()
    lora_A = draw(3, 128 // group_size, seed=8)
    vectors = torch.linalg.qr(weighting.right_of(lora_A).T).Q
    left = weighting.left_over(vectors, gamma)
    if left.hessian is not None:
        remaining = left.hessian.double()
    else:
        importance = torch.ones(128) if left.importance is None else left.importance
        absorbed = torch.zeros(128, 1) if left.vectors is None else left.vectors
        remaining = torch.diag(importance.double()) - absorbed.double() @ absorbed.double().T
    # The normal equations of lora_B in float64, by the pooled rows of lora_A.
    rows = lora_A.double().repeat_interleave(group_size, dim=1)
    lora_B = error @ hessian @ rows.T @ torch.linalg.inv(rows @ hessian @ rows.T)
    expected = gamma * cost(error - lora_B @ rows, hessian) + (1 - gamma) * cost(error, hessian)
    assert cost(error, remaining) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@every_statistic
@pytest.mark.parametrize("name", ["int4", "int2, float offsets"])
def test_a_round_of_codes_is_the_coordinate_descent_of_float64(name: str, kind: str, gamma: float) -> None:
    weight, weighting = matrix(), make_weighting(statistics(kind), 1)
    quantizer = make_quantizer(FORMATS[name], "float32", "search", weighting.importance)
    quantized = quantizer.quantize(TensorRows(weight))
    root = torch.linalg.cholesky(hessian_of(kind))
    error = (weight - quantizer.dequantize(quantized)).double()
    vectors = torch.linalg.svd(error @ root).Vh[:8].T  # V
    remaining = hessian_of(kind) - gamma * (root @ vectors) @ (root @ vectors).T
    refinement = quantizer.refine(
        TensorRows(weight), quantized, weighting.left_over(vectors.float(), gamma), fits_scales=False
    )
    scales = quantized.scales.double().repeat_interleave(32, dim=1)
    codes, before = quantized.codes.double(), cost(error, remaining)
    for j in range(128):
        curvature = remaining[j, j]
        step = (error @ remaining[:, j]) / curvature / scales[:, j]  # to the minimum, in codes
        moved = (codes[:, j] + step).round().clamp(0, 2 ** FORMATS[name].bits - 1)
        error[:, j] -= (moved - codes[:, j]) * scales[:, j]
        codes[:, j] = moved
    assert refinement is not None
    assert float((refinement.quantized.codes != codes).double().mean()) < 0.002
    assert refinement.before == pytest.approx(before, rel=1e-3)
    assert refinement.after == pytest.approx(cost(error, remaining), rel=1e-3)
    assert refinement.after < 0.9995 * refinement.before


@pytest.mark.parametrize(
    ("name", "fit", "shares"),
    [
        ("nf4", "loftq", SHARES),
        ("nf4", "joint", SHARES),
        ("int4", "loftq", SHARES),
        ("int4", "joint", SHARES),
        # Alternations search constants longer than a single quantization: 0.75 has 0.2 % less error of the base than 1.
        ("int2, float offsets", "joint", SHARES[:-1]),
    ],
)
def test_more_keeps_more_of_the_base_and_less_of_base_and_adapter(
    name: str, fit: str, shares: tuple[float, ...]
) -> None:
    """On real matrices: the error of the base falls, the error of base + adapter rises, with every step."""
    tensors = load_file(models.minilm() / "model.safetensors")
    weights = [
        tensors[f"encoder.layer.{layer}.{part}.weight"].float()[:192]
        for layer, part in ((0, "attention.self.query"), (3, "attention.output.dense"), (5, "intermediate.dense"))
    ]
    alone, adapted = [], []
    for keep_base in (0.0, *shares):
        squares = torch.zeros(2, dtype=torch.float64)
        for weight in weights:
            options = {"fit": fit, "iterations": 6, "svd": "fast", "keep_base": keep_base}
            initialization, quantizer, _ = initialize(weight, name, **options)
            error = weight - quantizer.dequantize(initialization.quantized)
            delta = adapter_delta(initialization.lora)
            squares += torch.stack([error.double().square().sum(), (error - delta).double().square().sum()])
        alone.append(float(squares[0]))
        adapted.append(float(squares[1]))
    assert all(after < before for before, after in itertools.pairwise(alone))
    assert all(after > before for before, after in itertools.pairwise(adapted))


def test_a_principal_start_goes_back_into_a_base_that_counts() -> None:
    """The principal part is in the adapter alone where the base does not count, and in the base where it does."""
    weight = matrix() + 0.2 * draw(96, 4, seed=11) @ draw(4, 128, seed=12)
    relative_errors = []
    for keep_base in (0.0, 0.5):
        options = {"iterations": 11, "start": "principal", "keep_base": keep_base}
        initialization, quantizer, _ = initialize(weight, "nf4", **options)
        relative_errors.append(float((weight - quantizer.dequantize(initialization.quantized)).norm() / weight.norm()))
    assert relative_errors[0] > 0.5
    assert relative_errors[1] < 0.2
