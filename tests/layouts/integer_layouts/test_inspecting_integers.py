"""What `loftq inspect` says of integer bases, and of integer formats that are tried."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import models
from support.adapters import tensors_of
from support.conversions import run_conversion
from support.integer_files import INTEGERS, Q0, Converted, Converter, added, combination, decoded, inspected, replaced
from support.loading import relative_error

from loftq_cli.cli.main import _run
from loftq_cli.layouts.layout import LAYOUTS


@pytest.mark.parametrize("against", [False, True], ids=["reported", "recomputed"])
def test_inspect_describes_every_layer(converted: Converted, against: bool, capsys: Any) -> None:
    found = inspected(capsys, converted.output, *(("--against", converted.source) if against else ()))
    weights, row = decoded(converted.output), LAYOUTS[converted.recipe["layout"]]
    assert {layer["name"] for layer in found["layers"]} == weights.keys()
    for layer, reported in zip(
        found["layers"], sorted(converted.report["layers"], key=lambda r: r["name"]), strict=True
    ):
        assert layer["quant_type"] == converted.recipe["quant_type"]
        assert layer["group_size"] == 32
        assert layer["symmetric"] == converted.recipe["symmetric"]
        assert layer["zero_point"] == row.zero_point
        assert layer["bits_per_weight"] == pytest.approx(reported["bits_per_weight"], abs=1e-4)
        original, base = converted.originals[layer["name"]].double(), weights[layer["name"]].double()
        both = base + added(converted.output, reported["module"], base.shape[1])
        assert layer["error"]["base_error"] == pytest.approx(relative_error(original, base), rel=1e-5)
        assert layer["error"]["error"] == pytest.approx(relative_error(original, both), rel=1e-5)
        if against:
            assert_group_statistics(layer["groups"], original, both)
        else:
            assert layer["groups"] is None


def assert_group_statistics(groups: dict[str, Any], weight: torch.Tensor, approximation: torch.Tensor) -> None:
    """Mean and worst of the relative errors of groups of 32, one by one in float64."""
    errors = {
        (row, group): relative_error(*(matrix[row, 32 * group : 32 * group + 32] for matrix in (weight, approximation)))
        for row in range(weight.shape[0])
        for group in range(weight.shape[1] // 32)
    }
    worst = max(errors, key=errors.__getitem__)
    assert groups["groups"] == len(errors)
    assert groups["mean_error"] == pytest.approx(math.fsum(errors.values()) / len(errors), rel=1e-5)
    assert groups["max_error"] == pytest.approx(errors[worst], rel=1e-4)
    assert (groups["worst_row"], groups["worst_group"]) == worst


@pytest.mark.parametrize("quant_type", INTEGERS)
@pytest.mark.parametrize("layout", ["compressed-tensors", "mlx"])
def test_the_table_says_groups_zero_points_and_worst_groups(
    layout: str, quant_type: str, convert_once: Converter, capsys: Any
) -> None:
    recipe = combination(quant_type, "qlora", layout)
    converted = convert_once(**recipe)
    capsys.readouterr()
    assert _run(["inspect", str(converted.output), "--against", str(converted.source)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(title in lines[0] for title in ("zero point", "mean group", "worst group"))
    rows = [re.split(r" {2,}", line.strip()) for line in lines if line.startswith("model.layers")]
    expected = "none" if recipe["symmetric"] else LAYOUTS[layout].zero_point
    assert len(rows) == 7
    assert all(row[2:5] == [quant_type, "group 32", expected] for row in rows)
    found = inspected(capsys, converted.output, "--against", converted.source)
    for row, layer in zip(rows, found["layers"], strict=True):
        assert row[0] == layer["name"]
        assert row[-2:] == [f"{layer['groups'][key]:.4f}" for key in ("mean_error", "max_error")]


def test_groups_of_zeros_count_in_no_mean(source: Path, tmp_path: Path, capsys: Any) -> None:
    model = tmp_path / "model"
    shutil.copytree(source, model)
    replaced(f"{Q0}.weight", lambda weight: weight.index_fill(1, torch.arange(32), 0.0))(model)
    run_conversion(model, tmp_path / "out", quant_type="int4", group_size=32, method="qlora")
    found = inspected(capsys, tmp_path / "out", "--against", model)
    (layer,) = [layer for layer in found["layers"] if layer["name"] == f"{Q0}.weight"]
    original, base = tensors_of(model)[f"{Q0}.weight"].double(), decoded(tmp_path / "out")[f"{Q0}.weight"].double()
    errors = [
        relative_error(a, b)
        for a, b in zip(original[:, 32:].reshape(-1, 32), base[:, 32:].reshape(-1, 32), strict=True)
    ]
    assert layer["groups"]["groups"] == 128 * 4
    assert layer["groups"]["mean_error"] == pytest.approx(math.fsum(errors) / len(errors), rel=1e-5)
    assert layer["groups"]["max_error"] == pytest.approx(max(errors), rel=1e-5)
    assert layer["groups"]["worst_group"] > 0


@pytest.mark.parametrize("quant_type", INTEGERS)
def test_a_tried_error_is_that_of_a_conversion_with_default_options(
    quant_type: str, source: Path, tmp_path: Path, capsys: Any
) -> None:
    run_conversion(source, tmp_path / "out", quant_type=quant_type, method="qlora")
    weights, originals = decoded(tmp_path / "out"), tensors_of(source)
    found = inspected(capsys, source, "--try", quant_type)
    errors = {row["name"]: row["errors"][quant_type]["error"] for row in found["tensors"] if row["errors"]}
    assert errors.keys() == weights.keys()
    for name, error in errors.items():
        assert error == pytest.approx(relative_error(originals[name], weights[name]), rel=1e-5)
    total = math.sqrt(
        sum(float((originals[n].double() - w.double()).square().sum()) for n, w in weights.items())
        / sum(float(originals[n].double().square().sum()) for n in weights)
    )
    assert found["totals"][quant_type]["error"] == pytest.approx(total, rel=1e-5)


def test_formats_are_tried_on_transposed_layers_too(tmp_path: Path, capsys: Any) -> None:
    source = models.gpt2(tmp_path / "source")
    outcome = run_conversion(source, tmp_path / "out", quant_type="int4", layout="dense", method="qlora")
    originals, weights = tensors_of(source), tensors_of(outcome.output)
    found = inspected(capsys, source, "--try", "int4")
    errors = {row["name"]: row["errors"]["int4"]["error"] for row in found["tensors"] if row["errors"]}
    assert len(errors) == 8
    for name, error in errors.items():
        assert error == pytest.approx(relative_error(originals[name], weights[name]), rel=1e-5)


def test_the_tried_error_of_a_real_model_is_that_of_rounding_between_minimum_and_maximum(capsys: Any) -> None:
    source = models.minilm()
    found = inspected(capsys, source, "--try", "int4")
    errors = {row["name"]: row["errors"]["int4"]["error"] for row in found["tensors"] if row["errors"]}
    tensors = tensors_of(source)
    assert len(errors) == 36
    for name, error in errors.items():
        groups = tensors[name].double().reshape(-1, 64)
        lowest, highest = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
        scale = ((highest - lowest) / 15).float().double()
        zero_point = (-lowest / scale).round()
        rounded = (((groups / scale).round() + zero_point).clamp(0, 15) - zero_point) * scale
        # A weight that lies between two steps in float32 may round to the other one: one in some 10⁵ of them.
        assert error == pytest.approx(relative_error(groups, rounded), rel=1e-4)


def test_trying_a_format_tries_what_its_own_containers_hold(tmp_path, capsys):
    shapes = {"model.layers.0.a.weight": (40, 128), "model.layers.0.b.weight": (64, 96)}
    generator = torch.Generator().manual_seed(0)
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, tmp_path / "w.safetensors"
    )

    assert _run(["inspect", str(tmp_path / "w.safetensors"), "--try", "int4", "--try", "nf4", "--json"]) == 0

    # NF4's loaders need rows in multiples of 32, integers of the default size whole groups of 64.
    rows = {row["name"]: set(row["errors"]) for row in json.loads(capsys.readouterr().out)["tensors"]}
    assert rows == {"model.layers.0.a.weight": {"int4"}, "model.layers.0.b.weight": {"nf4"}}
