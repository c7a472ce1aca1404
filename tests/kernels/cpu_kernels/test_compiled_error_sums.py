"""Error sums of the compiled kernels are those of float64, whatever the weights hold."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
from support.compiled_kernels import BAD, FLOATS, MAYBE_FLOATS, assert_sums, compiled, normal

from loftq_cli.triton_kernels.error_stats.contract import ErrorSums, error_stats


@pytest.mark.parametrize("delta_dtype", MAYBE_FLOATS)
@pytest.mark.parametrize("decoded_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_error_sums_are_those_of_float64(dtype, decoded_dtype, delta_dtype):
    for numel in (1, 7, 1023, 1024, 1025, 5000, 300_000):
        weight, decoded = normal(numel, dtype=dtype), normal(numel, seed=1, dtype=decoded_dtype)
        delta = None if delta_dtype is None else normal(numel, seed=2, dtype=delta_dtype)
        assert_sums(compiled(error_stats, weight, decoded, delta), weight, decoded, delta)


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-30, 1e30, 1e38])
def test_error_sums_hold_what_float32_does_not(scale):
    weight, decoded, delta = (normal(40, 50, seed=seed) * scale for seed in range(3))
    assert_sums(compiled(error_stats, weight, decoded, delta), weight, decoded, delta)


@pytest.mark.parametrize("place", [0, 1023, 1024, 2499])
def test_the_largest_error_is_found_wherever_it_is(place):
    weight, decoded = normal(2500), normal(2500, seed=1)
    weight[place] = -3.5
    found = compiled(error_stats, weight, decoded)
    assert found.max_error == abs(-3.5 - decoded[place].double().item())
    assert_sums(found, weight, decoded, None)


@pytest.mark.parametrize("place", [0, 1023, 1024, 2499])
@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_is_in_every_sum_that_it_is_part_of(bad, place):
    clean = [normal(2500, seed=seed) for seed in range(3)]
    parts = {
        0: ("squared_weight", "squared_base_error", "squared_error", "max_error"),
        1: ("squared_base_error", "squared_error", "max_error"),
        2: ("squared_error", "max_error", "squared_delta"),
    }
    for spoiled, names in parts.items():
        tensors = [tensor.clone() for tensor in clean]
        tensors[spoiled][place] = BAD[bad]
        found = compiled(error_stats, *tensors)
        for field in fields(ErrorSums):
            value = getattr(found, field.name)
            if field.name not in names:
                assert math.isfinite(value), field.name
            elif "NaN" in bad:
                assert math.isnan(value), field.name
            else:
                assert value == math.inf, field.name
