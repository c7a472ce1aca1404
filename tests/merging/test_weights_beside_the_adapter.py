"""Trained weights in further files of the adapter's directory are merged where the base has the place, else refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import models
from support.adapters import lora_tensors, tensors_of, write_adapter
from support.merge_refusals import Q0, refused

from loftq_cli.cli.main import _run

NORM = torch.linspace(0.5, 1.5, 128)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("checkpoints") / "llama")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))


def merge(base: Path, adapter: Path, out: Path, *arguments: str) -> int:
    return _run(["merge", str(base), str(adapter), str(out), "--dtype", "float32", *arguments])


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.norm.weight",
        "model.norm.weight",
        "model.model.norm.weight",
        "_orig_mod.model.norm.weight",
    ],
)
def test_a_trained_tensor_of_the_base_is_merged(name, base, adapter, tmp_path):
    torch.save({name: NORM}, adapter / "non_lora_trainables.bin")

    assert merge(base, adapter, tmp_path / "out") == 0

    assert torch.equal(tensors_of(tmp_path / "out")["model.norm.weight"], NORM)
    report = json.loads((tmp_path / "out" / "loftq_merge_report.json").read_text())
    assert report["replaced"] == ["model.norm.weight"]
    assert "non_lora_trainables.bin beside the adapter replaces model.norm.weight" in report["notes"]


REFUSED = {
    "a projector": ("non_lora_trainables.bin", {"model.mm_projector.weight": torch.ones(4, 4)}, "no such tensor"),
    "rows of new tokens": ("new_embeddings.safetensors", {"input_embeddings": torch.ones(4, 128)}, "no such tensor"),
    "a value head": ("value_head.safetensors", {"v_head.summary.weight": torch.ones(1, 128)}, "no such tensor"),
    "an empty tensor": ("non_lora_trainables.bin", {"model.norm.weight": torch.zeros(0)}, "is empty"),
    "whole numbers": ("extra.safetensors", {"model.norm.weight": torch.ones(128, dtype=torch.int32)}, "is int32"),
    "a weight under an adapter": ("merged.safetensors", {f"{Q0}.weight": torch.ones(128, 128)}, "under an adapter"),
    "a whole model": ("model.safetensors", {"model.norm.weight": NORM}, "is a model beside the adapter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused_by_name_and_left_out_by_force(case, base, adapter, tmp_path, capsys):
    file, tensors, says = REFUSED[case]
    (torch.save if file.endswith(".bin") else save_file)(tensors, adapter / file)

    status, line = refused(capsys, base, adapter, tmp_path / "out")

    assert status == 4
    assert file in line and says in line and "--force" in line
    if case != "a whole model":
        assert next(iter(tensors)) in line
    assert merge(base, adapter, tmp_path / "out", "--force") == 0
    notes = json.loads((tmp_path / "out" / "loftq_merge_report.json").read_text())["notes"]
    assert any(file in note and "is left out" in note for note in notes)


def test_a_shape_of_another_model_is_refused(base, adapter, tmp_path, capsys):
    torch.save({"model.norm.weight": torch.ones(127)}, adapter / "non_lora_trainables.bin")

    status, line = refused(capsys, base, adapter, tmp_path / "out")

    assert status == 4
    assert "non_lora_trainables.bin:model.norm.weight" in line and "(127,)" in line


def test_a_file_that_cannot_be_read_is_refused(base, adapter, tmp_path, capsys):
    (adapter / "value_head.bin").write_bytes(b"no archive")

    status, line = refused(capsys, base, adapter, tmp_path / "out")

    assert status == 4
    assert "value_head.bin" in line and "cannot be read" in line


def test_the_state_of_a_training_run_is_no_weight(base, adapter, tmp_path):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "scaler.pt"):
        (adapter / name).write_bytes(b"anything")

    assert merge(base, adapter, tmp_path / "out") == 0


def test_every_file_without_a_place_is_named(base, adapter, tmp_path, capsys):
    torch.save({"model.mm_projector.weight": torch.ones(4, 4)}, adapter / "non_lora_trainables.bin")
    save_file({"v_head.summary.weight": torch.ones(1, 128)}, adapter / "value_head.safetensors")

    status, line = refused(capsys, base, adapter, tmp_path / "out")

    assert status == 4
    assert "non_lora_trainables.bin" in line and "value_head.safetensors" in line
