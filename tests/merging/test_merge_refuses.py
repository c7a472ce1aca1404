"""What `loftq merge` does not merge: refused by name, with the right exit status, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from support.adapters import (
    PREFIX,
    edit_json,
    edit_tensors,
    lora_tensors,
    made_by_peft,
    names_in,
    tensors_of,
    write_adapter,
)
from support.conversions import loftq, run_conversion

from loftq_cli.cli.main import _run

Q0 = "model.layers.0.self_attn.q_proj"
QV = {"target_modules": ["q_proj", "v_proj"]}
SEQ_CLS = "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("llama", "tied llama", "gpt2", "bert"):
        models.BUILDERS[name](folder / name.replace(" ", "_"))
    run_conversion(folder / "llama", folder / "converted", rank=4, method="qlora")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit status and the last line of a merge that writes nothing."""
    status = _run(["merge", *map(str, arguments)])
    captured = capsys.readouterr()
    assert captured.out == ""
    return status, captured.err.splitlines()[-1]


@dataclass(frozen=True)
class Broken:
    """An adapter on the first q_proj of the llama, and what is wrong with it."""

    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor | None] = field(default_factory=dict)
    says: tuple[str, ...] = ()
    status: int = 4
    base: str = "llama"
    arguments: tuple[str, ...] = ()


def without(part: str) -> dict[str, torch.Tensor | None]:
    return {f"{Q0}.{part}": None}


