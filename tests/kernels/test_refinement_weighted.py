"""Searched constants and refined codes where columns count differently or depend on each other: in float64, by brute
force, and compiled against defined.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_refinement import (
    BACKENDS,
    FORMS,
    ROUNDING,
    assert_same_blocks,
    copied,
    normal,
    orthonormal,
    values_of,
)

from loftq_cli.triton_kernels.backend import use_compiled_kernels, use_reference_kernels
from loftq_cli.triton_kernels.refinement.contract import Blocks, Levels, RowErrors, refine, refine_dense, search_scales

WEIGHTED_FORMS = FORMS | {"int8": Levels(None, 8, "int", torch.float32)}
every_form = pytest.mark.parametrize("form", WEIGHTED_FORMS)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both implementations, one after the other."""
    if request.param == "compiled":
        pytest.importorskip("numba")
        assert use_compiled_kernels() is None
    yield request.param
    use_reference_kernels()


def uneven(columns: int, seed: int = 4) -> torch.Tensor:
    """Importance over two orders of magnitude, and one column without any."""
    importance = 10.0 ** (2.0 * torch.rand(columns, generator=torch.Generator().manual_seed(seed)) - 1.0)
    importance[columns // 2] = 0.0
    return importance


def semidefinite(columns: int, rank: int, seed: int = 5) -> torch.Tensor:
    """A matrix of that rank, or less than full, with columns that count differently and depend on each other."""
    samples = torch.randn(rank, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    samples = (samples + 0.5 * samples.roll(1, dims=1)) * uneven(columns, seed).double().sqrt()
    return (samples.T @ samples / rank).float()


def spread(importance: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """√d·V."""
    return (importance.sqrt()[:, None] * vectors).contiguous()


def reduced(importance: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """float64: diag(d) − U·Uᵀ."""
    return torch.diag(importance.double()) - vectors.double() @ vectors.double().T


def errors_under(weight: torch.Tensor, blocks: Blocks, levels: Levels, hessian: torch.Tensor) -> torch.Tensor:
    """float64 [rows]: e·H·eᵀ."""
    error = weight.double() - values_of(blocks, levels)
    return ((error @ hessian.double()) * error).sum(dim=1)


def told_to(levels: Levels) -> float:
    """The digits that are told of an error. Those of 8 bits are small beside weights, which float32 rounds."""
    return 1e-4 if levels.bits == 8 else 1e-5


def lost_in(weight: torch.Tensor, blocks: Blocks, levels: Levels, importance: torch.Tensor) -> torch.Tensor:
    """float64 [rows, blocks]: the squared error of each block."""
    squares = (weight.double() - values_of(blocks, levels)).square() * importance.double()
    return squares.view(*blocks.scales.shape, -1).sum(dim=2)


# The search.


@every_form
def test_columns_that_count_more_lose_less(form, backend):
    levels, weight, importance = WEIGHTED_FORMS[form], normal(40, 192), uneven(192)
    even, found = search_scales(weight, 32, levels), search_scales(weight, 32, levels, importance=importance)
    plain, lost = (float(lost_in(weight, blocks, levels, importance).sum()) for blocks in (even, found))
    assert lost < 0.97 * plain
    warm = search_scales(weight, 32, levels, even, importance)
    of_start, of_warm = (lost_in(weight, blocks, levels, importance) for blocks in (even, warm))
    assert bool((of_warm <= of_start * (1 + ROUNDING)).all())


@pytest.mark.parametrize("form", ["nf4", "nf4, positive", "int3 symmetric"])
def test_the_search_comes_close_to_the_best_of_all_scales(form, backend):
    """Of 4 columns one counts half: 4000 scales are tried, each with the nearest codes."""
    levels, weight = replace(WEIGHTED_FORMS[form], scale_dtype=torch.float32), normal(30, 4)
    importance = torch.tensor([0.5, 0.3, 0.0, 0.2])
    found = search_scales(weight, 4, levels, importance=importance)
    lost = lost_in(weight, found, levels, importance)[:, 0]
    steps = torch.arange(2**levels.bits, dtype=torch.float64) - 2 ** (levels.bits - 1)
    steps = steps if levels.table is None else levels.table.double()
    factors = torch.linspace(0.02, 1.5, 2000, dtype=torch.float64)
    factors = torch.cat([factors, -factors]) if levels.is_signed else factors
    scales = weight.double().abs().amax(dim=1, keepdim=True) * factors / steps.abs().max()
    nearest = (weight.double()[:, None, :, None] - scales[..., None, None] * steps).square().amin(dim=3)
    best = (nearest * importance.double()).sum(dim=2).amin(dim=1)
    even = lost_in(weight, search_scales(weight, 4, levels), levels, importance)[:, 0]
    assert float((lost - best).sum()) < 0.6 * float((even - best).sum())


@every_form
def test_equal_importance_is_none(form, backend):
    levels, weight = WEIGHTED_FORMS[form], normal(20, 128)
    expected = search_scales(weight, 64, levels)
    for importance in (torch.ones(128), torch.full((128,), 0.25), torch.zeros(128)):
        assert_same_blocks(search_scales(weight, 64, levels, importance=importance), expected)
        warm = search_scales(weight * 1.01, 64, levels, expected, importance)
        assert_same_blocks(warm, search_scales(weight * 1.01, 64, levels, expected))


@every_form
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**20])
def test_importance_times_a_power_of_two_gives_the_same(form, factor, backend):
    levels, weight, importance, vectors = WEIGHTED_FORMS[form], normal(12, 128), uneven(128), orthonormal(128, 4)
    both = []
    for scaled in (importance, importance * factor):
        found = search_scales(weight, 64, levels, importance=scaled)
        moved = copied(found)
        refine(weight, moved, 64, levels, spread(scaled, vectors), scaled, sweeps=2, fits_scales=True)
        dense = copied(found)
        refine_dense(
            weight, dense, 64, levels, reduced(scaled, spread(scaled, vectors)).float(), sweeps=2, fits_scales=True
        )
        both.append((found, moved, dense))
    for one, other in zip(*both, strict=True):
        assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)
        assert one.offsets is None or torch.equal(one.offsets, other.offsets)


@every_form
def test_what_a_column_without_importance_loses_does_not_matter(form, backend):
    levels, weight, importance = WEIGHTED_FORMS[form], normal(20, 32), torch.ones(32)
    importance[7] = 0.0
    found = search_scales(weight, 32, levels, importance=importance)
    for column, limit in ((7, 0.0), (8, 1e-4)):
        changed = weight.clone()
        changed[:, column] *= 0.9  # far from the ends of most blocks
        other = search_scales(changed, 32, levels, importance=importance)
        same = (found.scales == other.scales).float().mean()
        assert float(same) > 0.8 if not limit else float(same) < 0.9


@every_form
def test_rows_are_searched_alone(form, backend):
    levels, weight, importance = WEIGHTED_FORMS[form], normal(70, 96), uneven(96)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(3))
    whole = search_scales(weight, 32, levels, importance=importance)
    part = search_scales(weight[order].contiguous(), 32, levels, importance=importance)
    assert torch.equal(part.codes, whole.codes[order]) and torch.equal(part.scales, whole.scales[order])


