"""Defaults of a recipe decide the bytes of a conversion: a changed default is a changed result."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from loftq_cli.planning.recipe_files import recipe_toml, resolve_recipe

PAPER = {"fit": "loftq"}
QALORA = {"method": "qalora", "quant_type": "int4"}
CALIBRATED = {"calibration": "STATS"}
NO_STATISTICS = {"calibration": "none"}
TEXT = {"text": ("random",)}


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
        ({}, "joint", "zero", "search", 2, 2),
        ({"quant_type": "int4"}, "joint", "zero", "search", 2, 2),
        (QALORA, "joint", "zero", "search", 2, 2),
        (NO_STATISTICS, "joint", "zero", "search", 11, 0),
        ({**QALORA, **NO_STATISTICS}, "joint", "zero", "search", 11, 0),
        (TEXT, "joint", "zero", "search", 2, 4),
        (CALIBRATED, "joint", "zero", "search", 2, 4),
        ({**QALORA, **CALIBRATED}, "joint", "zero", "search", 2, 4),
        ({"keep_base": 0.5}, "joint", "zero", "search", 2, 2),
        ({**NO_STATISTICS, "keep_base": 1.0}, "joint", "zero", "search", 1, 0),
        ({**CALIBRATED, "keep_base": 1.0}, "joint", "zero", "search", 1, 4),
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


@pytest.mark.parametrize(
    ("asked", "share"),
    [
        ({}, 0.3),
        (QALORA, 0.3),
        (TEXT, 0.3),
        (CALIBRATED, 0.3),
        (NO_STATISTICS, 0.5),
        (PAPER, 0.0),
        ({**PAPER, **CALIBRATED}, 0.0),
        ({"keep_base": 0.0}, 0.0),
        ({"method": "qlora"}, 0.0),
        ({**QALORA, "init": "standard"}, 0.0),
        ({"method": "pissa"}, 0.0),
    ],
    ids=str,
)
def test_a_share_of_the_base_that_nobody_asked_for(asked: dict[str, Any], share: float) -> None:
    assert resolve_recipe(None, asked).fitting.keep_base == share
    # A file says a share where the fit has one, so that a later default does not change the file.
    has_share = asked.get("method") not in ("qlora", "pissa") and asked.get("fit") is None and "init" not in asked
    assert written(asked).get("keep_base") == (share if has_share else None)


@pytest.mark.parametrize(
    ("asked", "calibration"),
    [
        ({}, "weights"),
        (QALORA, "weights"),
        ({"calibration": "none"}, "none"),
        ({"calibration": "weights"}, "weights"),
        (CALIBRATED, "STATS"),
        (TEXT, None),
        (PAPER, None),
        ({**PAPER, "calibration": "weights"}, "weights"),
        ({"method": "pissa"}, None),
        ({"method": "qlora"}, None),
        ({"method": "qlora", "scales": "search"}, "weights"),
        ({"method": "qlora", "scales": "search", "calibration": "none"}, "none"),
    ],
    ids=str,
)
def test_statistics_that_nobody_asked_for(asked: dict[str, Any], calibration: str | None) -> None:
    """A joint fit and a search for constants without statistics clip the largest weights."""
    assert written(asked).get("calibration") == calibration
    recipe = resolve_recipe(None, asked)
    assert recipe.calibration == (None if calibration == "none" else calibration)
    assert recipe.is_weighted == (calibration not in (None, "none") or "text" in asked)


@pytest.mark.parametrize(
    ("asked", "scales", "rounds"), [({}, "absmax", None), (CALIBRATED, "search", 4)], ids=["plain", "calibrated"]
)
def test_a_base_under_an_adapter_of_nothing(asked: dict[str, Any], scales: str, rounds: int | None) -> None:
    recipe = written({"method": "qlora", **asked})
    assert (recipe["scales"], recipe.get("rounds")) == (scales, rounds)
