"""Searched constants and refined codes: what they promise, in float64, by brute force, and compiled against defined."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq_cli.triton_kernels.affine.contract import dequantize_affine, quantize_affine
from loftq_cli.triton_kernels.backend import implementation, use_compiled_kernels, use_reference_kernels
from loftq_cli.triton_kernels.codebook.contract import codebook_table, dequantize_codebook, quantize_codebook
from loftq_cli.triton_kernels.refinement import reference as refinement_reference
from loftq_cli.triton_kernels.refinement.contract import (
    Blocks,
    Levels,
    Refined,
    codebook_levels,
    refine,
    residual,
    search_scales,
)

TABLE = codebook_table("nf4")
FORMS = {
    "nf4": codebook_levels(TABLE),
    "nf4, positive": replace(codebook_levels(TABLE), is_signed=False),
    "fp4": codebook_levels(codebook_table("fp4")),
    "int3 symmetric": Levels(None, 3, "none", torch.bfloat16),
    "int4": Levels(None, 4, "int", torch.bfloat16),
    "int2": Levels(None, 2, "int", torch.float16),
    "int2 with biases": Levels(None, 2, "float", torch.bfloat16),
    "int4 with biases": Levels(None, 4, "float", torch.float32),
}
# Of float32 errors summed: what is not raised in exact arithmetic may be in this digit.
ROUNDING = 1e-6
BACKENDS = ["reference", "compiled"]
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both implementations, one after the other."""
    if request.param == "compiled":
        pytest.importorskip("numba")
        assert use_compiled_kernels() is None
    yield request.param
    use_reference_kernels()


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def orthonormal(columns: int, rank: int, seed: int = 1) -> torch.Tensor:
    return torch.linalg.qr(normal(columns, rank, seed)).Q.contiguous()


def copied(blocks: Blocks) -> Blocks:
    offsets = None if blocks.offsets is None else blocks.offsets.clone()
    return Blocks(blocks.codes.clone(), blocks.scales.clone(), offsets)


def values_of(blocks: Blocks, levels: Levels) -> torch.Tensor:
    """float64, by the formula of refinement.py."""
    rows, columns = blocks.codes.shape
    codes = blocks.codes.view(*blocks.scales.shape, -1)
    offsets = None if blocks.offsets is None else blocks.offsets.double()[..., None]
    if levels.table is not None:
        steps = levels.table.double()[codes.long()]
    elif levels.offset == "int":
        steps = codes.double() - offsets
    else:
        steps = codes.double() - (2 ** (levels.bits - 1) if levels.offset == "none" else 0)
    values = steps * blocks.scales.double()[..., None]
    return (values + offsets if levels.offset == "float" else values).view(rows, columns)


def errors_under(weight: torch.Tensor, blocks: Blocks, levels: Levels, vectors: torch.Tensor) -> torch.Tensor:
    """float64 [rows]: e·H·eᵀ with H spelled out."""
    error = weight.double() - values_of(blocks, levels)
    wide = vectors.double()
    return ((error @ (torch.eye(len(wide), dtype=torch.float64) - wide @ wide.T)) * error).sum(dim=1)


def assert_same_blocks(found: Blocks, expected: Blocks) -> None:
    """The same codes; constants that another order of sums may round to their neighbours, or refit once less: where
    they are best, float32 errors do not tell constants apart that differ by 1e-4.
    """
    assert torch.equal(found.codes, expected.codes)
    tolerance = max(1e-4, torch.finfo(expected.scales.dtype).eps)
    torch.testing.assert_close(found.scales, expected.scales, rtol=tolerance, atol=0.0)
    if expected.offsets is not None:
        torch.testing.assert_close(found.offsets, expected.offsets, rtol=tolerance, atol=1e-6)


# The search.


