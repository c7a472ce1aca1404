"""A base that a merge cannot read or write is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import edit_json, edit_tensors, lora_tensors, names_in, write_adapter
from support.merge_refusals import Q0, refused


def test_a_base_with_nan_is_named(checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "llama", tmp_path / "base")
    edit_tensors(tmp_path / "base" / "model.safetensors", lambda t: t[f"{Q0}.weight"].view(-1)[7].fill_(torch.nan))
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))

    status, line = refused(capsys, tmp_path / "base", adapter, tmp_path / "out")

    assert status == 2
    assert "adapter" not in line
    assert f"{Q0}.weight: holds NaN" in line
    assert names_in(tmp_path) == ["adapter", "base"]


def test_a_copied_tensor_that_does_not_fit_the_dtype_is_named(checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "llama", tmp_path / "base")
    edit_tensors(tmp_path / "base" / "model.safetensors", lambda t: t["model.norm.weight"].fill_(1e5))
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))

    status, line = refused(capsys, tmp_path / "base", adapter, tmp_path / "out", "--dtype", "float16")

    assert (status, "model.norm.weight: has numbers too large for float16" in line) == (2, True), line
    assert names_in(tmp_path) == ["adapter", "base"]


@pytest.mark.parametrize("part", ["", ".absmax", ".quant_map"])
def test_a_4_bit_weight_that_lacks_a_part_is_named(part, checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "converted", tmp_path / "base")
    edit_tensors(tmp_path / "base" / "model.safetensors", lambda t: t.pop(f"{Q0}.weight{part}"))

    status, line = refused(capsys, tmp_path / "base", tmp_path / "base" / "qlora_init", tmp_path / "out")

    assert (status, f"{Q0}.weight{part}: is missing" in line) == (2, True), line


def test_a_base_quantized_by_another_tool_is_refused(checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "llama", tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", quantization_config={"quant_method": "gptq"})
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))

    status, line = refused(capsys, tmp_path / "base", adapter, tmp_path / "out")

    assert (status, "quantized already (gptq)" in line) == (2, True), line


@pytest.mark.parametrize(
    ("arrange", "says"),
    [
        (lambda path: shutil.rmtree(path), "is no directory"),
        (lambda path: (path / "adapter_config.json").unlink(), "holds no adapter_config.json"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (lambda path: (path / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"\0" * 20), "adapter_model.safetensors"),
    ],
)
def test_something_that_is_no_adapter_is_refused(arrange: Callable[[Path], Any], says, checkpoints, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))
    arrange(adapter)

    status, line = refused(capsys, checkpoints / "llama", adapter, tmp_path / "out")

    assert (status, says in line) == (2, True), line


def test_quantizing_what_no_loader_holds_in_4_bits_is_refused(checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "llama", tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", model_type="falcon")
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))

    status, line = refused(capsys, tmp_path / "base", adapter, tmp_path / "out", "--requantize", "nf4")

    assert (status, "transformers cannot load falcon from quantized tensors" in line) == (2, True), line


PARTS = {
    "codes as float": ("", lambda t: t.float(), "is float32 (8192, 1)"),
    "too few codes": ("", lambda t: t[:-1].clone(), "is uint8 (8191, 1)"),
    "constants as float": (".absmax", lambda t: t.float(), "is float32 (256,)"),
    "constants as a matrix": (".absmax", lambda t: t.view(16, 16), "is uint8 (16, 16)"),
    "too few constants": (".absmax", lambda t: t[1:].clone(), "is uint8 (255,)"),
    "a table in another dtype": (".nested_quant_map", lambda t: t.double(), "is float64 (256,)"),
    "another table": (".quant_map", lambda t: t.flip(0).contiguous(), "not the one of its quant_type"),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_4_bit_weight_whose_parts_do_not_fit_is_refused(case, checkpoints, tmp_path, capsys):
    part, change, says = PARTS[case]
    base, name = tmp_path / "base", f"{Q0}.weight{part}"
    shutil.copytree(checkpoints / "converted", base)
    (base / "loftq_report.json").unlink()
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update({name: change(tensors[name])}))
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))

    status, line = refused(capsys, base, adapter, tmp_path / "out")

    assert (status, f"tensor {name}: " in line, says in line) == (2, True, True), line
    assert names_in(tmp_path) == ["adapter", "base"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("xyz", ": has a quant_state of a type that we do not know"),
        ("fp4", ".quant_state.bitsandbytes__fp4: says quant_type nf4, and its name another one"),
    ],
)
def test_a_quant_state_under_the_name_of_another_type_is_refused(name, says, checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "converted", tmp_path / "base")
    state = f"{Q0}.weight.quant_state.bitsandbytes__"
    edit_tensors(tmp_path / "base" / "model.safetensors", lambda t: t.update({state + name: t.pop(f"{state}nf4")}))

    status, line = refused(capsys, tmp_path / "base", tmp_path / "base" / "qlora_init", tmp_path / "out")

    assert (status, f"{Q0}.weight{says}" in line) == (2, True), line


def test_a_weight_with_two_quant_states_is_refused(checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "converted", tmp_path / "base")
    state = f"{Q0}.weight.quant_state.bitsandbytes__"
    edit_tensors(tmp_path / "base" / "model.safetensors", lambda t: t.update({f"{state}fp4": t[f"{state}nf4"].clone()}))

    status, line = refused(capsys, tmp_path / "base", tmp_path / "base" / "qlora_init", tmp_path / "out")

    assert (status, f"{Q0}.weight: has two quant_states" in line) == (2, True), line


def test_a_quant_state_as_large_as_a_weight_is_not_read(checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "converted", tmp_path / "base")
    state = {f"{Q0}.weight.quant_state.bitsandbytes__nf4": torch.zeros(20_000, dtype=torch.uint8)}
    edit_tensors(tmp_path / "base" / "model.safetensors", lambda tensors: tensors.update(state))

    status, line = refused(capsys, tmp_path / "base", tmp_path / "base" / "qlora_init", tmp_path / "out")

    assert (status, "has 20000 bytes, and a quant_state is small" in line) == (2, True), line
