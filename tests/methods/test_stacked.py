"""LoftQ of a stack of matrices finds what LoftQ of each finds, and says which are not ordinary. With the plain-torch
definitions of the kernels, on a processor.
"""

from __future__ import annotations

import pytest
import torch

from loftq_cli.methods.method import Fitting, load_method
from loftq_cli.methods.stacked import StackedInitialization, alternate_stack, orthonormal_stack, quantize_once
from loftq_cli.quant.codebook_stack import unstacked
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import CodebookSpec, LoraSpec

SPEC = CodebookSpec("nf4", 64, double_quant=True)
PLAIN = CodebookSpec("nf4", 32, double_quant=False)


def weights(n: int = 3, shape: tuple[int, int] = (320, 384), seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(n, shape[0], 1, generator=generator) + 0.5
    return (torch.randn(n, *shape, generator=generator) * 0.05 * scales).bfloat16()


def starts(n: int, columns: int, rank: int) -> torch.Tensor:
    return torch.stack([torch.randn(columns, rank, generator=torch.Generator().manual_seed(i)) for i in range(n)])


def alternated(weight: torch.Tensor, spec: CodebookSpec, lora: LoraSpec, iterations: int = 5) -> StackedInitialization:
    return alternate_stack(weight, spec, "bfloat16", lora, iterations, starts(len(weight), weight.shape[2], lora.rank))


def true_error(found: StackedInitialization, weight: torch.Tensor, spec: CodebookSpec, scaling: float, i: int) -> float:
    """||W - dequant(Q) - s·B·A||² in float64, from the codes and constants as they are stored."""
    assert found.alternation is not None
    shape = (weight.shape[1], weight.shape[2])
    quantized = unstacked(found.packed, found.constants, spec, shape, "bfloat16", i)
    decoded = make_quantizer(spec, "bfloat16").dequantize(quantized).double()
    product = found.alternation.lora_B[i].double() @ found.alternation.lora_A[i].double()
    return float((weight[i].double() - decoded - scaling * product).square().sum())


@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["double quantization", "plain constants"])
@pytest.mark.parametrize("lora", [LoraSpec(16, 16.0), LoraSpec(8, 32.0, rslora=True)], ids=["scaling 1", "rsLoRA"])
def test_each_matrix_gets_the_error_that_it_gets_alone(spec, lora):
    weight = weights()
    found = alternated(weight, spec, lora)
    assert bool(found.is_ordinary.all())
    assert found.alternation is not None
    ratios = []
    for i, matrix in enumerate(weight):
        alone = load_method("loftq")(
            TensorRows(matrix),
            make_quantizer(spec, "bfloat16"),
            lora,
            Fitting(iterations=5),
            generator=torch.Generator().manual_seed(i),
        )
        errors = (found.alternation.squared_errors[:, i] / found.sums[i, 0]).sqrt().tolist()
        # From another rounding the codes go another way: of a matrix this small, errors differ by up to 0.2 %, by which
        # neither is better.
        assert errors == pytest.approx(list(alone.iteration_errors), rel=3e-3)
        ratios.append(errors[-1] / alone.iteration_errors[-1])
        assert int(found.alternation.best_iteration[i]) == alone.best_iteration
        base = float((found.alternation.squared_base[i] / found.sums[i, 0]).sqrt())
        assert base == pytest.approx(alone.quantization_error, rel=1e-5)
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=1.5e-3)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_the_sums_are_those_of_what_is_stored(iterations):
    weight, lora = weights(), LoraSpec(8, 4.0)
    found = alternated(weight, SPEC, lora, iterations)
    for i in range(3):
        exact = true_error(found, weight, SPEC, lora.scaling, i)
        assert float(found.sums[i, 2]) == pytest.approx(exact, rel=1e-5)
        assert float(found.alternation.squared_errors[iterations - 1, i]) == pytest.approx(exact, rel=1e-3)
        assert float(found.sums[i, 0]) == pytest.approx(float(weight[i].double().square().sum()), rel=1e-9)


