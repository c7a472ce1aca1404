"""Every damaged, missing, extra or foreign byte is found, and named by its tensor or file."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import edit_json, edit_tensors, write_adapter
from support.verified_results import ADAPTER, LORA_B, MODEL, NORM, Q0, flip, places, sign

# Bytes.


@pytest.mark.parametrize("name", [Q0, f"{Q0}.absmax", NORM])
def test_a_flipped_bit_is_named_by_its_tensor(name, result, verify):
    flip(result / MODEL, places(result / MODEL)[name][1] - 1)
    assert verify(result)["problems"] == [(MODEL, name, "does not have its sha256")]


def test_a_flipped_bit_in_the_adapter_is_named_by_its_tensor(result, verify):
    flip(result / ADAPTER, places(result / ADAPTER)[LORA_B][0])
    assert verify(result)["problems"] == [(ADAPTER, LORA_B, "does not have its sha256")]


@pytest.mark.parametrize("name", [Q0, NORM])
def test_without_sums_of_tensors_the_file_is_named(name, result, verify):
    sign(result, tensors=False)
    flip(result / MODEL, places(result / MODEL)[name][0])
    assert verify(result)["problems"] == [(MODEL, None, "does not have the sha256 that checksums.json lists")]


def test_a_flipped_bit_in_a_side_file_is_named(result, verify):
    flip(result / "tokenizer.json", 3)
    assert verify(result)["problems"] == [
        ("tokenizer.json", None, "does not have the sha256 that checksums.json lists")
    ]


def test_every_damaged_tensor_and_file_is_named(result, verify):
    for name in (Q0, NORM):
        flip(result / MODEL, places(result / MODEL)[name][0])
    flip(result / ADAPTER, places(result / ADAPTER)[LORA_B][0])
    (result / "README.md").unlink()
    assert {(file, tensor) for file, tensor, _ in verify(result)["problems"]} == {
        (MODEL, Q0),
        (MODEL, NORM),
        (ADAPTER, LORA_B),
        ("README.md", None),
    }


def test_a_changed_header_over_the_same_numbers_is_named(result, verify):
    data = (result / MODEL).read_bytes()
    (result / MODEL).write_bytes(data.replace(b'{"format":"pt"}', b'{"format":"np"}', 1))
    assert verify(result)["problems"] == [(MODEL, None, "its header is not the one that was written, its tensors are")]


def test_a_missing_and_an_extra_tensor_are_named(result, verify):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["extra.weight"] = tensors.pop(NORM)

    edit_tensors(result / MODEL, change)
    assert verify(result)["problems"] == [
        (MODEL, NORM, "is missing"),
        (MODEL, "extra.weight", "is not part of the result"),
    ]


def test_a_truncated_file_is_named_and_the_rest_is_still_checked(result, verify):
    with open(result / MODEL, "r+b") as file:
        file.truncate(places(result / MODEL)[NORM][0] + 1)
    flip(result / ADAPTER, places(result / ADAPTER)[LORA_B][0])
    problems = verify(result)["problems"]
    assert [file for file, *_ in problems] == [MODEL, ADAPTER]
    assert "the file holds" in problems[0][2]


def test_truncated_and_missing_shards_are_all_named(shards, verify):
    first, second = sorted(shards.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    problems = verify(shards)["problems"]
    assert [file for file, *_ in problems] == [first.name, second.name]
    assert problems[1][2] == "no such file"


@pytest.mark.parametrize("name", ["config.json", MODEL, ADAPTER, "loftq_init/adapter_config.json", "loftq_report.json"])
def test_a_missing_file_is_named(name, result, verify):
    (result / name).unlink()
    assert (name, None, "no such file") in verify(result)["problems"]


def test_an_index_that_disagrees_is_named_for_each_file(shards, verify):
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    swap = dict(zip(files, reversed(files), strict=True))
    edit_json(shards / "model.safetensors.index.json", weight_map={k: swap[v] for k, v in index["weight_map"].items()})
    problems = verify(shards)["problems"]
    assert [file for file, *_ in problems] == files
    assert all("which model.safetensors.index.json expects in it" in what for *_, what in problems)


# What belongs to a result.


def test_a_file_that_is_not_listed_is_a_note(result, verify):
    write_adapter(result / "trained", {"x.lora_A.weight": torch.ones(4, 8), "x.lora_B.weight": torch.ones(8, 4)})
    found = verify(result)
    assert found["problems"] == []
    assert found["notes"] == [
        "trained/adapter_config.json: is not part of the result",
        "trained/adapter_model.safetensors: is not part of the result",
    ]


def test_an_extra_index_that_loaders_would_follow_is_damage(result, verify):
    weight_map = dict.fromkeys(load_file(result / MODEL), MODEL)
    (result / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert verify(result)["problems"] == [
        ("model.safetensors.index.json", None, "is not part of the result, and loaders take it for its weights")
    ]


@pytest.mark.parametrize("name", ["config.json", "loftq_init/adapter_config.json", "loftq_recipe.toml"])
def test_a_config_that_was_edited_is_named(name, result, verify):
    path = result / name
    path.write_text(path.read_text() + "\n")
    assert verify(result)["problems"] == [(name, None, "does not have the sha256 that checksums.json lists")]


@pytest.mark.parametrize("name", ["config.json", "loftq_init/adapter_config.json", "loftq_report.json"])
def test_a_record_that_is_no_json_is_named_once(name, result, verify):
    (result / name).write_text("{")
    problems = verify(result)["problems"]
    assert len(problems) == 1 and problems[0][0] == name and "is not valid JSON" in problems[0][2]


def test_checksums_that_were_edited_are_named(result, verify):
    values = json.loads((result / "checksums.json").read_text())
    values["files"]["config.json"] = "0" * 64
    values["tensors"][MODEL][NORM] = "1" * 64
    edit_json(result / "checksums.json", **values)
    assert verify(result)["problems"] == [
        ("config.json", None, "does not have the sha256 that checksums.json lists"),
        ("checksums.json", NORM, f"does not have its sha256, and its file {MODEL} has"),
    ]


@pytest.mark.parametrize(
    "values",
    [
        {"files": {"../outside": "0" * 64}},
        {"files": {"/etc/passwd": "0" * 64}},
        {"files": {"a//b": "0" * 64}},
        {"files": {"config.json": "short"}},
        {"files": ["config.json"]},
        {"tool": "other"},
        {"tensors": {"elsewhere": {}}},
    ],
    ids=str,
)
def test_checksums_that_this_tool_does_not_write_are_damage(values, result, verify):
    edit_json(result / "checksums.json", **values)
    found = verify(result)
    assert found["problems"] == [("checksums.json", None, "is not a list of checksums of this tool")]
    assert found["checksums"] is False