@every_form
def test_the_search_loses_less_than_the_whole_range_does(form, backend):
    levels, weight = FORMS[form], normal(40, 192)
    found = search_scales(weight, 64, levels)
    if levels.table is not None:
        codebook = form[:3]
        codes = quantize_codebook(weight, codebook, 64)
        plain = dequantize_codebook(*codes, codebook, 64, weight.numel()).view(weight.shape)
    else:
        options = {"symmetric": levels.offset == "none", "scale_dtype": str(levels.scale_dtype)[6:]}
        zero_point = "float" if levels.offset == "float" else "int"
        groups = quantize_affine(weight, levels.bits, 64, **options, zero_point=zero_point)
        arguments = (groups.codes, groups.scales, groups.zero_points, levels.bits, 64)
        plain = dequantize_affine(*arguments, biases=groups.biases)
    lost = (weight - values_of(found, levels)).square().view(-1, 64).sum(dim=1)
    before = (weight - plain).double().square().view(-1, 64).sum(dim=1)
    assert bool((lost <= before * 1.02).all())  # a loader's bfloat16 products can round either way
    assert float(lost.sum()) < 0.95 * float(before.sum())


@every_form
def test_searched_constants_are_those_that_their_codes_are_nearest_to(form, backend):
    levels, weight = FORMS[form], normal(8, 64)
    found = search_scales(weight, 32, levels)
    error = (weight - values_of(found, levels)).abs()
    for code in range(2**levels.bits):
        other = replace(found, codes=torch.full_like(found.codes, code))
        assert bool((error <= (weight - values_of(other, levels)).abs() + 1e-7).all())


@every_form
@pytest.mark.parametrize("power", [-20, 3])
def test_weights_times_a_power_of_two_have_the_same_codes(form, power, backend):
    if FORMS[form].scale_dtype == torch.float16 and power < 0:
        pytest.skip("float16 has no numbers that small")
    levels, weight, vectors, factor = FORMS[form], normal(12, 128), orthonormal(128, 4), 2.0**power
    both = []
    for scaled in (weight, weight * factor):
        found = search_scales(scaled, 64, levels)
        warm = search_scales(scaled * 0.75, 64, levels, found)
        refine(scaled, found, 64, levels, vectors, sweeps=2, fits_scales=True)
        both += [found, warm]
    for small, large in zip(both[:2], both[2:], strict=True):
        assert torch.equal(small.codes, large.codes)
        assert torch.equal(small.scales.float() * factor, large.scales.float())
        if levels.offset == "float":
            assert torch.equal(small.offsets.float() * factor, large.offsets.float())
        elif levels.offset == "int":
            assert torch.equal(small.offsets, large.offsets)


def test_a_negated_block_has_the_negated_constant(backend):
    levels, weight = FORMS["nf4"], normal(30, 64)
    found, negated = search_scales(weight, 64, levels), search_scales(-weight, 64, levels)
    assert torch.equal(found.scales, -negated.scales) and torch.equal(found.codes, negated.codes)
    assert bool((found.scales < 0).any() and (found.scales > 0).any())


@every_form
def test_a_search_from_constants_never_loses_more_than_they_do(form, backend):
    levels, weight = FORMS[form], normal(20, 128)
    start = search_scales(weight, 64, levels)
    moved = weight + 0.1 * normal(20, 128, seed=7)
    found = search_scales(moved, 64, levels, copied(start))
    nearest = replace(start, codes=torch.stack([torch.full_like(start.codes, c) for c in range(2**levels.bits)]))
    candidates = [values_of(replace(start, codes=codes), levels) for codes in nearest.codes]
    of_start = torch.stack([(moved - values).square() for values in candidates]).amin(dim=0)
    lost, bound = ((e.view(20, 2, 64).sum(dim=2)) for e in ((moved - values_of(found, levels)).square(), of_start))
    assert bool((lost <= bound * (1 + ROUNDING)).all())


@every_form
def test_zero_blocks_stay_zero_and_do_not_change_their_neighbours(form, backend):
    levels, weight = FORMS[form], normal(6, 128)
    weight[2, 64:] = 0.0
    found, alone = search_scales(weight, 64, levels), search_scales(weight[3:4].contiguous(), 64, levels)
    warm = search_scales(weight, 64, levels, found)
    for blocks in (found, warm):
        assert bool((values_of(blocks, levels)[2, 64:] == 0).all())
    assert torch.equal(found.codes[3], alone.codes[0])
    assert torch.equal(warm.codes[3], search_scales(weight[3:4].contiguous(), 64, levels, alone).codes[0])
    refine(weight, found, 64, levels, orthonormal(128, 3), sweeps=2, fits_scales=True)
    assert bool(torch.isfinite(found.scales).all())