def test_the_best_iterate_is_the_one_that_is_returned_where_the_last_is_worse(monkeypatch):
    """The third of four is made the best by what the products say; its base is made again."""
    from loftq_cli.methods import stacked

    weight, lora = weights(2), LoraSpec(8, 8.0)
    third = alternated(weight, SPEC, lora, 3)
    original, calls = stacked.residual_product, []

    def worse_at_the_end(*arguments):
        product, squares = original(*arguments)
        calls.append(None)
        return product, squares * 4 if len(calls) == 3 + 4 else squares  # three cold steps, then one an iteration

    monkeypatch.setattr(stacked, "residual_product", worse_at_the_end)
    found = alternated(weight, SPEC, lora, 4)
    assert found.alternation.best_iteration.tolist() == [3, 3]
    assert torch.equal(found.packed, third.packed)
    assert torch.equal(found.alternation.lora_A, third.alternation.lora_A)
    assert torch.equal(found.sums, third.sums)


def test_what_a_matrix_becomes_does_not_depend_on_its_neighbours():
    weight = weights()
    together = alternated(weight, SPEC, LoraSpec(8, 8.0))
    for i in range(3):
        alone = alternate_stack(weight[i : i + 1], SPEC, "bfloat16", LoraSpec(8, 8.0), 5, starts(3, 384, 8)[i : i + 1])
        assert float(alone.sums[0, 2]) == pytest.approx(float(together.sums[i, 2]), rel=1e-6)


def test_quantizing_once_gives_the_bytes_of_the_quantizer():
    weight = weights()
    found = quantize_once(weight, SPEC, "bfloat16")
    assert found.alternation is None
    for i, matrix in enumerate(weight):
        expected = make_quantizer(SPEC, "bfloat16").quantize(TensorRows(matrix))
        made = unstacked(found.packed, found.constants, SPEC, (320, 384), "bfloat16", i)
        assert torch.equal(made.packed, expected.packed)
        assert torch.equal(made.absmax.codes, expected.absmax.codes)
        assert torch.equal(made.absmax.absmax, expected.absmax.absmax)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w.index_fill_(0, torch.tensor([3]), float("nan")),
        lambda w: w.index_fill_(0, torch.tensor([3]), float("inf")),
        lambda w: w.index_fill_(0, torch.tensor([3]), 0.0),
        lambda w: w.zero_(),
        lambda w: w.mul_(1e38).mul_(6),
        lambda w: w.view(-1)[:1].fill_(1e6),
    ],
    ids=["NaN", "Inf", "a row of zeros", "zeros", "huge", "an outlier that ruins constants"],
)
def test_what_is_unusual_is_noted_and_spoils_no_other_matrix(spoil):
    ordinary = alternated(weights(), SPEC, LoraSpec(8, 8.0))
    weight = weights()
    spoil(weight[1])
    found = alternated(weight, SPEC, LoraSpec(8, 8.0))
    assert found.is_ordinary.tolist() == [True, False, True]
    assert quantize_once(weight, SPEC, "bfloat16").is_ordinary.tolist() == [True, False, True]
    for i in (0, 2):
        assert float(found.sums[i, 2]) == pytest.approx(float(ordinary.sums[i, 2]), rel=1e-6)


def test_bases_are_orthonormal_and_span_what_the_columns_do():
    """Against Householder reflections in float64; of columns of very different sizes too."""
    columns = torch.randn(3, 300, 24, generator=torch.Generator().manual_seed(0))
    columns[1] *= 1e-12
    columns[2] *= torch.logspace(0, 6, 24)
    basis, is_found = orthonormal_stack(columns)
    assert bool(is_found.all())
    exact = torch.linalg.qr(columns.double()).Q
    for found, expected in zip(basis.double(), exact, strict=True):
        assert float((found.T @ found - torch.eye(24)).abs().max()) < 1e-5
        assert float((expected - found @ (found.T @ expected)).norm()) < 1e-4


def test_columns_of_zeros_have_a_basis_of_zeros():
    basis, is_found = orthonormal_stack(torch.zeros(1, 50, 4))
    assert bool(is_found.all()) and not bool(basis.any())
