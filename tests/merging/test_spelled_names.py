"""Names as training runs leave the names: wrappers and the adapter's name are taken off, and said once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from support.adapters import PREFIX, lora_tensors, made_by_peft, tensors_of, write_adapter

from loftq_cli.cli.main import _run

QV = {"target_modules": ["q_proj", "v_proj"]}
SPELLINGS: dict[str, tuple[Callable[[str], str], str]] = {
    "torch.compile": (lambda name: f"_orig_mod.{name}", "_orig_mod."),
    "torch.compile inside": (lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."), "_orig_mod."),
    "DDP": (lambda name: f"module.{name}", "module."),
    "DDP inside": (lambda name: name.replace(PREFIX, f"{PREFIX}module."), "module."),
    "FSDP": (lambda name: name.replace("layers.0", "layers.0._fsdp_wrapped_module"), "_fsdp_wrapped_module."),
    "FSDP in two places": (
        lambda name: "_fsdp_wrapped_module." + name.replace("self_attn", "self_attn._fsdp_wrapped_module"),
        "_fsdp_wrapped_module.",
    ),
    "DDP of torch.compile": (lambda name: f"module._orig_mod.{name}", "_orig_mod., module."),
    "a state dict": (lambda name: name.replace(".weight", ".default.weight"), "default"),
    "a wrapped state dict": (
        lambda name: "module." + name.replace(".weight", ".default._fsdp_wrapped_module.weight"),
        "module., _fsdp_wrapped_module., default",
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("checkpoints") / "llama")


@pytest.mark.parametrize("case", SPELLINGS)
def test_a_wrapped_adapter_merges_as_the_plain_one(case, base, tmp_path, capsys):
    spell, said = SPELLINGS[case]
    made = made_by_peft(base, tmp_path / "adapter", **QV)
    file = made.path / "adapter_model.safetensors"
    save_file({spell(name): value for name, value in load_file(file).items()}, file)

    assert _run(["merge", str(base), str(made.path), str(tmp_path / "out"), "--dtype", "float32"]) == 0

    merged = tensors_of(tmp_path / "out")
    for name in (name for name in merged if "q_proj" in name or "v_proj" in name):
        torch.testing.assert_close(merged[name], made.merged[name], rtol=0, atol=1e-6)
    note = f"{said} in the names of the adapter's tensors: left by training, and taken off"
    assert capsys.readouterr().err.count("taken off") == 1
    assert note in json.loads((tmp_path / "out" / "loftq_merge_report.json").read_text())["notes"]


def test_a_plain_adapter_gets_no_note(base, tmp_path, capsys):
    made = made_by_peft(base, tmp_path / "adapter", **QV)

    assert _run(["merge", str(base), str(made.path), str(tmp_path / "out")]) == 0

    assert "taken off" not in capsys.readouterr().err


def test_two_spellings_of_one_tensor_are_refused(base, tmp_path, capsys):
    plain = lora_tensors("model.layers.0.self_attn.q_proj", (128, 128))
    adapter = write_adapter(
        tmp_path / "adapter", plain | {f"_orig_mod.{name}": value.clone() for name, value in plain.items()}
    )

    assert _run(["merge", str(base), str(adapter), str(tmp_path / "out")]) == 4
    assert "has the same place as" in capsys.readouterr().err


@pytest.mark.parametrize("targets", [["proj"], ["h.module.proj"]], ids=["an end of the name", "the complete name"])
def test_a_module_of_the_base_called_like_a_wrapper_is_found(targets, tmp_path, capsys):
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    save_file({"h.module.proj.weight": weight}, tmp_path / "base.safetensors")
    factors = lora_tensors("h.module.proj", (32, 64))
    adapter = write_adapter(tmp_path / "adapter", factors, target_modules=targets)

    status = _run(["merge", str(tmp_path / "base.safetensors"), str(adapter), str(tmp_path / "out"), "--force"])

    assert status == 0
    expected = weight + factors["h.module.proj.lora_B.weight"] @ factors["h.module.proj.lora_A.weight"]
    torch.testing.assert_close(tensors_of(tmp_path / "out")["h.module.proj.weight"], expected, rtol=0, atol=1e-6)
    assert "taken off" not in capsys.readouterr().err
