"""Values of a config that are not of their type are refused by key, and bring down nothing else."""

from __future__ import annotations

import shutil

import pytest
from support.adapters import edit_json, lora_tensors, write_adapter
from support.merge_refusals import Q0, refused

from loftq_cli.cli.main import _run

HOSTILE = [None, True, 0, -1, 1.5, 10**40, "", "(", [1], ["("], {"(": 1}, {"a": None}, [[0, 1]], {"a": {"b": 1}}]
KEYS = ["peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"]
KEYS += ["fan_in_fan_out", "init_lora_weights", "bias", "base_model_name_or_path", "target_modules", "use_x"]


@pytest.mark.parametrize("key", KEYS)
def test_no_config_value_brings_down_more_than_the_merge(key, checkpoints, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))
    config = (adapter / "adapter_config.json").read_text()

    for value in HOSTILE:
        edit_json(adapter / "adapter_config.json", **{key: value})
        arguments = ["merge", str(checkpoints / "converted"), str(adapter), str(tmp_path / "out"), "--dry-run"]
        assert _run(arguments) in (0, 2, 4)
        (adapter / "adapter_config.json").write_text(config)


CONFIG_VALUES = {
    "architectures": [5, "LlamaForCausalLM", [5], {"a": 1}],
    "model_type": [7, ["llama"]],
    "text_config": [[], "llama", 3],
    "torch_dtype": [7, ["float16"], True],
    "tie_word_embeddings": ["yes", 1],
    "vocab_size": ["x", 1.5, [160]],
    "quantization_config": [3, "gptq", [1]],
    "quantization": [True],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CONFIG_VALUES.items() for value in values])
def test_a_config_value_of_the_wrong_type_is_refused_by_its_key(key, value, checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "llama", tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", **{key: value})
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))

    status, line = refused(capsys, tmp_path / "base", adapter, tmp_path / "out")

    assert status == 2
    assert line.startswith(f"error: {tmp_path}/base/config.json: {key} is "), line
    assert _run(["quantize", str(tmp_path / "base"), str(tmp_path / "out"), "--dry-run"]) == 2
    assert f"config.json: {key} is " in capsys.readouterr().err


@pytest.mark.parametrize("key", ["dtype", "tie_word_embeddings", "vocab_size"])
def test_a_nested_config_value_of_the_wrong_type_is_refused_by_its_key(key, checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "llama", tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", text_config={key: [1]})
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))

    status, line = refused(capsys, tmp_path / "base", adapter, tmp_path / "out")

    assert (status, f"config.json: text_config.{key} is [1], not " in line) == (2, True), line