# The refinement.


@every_form
@pytest.mark.parametrize("fits_scales", [False, True])
def test_no_pass_raises_the_error_of_any_row_where_columns_count_differently(form, fits_scales, backend):
    levels, weight, importance = WEIGHTED_FORMS[form], normal(70, 96), uneven(96)
    vectors = spread(importance, orthonormal(96, 5))
    blocks = search_scales(weight, 32, levels, importance=importance)
    hessian = reduced(importance, vectors)
    before = errors_under(weight, blocks, levels, hessian)
    first, unused = before, blocks.codes[:, 48].clone()
    for _ in range(3):
        told = refine(weight, blocks, 32, levels, vectors, importance, sweeps=1, fits_scales=fits_scales)
        after = errors_under(weight, blocks, levels, hessian)
        assert bool((after <= before * (1 + ROUNDING)).all())
        torch.testing.assert_close(told.before, before, rtol=told_to(levels), atol=0.0)
        torch.testing.assert_close(told.after, after, rtol=told_to(levels), atol=0.0)
        before = after
    assert float(after.sum()) < 0.99 * float(first.sum())
    assert torch.equal(blocks.codes[:, 48], unused)  # the column without importance


@every_form
@pytest.mark.parametrize(("block_size", "rank"), [(64, 400), (48, 20), (8, 400)])
def test_no_pass_raises_the_error_of_any_row_under_any_matrix(form, block_size, rank, backend):
    levels, weight, hessian = WEIGHTED_FORMS[form], normal(70, 192), semidefinite(192, rank)
    blocks = search_scales(weight, block_size, levels, importance=hessian.diagonal().contiguous())
    before = errors_under(weight, blocks, levels, hessian)
    first, largest = before, float(hessian.diagonal().max())
    for fits_scales in (False, True, True):
        told = refine_dense(weight, blocks, block_size, levels, hessian, sweeps=1, fits_scales=fits_scales)
        after = errors_under(weight, blocks, levels, hessian)
        # What of the error lies where a singular matrix has nothing is lost in the digits of float32.
        slack = ROUNDING * largest * (weight.double() - values_of(blocks, levels)).square().sum(dim=1)
        assert bool((after <= before * (1 + ROUNDING) + slack).all())
        for mine, expected in ((told.before, before), (told.after, after)):
            assert bool(((mine - expected).abs() <= told_to(levels) * expected + slack).all())
        before = after
    assert float(after.sum()) < 0.98 * float(first.sum())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    n_blocks=st.integers(1, 4),
    block_size=st.sampled_from([1, 3, 8, 20]),
    rank=st.integers(0, 30),
    form=st.sampled_from(sorted(WEIGHTED_FORMS)),
    is_reduced=st.booleans(),
)
def test_from_any_codes_and_constants_no_pass_raises_the_error(
    seed, rows, n_blocks, block_size, rank, form, is_reduced
):
    levels, columns = WEIGHTED_FORMS[form], n_blocks * block_size
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if is_reduced:
        hessian = reduced(torch.ones(columns), orthonormal(columns, min(rank, columns), seed)).float()
    else:
        hessian = semidefinite(columns, rank, seed) if rank else torch.zeros(columns, columns)
    blocks = search_scales(weight, block_size, levels)
    blocks.codes.copy_(torch.randint(0, 2**levels.bits, (rows, columns), generator=generator))
    before = errors_under(weight, blocks, levels, hessian)
    slack = ROUNDING * (weight.double() - values_of(blocks, levels)).square().sum(dim=1) * float(hessian.abs().max())
    for fits_scales in (True, False, True):
        refine_dense(weight, blocks, block_size, levels, hessian, sweeps=1, fits_scales=fits_scales)
        after = errors_under(weight, blocks, levels, hessian)
        assert bool((after <= before + slack).all())
        before = after


