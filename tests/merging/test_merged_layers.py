"""The numbers about merged layers, by hand."""

from __future__ import annotations

import math

import pytest

from loftq_cli.checkpoint.record_schema import RecordError
from loftq_cli.merging.report import MergedLayer, layer_json, total_lost, total_retention
from loftq_cli.quant.affine import OffsetDifference

PLAIN = MergedLayer("a", 16, 2.0, squared_weight=100.0, squared_delta=4.0)
# 4 of the 16 in <stored - base, update> are missing, and the rounding is a quarter of the update.
ROUNDED = MergedLayer("b", 8, 1.0, squared_weight=25.0, squared_delta=16.0, retained=12.0, squared_rounding=1.0)
MOVED = MergedLayer("c", 4, 0.5, squared_weight=9.0, squared_delta=4.0, difference=OffsetDifference(0.5, 2.0, 9.0))


def test_every_number_has_its_key_in_json():
    assert layer_json(PLAIN) == {
        "name": "a",
        "rank": 16,
        "scaling": 2.0,
        "relative_delta": 0.2,
        "retention": None,
        "lost": None,
        "max_difference": None,
        "relative_difference": None,
    }
    rounded, moved = layer_json(ROUNDED), layer_json(MOVED)
    assert (rounded["relative_delta"], rounded["retention"], rounded["lost"]) == (0.8, 0.75, 0.25)
    assert (moved["lost"], moved["max_difference"], moved["relative_difference"]) == (1.5, 0.5, 0.25)
    assert moved["retention"] is None


@pytest.mark.parametrize("layer", [PLAIN, ROUNDED, MOVED])
def test_a_layer_comes_back_from_a_journal(layer):
    assert MergedLayer.from_json(layer.to_json()) == layer


def test_a_layer_of_another_tool_does_not():
    with pytest.raises(RecordError, match="rank"):
        MergedLayer.from_json({**PLAIN.to_json(), "rank": "16"})


def test_no_weight_and_no_update_divide_by_nothing():
    empty = MergedLayer("a", 1, 1.0, squared_weight=0.0, squared_delta=0.0, retained=0.0, squared_rounding=1.0)
    assert (empty.relative_delta, empty.lost) == (0.0, None)
    moved = MergedLayer("a", 1, 1.0, 0.0, 0.0, difference=OffsetDifference(0.5, 0.0, 1.0))
    assert moved.lost is not None and math.isinf(moved.lost)
    assert moved.relative_difference == 0.5
    assert layer_json(moved)["lost"] is None


def test_totals_are_of_all_layers_that_have_the_number():
    other = MergedLayer("d", 8, 1.0, squared_weight=1.0, squared_delta=4.0, retained=3.0, squared_rounding=0.0)
    assert total_retention([ROUNDED, other, MOVED]) == pytest.approx((12.0 + 3.0) / (16.0 + 4.0))
    assert total_retention([MOVED]) is None
    assert total_lost([ROUNDED, MOVED]) == pytest.approx(math.sqrt((1.0 + 9.0) / (16.0 + 4.0)))
