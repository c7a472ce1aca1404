"""Experts are converted like all weights: equal bytes with any number of threads and after an interruption, and every
expert gains by a fitted adapter.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.conversions import StopAfter, converted_files, files_of, run_conversion
from support.moes import moe

import loftq_cli as loftq
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.conversion.report import read_report
from loftq_cli.errors import StorageError
from loftq_cli.output.writer import SafetensorsWriter

INT4 = {"quant_type": "int4", "symmetric": True, "group_size": 32, "rank": 4, "iterations": 2}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe("mixtral", tmp_path_factory.mktemp("mixtral") / "model")


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe("gpt_oss", tmp_path_factory.mktemp("gpt_oss") / "model")


def test_bytes_are_the_same_with_any_number_of_threads_and_after_an_interruption(mixtral, tmp_path):
    (tmp_path / "whole").mkdir()
    expected = converted_files(mixtral, tmp_path / "whole", **INT4)
    for name in ("threads", "parts"):
        (tmp_path / name).mkdir()
    run_conversion(mixtral, tmp_path / "threads" / "out", threads=3, **INT4)
    assert without_config(files_of(tmp_path / "threads" / "out")) == without_config(expected)
    with pytest.raises(KeyboardInterrupt):
        run_conversion(mixtral, tmp_path / "parts" / "out", observer=StopAfter(3), **INT4)
    outcome = run_conversion(mixtral, tmp_path / "parts" / "out", **INT4)
    assert outcome.resumed_layers >= 3
    assert without_config(files_of(tmp_path / "parts" / "out")) == without_config(expected)


def without_config(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files but for the path of the base in the adapter's config, and the hash of the config."""
    return {name: data for name, data in files.items() if not name.endswith(("adapter_config.json", "checksums.json"))}


def test_experts_of_one_tensor_are_read_an_expert_at_a_time(gpt_oss, tmp_path, monkeypatch):
    load, read = Checkpoint.load, []

    def watch(self, name, *, pinned=False):
        read.append(name)
        return load(self, name, pinned=pinned)

    monkeypatch.setattr(Checkpoint, "load", watch)
    run_conversion(gpt_oss, tmp_path / "base", method="qlora", layout="dense", block_size=32, rank=4, verify=False)
    assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in read)


def test_experts_that_the_disk_changes_are_found_when_the_result_is_read_back(mixtral, tmp_path, monkeypatch):
    write = SafetensorsWriter.write

    def damage(self, name, tensor):
        return write(self, name, tensor * 2 if name.endswith("experts.2.w3.weight_scale") else tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", damage)
    with pytest.raises(StorageError, match=r"gate_up_proj\.2: has error .* as read back"):
        run_conversion(mixtral, tmp_path / "base", method="qlora", **{**INT4, "iterations": 1})


@pytest.mark.parametrize("method", ["loftq", "joint", "pissa"])
def test_every_expert_has_a_smaller_error_than_with_an_adapter_of_zeros(mixtral, tmp_path, method):
    options = {"joint": {"fit": "joint", "calibration": "none"}, "pissa": {"method": "pissa"}}.get(method, {})
    run_conversion(mixtral, tmp_path / "qlora", method="qlora", **INT4)
    run_conversion(mixtral, tmp_path / "fitted", **{**INT4, **options})
    zeros, fitted = (read_report(tmp_path / name) for name in ("qlora", "fitted"))
    assert zeros is not None and fitted is not None
    experts = [layer for layer in zeros[1] if layer.experts]
    assert len(experts) == 4
    for before, after in zip(zeros[1], fitted[1], strict=True):
        if before.experts:
            pairs = zip(before.expert_errors or (), after.expert_errors or (), strict=True)
            assert all(with_adapter < without for without, with_adapter in pairs)


def test_inspect_shows_the_experts_of_a_layer_in_a_row_and_finds_no_damage(tmp_path):
    outcome = run_conversion(moe("llama4_text", tmp_path / "model"), tmp_path / "base", method="qlora", **INT4)
    shown = loftq.inspect(outcome.output)
    assert isinstance(shown, loftq.ConvertedInspection)
    assert [row.name for row in shown.layers] == sorted(layer.name for layer in outcome.layers)
    assert shown.total is not None
    assert shown.total.error == pytest.approx(outcome.total.error)
    found = loftq.inspect(outcome.output, verify=True)
    assert isinstance(found, loftq.Verification)
    assert found.problems == ()
