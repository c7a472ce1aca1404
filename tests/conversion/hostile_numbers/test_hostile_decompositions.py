"""Decompositions of residuals of any size, and errors of weights of any size."""

from __future__ import annotations

import math

import pytest
import torch
from support.hostile_matrices import COLUMNS, ROWS, SIZE, evenly, normal

from loftq_cli.errors import NumericError
from loftq_cli.methods.lowrank import make_solver, truncated_svd
from loftq_cli.tensors.metrics import group_errors, layer_error
from loftq_cli.tensors.rows import TensorRows

# Decompositions.


@pytest.mark.parametrize("svd", ["fast", "faithful", "exact"])
@pytest.mark.parametrize("size", [1e-42, 1e-36, 1e-18, 1e18, 1e30, 1e36])
def test_a_residual_of_any_size_is_decomposed_like_one_of_usual_size(svd, size):
    matrix = normal(96, 128)
    factors = make_solver(svd, 4, (96, 128), torch.Generator().manual_seed(0))(matrix * size)
    product = factors.left.double() @ factors.right.double()
    left = float((matrix.double() * size - product).norm() / (matrix.double() * size).norm())
    singular = torch.linalg.svdvals(matrix.double())
    least = float(singular[4:].norm() / singular.norm())
    # Of subnormal numbers a few digits are left, and the root of their singular values rounds.
    assert left <= least * (1.02 if size > 1e-40 else 1.2)
    if size > 1e-40:
        assert factors.gain == pytest.approx(size**2 * float(singular[:4].square().sum()), rel=0.1)


@pytest.mark.parametrize("svd", ["fast", "faithful"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_iteration_goes_on_after_a_matrix_that_had_to_be_scaled(svd, dtype):
    solve = make_solver(svd, 4, (96, 128), torch.Generator().manual_seed(0))
    for size in (1e37, 1.0, 1e37, 1e37):
        matrix = (normal(96, 128) * size).to(dtype)
        factors = solve(matrix)
        left = (matrix.double() - factors.left.double() @ factors.right.double()).norm() / matrix.double().norm()
        assert float(left) < 0.95


def without_convergence(function, only=None):
    """`function` of LAPACK that does not converge: always, or on one dtype."""

    def fail(matrix, *arguments, **options):
        if only is None or matrix.dtype == only:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return function(matrix, *arguments, **options)

    return fail


@pytest.mark.parametrize("svd", ["fast", "faithful", "exact"])
def test_lapack_is_asked_again_in_float64_and_by_another_algorithm(monkeypatch, svd):
    matrix = normal(96, 128)
    expected = make_solver(svd, 4, (96, 128), torch.Generator().manual_seed(0))(matrix)
    for only in (torch.float32, None):
        monkeypatch.setattr(torch.linalg, "eigh", without_convergence(torch.linalg.eigh, only))
        found = make_solver(svd, 4, (96, 128), torch.Generator().manual_seed(0))(matrix)
        torch.testing.assert_close(found.left @ found.right, expected.left @ expected.right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("svd", ["fast", "faithful", "exact"])
def test_a_decomposition_that_is_not_found_says_what_to_do(monkeypatch, svd):
    for name in ("eigh", "svd"):
        monkeypatch.setattr(torch.linalg, name, without_convergence(getattr(torch.linalg, name)))
    with pytest.raises(NumericError, match="no singular value decomposition") as caught:
        make_solver(svd, 4, (96, 128), torch.Generator().manual_seed(0))(normal(96, 128))
    assert "--svd exact" in str(caught.value.hint)
    assert "--method qlora" in str(caught.value.hint)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_residual_that_is_not_finite_is_no_crash(value):
    matrix = normal(96, 128)
    matrix[5, 7] = value
    for svd in ("fast", "faithful"):
        with pytest.raises(NumericError):
            make_solver(svd, 4, (96, 128), torch.Generator().manual_seed(0))(matrix)
    with pytest.raises(NumericError):
        truncated_svd(matrix, 4)


# Errors.


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-23, 1.0, 1e19, 1e30, 3e38])
def test_errors_of_weights_of_any_size_are_those_of_float64(size):
    weight, decoded = evenly(ROWS, COLUMNS) * size, evenly(ROWS, COLUMNS) * (size * 0.9)
    error = layer_error(TensorRows(weight), TensorRows(decoded), None)
    difference = (weight - decoded).double()
    assert error.error == pytest.approx(float(difference.norm() / weight.double().norm()))
    assert error.max_error == pytest.approx(float(difference.abs().max()))
    groups = group_errors(TensorRows(weight), TensorRows(decoded), None, SIZE)
    ratios = difference.view(-1, SIZE).norm(dim=1) / weight.double().view(-1, SIZE).norm(dim=1)
    assert groups.mean_error == pytest.approx(float(ratios.mean()))
    assert groups.max_error == pytest.approx(float(ratios.max()))
