"""The tokenizer that a trainer saved beside the adapter goes into the merged model; a difference is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import models
from support.adapters import lora_tensors, write_adapter
from support.merge_refusals import Q0, refused

from loftq_cli.cli.main import _run

BASE = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "merges.txt": "a b", "chat_template.jinja": "base"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = models.llama(tmp_path_factory.mktemp("checkpoints") / "llama")
    for name, text in BASE.items():
        (folder / name).write_text(text)
    return folder


def merged_files(
    base: Path, tmp_path: Path, files: dict[str, str], *arguments: str
) -> tuple[dict[str, str], list[str]]:
    """The tokenizer of a merge with `files` beside the adapter, and the notes."""
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))
    for name, text in files.items():
        (adapter / name).write_text(text)
    assert _run(["merge", str(base), str(adapter), str(tmp_path / "out"), *arguments]) == 0
    report = json.loads((tmp_path / "out" / "loftq_merge_report.json").read_text())
    kept = {name: (tmp_path / "out" / name) for name in {*BASE, *files}}
    notes = [note for note in report["notes"] if "tokenizer" in note]
    return {name: path.read_text() for name, path in kept.items() if path.exists()}, notes


NEW = {"tokenizer.json": '{"new": 1}', "tokenizer_config.json": "{}", "added_tokens.json": '{"<doc>": 128}'}


def test_the_adapters_tokenizer_takes_the_place_of_the_bases(base, tmp_path):
    files, (note,) = merged_files(base, tmp_path, {**NEW, "chat_template.jinja": "adapter"})

    assert files == {**NEW, "chat_template.jinja": "adapter"}  # no merges.txt of another tokenizer
    assert "the adapter's" in note and "tokenizer.json" in note and "without the base's merges.txt" in note


def test_the_bases_chat_template_stays_without_another(base, tmp_path):
    assert merged_files(base, tmp_path, NEW)[0] == {**NEW, "chat_template.jinja": "base"}


def test_a_template_in_the_tokenizers_config_is_not_hidden_by_the_bases_file(base, tmp_path):
    new = {**NEW, "tokenizer_config.json": '{"chat_template": "adapter"}'}

    assert merged_files(base, tmp_path, new)[0] == new


def test_a_chat_template_alone_leaves_the_bases_vocabulary(base, tmp_path):
    files, (note,) = merged_files(base, tmp_path, {"chat_template.jinja": "adapter"})

    assert files == {**BASE, "chat_template.jinja": "adapter"}
    assert note.endswith(": chat_template.jinja")


LOST = "the base's chat template, which the adapter's tokenizer lacks, is left out"


def with_a_template_in_its_config(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"chat_template": "base"}')
    return tmp_path / "base"


def test_a_template_that_goes_with_the_bases_config_is_said(base, tmp_path):
    files, (note,) = merged_files(with_a_template_in_its_config(base, tmp_path), tmp_path, NEW)

    assert files["tokenizer_config.json"] == "{}"
    assert LOST in note


def test_a_template_that_stays_in_the_bases_config_is_not_said_to_be_lost(base, tmp_path):
    new = {"special_tokens_map.json": '{"pad_token": "<pad>"}'}

    files, (note,) = merged_files(with_a_template_in_its_config(base, tmp_path), tmp_path, new)

    assert files["tokenizer_config.json"] == '{"chat_template": "base"}'
    assert "special_tokens_map.json" in note and LOST not in note


def test_the_base_is_kept_on_demand_and_the_difference_said(base, tmp_path):
    files, (note,) = merged_files(base, tmp_path, NEW, "--tokenizer", "base")

    assert files == BASE
    assert "is left out" in note and "added_tokens.json" in note


@pytest.mark.parametrize("files", [{}, BASE], ids=["none", "an equal one"])
def test_no_difference_is_no_note(files, base, tmp_path):
    assert merged_files(base, tmp_path, files) == (BASE, [])


def test_an_absent_tokenizer_cannot_be_chosen(base, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))

    status, line = refused(capsys, base, adapter, tmp_path / "out", "--tokenizer", "adapter")

    assert status == 2
    assert "holds no tokenizer" in line and "--tokenizer base" in line


def test_a_link_out_of_the_adapters_directory_is_refused(base, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))
    (tmp_path / "secret").write_text("secret")
    (adapter / "tokenizer.json").symlink_to(tmp_path / "secret")

    status, line = refused(capsys, base, adapter, tmp_path / "out")

    assert status == 2
    assert "is a link out of the model's folder" in line