@every_form
def test_a_search_from_a_zero_block_does_not_change_what_becomes_of_others(form, backend):
    levels, weight = FORMS[form], normal(40, 64)
    moved = weight + 0.2 * normal(40, 64, seed=5)
    start = search_scales(weight, 64, levels)
    weight[7] = 0.0
    with_zeros = search_scales(weight, 64, levels)
    expected, found = (search_scales(moved, 64, levels, blocks) for blocks in (start, with_zeros))
    others = torch.arange(40) != 7
    assert torch.equal(found.scales[others], expected.scales[others])
    assert torch.equal(found.codes[others], expected.codes[others])
    assert bool((found.codes[7] != found.codes[7, 0]).any())  # it has left zero


@every_form
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_scale_is_not_finite_exactly_where_its_block_is_not(form, bad, backend):
    levels, weight = FORMS[form], normal(5, 128)
    clean = search_scales(weight, 64, levels)
    weight[3, 70] = bad
    found = search_scales(weight, 64, levels)
    assert torch.isfinite(found.scales).logical_not().nonzero().tolist() == [[3, 1]]
    others = torch.arange(5) != 3
    assert torch.equal(found.codes[others], clean.codes[others])


# The refinement.


@every_form
@pytest.mark.parametrize("fits_scales", [False, True])
@pytest.mark.parametrize("length", [1.0, 0.7])  # shorter: the error without the adapter counts too
def test_no_pass_raises_the_error_of_any_row(form, length, fits_scales, backend):
    levels, weight = FORMS[form], normal(70, 192)
    vectors, blocks = orthonormal(192, 7) * length, search_scales(weight, 64, levels)
    before = errors_under(weight, blocks, levels, vectors)
    for _ in range(4):
        told = refine(weight, blocks, 64, levels, vectors, sweeps=1, fits_scales=fits_scales)
        after = errors_under(weight, blocks, levels, vectors)
        assert bool((after <= before * (1 + ROUNDING)).all())
        torch.testing.assert_close(told.before, before, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(told.after, after, rtol=1e-5, atol=0.0)
        before = after


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    n_blocks=st.integers(1, 4),
    block_size=st.sampled_from([1, 3, 8, 16]),
    rank=st.integers(0, 5),
    form=st.sampled_from(sorted(FORMS)),
    coarse=st.booleans(),
)
def test_from_any_codes_and_constants_no_pass_raises_the_error(seed, rows, n_blocks, block_size, rank, form, coarse):
    levels, columns = FORMS[form], n_blocks * block_size
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if coarse:
        weight = weight.round()  # zeros and ties
    vectors = orthonormal(columns, min(rank, columns), seed) if rank else torch.zeros(columns, 2)
    blocks = search_scales(weight, block_size, levels)
    blocks.codes.copy_(torch.randint(0, 2**levels.bits, (rows, columns), generator=generator))
    before = errors_under(weight, blocks, levels, vectors)
    slack = ROUNDING * (weight.double() - values_of(blocks, levels)).square().sum(dim=1)
    for fits_scales in (True, False, True):
        refine(weight, blocks, block_size, levels, vectors, sweeps=1, fits_scales=fits_scales)
        after = errors_under(weight, blocks, levels, vectors)
        assert bool((after <= before + slack).all())
        before = after


@pytest.mark.parametrize("form", ["nf4", "int4", "int2 with biases"])
@pytest.mark.parametrize("length", [1.0, 0.7])
def test_it_ends_where_no_code_changed_alone_lowers_the_error(form, length, backend):
    levels, weight, vectors = FORMS[form], normal(40, 3, seed=2), orthonormal(3, 1) * length
    blocks = search_scales(weight, 3, levels)
    blocks.codes.zero_()
    refine(weight, blocks, 3, levels, vectors, sweeps=30, fits_scales=False)
    least = errors_under(weight, blocks, levels, vectors)
    slack = 2e-5 * (weight.double() - values_of(blocks, levels)).square().sum(dim=1)
    for column in range(3):
        for code in range(2**levels.bits):
            other = copied(blocks)
            other.codes[:, column] = code
            assert bool((least <= errors_under(weight, other, levels, vectors) + slack).all())


