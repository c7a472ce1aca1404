"""Records of JSON values: what each type hint accepts, and that no change of a file gives a record of wrong types."""

from __future__ import annotations

import copy
import doctest
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq_cli.checkpoint import record_schema
from loftq_cli.checkpoint.record_schema import NonNegative, PositiveInt, RecordError, Sha256, read_record
from loftq_cli.checkpoint.statistics import open_statistics
from loftq_cli.conversion.report import LayerResult, read_report
from loftq_cli.errors import InputError
from loftq_cli.output.checksums import read_checksums
from loftq_cli.output.journal import JournalEntry
from loftq_cli.quant.formats import spec_from_json


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: float = 0.5


ACCEPTED: list[tuple[Any, Any, Any]] = [
    (str, "", ""),
    (bool, True, True),
    (int, -3, -3),
    (float, 1.5, 1.5),
    (float, 10**400, 10**400),
    (Any, [None], [None]),
    (str | None, None, None),
    (str | None, "a", "a"),
    (Literal["full", "diagonal"], "full", "full"),
    (PositiveInt, 1, 1),
    (NonNegative, 0.0, 0.0),
    (NonNegative | None, None, None),
    (Sha256, "0" * 64, "0" * 64),
    (tuple[int, ...], [1, 2], (1, 2)),
    (tuple[int, ...], [], ()),
    (tuple[int, int], [1, 2], (1, 2)),
    (list[str], ["a"], ["a"]),
    (dict[str, int], {"a": 1}, {"a": 1}),
    (Mapping[str, Mapping[str, int]], {"a": {"b": 1}}, {"a": {"b": 1}}),
    (Point, {"x": 1, "y": 2.5, "z": "more"}, Point(1, 2.5)),
    (Point, {"x": 1}, Point(1, 0.5)),
    (tuple[Point, ...], [{"x": 1}], (Point(1),)),
]
REFUSED: list[tuple[Any, Any, str]] = [
    (str, 1, "value is 1, not a text"),
    (str, None, "value is None, not a text"),
    (bool, 1, "value is 1, not true or false"),
    (int, True, "value is True, not a whole number"),
    (int, 1.0, "value is 1.0, not a whole number"),
    (float, True, "value is True, not a finite number"),
    (float, "1", "value is '1', not a finite number"),
    (float, math.nan, "value is nan, not a finite number"),
    (float, math.inf, "value is inf, not a finite number"),
    (str | None, 1, "value is 1, not a text"),
    (Literal["full", "diagonal"], "half", "value is 'half', not full or diagonal"),
    (Literal["full", "diagonal"], ["full"], "value is ['full'], not full or diagonal"),
    (PositiveInt, 0, "value is 0, not 1 or more"),
    (NonNegative, -1e-300, "value is -1e-300, not 0 or more"),
    (NonNegative, math.nan, "value is nan, not a finite number"),
    (NonNegative | None, {}, "value is {}, not a finite number"),
    (NonNegative | None, -1, "value is -1, not 0 or more"),
    (Sha256, "0" * 63, f"value is '{'0' * 63}', not spelled [0-9a-f]{{64}}"),
    (Sha256, "0" * 64 + "\n", "not spelled [0-9a-f]{64}"),
    (tuple[int, ...], "12", "value is '12', not a list"),
    (tuple[int, ...], [1, "2"], "value[1] is '2', not a whole number"),
    (tuple[int, int], [1], "value is [1], not a list of 2"),
    (tuple[int, int], [1, 2, 3], "value is [1, 2, 3], not a list of 2"),
    (dict[str, int], [], "value is [], not an object"),
    (dict[str, int], {"a": "1"}, "value.a is '1', not a whole number"),
    (Point, [], "value is [], not an object"),
    (Point, {"y": 1}, "value.x is missing"),
    (tuple[Point, ...], [{"x": 1}, {"x": None}], "value[1].x is None, not a whole number"),
]


@pytest.mark.parametrize(("hint", "value", "expected"), ACCEPTED)
def test_a_value_of_the_type_is_read(hint: Any, value: Any, expected: Any) -> None:
    found = read_record(make_dataclass("Record", [("value", hint)]), {"value": value})

    assert found.value == expected  # type: ignore[attr-defined]
    assert type(found.value) is type(expected)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("hint", "value", "message"), REFUSED)
def test_a_value_of_another_type_is_refused_by_its_key(hint: Any, value: Any, message: str) -> None:
    with pytest.raises(RecordError, match=re.escape(message) + "$"):
        read_record(make_dataclass("Record", [("value", hint)]), {"value": value})


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(record_schema).failed == 0
    assert doctest.testmod(record_schema).attempted > 0


# Files of this tool with one value exchanged.