@every_form
def test_a_matrix_and_its_factors_lead_to_the_same_error(form, backend):
    levels, weight, importance = WEIGHTED_FORMS[form], normal(70, 128), uneven(128)
    vectors = spread(importance, orthonormal(128, 6))
    hessian = reduced(importance, vectors)
    start = search_scales(weight, 32, levels, importance=importance)
    by_factors, by_matrix = copied(start), copied(start)
    one = refine(weight, by_factors, 32, levels, vectors, importance, sweeps=2, fits_scales=True)
    two = refine_dense(weight, by_matrix, 32, levels, hessian.float(), sweeps=2, fits_scales=True)
    torch.testing.assert_close(two.before, one.before, rtol=1e-5, atol=0.0)
    assert float((by_factors.codes == by_matrix.codes).float().mean()) > 0.995
    assert abs(float(one.after.sum() / two.after.sum()) - 1.0) < 1e-3


@pytest.mark.parametrize("form", ["nf4", "int4", "int2 with biases"])
def test_it_ends_where_no_code_changed_alone_lowers_the_error(form, backend):
    levels, weight, hessian = WEIGHTED_FORMS[form], normal(40, 3, seed=2), semidefinite(3, 8)
    blocks = search_scales(weight, 3, levels)
    blocks.codes.zero_()
    refine_dense(weight, blocks, 3, levels, hessian, sweeps=30, fits_scales=False)
    least = errors_under(weight, blocks, levels, hessian)
    slack = 2e-5 * (weight.double() - values_of(blocks, levels)).square().sum(dim=1) * float(hessian.max())
    for column in range(3):
        for code in range(2**levels.bits):
            other = copied(blocks)
            other.codes[:, column] = code
            assert bool((least <= errors_under(weight, other, levels, hessian) + slack).all())


