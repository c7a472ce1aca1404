"""Defaults of a recipe decide the bytes of a conversion: a changed default is a changed result."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from loftq_cli.planning.recipe_files import recipe_toml, resolve_recipe

PAPER = {"fit": "loftq"}
QALORA = {"method": "qalora", "quant_type": "int4"}
CALIBRATED = {"calibration": "STATS"}


def written(asked: dict[str, Any]) -> dict[str, Any]:
    """The recipe as `loftq_recipe.toml` says it."""
    return tomllib.loads(recipe_toml(resolve_recipe(None, asked)))


@pytest.mark.parametrize(
    ("asked", "defaults"),
    [
        (
            {},
            {"method": "loftq", "quant_type": "nf4", "layout": "bitsandbytes", "rank": 16, "rslora": False, "seed": 0},
        ),
        ({}, {"block_size": 64, "double_quant": True, "adapter_dtype": "float32", "max_shard_size": "5GB"}),
        ({"quant_type": "int4"}, {"group_size": 64, "symmetric": False, "layout": "compressed-tensors"}),
        ({"quant_type": "int8"}, {"group_size": 64, "symmetric": True, "layout": "compressed-tensors"}),
        ({"quant_type": "int8", "layout": "mlx"}, {"symmetric": False}),
        (QALORA, {"pooling": "peft", "init": "residual", "symmetric": False}),
        ({**QALORA, "quant_type": "int8"}, {"symmetric": False}),
    ],
    ids=str,
)
def test_a_format_and_an_adapter_that_nobody_asked_for(asked: dict[str, Any], defaults: dict[str, Any]) -> None:
    recipe = written(asked)
    assert {name: recipe.get(name) for name in defaults} == defaults


@pytest.mark.parametrize(
    ("asked", "fit", "start", "scales", "iterations", "rounds"),
    [
        ({}, "joint", "principal", "search", 11, 0),
        ({"quant_type": "int4"}, "joint", "principal", "search", 11, 0),
        (QALORA, "joint", "zero", "search", 11, 0),
        (CALIBRATED, "joint", "zero", "search", 2, 2),
        ({**QALORA, **CALIBRATED}, "joint", "zero", "search", 2, 2),
        ({"keep_base": 0.5}, "joint", "zero", "search", 11, 0),
        ({"keep_base": 1.0}, "joint", "zero", "search", 1, 0),
        ({**CALIBRATED, "keep_base": 1.0}, "joint", "zero", "search", 1, 2),
        ({**PAPER, "keep_base": 0.5}, "loftq", "zero", "absmax", 8, None),
        (PAPER, "loftq", "zero", "absmax", 8, None),
        ({**PAPER, "svd": "faithful"}, "loftq", "zero", "absmax", 5, None),
        ({**PAPER, "svd": "exact"}, "loftq", "zero", "absmax", 5, None),
        ({**PAPER, **CALIBRATED}, "loftq", "zero", "search", 8, None),
    ],
    ids=str,
)
def test_a_fit_that_nobody_asked_for(
    asked: dict[str, Any], fit: str, start: str, scales: str, iterations: int, rounds: int | None
) -> None:
    recipe = written(asked)
    assert (recipe["fit"], recipe["start"], recipe["scales"]) == (fit, start, scales)
    assert (recipe["iterations"], recipe.get("rounds")) == (iterations, rounds)


@pytest.mark.parametrize("asked", [{}, {"keep_base": 0.0}, {"method": "qlora"}, QALORA], ids=str)
def test_a_base_counts_with_its_adapter_unless_a_share_is_asked_for(asked: dict[str, Any]) -> None:
    assert resolve_recipe(None, asked).fitting.keep_base == 0.0
    assert "keep_base" not in written(asked)
    if asked.get("method") != "qlora":
        assert written({**asked, "keep_base": 0.5})["keep_base"] == 0.5


@pytest.mark.parametrize(
    ("asked", "scales", "rounds"), [({}, "absmax", None), (CALIBRATED, "search", 2)], ids=["plain", "calibrated"]
)
def test_a_base_under_an_adapter_of_nothing(asked: dict[str, Any], scales: str, rounds: int | None) -> None:
    recipe = written({"method": "qlora", **asked})
    assert (recipe["scales"], recipe.get("rounds")) == (scales, rounds)