@every_form
def test_the_fitted_scale_is_the_best_one_for_its_codes(form, backend):
    levels = replace(FORMS[form], scale_dtype=torch.float32)
    weight, vectors = normal(30, 32), orthonormal(32, 4)
    blocks = search_scales(weight, 32, levels)
    # With all weight on codes that cannot be bettered, only the scale moves: try its neighbourhood.
    refine(weight, blocks, 32, levels, vectors, sweeps=40, fits_scales=True)
    least = errors_under(weight, blocks, levels, vectors)
    for factor in (0.99, 0.999, 1.001, 1.01):
        other = replace(copied(blocks), scales=blocks.scales * factor)
        assert bool((least <= errors_under(weight, other, levels, vectors) * (1 + ROUNDING)).all())


@every_form
def test_without_an_adapter_codes_are_the_nearest(form, backend):
    levels, weight = FORMS[form], normal(10, 64)
    expected = search_scales(weight, 32, levels)
    blocks = replace(copied(expected), codes=torch.zeros_like(expected.codes))
    told = refine(weight, blocks, 32, levels, torch.zeros(64, 4), sweeps=1, fits_scales=False)
    assert torch.equal(blocks.codes, expected.codes)
    assert bool((told.projections == 0).all())


@every_form
def test_the_order_and_the_division_of_rows_change_nothing(form, backend):
    levels, weight, vectors = FORMS[form], normal(150, 128), orthonormal(128, 5)
    blocks = search_scales(weight, 64, levels)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(3))

    def refined(rows: torch.Tensor) -> tuple[Blocks, Refined]:
        offsets = None if blocks.offsets is None else blocks.offsets[rows].clone()
        part = Blocks(blocks.codes[rows].clone(), blocks.scales[rows].clone(), offsets)
        return part, refine(weight[rows].contiguous(), part, 64, levels, vectors, sweeps=2, fits_scales=True)

    whole, told = refined(torch.arange(150))
    for rows in (order, order[:1], order[1:70], order[70:]):
        part, of_part = refined(rows)
        assert torch.equal(part.codes, whole.codes[rows])
        torch.testing.assert_close(part.scales, whole.scales[rows])
        if backend == "compiled":  # the definition's products are those of BLAS
            assert torch.equal(part.scales, whole.scales[rows])
            assert torch.equal(of_part.after, told.after[rows])
            assert torch.equal(of_part.projections, told.projections[rows])
        cold, warm = (search_scales(weight[rows].contiguous(), 64, levels, start) for start in (None, part))
        assert torch.equal(cold.codes, blocks.codes[rows])
        assert torch.equal(warm.codes, search_scales(weight, 64, levels, whole).codes[rows])


@pytest.mark.parametrize("form", ["nf4", "int4"])
def test_a_column_that_is_the_adapters_alone_keeps_its_code(form, backend):
    levels, weight = FORMS[form], normal(9, 64)
    blocks = search_scales(weight, 32, levels)
    codes = blocks.codes.clone()
    vectors = torch.zeros(64, 2)
    vectors[5, 0] = 1.0
    vectors[40, 1] = math.sqrt(1.0 - 1e-5)
    told = refine(weight, blocks, 32, levels, vectors, sweeps=2, fits_scales=True)
    assert torch.equal(blocks.codes[:, [5, 40]], codes[:, [5, 40]])
    assert bool(torch.isfinite(told.after).all())


@every_form
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_spoils_no_other(form, bad, backend):
    levels, weight, vectors = FORMS[form], normal(7, 64), orthonormal(64, 4)
    clean = search_scales(weight, 32, levels)
    spoiled_blocks, spoiled = copied(clean), weight.clone()
    spoiled[4, 3] = bad
    told = refine(spoiled, spoiled_blocks, 32, levels, vectors, sweeps=2, fits_scales=True)
    refine(weight, clean, 32, levels, vectors, sweeps=2, fits_scales=True)
    others = torch.arange(7) != 4
    assert torch.equal(spoiled_blocks.codes[others], clean.codes[others])
    assert int(spoiled_blocks.codes.max()) < 2**levels.bits
    assert torch.isfinite(told.after).tolist() == others.tolist()