@every_form
def test_the_fitted_scale_is_the_best_one_for_its_codes(form, backend):
    levels = replace(WEIGHTED_FORMS[form], scale_dtype=torch.float32)
    weight, hessian = normal(30, 32), semidefinite(32, 80)
    blocks = search_scales(weight, 32, levels)
    refine_dense(weight, blocks, 32, levels, hessian, sweeps=40, fits_scales=True)
    least = errors_under(weight, blocks, levels, hessian)
    for factor in (0.99, 0.999, 1.001, 1.01):
        other = replace(copied(blocks), scales=blocks.scales * factor)
        assert bool((least <= errors_under(weight, other, levels, hessian) * (1 + ROUNDING)).all())
        if levels.offset == "float":
            other = replace(copied(blocks), offsets=blocks.offsets * factor)
            assert bool((least <= errors_under(weight, other, levels, hessian) * (1 + ROUNDING)).all())


@every_form
def test_the_order_of_rows_changes_nothing(form, backend):
    levels, weight, hessian = WEIGHTED_FORMS[form], normal(100, 96), semidefinite(96, 200)
    start = search_scales(weight, 16, levels)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(3))

    def refined(rows: torch.Tensor) -> tuple[Blocks, RowErrors]:
        offsets = None if start.offsets is None else start.offsets[rows].clone()
        part = Blocks(start.codes[rows].clone(), start.scales[rows].clone(), offsets)
        return part, refine_dense(weight[rows].contiguous(), part, 16, levels, hessian, sweeps=2, fits_scales=True)

    whole, told = refined(torch.arange(100))
    part, of_part = refined(order)
    assert torch.equal(part.codes, whole.codes[order])
    torch.testing.assert_close(part.scales, whole.scales[order])
    torch.testing.assert_close(of_part.after, told.after[order])


@every_form
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_spoils_no_other(form, bad, backend):
    levels, weight, hessian = WEIGHTED_FORMS[form], normal(7, 64), semidefinite(64, 100)
    clean = search_scales(weight, 16, levels)
    spoiled_blocks, spoiled = copied(clean), weight.clone()
    spoiled[4, 3] = bad
    told = refine_dense(spoiled, spoiled_blocks, 16, levels, hessian, sweeps=2, fits_scales=True)
    refine_dense(weight, clean, 16, levels, hessian, sweeps=2, fits_scales=True)
    others = torch.arange(7) != 4
    assert torch.equal(spoiled_blocks.codes[others], clean.codes[others])
    assert int(spoiled_blocks.codes.max()) < 2**levels.bits
    assert torch.isfinite(told.after).tolist() == others.tolist()