NAN = torch.full((128, 4), float("nan"))
BROKEN = {
    # another arithmetic than W + s·B·A
    "DoRA": Broken(config={"use_dora": True}, says=("adapter_config.json", "use_dora", "magnitude")),
    "BD-LoRA": Broken(config={"use_bdlora": {"nblocks": 2}}, says=("use_bdlora", "block-diagonal")),
    "KaSA": Broken(config={"kasa_config": {"beta": 1}}, says=("kasa_config",)),
    "MonteCLoRA": Broken(config={"monteclora_config": {}, "use_monte": True}, says=("use_monte",)),
    "a switch of tomorrow": Broken(config={"use_hyperlora": True}, says=("use_hyperlora", "not known")),
    "IA3": Broken(config={"peft_type": "IA3"}, says=("peft_type 'IA3'",)),
    "no peft_type": Broken(config={"peft_type": None}, says=("peft_type None",)),
    "experts' parameters": Broken(config={"target_parameters": ["mlp.experts.down_proj"]}, says=("target_parameters",)),
    "PiSSA": Broken(config={"init_lora_weights": "pissa_niter_16"}, says=("init_lora_weights 'pissa_niter_16'",)),
    "OLoRA": Broken(config={"init_lora_weights": "olora"}, says=("init_lora_weights 'olora'",)),
    "CorDA": Broken(config={"init_lora_weights": "corda"}, says=("init_lora_weights 'corda'",)),
    "LoRA-GA": Broken(config={"init_lora_weights": "lora_ga"}, says=("init_lora_weights 'lora_ga'",)),
    "PEFT's own LoftQ": Broken(config={"init_lora_weights": "loftq"}, says=("init_lora_weights 'loftq'",)),
    "replicated layers": Broken(config={"layer_replication": [[0, 2], [1, 2]]}, says=("layer_replication",)),
    "trained tokens": Broken(config={"trainable_token_indices": [1, 2]}, says=("trainable_token_indices",)),
    "activated LoRA": Broken(config={"alora_invocation_tokens": [1]}, says=("alora_invocation_tokens",)),
    "Arrow": Broken(config={"arrow_config": {"top_k": 2}}, says=("arrow_config",)),
    "a magnitude": Broken(
        tensors={f"{Q0}.lora_magnitude_vector": torch.ones(128)}, says=(f"{Q0}.lora_magnitude_vector", "of a kind")
    ),
    "a diagonal": Broken(tensors={f"{Q0}.lora_diag": torch.ones(4)}, says=(f"{Q0}.lora_diag", "of a kind")),
    # tensors that have no place
    "a tensor of nothing": Broken(
        tensors={"model.layers.9.norm.weight": torch.ones(128)}, says=("model.layers.9.norm.weight", "is left over")
    ),
    "an original without its copy": Broken(
        tensors={"score.original_module.weight": torch.ones(2)}, says=("score.original_module.weight", "left over")
    ),
    "two tensors for one place": Broken(
        tensors={f"{Q0}.base_layer.weight": torch.ones(128, 128), f"{Q0}.weight": torch.ones(128, 128)},
        says=("has the same place as",),
    ),
    "whole numbers": Broken(
        tensors={"model.norm.weight": torch.ones(128, dtype=torch.int64)}, says=("model.norm.weight", "is int64")
    ),
    "no lora_B": Broken(tensors=without("lora_B.weight"), says=(f"{Q0}.lora_A.weight", "has no lora_B beside it")),
    "no lora_A": Broken(tensors=without("lora_A.weight"), says=(f"{Q0}.lora_B.weight", "has no lora_A beside it")),
    "a layer not in the base": Broken(
        tensors=dict(lora_tensors("model.layers.2.self_attn.q_proj", (128, 128))),
        says=("model.layers.2.self_attn.q_proj.lora_A.weight", "its module is not in the base", "called like"),
    ),
    "no layer of the base": Broken(
        tensors={f"{Q0}.lora_A.weight": None, f"{Q0}.lora_B.weight": None, **lora_tensors("blocks.0.q", (128, 128))},
        says=("blocks.0.q.lora_A.weight", "its module is not in the base"),
    ),
    "a bias for a layer without one": Broken(
        tensors={f"{Q0}.lora_B.bias": torch.ones(128)}, says=(f"{Q0}.lora_B.bias", "has no bias in the base")
    ),
    "an adapted norm": Broken(
        tensors=dict(lora_tensors("model.norm", (128, 1))), says=("model.norm.lora_B.weight", "(128,)")
    ),
    # shapes and ranks
    "too few inputs": Broken(
        tensors={f"{Q0}.lora_A.weight": torch.ones(4, 64)}, says=(f"{Q0}.lora_B.weight", "(128, 64)", "(128, 128)")
    ),
    "too many outputs": Broken(
        tensors={f"{Q0}.lora_B.weight": torch.ones(256, 4)}, says=(f"{Q0}.lora_B.weight", "(256, 128)")
    ),
    "too many outputs for a 4-bit base": Broken(
        tensors={f"{Q0}.lora_B.weight": torch.ones(256, 4)},
        says=(f"{Q0}.lora_B.weight", "(256, 128)"),
        base="converted",
    ),
    "two ranks": Broken(tensors={f"{Q0}.lora_B.weight": torch.ones(128, 8)}, says=("lora_B.weight", "ranks differ")),
    "another rank than the config": Broken(
        config={"r": 8}, says=(f"{Q0}.lora_A.weight", "has rank 4", "adapter_config.json says 8")
    ),
    "another rank than the pattern": Broken(
        config={"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, says=("has rank 4", "says 2")
    ),
    "a factor of three dimensions": Broken(
        tensors={f"{Q0}.lora_A.weight": torch.ones(4, 128, 1)}, says=("lora_A.weight", "not a matrix")
    ),
    "a bias of another shape": Broken(
        tensors={f"{Q0}.lora_B.bias": torch.ones(1)}, says=(f"{Q0}.lora_B.bias", "is (1,)")
    ),
    "a replaced tensor of another shape": Broken(
        tensors={"lm_head.weight": torch.ones(161, 128)},
        config={"modules_to_save": ["lm_head"]},
        says=("lm_head.weight", "(161, 128)", "(160, 128)", "resize the base's embeddings"),
    ),
    "[in, out] weights where the base has [out, in]": Broken(
        config={"fan_in_fan_out": True}, says=("fan_in_fan_out", f"{Q0}.weight is [out, in]")
    ),
    # a config that means nothing
    "no rank": Broken(config={"r": 0}, says=("r is 0",), status=2),
    "a rank that is text": Broken(config={"r": "4"}, says=("r is '4'",), status=2),
    "no alpha": Broken(config={"lora_alpha": 0}, says=("lora_alpha is 0",), status=2),
    "a pattern of text": Broken(config={"alpha_pattern": {"q_proj": "8"}}, says=("alpha_pattern",), status=2),
    "a pattern that is a list": Broken(config={"rank_pattern": ["q_proj"]}, says=("rank_pattern",), status=2),
    "a pattern that is no expression": Broken(
        config={"rank_pattern": {"q_proj(": 4}}, says=("rank_pattern", "'q_proj('"), status=2
    ),
    "saved modules that are a number": Broken(config={"modules_to_save": 3}, says=("modules_to_save",), status=2),
    "targets that are a number": Broken(
        config={"target_modules": 3},
        says=("adapter_config.json", "target_modules is neither a list of names"),
        status=2,
    ),
    "targets that are no names": Broken(
        config={"target_modules": ["q_proj", None]}, says=("target_modules is neither",), status=2
    ),
    "excluded modules that are an object": Broken(
        config={"exclude_modules": {"a": 1}}, says=("exclude_modules is neither",), status=2
    ),
    "layers that are text": Broken(
        config={"target_modules": ["q_proj"], "layers_to_transform": "0"},
        says=("layers_to_transform is not",),
        status=2,
    ),
    "targets that are no expression": Broken(
        config={"target_modules": "q_proj("}, says=("target_modules", "'q_proj('", "no regular expression"), status=2
    ),
    # expressions made to run for years
    "a rank pattern that never ends": Broken(
        config={"rank_pattern": {"(.|..)*[XYZ]": 4}},
        says=("adapter_config.json", "rank_pattern", "'(.|..)*[XYZ]'", "takes too long to match"),
        status=2,
    ),
    "an alpha pattern that never ends": Broken(
        config={"alpha_pattern": {"(.|..)+[^a-z]": 4}},
        says=("adapter_config.json", "alpha_pattern", "'(.|..)+[^a-z]'", "takes too long"),
        status=2,
    ),
    "targets that never end": Broken(
        config={"target_modules": "(.|..)*[XYZ]"}, says=("target_modules", "takes too long to match"), status=2
    ),
    "excluded modules that never end": Broken(
        config={"target_modules": ["q_proj"], "exclude_modules": "(.|..)*[XYZ]"},
        says=("exclude_modules", "takes too long"),
        status=2,
    ),
    "an expression of a million characters": Broken(
        config={"rank_pattern": {"q" * 1_000_000: 4}}, says=("rank_pattern", "1000000 characters"), status=2
    ),
    # tensors that PEFT would drop
    "a module that is no target": Broken(
        config={"target_modules": ["v_proj", "proj"]},
        says=("adapter_model.safetensors", f"{Q0}.lora_A.weight", "target_modules", "PEFT would drop it"),
    ),
    "no targets": Broken(config={"target_modules": []}, says=("PEFT would drop it",)),
    "a module that the expression does not match": Broken(
        config={"target_modules": r".*\.v_proj"}, says=(f"{Q0}.lora_A.weight", "PEFT would drop it")
    ),
    "a module that is excluded": Broken(
        config={"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]}, says=("PEFT would drop it",)
    ),
    "a module in another layer": Broken(
        config={"target_modules": ["q_proj"], "layers_to_transform": [1]}, says=("PEFT would drop it",)
    ),
    # numbers
    "NaN": Broken(
        tensors={f"{Q0}.lora_B.weight": NAN},
        says=("adapter_model.safetensors", f"{Q0}.lora_B.weight", "NaN"),
        status=2,
    ),
    "NaN in a saved module": Broken(
        tensors={"lm_head.weight": torch.full((160, 128), float("inf"))}, says=("lm_head.weight", "NaN"), status=2
    ),
    "too large for float16": Broken(
        tensors={f"{Q0}.lora_B.weight": torch.full((128, 4), 1e6)},
        says=(f"{Q0}.weight", "not finite in float16", "--dtype float32"),
        status=2,
        arguments=("--dtype", "float16"),
    ),
    "too large for any dtype": Broken(
        tensors={f"{Q0}.lora_B.weight": torch.full((128, 4), 3e38)},
        says=(f"{Q0}.weight", "not finite in float32"),
        status=2,
        arguments=("--dtype", "float32"),
    ),
    "too large to be quantized": Broken(
        tensors={f"{Q0}.lora_B.weight": torch.full((128, 4), 3e38)},
        says=(f"{Q0}.weight", "NaN or infinite"),
        status=2,
        base="converted",
        arguments=("--requantize", "nf4"),
    ),
    # usage
    "an unknown dtype": Broken(says=("--dtype 'int8' does not exist",), status=2, arguments=("--dtype", "int8")),
    "an unknown quant type": Broken(
        says=("--requantize 'nf2' does not exist",), status=2, arguments=("--requantize", "nf2")
    ),
    "a size that is none": Broken(says=("'big' is not a size",), status=2, arguments=("--max-shard-size", "big")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_merged_is_refused_by_name(case, checkpoints, tmp_path, capsys):
    broken = BROKEN[case]
    tensors = {**lora_tensors(Q0, (128, 128)), **broken.tensors}
    present = {name: value for name, value in tensors.items() if value is not None}
    adapter = write_adapter(tmp_path / "adapter", present, **broken.config)

    status, line = refused(capsys, checkpoints / broken.base, adapter, tmp_path / "out", *broken.arguments)

    assert line.startswith("error: ")
    assert all(text in line for text in broken.says), line
    assert status == broken.status
    assert names_in(tmp_path) == ["adapter"]


def test_the_same_adapter_without_a_fault_merges(checkpoints, tmp_path):
    """The cases above fail for what is wrong with them, not for how they are made."""
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))

    for base in ("llama", "converted"):
        assert _run(["merge", str(checkpoints / base), str(adapter), str(tmp_path / base)]) == 0


@pytest.mark.parametrize(
    ("base", "config", "says"),
    [
        ("llama", {**QV, "use_dora": True}, "use_dora"),
        ("llama", {**QV, "init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ("llama", {**QV, "init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ("llama", {**QV, "trainable_token_indices": [1]}, "trainable_token_indices"),
        ("llama", {**QV, "layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ("tied_llama", {"target_modules": ["q_proj", "embed_tokens"]}, "it would change the head too"),
        ("tied_llama", {"target_modules": ["q_proj", "lm_head"]}, "it would change the embedding too"),
        ("tied_llama", {**QV, "modules_to_save": ["embed_tokens"]}, "it would change the head too"),
        ("gpt2", {"target_modules": ["c_attn", "wte"]}, "it would change the head too"),
    ],
)
def test_what_peft_itself_writes_and_merging_cannot_represent_is_refused(
    base, config, says, checkpoints, tmp_path, capsys
):
    made = made_by_peft(checkpoints / base, tmp_path / "adapter", **config)

    status, line = refused(capsys, checkpoints / base, made.path, tmp_path / "out")

    assert (status, says in line) == (4, True), line
    assert names_in(tmp_path) == ["adapter"]


def test_an_adapter_of_fused_experts_is_refused(tmp_path, capsys):
    models.mixtral(tmp_path / "base")
    config = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    made = made_by_peft(tmp_path / "base", tmp_path / "adapter", **config)

    status, line = refused(capsys, tmp_path / "base", made.path, tmp_path / "out")

    assert (status, "target_parameters" in line) == (4, True), line


def test_an_adapter_for_a_model_of_another_size_is_refused(checkpoints, tmp_path, capsys):
    made = made_by_peft(checkpoints / "bert", tmp_path / "adapter", SEQ_CLS, target_modules=["query"])

    status, line = refused(capsys, checkpoints / "llama", made.path, tmp_path / "out")

    assert (status, "bert.encoder.layer.0.attention.self.query.lora_A.weight" in line) == (4, True), line


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


def test_one_factor_under_two_names_is_refused(checkpoints, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))
    again = {f"{Q0}.lora_B.weight": torch.ones(128, 4)}  # without PEFT's prefix
    edit_tensors(adapter / "adapter_model.safetensors", lambda tensors: tensors.update(again))

    status, line = refused(capsys, checkpoints / "llama", adapter, tmp_path / "out")

    assert (status, f"has the same place as {PREFIX}{Q0}.lora_B.weight" in line) == (4, True), line


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


def test_an_adapter_without_tensors_is_refused(checkpoints, tmp_path, capsys):
    status, line = refused(capsys, checkpoints / "llama", write_adapter(tmp_path / "adapter", {}), tmp_path / "out")

    assert (status, "holds no tensor" in line) == (4, True), line


def test_an_output_that_exists_is_refused_and_kept(checkpoints, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    arguments = (checkpoints / "llama", adapter, tmp_path / "out")

    for force in ((), ("--overwrite",)):
        status, line = refused(capsys, *arguments, *force)
        assert (status, "is not empty and not a result of this tool" in line) == (2, True), line
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_an_earlier_result_is_refused_without_overwrite(checkpoints, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))
    arguments = (checkpoints / "llama", adapter, tmp_path / "out")
    assert _run(["merge", *map(str, arguments), "--quiet"]) == 0
    capsys.readouterr()

    status, line = refused(capsys, *arguments, "--dtype", "float16")

    assert (status, "exists already (--overwrite replaces it)" in line) == (2, True), line


def test_the_same_merge_again_does_nothing(checkpoints, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))
    arguments = ("merge", str(checkpoints / "llama"), str(adapter), str(tmp_path / "out"))
    assert _run([*arguments, "--quiet"]) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    capsys.readouterr()

    assert _run([*arguments]) == 0

    assert "already done, with these inputs and options" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_a_merge_of_another_adapter_under_the_same_name_is_not_taken_for_done(checkpoints, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))
    arguments = (checkpoints / "llama", adapter, tmp_path / "out")
    assert _run(["merge", *map(str, arguments), "--quiet"]) == 0
    capsys.readouterr()
    shutil.rmtree(adapter)
    write_adapter(adapter, {name: tensor + 1 for name, tensor in lora_tensors(Q0, (128, 128)).items()})

    status, line = refused(capsys, *arguments)

    assert (status, "exists already (--overwrite replaces it)" in line) == (2, True), line


def test_a_refused_merge_keeps_the_earlier_result(checkpoints, tmp_path, capsys):
    good = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))
    bad = write_adapter(tmp_path / "bad", {**lora_tensors(Q0, (128, 128)), f"{Q0}.lora_B.weight": NAN})
    assert _run(["merge", str(checkpoints / "llama"), str(good), str(tmp_path / "out"), "--quiet"]) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    capsys.readouterr()

    status, _ = refused(capsys, checkpoints / "llama", bad, tmp_path / "out", "--overwrite")

    assert status == 2
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert names_in(tmp_path) == ["adapter", "bad", "out"]


@pytest.mark.parametrize("where", ["base", "base/out", "base/model.safetensors", "adapter/out", "."])
def test_an_output_in_or_around_an_input_is_refused(where, checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "llama", tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))

    status, line = refused(capsys, tmp_path / "base" / "model.safetensors", adapter, tmp_path / where)

    assert (status, "may not be, contain or lie inside the input" in line) == (2, True), line
    assert names_in(tmp_path / "base") == names_in(checkpoints / "llama")


