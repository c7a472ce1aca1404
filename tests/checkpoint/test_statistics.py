"""The files of `loftq calibrate` are believed only where names, shapes, numbers and sums agree.

Expected matrices are built by numpy from the upper triangle, row after row.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loftq_cli.checkpoint.statistics import (
    open_statistics,
    pack_triangle,
    triangle_numel,
    triangle_side,
    unpack_triangle,
)
from loftq_cli.errors import InputError, StorageError

UPPER = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
FULL = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])


def written(directory: Path, tensors: dict[str, torch.Tensor], **values: Any) -> Path:
    """A directory of statistics with the right sha256, and `values` in place of those of calibration.json."""
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "statistics.safetensors")
    record = {
        "tool": "loftq-cli",
        "format": 2,
        "kind": "full",
        "tokens": 7,
        "inputs": {"a.weight": "x", "b.weight": "x"},
        "statistics_sha256": hashlib.sha256((directory / "statistics.safetensors").read_bytes()).hexdigest(),
    }
    (directory / "calibration.json").write_text(json.dumps({**record, **values}))
    return directory


def refusal(directory: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        open_statistics(directory)
    assert caught.value.hint == "run loftq calibrate again"
    return caught.value


@pytest.mark.parametrize("side", [1, 2, 3, 10])
def test_a_triangle_and_its_matrix_are_two_forms_of_one_thing(side):
    matrix = np.random.default_rng(side).normal(size=(side, side))
    symmetric = torch.from_numpy(matrix + matrix.T)
    upper = symmetric.numpy()[np.triu_indices(side)]

    assert pack_triangle(symmetric).tolist() == upper.tolist()
    assert torch.equal(unpack_triangle(torch.from_numpy(upper)), symmetric)
    assert (triangle_numel(side), triangle_side(len(upper))) == (len(upper), side)


def test_a_full_statistic_is_read_from_its_triangle(tmp_path):
    statistics = open_statistics(written(tmp_path, {"x": UPPER}))

    assert torch.equal(statistics.load("b.weight"), FULL)
    assert statistics.in_features("a.weight") == 3
    assert (statistics.kind, statistics.tokens, statistics.is_measured) == ("full", 7, True)
    assert statistics.names == {"a.weight", "b.weight"}
    assert statistics.sha256 == hashlib.sha256((tmp_path / "calibration.json").read_bytes()).hexdigest()


def test_the_first_format_holds_whole_matrices(tmp_path):
    statistics = open_statistics(written(tmp_path, {"x": FULL}, format=1))

    assert torch.equal(statistics.load("a.weight"), FULL)
    assert statistics.in_features("a.weight") == 3


@pytest.mark.parametrize("number", [1, 2])
def test_a_diagonal_is_a_vector_in_both_formats(number, tmp_path):
    statistics = open_statistics(written(tmp_path, {"x": UPPER[:5]}, format=number, kind="diagonal"))

    assert torch.equal(statistics.load("a.weight"), UPPER[:5])
    assert statistics.in_features("a.weight") == 5


@pytest.mark.parametrize(
    ("tensor", "values"),
    [
        (UPPER[:5], {}),  # no triangle has five entries
        (FULL, {}),  # a square in the format of triangles
        (UPPER, {"format": 1}),  # a triangle in the format of squares
        (FULL[:2], {"format": 1}),
        (FULL[None], {"format": 1}),
        (FULL, {"kind": "diagonal"}),
        (torch.ones(0), {"kind": "diagonal"}),
        (torch.ones(0, 0), {"format": 1}),
        (UPPER.double(), {}),
        (UPPER.bfloat16(), {}),
    ],
)
def test_a_tensor_of_another_form_is_refused_by_name(tensor, values, tmp_path):
    error = refusal(written(tmp_path, {"x": tensor.contiguous()}, **values))

    kind = values.get("kind", "full")
    shown = f"is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, which is no {kind} statistic"
    assert (error.file, error.tensor, error.message) == (str(tmp_path / "statistics.safetensors"), "x", shown)


def test_a_statistic_that_is_named_and_not_there_is_refused_by_name(tmp_path):
    error = refusal(written(tmp_path, {"y": UPPER}))

    assert (error.file, error.tensor) == (str(tmp_path / "calibration.json"), "x")
    assert error.message == "is not in statistics.safetensors, and a.weight needs it"


def test_other_numbers_than_those_recorded_are_refused(tmp_path):
    written(tmp_path, {"x": UPPER})
    save_file({"x": UPPER + 1}, tmp_path / "statistics.safetensors")

    error = refusal(tmp_path)

    assert error.file == str(tmp_path / "statistics.safetensors")
    assert error.message.startswith("does not hold the numbers of calibration.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_when_they_are_read(value, tmp_path):
    statistics = open_statistics(written(tmp_path, {"x": torch.tensor([1.0, value, 3.0])}))

    with pytest.raises(InputError, match="holds NaN or infinite values") as caught:
        statistics.load("a.weight")
    assert (caught.value.file, caught.value.tensor) == (str(tmp_path / "statistics.safetensors"), "x")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"tool": "other"}, "is not of a calibration of this tool"),
        ({"format": 3}, "is of format 3, and 1 and 2 are read here"),
        ({"format": True}, "is of format True, and 1 and 2 are read here"),
        ({"kind": "half"}, "or has wrong ones: kind is"),
        ({"tokens": 0}, "or has wrong ones: tokens is 0"),
        ({"statistics_sha256": "00"}, "or has wrong ones: statistics_sha256 is"),
        ({"inputs": {}}, "or has wrong ones: inputs is empty"),
    ],
)
def test_a_record_of_something_else_is_refused(values, says, tmp_path):
    error = refusal(written(tmp_path, {"x": UPPER}, **values))

    assert error.file == str(tmp_path / "calibration.json")
    assert says in error.message


def test_a_record_without_a_format_is_of_something_else(tmp_path):
    written(tmp_path, {"x": UPPER})
    record = json.loads((tmp_path / "calibration.json").read_text())
    (tmp_path / "calibration.json").write_text(json.dumps({k: v for k, v in record.items() if k != "format"}))

    assert refusal(tmp_path).message == "is not of a calibration of this tool"


@pytest.mark.parametrize("name", ["calibration.json", "statistics.safetensors"])
def test_a_file_that_changes_afterwards_is_noticed(name, tmp_path):
    statistics = open_statistics(written(tmp_path, {"x": UPPER}))
    statistics.check_unchanged()
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b" ")

    with pytest.raises(StorageError, match="changed"):
        statistics.check_unchanged()
