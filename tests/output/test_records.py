"""The small records of a result: the mark, and the names of sources."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from loftq_cli.errors import InputError
from loftq_cli.output.checksums import Checksums, files_in, read_checksums
from loftq_cli.output.records import index_json, source_name
from loftq_cli.output.side_files import are_copied, copy_side_files

A, B = "a" * 64, "b" * 64
MARK: dict[str, Any] = {
    "tool": "loftq-cli",
    "version": "0.1.0",
    "input_sha256": A,
    "fingerprint": "f",
    "files": {"model.safetensors": B, "adapter/README.md": A},
    "tensors": {"model.safetensors": {"w": A}},
}


def marked(directory: Path, **values: Any) -> Path:
    (directory / "checksums.json").write_text(json.dumps({**MARK, **values}))
    return directory


def test_a_mark_is_read_and_written_without_a_change(tmp_path):
    mark = read_checksums(marked(tmp_path))
    assert mark == Checksums("f", A, MARK["files"], MARK["tensors"])
    assert list(mark.to_json().items()) == [item for item in MARK.items() if item[0] not in ("tool", "version")]


def test_a_mark_without_a_hash_of_the_input_has_no_key_for_the_hash(tmp_path):
    mark = read_checksums(marked(tmp_path, input_sha256=None))
    assert mark is not None and mark.input_sha256 is None
    assert "input_sha256" not in mark.to_json()


@pytest.mark.parametrize(
    "values",
    [
        {"tool": "other"},
        {"fingerprint": None},
        {"files": {"model.safetensors": "short"}},
        {"files": {"../model.safetensors": B, "model.safetensors": B}},
        {"files": {"/model.safetensors": B, "model.safetensors": B}},
        {"files": {"a//b": B, "model.safetensors": B}},
        {"files": {"./a": B, "model.safetensors": B}},
        {"files": {"a\0b": B, "model.safetensors": B}},
        {"files": {}},  # tensors of a file that is not listed
    ],
)
def test_a_mark_of_another_tool_or_of_files_elsewhere_is_refused(values, tmp_path):
    with pytest.raises(InputError, match="is not a list of checksums of this tool") as caught:
        read_checksums(marked(tmp_path, **values))
    assert (caught.value.file, caught.value.hint) == (str(tmp_path / "checksums.json"), "convert again")


@pytest.mark.parametrize(("path", "name"), [("models/MiniLM", "MiniLM"), ("a/..", "here"), (".", "here"), ("", "here")])
def test_a_source_has_the_last_name_of_its_path(path, name, tmp_path, monkeypatch):
    (tmp_path / "here" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert source_name(Path(path)) == name


def test_unprintable_characters_of_a_source_are_escaped():
    assert source_name(Path("a\x1b[31m")) == "a\\x1b[31m"


def test_side_files_are_those_that_were_copied_while_their_bytes_are(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {}, "a": 1}')
    sources = {name: tmp_path / name for name in ("tokenizer.json", "tokenizer_config.json")}
    for remote_code in (True, False):
        (tmp_path / "copies").mkdir(exist_ok=True)
        copy_side_files(sources, tmp_path / "copies", remote_code=remote_code)
        sums = {name: hashlib.sha256((tmp_path / "copies" / name).read_bytes()).hexdigest() for name in sources}
        assert are_copied(sources, sums, remote_code=remote_code)
        assert not are_copied(sources, sums, remote_code=not remote_code)
        assert are_copied(sources, sums) is remote_code
        assert not are_copied(sources, {"tokenizer.json": sums["tokenizer.json"]}, remote_code=remote_code)
    assert json.loads((tmp_path / "copies" / "tokenizer_config.json").read_text()) == {"a": 1}


def test_an_index_names_the_file_of_each_tensor_and_the_bytes_of_all():
    index = json.loads(index_json({"b": "model-2.safetensors", "a": "model-1.safetensors"}, 64))
    assert index == {
        "metadata": {"total_size": 64},
        "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"},
    }
    assert list(index["weight_map"]) == ["a", "b"]


def test_links_to_folders_are_listed_on_demand_alone(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "model" / "config.json").touch()
    assert files_in(tmp_path / "model") == ["config.json"]
    assert files_in(tmp_path / "model", links=True) == ["config.json", "linked"]