def test_the_exit_status_and_the_one_line_reach_the_shell(checkpoints, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)), use_dora=True)

    run = loftq("merge", checkpoints / "llama", adapter, tmp_path / "out")

    assert run.returncode == 4
    assert run.stdout == ""
    assert run.stderr == (
        f"error: {adapter}/adapter_config.json: use_dora: DoRA scales the merged weight by a magnitude "
        "(merge it with PEFT)\n"
    )


@pytest.mark.parametrize("config", [{"use_dora": True}, {"r": 8}, {"peft_type": "IA3"}])
def test_what_headers_tell_is_refused_before_torch_is_imported(config, checkpoints, tmp_path):
    import subprocess
    import sys

    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)), **config)
    code = (
        "import sys; from loftq_cli.cli.main import _run; status = _run(sys.argv[1:]); "
        "sys.exit(99 if 'torch' in sys.modules else status)"
    )
    arguments = ["merge", str(checkpoints / "converted"), str(adapter), str(tmp_path / "out")]

    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)

    assert run.returncode == 4, run.stderr


def test_a_name_in_an_adapter_cannot_write_to_the_terminal(checkpoints, tmp_path, capsys):
    tensors = {**lora_tensors(Q0, (128, 128)), "evil\x1b[2J\n.weight": torch.ones(2)}

    _, line = refused(capsys, checkpoints / "llama", write_adapter(tmp_path / "adapter", tensors), tmp_path / "out")

    assert "\x1b" not in line
    assert r"evil\x1b[2J\n.weight" in line


def test_the_adapter_is_not_changed(checkpoints, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))
    before = {name: (adapter / name).read_bytes() for name in names_in(adapter)}

    assert _run(["merge", str(checkpoints / "llama"), str(adapter), str(tmp_path / "out"), "--quiet"]) == 0

    assert {name: (adapter / name).read_bytes() for name in names_in(adapter)} == before
    assert set(tensors_of(adapter)) == {f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"}
    assert json.loads(before["adapter_config.json"])["r"] == 4