LAYER: dict[str, Any] = {
    "name": "a.weight",
    "module": "a",
    "shape": [32, 64],
    "transposed": False,
    "bits_per_weight": 4.5,
    "rank": 4,
    "alpha": 16,
    "scaling": 4.0,
    "iteration_errors": [0.2, 0.1],
    "best_iteration": 2,
    "plain_error": 0.1,
    "plain_output_error": 0.1,
    "base_output_error": 0.1,
    "output_error": 0.1,
    "quant_type": "nf4",
    "block_size": 64,
    "double_quant": True,
    "error": {
        "squared_weight": 2.0,
        "squared_base_error": 0.2,
        "squared_error": 0.1,
        "max_error": 0.1,
        "squared_delta": 0.1,
    },
}
REPORT = {"base_fingerprint": "0", "adapter_dir": "d", "recipe": {"method": "loftq"}}
CHECKSUMS = {
    "tool": "loftq-cli",
    "fingerprint": "1",
    "input_sha256": "2",
    "files": {"model.safetensors": "3" * 64},
    "tensors": {"model.safetensors": {"a.weight": "4" * 64}},
}
CALIBRATION = {
    "tool": "loftq-cli",
    "format": 1,
    "kind": "full",
    "tokens": 9,
    "inputs": {"a.weight": "h"},
    "statistics_sha256": "5" * 64,
}
HOSTILE = [None, True, 0, -1, 1.5, -0.5, 10**30, "", "a", "../x", [], [1], [1, 1, 1], {}, {"a": 1}, {"method": 1}]
hostile_values = st.sampled_from(HOSTILE) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@st.composite
def changed(draw: st.DrawFn, record: dict[str, Any]) -> dict[str, Any]:
    """The record with one value, at any depth, exchanged or taken away."""
    whole = copy.deepcopy(record)
    part: Any = whole
    while True:
        key = draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        if isinstance(part[key], (dict, list)) and part[key] and draw(st.booleans()):
            part = part[key]
            continue
        if isinstance(part, dict) and draw(st.booleans()):
            del part[key]
        else:
            part[key] = draw(hostile_values)
        return whole


def is_number(value: object) -> bool:
    return type(value) in (int, float) and value >= 0  # type: ignore[operator]


@given(changed(LAYER))
@settings(max_examples=500, deadline=None)
def test_a_changed_layer_is_a_layer_of_right_types_or_an_error(values: dict[str, Any]) -> None:
    try:
        layer = LayerResult.from_json(values)
    except (KeyError, TypeError, ValueError):
        return
    assert all(type(text) is str for text in (layer.name, layer.module))
    assert type(layer.shape) is tuple and len(layer.shape) == 2
    assert all(type(size) is int and size > 0 for size in (*layer.shape, layer.rank))
    assert type(layer.transposed) is bool
    numbers = [layer.bits_per_weight, layer.alpha, layer.scaling, layer.best_iteration]
    assert all(map(is_number, [*numbers, *layer.iteration_errors, *asdict(layer.error).values()]))
    optional = (layer.plain_error, layer.plain_output_error, layer.base_output_error, layer.output_error)
    assert all(error is None or is_number(error) for error in optional)
    assert layer.spec == spec_from_json(values)


@given(changed({**REPORT, "layers": [LAYER]}))
@settings(max_examples=150, deadline=None)
def test_a_changed_report_is_read_or_an_error_of_the_file(tmp_path_factory: Any, values: dict[str, Any]) -> None:
    directory = tmp_path_factory.mktemp("report")
    (directory / "loftq_report.json").write_text(json.dumps(values))
    try:
        report = read_report(directory)
    except InputError as error:
        assert error.file == str(directory / "loftq_report.json")
        return
    assert report is not None
    texts = [values[key] for key in ("base_fingerprint", "adapter_dir")]
    assert all(type(text) is str for text in [*texts, values["recipe"]["method"]])


@given(changed(CHECKSUMS))
@settings(max_examples=200, deadline=None)
def test_changed_checksums_are_read_or_an_error_of_the_file(tmp_path_factory: Any, values: dict[str, Any]) -> None:
    directory = tmp_path_factory.mktemp("checksums")
    (directory / "checksums.json").write_text(json.dumps(values))
    try:
        mark = read_checksums(directory)
    except InputError as error:
        assert error.file == str(directory / "checksums.json")
        return
    assert mark is not None
    assert type(mark.fingerprint) is str and (mark.input_sha256 is None or type(mark.input_sha256) is str)
    for sums in (mark.files, *mark.tensors.values()):
        assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in sums.values())
    assert not any(".." in name.split("/") or name.startswith("/") for name in mark.files)
    assert mark.tensors.keys() <= mark.files.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "half"}, "kind is 'half', not full or diagonal"),
        ({"tokens": 0}, "tokens is 0, not 1 or more"),
        ({"tokens": True}, "tokens is True, not a whole number"),
        ({"inputs": {}}, "inputs is empty"),
        ({"inputs": {"a.weight": 1}}, "inputs.a.weight is 1, not a text"),
        ({"statistics_sha256": "x"}, "statistics_sha256 is 'x', not spelled"),
    ],
)
def test_a_changed_calibration_is_an_error_of_the_file_and_key(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "calibration.json").write_text(json.dumps({**CALIBRATION, **change}))

    with pytest.raises(InputError) as caught:
        open_statistics(tmp_path)

    assert caught.value.file == str(tmp_path / "calibration.json")
    assert f"has wrong ones: {message}" in caught.value.message


def test_a_report_of_another_shape_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "loftq_report.json").write_text(json.dumps({**REPORT, "layers": [{**LAYER, "rank": "4"}]}))

    with pytest.raises(InputError, match="is not a report of this tool: rank is '4', not a whole number"):
        read_report(tmp_path)


@given(changed({"unit": "a", "input_sha256": "0", "outputs": {"a": "1"}, "result": {"error": 0.1}}))
@settings(max_examples=150, deadline=None)
def test_a_changed_entry_of_a_journal_has_right_types_or_is_none(values: dict[str, Any]) -> None:
    try:
        entry = read_record(JournalEntry, values)
    except RecordError:
        return
    assert type(entry.unit) is str and type(entry.input_sha256) is str
    assert type(entry.result) is dict
    assert all(type(key) is str and type(value) is str for key, value in entry.outputs.items())
