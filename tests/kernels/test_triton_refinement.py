"""The search for block constants and their refinement by Triton's kernels, against the definition and float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.interpreter import interpreted
from test_refinement import FORMS, copied, normal, orthonormal, values_of
from test_refinement_weighted import semidefinite, spread, told_to, uneven

from loftq_cli.triton_kernels.refinement.contract import (
    Blocks,
    Levels,
    Refined,
    RowErrors,
    refine,
    refine_dense,
    residual,
    search_scales,
)

pytest.importorskip("triton")

pytestmark = pytest.mark.interpreter
EVERY_FORM = FORMS | {"int8": Levels(None, 8, "int", torch.float32)}
every_form = pytest.mark.parametrize("form", EVERY_FORM)


def lost_in(weight: torch.Tensor, blocks: Blocks, levels: Levels, importance: torch.Tensor) -> torch.Tensor:
    squares = (weight.double() - values_of(blocks, levels)).square() * importance.double()
    return squares.view(*blocks.scales.shape, -1).sum(dim=2)


def assert_same(found: Blocks, expected: Blocks, *, ties: int = 0) -> None:
    """The same codes in all but a few rows, where float32 does not see which of two is nearer; and constants that may
    be rounded to neighbours."""
    same = (found.codes == expected.codes).all(dim=1)
    assert int(same.logical_not().sum()) <= ties
    tolerance = max(1e-4, torch.finfo(expected.scales.dtype).eps)
    torch.testing.assert_close(found.scales[same], expected.scales[same], rtol=tolerance, atol=0.0, equal_nan=True)
    if expected.offsets is not None:
        assert found.offsets.dtype == expected.offsets.dtype
        torch.testing.assert_close(found.offsets[same], expected.offsets[same], rtol=tolerance, atol=1e-6)


@every_form
@pytest.mark.parametrize(("weighted", "block_size"), [(False, 32), (True, 24)])
def test_the_search_finds_what_the_definition_does(form, weighted, block_size):
    levels, weight, importance = EVERY_FORM[form], normal(13, 96), uneven(96) if weighted else None
    weight[5, :block_size] = 0.0
    expected = search_scales(weight, block_size, levels, importance=importance)
    found = interpreted(search_scales, weight, block_size, levels, importance=importance)
    assert_same(found, expected)
    moved = weight + 0.2 * normal(13, 96, seed=5)
    expected_warm = search_scales(moved, block_size, levels, expected, importance)
    warm = interpreted(search_scales, moved, block_size, levels, expected, importance)
    assert_same(warm, expected_warm)
    counted = torch.ones(96) if importance is None else importance
    for mine, theirs, of in ((found, expected, weight), (warm, expected_warm, moved)):
        errors = (lost_in(of, blocks, levels, counted) for blocks in (mine, theirs))
        torch.testing.assert_close(*errors, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(("form", "bad"), zip(EVERY_FORM, [math.nan, math.inf, -math.inf] * 3, strict=False))
def test_a_scale_is_not_finite_exactly_where_its_block_is_not(form, bad):
    levels, weight = EVERY_FORM[form], normal(5, 64)
    clean = search_scales(weight, 32, levels)
    weight[3, 40] = bad
    found = interpreted(search_scales, weight, 32, levels)
    assert torch.isfinite(found.scales).logical_not().nonzero().tolist() == [[3, 1]]
    others = torch.arange(5) != 3
    assert torch.equal(found.codes[others], clean.codes[others])


def test_a_table_that_leaves_its_cells_is_searched_as_well():
    levels, weight = FORMS["nf4"], normal(4, 64)
    wide = replace(levels, table=levels.table * 3.0)
    found, expected = interpreted(search_scales, weight, 32, wide), search_scales(weight, 32, wide)
    assert_same(found, expected)


@every_form
def test_the_error_that_is_given_is_that_of_the_codes(form):
    levels, weight, out = EVERY_FORM[form], normal(3, 1200), torch.empty(3, 1200)
    blocks, defined = search_scales(weight, 48, levels), torch.empty(3, 1200)
    squares = interpreted(residual, weight, blocks, 48, levels, out)
    expected = residual(weight, blocks, 48, levels, defined)
    assert torch.equal(out, defined)
    torch.testing.assert_close(squares, expected, rtol=1e-12, atol=0.0)


def assert_refined_alike(
    weight: torch.Tensor, levels: Levels, both: tuple[Blocks, Blocks], told: tuple[RowErrors | Refined, ...]
) -> None:
    """Of the definition and the kernels: the same codes and constants, and the errors that they tell."""
    (expected, found), (defined, mine) = both, told
    assert_same(found, expected, ties=1)
    same = (found.codes == expected.codes).all(dim=1)
    for ours, theirs in ((found.scales, expected.scales), (found.offsets, expected.offsets)):
        if ours is not None:  # but for those that are rounded to neighbours
            same &= torch.isclose(ours.float(), theirs.float(), rtol=1e-4, atol=1e-7).all(dim=1)
    assert int(same.sum()) >= len(weight) - 2
    torch.testing.assert_close(mine.before, defined.before, rtol=told_to(levels), atol=0.0)
    torch.testing.assert_close(mine.after[same], defined.after[same], rtol=10 * told_to(levels), atol=0.0)
    assert bool((mine.after <= mine.before * (1 + told_to(levels))).all())
    assert float(mine.after.sum()) < float(mine.before.sum())


REFINED_CASES = [
    ("nf4", 16, True),
    ("nf4, positive", 3, False),
    ("int3 symmetric", 5, True),
    ("int2", 1, True),
    ("int2 with biases", 12, True),
    ("int4 with biases", 5, False),
    ("int8", 5, True),
]


@pytest.mark.parametrize(("form", "rank", "fits_scales"), REFINED_CASES)
def test_the_refinement_finds_what_the_definition_does(form, rank, fits_scales):
    levels, weight, out = EVERY_FORM[form], normal(9, 24), torch.empty(9, 24)
    importance = uneven(24) if rank != 16 else None
    vectors = orthonormal(24, rank) if importance is None else spread(importance, orthonormal(24, rank))
    start = search_scales(weight, 12, levels, importance=importance)
    both, options = (copied(start), copied(start)), {"sweeps": 1 + (rank == 5), "fits_scales": fits_scales}
    defined = refine(weight, both[0], 12, levels, vectors, importance, **options)
    mine = interpreted(refine, weight, both[1], 12, levels, vectors, importance, **options, out=out)
    assert_refined_alike(weight, levels, both, (defined, mine))
    torch.testing.assert_close(out.double(), weight - values_of(both[1], levels), rtol=0.0, atol=1e-7)
    torch.testing.assert_close(mine.projections, out @ vectors, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block_size", [12, 144])  # held by a program, and by no one
@pytest.mark.parametrize(("form", "_", "fits_scales"), REFINED_CASES)
def test_the_refinement_under_any_matrix_finds_what_the_definition_does(form, _, fits_scales, block_size):
    if block_size == 144 and form != "int2 with biases":
        pytest.skip("like the others")
    columns = max(block_size, 24)
    levels, weight, hessian = EVERY_FORM[form], normal(9, columns), semidefinite(columns, 400)
    start, out = search_scales(weight, block_size, levels), torch.empty(9, columns)
    both, options = (copied(start), copied(start)), {"sweeps": 1, "fits_scales": fits_scales}
    defined = refine_dense(weight, both[0], block_size, levels, hessian, **options)
    mine = interpreted(refine_dense, weight, both[1], block_size, levels, hessian, **options, out=out)
    assert_refined_alike(weight, levels, both, (defined, mine))
    torch.testing.assert_close(out.double(), weight - values_of(both[1], levels), rtol=0.0, atol=1e-7)


def test_what_no_kernel_holds_is_refined_as_well():
    wide = replace(FORMS["nf4"], table=FORMS["nf4"].table * 3.0)
    weight, hessian, vectors = normal(4, 32), semidefinite(32, 40), torch.zeros(32, 1100)
    vectors[:, :4] = orthonormal(32, 4)
    for levels, operation, space in ((wide, refine_dense, hessian), (FORMS["nf4"], refine, vectors)):
        start = search_scales(weight, 16, levels)
        both, options = (copied(start), copied(start)), {"sweeps": 1, "fits_scales": True}
        defined = operation(weight, both[0], 16, levels, space, **options)
        mine = interpreted(operation, weight, both[1], 16, levels, space, **options)
        assert_refined_alike(weight, levels, both, (defined, mine))


@pytest.mark.parametrize("form", ["nf4", "int2 with biases"])
def test_a_row_that_is_not_finite_spoils_no_other(form):
    levels, weight, hessian, vectors = EVERY_FORM[form], normal(6, 32), semidefinite(32, 60), orthonormal(32, 4)
    clean, spoiled = search_scales(weight, 16, levels), weight.clone()
    spoiled[4, 3] = math.nan
    others = torch.arange(6) != 4
    for operation, space in ((refine, vectors), (refine_dense, hessian)):
        expected, found = copied(clean), copied(clean)
        interpreted(operation, weight, expected, 16, levels, space, sweeps=1, fits_scales=True)
        told = interpreted(operation, spoiled, found, 16, levels, space, sweeps=1, fits_scales=True)
        assert torch.equal(found.codes[others], expected.codes[others])
        assert int(found.codes.max()) < 2**levels.bits
        assert torch.isfinite(told.after).tolist() == others.tolist()
