"""The search for block constants and their refinement by Triton's kernels, against the definition and float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from interpreter import interpreted
from test_refinement import FORMS, normal, values_of
from test_refinement_weighted import uneven

from loftq_cli.triton_kernels.refinement import Blocks, Levels, residual, search_scales

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
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block_size", [32, 24])
def test_the_search_finds_what_the_definition_does(form, weighted, block_size):
    levels, weight, importance = EVERY_FORM[form], normal(37, 96), uneven(96) if weighted else None
    weight[5, :block_size] = 0.0
    expected = search_scales(weight, block_size, levels, importance=importance)
    found = interpreted(search_scales, weight, block_size, levels, importance=importance)
    assert_same(found, expected)
    moved = weight + 0.2 * normal(37, 96, seed=5)
    expected_warm = search_scales(moved, block_size, levels, expected, importance)
    warm = interpreted(search_scales, moved, block_size, levels, expected, importance)
    assert_same(warm, expected_warm)
    counted = torch.ones(96) if importance is None else importance
    for mine, theirs, of in ((found, expected, weight), (warm, expected_warm, moved)):
        errors = (lost_in(of, blocks, levels, counted) for blocks in (mine, theirs))
        torch.testing.assert_close(*errors, rtol=1e-4, atol=1e-12)


@every_form
@pytest.mark.parametrize("bad", [math.nan, math.inf])
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
