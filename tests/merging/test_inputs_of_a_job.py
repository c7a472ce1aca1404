"""An interrupted merge redoes a job whose inputs changed: the hash of a job is of every tensor that the job reads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import models
from support.adapters import edit_tensors, lora_tensors, write_adapter
from support.merge_refusals import Q0

from loftq_cli.merging.form import MergeOptions
from loftq_cli.merging.inputs import InputSums
from loftq_cli.merging.plan import prepare_merge

WEIGHT, NORM = f"{Q0}.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("checkpoints") / "llama")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Factors for a matrix, and a vector of the base that was trained whole."""
    tensors = lora_tensors(Q0, (128, 128))
    tensors[NORM] = torch.full((128,), 0.5)
    return write_adapter(tmp_path / "adapter", tensors, modules_to_save=["norm"])


def sums_of(base: Path, adapter: Path) -> InputSums:
    return InputSums(prepare_merge(base, adapter, adapter.parent / "out", MergeOptions()))


def hashes(base: Path, adapter: Path) -> dict[str, str]:
    sums = sums_of(base, adapter)
    return {name: sums.hash_job(name) for name in (WEIGHT, NORM)}


def test_the_same_inputs_give_the_same_hashes(base, adapter):
    assert hashes(base, adapter) == hashes(base, adapter)


@pytest.mark.parametrize(("part", "job"), [("lora_A.weight", WEIGHT), ("lora_B.weight", WEIGHT), ("norm.weight", NORM)])
def test_a_changed_tensor_of_the_adapter_changes_the_hash_of_its_job_alone(part, job, base, adapter):
    before = hashes(base, adapter)
    (name,) = (name for name in load_file(adapter / "adapter_model.safetensors") if name.endswith(part))
    edit_tensors(adapter / "adapter_model.safetensors", lambda tensors: tensors[name].view(-1)[0].add_(1))
    after = hashes(base, adapter)
    assert {name for name in before if before[name] != after[name]} == {job}


def test_a_changed_tensor_of_the_base_changes_the_hash_of_its_job(base, adapter, tmp_path):
    other = models.llama(tmp_path / "other")
    edit_tensors(other / "model.safetensors", lambda tensors: tensors[WEIGHT].view(-1)[0].add_(1))
    before, after = hashes(base, adapter), hashes(other, adapter)
    assert (before[WEIGHT] == after[WEIGHT], before[NORM] == after[NORM]) == (False, True)


def test_a_remembered_sum_stands_for_a_tensor_that_is_not_read_again(base, adapter):
    sums = sums_of(base, adapter)
    sums.remember(WEIGHT, "0" * 64)
    assert sums.hash_base_tensor(WEIGHT) == "0" * 64
    assert sums.hash_job(WEIGHT) != hashes(base, adapter)[WEIGHT]
    expected = hashlib.sha256(load_file(base / "model.safetensors")[NORM].view(torch.uint8).numpy().tobytes())
    assert sums.hash_base_tensor(NORM) == expected.hexdigest()