@every_form
def test_the_error_that_is_given_is_that_of_the_codes(form, backend):
    levels, weight, vectors = FORMS[form], normal(66, 96), orthonormal(96, 6)
    blocks, out = search_scales(weight, 32, levels), torch.empty(66, 96)
    expected = weight - values_of(blocks, levels)
    squares = residual(weight, blocks, 32, levels, out)
    torch.testing.assert_close(out.double(), expected, rtol=0.0, atol=1e-7)
    torch.testing.assert_close(squares, expected.square().sum(dim=1), rtol=1e-5, atol=0.0)
    told = refine(weight, blocks, 32, levels, vectors, sweeps=1, fits_scales=True, out=out)
    torch.testing.assert_close(out.double(), weight - values_of(blocks, levels), rtol=0.0, atol=1e-7)
    torch.testing.assert_close(told.projections, out @ vectors, rtol=1e-4, atol=1e-6)


@every_form
@pytest.mark.parametrize(("block_size", "rank"), [(64, 16), (24, 5), (96, 1)])
def test_the_compiled_kernels_find_what_the_definition_does(form, block_size, rank):
    pytest.importorskip("numba")
    levels, weight, vectors = FORMS[form], normal(130, 192), orthonormal(192, rank)
    found, told = [], []
    for prepare in (use_reference_kernels, use_compiled_kernels):
        prepare()
        assert implementation("refinement", "cpu").__name__.endswith((".reference", ".cpu"))
        blocks = search_scales(weight, block_size, levels)
        warm = search_scales(weight * 1.01, block_size, levels, blocks)
        told.append(refine(weight, blocks, block_size, levels, vectors, sweeps=2, fits_scales=True))
        found.append((blocks, warm))
    use_reference_kernels()
    for compiled, defined in zip(found[1], found[0], strict=True):
        assert_same_blocks(compiled, defined)
    torch.testing.assert_close(told[1].after, told[0].after, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(told[1].projections, told[0].projections, rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_refused():
    weight, levels = normal(4, 64), FORMS["int4"]
    blocks, vectors = search_scales(weight, 32, levels), torch.zeros(64, 2)
    options = {"sweeps": 1, "fits_scales": True}
    with pytest.raises(ValueError, match="64 columns do not split into blocks of 48"):
        search_scales(weight, 48, levels)
    with pytest.raises(ValueError, match="contiguous float32"):
        search_scales(weight.T, 4, levels)
    with pytest.raises(ValueError, match="unknown offset"):
        search_scales(weight, 32, replace(levels, table=TABLE))
    with pytest.raises(ValueError, match="unknown scale dtype"):
        search_scales(weight, 32, replace(levels, scale_dtype=torch.float64))
    with pytest.raises(ValueError, match="bits must be one of"):
        search_scales(weight, 32, replace(levels, bits=5))
    with pytest.raises(ValueError, match="16 entries"):
        search_scales(weight, 32, replace(FORMS["nf4"], table=TABLE[:8]))
    with pytest.raises(ValueError, match="scales must be"):
        refine(weight, blocks, 64, levels, vectors, **options)
    with pytest.raises(ValueError, match="offsets must be there"):
        refine(weight, replace(blocks, offsets=None), 32, levels, vectors, **options)
    with pytest.raises(ValueError, match=r"vectors must be float32 \[64, r\]"):
        refine(weight, blocks, 32, levels, vectors[:5], **options)
    with pytest.raises(ValueError, match="out must be"):
        residual(weight, blocks, 32, levels, torch.empty(4, 63))


def test_the_definition_rounds_ties_as_it_says():
    constants = refinement_reference.Constants(*(torch.tensor([[number]]) for number in (1.0, 8.0, 0.0)))
    codes = refinement_reference.encode(torch.tensor([[0.5, 1.5, -0.5, 100.0, -100.0]]), constants, FORMS["int4"])
    assert codes.tolist() == [[8.0, 10.0, 8.0, 15.0, 0.0]]
