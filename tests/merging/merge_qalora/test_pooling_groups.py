"""Groups and poolings of an adapter: those that fit the base are merged, others are refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.adapters import PREFIX, decoded, edit_json, edit_tensors, tensors_of
from support.qalora_merges import DOWN, LINEARS, Q0, Trained, assert_exact, grids, largest, refused, trained


def test_groups_that_are_no_unions_of_the_bases_are_refused_and_merge_densely(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", group_size=48, modules=[DOWN])

    ran = merge(base, adapter, tmp_path / "out")

    says = (f"{DOWN}.lora_A.weight", "pools groups of 48", "not unions of the groups of 32", "(--layout dense)")
    refused(ran, tmp_path, 4, *says)
    assert merge(base, adapter, tmp_path / "out", "--layout", "dense", "--dtype", "float32").status == 0
    values = torch.from_numpy(grids(base)[DOWN].values).to(torch.bfloat16).double()
    exact = (values + torch.from_numpy(adapter.updates[DOWN])).numpy()
    found = tensors_of(tmp_path / "out")[f"{DOWN}.weight"].double().numpy()
    assert largest(found - exact) <= 1e-6 * largest(exact)


def test_smaller_groups_than_the_bases_are_refused(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", group_size=16)

    ran = merge(base, adapter, tmp_path / "out")

    refused(ran, tmp_path, 4, "pools groups of 16", "not unions of the groups of 32", "--layout dense")


@pytest.mark.parametrize("convention", ["peft", "paper", "repo"])
def test_a_pooling_that_the_config_does_not_say_can_be_named(convention, converted, merge, tmp_path):
    base = converted("gptq")
    adapter = trained(base, tmp_path / "adapter", convention=convention)
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    for key in ("use_qalora", "qalora_pooling", "qalora_group_size"):
        config.pop(key, None)
    (adapter.path / "adapter_config.json").write_text(json.dumps(config))

    ran = merge(base, adapter, tmp_path / "out")

    says = ("lora_B.weight", "is for (128, 6)", "is (128, 192)", "--pooling peft, paper or repo")
    refused(ran, tmp_path, 4, *says)
    assert merge(base, adapter, tmp_path / "out", "--pooling", convention).status == 0
    assert_exact(base, tmp_path / "out", adapter.updates)


@pytest.mark.parametrize("convention", ["peft", "paper", "repo"])
def test_a_named_pooling_overrides_a_config_that_is_wrong(convention, converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", convention=convention)
    says = {"use_qalora": convention != "peft", "qalora_pooling": None if convention != "peft" else "paper"}
    edit_json(adapter.path / "adapter_config.json", **says)

    assert merge(base, adapter, tmp_path / "out", "--pooling", convention).status == 0

    assert_exact(base, tmp_path / "out", adapter.updates)


@pytest.mark.parametrize(
    ("config", "status", "says"),
    [
        ({"qalora_pooling": "max"}, 2, ("adapter_config.json", "pooling convention is one of peft, paper, repo")),
        ({"qalora_group_size": "32"}, 2, ("adapter_config.json", "qalora_group_size is a whole number")),
        ({"qalora_group_size": 0}, 2, ("adapter_config.json", "group_size is at least 1")),
        ({"qalora_group_size": 16}, 4, ("lora_B.weight", "is for (128, 96)", "is (128, 192)")),
        ({"qalora_group_size": 64}, 4, ("lora_B.weight", "is for (128, 384)", "is (128, 192)")),
    ],
)
def test_a_pooling_that_does_not_fit_is_refused(config, status, says, converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")
    edit_json(adapter.path / "adapter_config.json", **config)

    refused(merge(base, adapter, tmp_path / "out"), tmp_path, status, *says)


def test_an_unknown_pooling_on_the_command_line_is_refused(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")

    ran = merge(base, adapter, tmp_path / "out", "--pooling", "max")

    refused(ran, tmp_path, 2, "--pooling 'max' does not exist (one of peft, paper, repo)")


def test_a_pooling_named_for_an_adapter_that_reads_every_input_is_refused(converted, merge, tmp_path):
    base = converted("compressed-tensors", method="qlora")

    ran = merge(base, base / "qlora_init", tmp_path / "out", "--pooling", "paper")

    refused(ran, tmp_path, 2, "--pooling is for a QA-LoRA adapter, and this one reads every input", left=())


def test_a_pooling_into_unequal_groups_is_refused(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", modules=[Q0])
    edit_json(adapter.path / "adapter_config.json", use_qalora=False)
    edit_tensors(
        adapter.path / "adapter_model.safetensors",
        lambda t: t.update({f"{PREFIX}{Q0}.lora_A.weight": torch.ones(4, 5)}),
    )

    ran = merge(base, adapter, tmp_path / "out", "--pooling", "paper")

    refused(ran, tmp_path, 4, f"{Q0}.lora_A.weight", "reads 5 inputs", "no equal groups of the 128")


def test_groups_that_do_not_fit_are_refused_before_torch_is_imported(converted, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", group_size=16)
    code = (
        "import sys; from loftq_cli.cli.main import _run; status = _run(sys.argv[1:]); "
        "sys.exit(99 if 'torch' in sys.modules else status)"
    )
    arguments = ["merge", str(base), str(adapter.path), str(tmp_path / "out")]

    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)

    assert run.returncode == 4, run.stderr


def ordinary(base: Path, directory: Path, stored: dict[str, np.ndarray], **config: Any) -> Trained:
    adapter = trained(base, directory, group_size=1, stored=stored)
    edit_json(directory / "adapter_config.json", **config)
    return adapter


@pytest.mark.parametrize("kind", ["nf4", "int4", "original"])
def test_an_adapter_that_says_qalora_and_reads_every_input_is_an_ordinary_one(kind, converted, llamas, merge, tmp_path):
    if kind == "int4":
        base = converted("compressed-tensors", method="qlora")
        stored = {module: grid.values for module, grid in grids(base).items()}
        before = {m: torch.from_numpy(values).to(torch.bfloat16).double() for m, values in stored.items()}
    else:
        base = converted("compressed-tensors", quant_type="nf4", method="qlora", group_size=None)
        weights = decoded(base) if kind == "nf4" else tensors_of(llamas["bfloat16"])
        before = {module: weights[f"{module}.weight"].double() for module in LINEARS}
        stored = {module: weight.numpy() for module, weight in before.items()}
    adapter = ordinary(base, tmp_path / "adapter", stored, use_qalora=True, qalora_group_size=16)

    ran = merge(llamas["bfloat16"] if kind == "original" else base, adapter, tmp_path / "out", "--dtype", "float32")

    assert (ran.status, ran.err) == (0, "")
    merged = tensors_of(tmp_path / "out")
    for module in LINEARS:
        exact = before[module].numpy() + adapter.updates[module]
        assert largest(merged[f"{module}.weight"].double().numpy() - exact) <= 1e-6 * largest(exact)