@every_form
def test_what_does_not_change_is_told_to_be_as_before(form, backend):
    levels, weight, hessian, out = WEIGHTED_FORMS[form], normal(5, 192), semidefinite(192, 300), torch.empty(5, 192)
    blocks = search_scales(weight, 32, levels)
    for sweeps in (0, 2):
        told = refine_dense(weight, blocks, 32, levels, hessian * (sweeps == 0), sweeps=sweeps, fits_scales=True)
        assert torch.equal(told.before, told.after)
    codes = blocks.codes.clone()
    refine_dense(weight, blocks, 32, levels, torch.zeros(192, 192), sweeps=1, fits_scales=True, out=out)
    assert torch.equal(blocks.codes, codes)
    torch.testing.assert_close(out.double(), weight - values_of(blocks, levels), rtol=0.0, atol=1e-7)


@every_form
@pytest.mark.parametrize("block_size", [64, 24, 16, 96])
def test_the_compiled_kernels_find_what_the_definition_does(form, block_size):
    pytest.importorskip("numba")
    levels, weight, importance = WEIGHTED_FORMS[form], normal(130, 192), uneven(192)
    vectors, hessian, out = spread(importance, orthonormal(192, 5)), semidefinite(192, 500), torch.empty(130, 192)
    start = search_scales(weight, block_size, levels, importance=importance)
    found, told = [], []
    for prepare in (use_reference_kernels, use_compiled_kernels):
        prepare()
        cold = search_scales(weight, block_size, levels, importance=importance)
        warm = search_scales(weight * 1.01, block_size, levels, start, importance)
        reduced_blocks, dense = copied(start), copied(start)
        refine(weight, reduced_blocks, block_size, levels, vectors, importance, sweeps=2, fits_scales=True)
        told.append(refine_dense(weight, dense, block_size, levels, hessian, sweeps=2, fits_scales=True, out=out))
        torch.testing.assert_close(out.double(), weight - values_of(dense, levels), rtol=0.0, atol=1e-7)
        found.append((cold, warm, reduced_blocks, dense))
    use_reference_kernels()
    for compiled, defined in zip(found[1], found[0], strict=True):
        same = (compiled.codes == defined.codes).all(dim=1)
        assert int(same.sum()) >= 127  # float32 does not see which of two is nearer
        kept = same & (compiled.offsets is None or (compiled.offsets == defined.offsets).all(dim=1))
        tolerance = max(1e-4, torch.finfo(levels.scale_dtype).eps)
        torch.testing.assert_close(compiled.scales[kept], defined.scales[kept], rtol=tolerance, atol=0.0)
    torch.testing.assert_close(told[1].before, told[0].before, rtol=told_to(levels), atol=0.0)
    after = told[0].after[same]  # of the last ones, whose scales may be rounded to neighbours
    torch.testing.assert_close(told[1].after[same], after, rtol=1e-3, atol=0.0)


def test_what_does_not_fit_is_refused():
    weight, levels = normal(4, 64), WEIGHTED_FORMS["int4"]
    blocks, hessian = search_scales(weight, 32, levels), torch.eye(64)
    options = {"sweeps": 1, "fits_scales": True}
    for importance in (torch.ones(63), torch.ones(64, dtype=torch.float64), torch.ones(64, 1), torch.ones(128)[::2]):
        with pytest.raises(ValueError, match=r"importance must be contiguous torch.float32 with shape"):
            search_scales(weight, 32, levels, importance=importance)
        with pytest.raises(ValueError, match=r"importance must be contiguous torch.float32 with shape"):
            refine(weight, blocks, 32, levels, torch.zeros(64, 2), importance, **options)
    for matrix in (torch.eye(63), hessian.double(), torch.ones(64)):
        with pytest.raises(ValueError, match="hessian must be"):
            refine_dense(weight, blocks, 32, levels, matrix, **options)
    with pytest.raises(ValueError, match="scales must be"):
        refine_dense(weight, blocks, 64, levels, hessian, **options)
    with pytest.raises(ValueError, match="out must be"):
        refine_dense(weight, blocks, 32, levels, hessian, **options, out=torch.empty(4, 63))
