"""An adapter that a merge cannot represent is refused by name, with the right exit status."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.adapters import PREFIX, edit_tensors, lora_tensors, made_by_peft, names_in, write_adapter
from support.merge_refusals import NAN, Q0, refused

from loftq_cli.cli.main import _run

QV = {"target_modules": ["q_proj", "v_proj"]}
SEQ_CLS = "AutoModelForSequenceClassification"
ROWS = "model.embed_tokens.token_adapter.trainable_tokens_delta"


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


BROKEN = {
    # another arithmetic than W + s·B·A
    "DoRA without its lengths": Broken(
        config={"use_dora": True}, says=(f"{Q0}.lora_B.weight", "has no lora_magnitude_vector beside it")
    ),
    "DoRA of another length": Broken(
        config={"use_dora": True},
        tensors={f"{Q0}.lora_magnitude_vector": torch.ones(127)},
        says=(f"{Q0}.lora_magnitude_vector", "is (127,), and its layer has 128 rows"),
    ),
    "lengths that are not finite": Broken(
        config={"use_dora": True},
        tensors={f"{Q0}.lora_magnitude_vector": torch.full((128,), float("nan"))},
        says=(f"{Q0}.lora_magnitude_vector", "NaN"),
        status=2,
    ),
    "BD-LoRA": Broken(config={"use_bdlora": {"nblocks": 2}}, says=("use_bdlora", "block-diagonal")),
    "KaSA": Broken(config={"kasa_config": {"beta": 1}}, says=("kasa_config",)),
    "MonteCLoRA": Broken(config={"monteclora_config": {}, "use_monte": True}, says=("use_monte",)),
    "a switch of tomorrow": Broken(config={"use_hyperlora": True}, says=("use_hyperlora", "not known")),
    "IA3": Broken(config={"peft_type": "IA3"}, says=("peft_type 'IA3'",)),
    "no peft_type": Broken(config={"peft_type": None}, says=("peft_type None",)),
    "one name of a parameter": Broken(
        config={"target_parameters": "mlp.experts.down_proj"}, says=("target_parameters is not a list",), status=2
    ),
    "PiSSA": Broken(config={"init_lora_weights": "pissa_niter_16"}, says=("init_lora_weights 'pissa_niter_16'",)),
    "OLoRA": Broken(config={"init_lora_weights": "olora"}, says=("init_lora_weights 'olora'",)),
    "CorDA": Broken(config={"init_lora_weights": "corda"}, says=("init_lora_weights 'corda'",)),
    "LoRA-GA": Broken(config={"init_lora_weights": "lora_ga"}, says=("init_lora_weights 'lora_ga'",)),
    "PEFT's own LoftQ": Broken(config={"init_lora_weights": "loftq"}, says=("init_lora_weights 'loftq'",)),
    "replicated layers": Broken(config={"layer_replication": [[0, 2], [1, 2]]}, says=("layer_replication",)),
    "trained tokens without rows": Broken(
        config={"trainable_token_indices": [1, 2]}, says=("holds no rows of single tokens",)
    ),
    "fewer rows than tokens": Broken(
        config={"trainable_token_indices": [1, 2]},
        tensors={ROWS: torch.ones(1, 128)},
        says=(ROWS, "is (1, 128), and adapter_config.json lists 2 tokens"),
    ),
    "one token twice": Broken(
        config={"trainable_token_indices": [1, 1]},
        tensors={ROWS: torch.ones(2, 128)},
        says=("adapter_config.json", "not different whole numbers"),
        status=2,
    ),
    "a token behind the vocabulary": Broken(
        config={"trainable_token_indices": [160]},
        tensors={ROWS: torch.ones(1, 128)},
        says=(ROWS, "trains the row 160", "has 160"),
    ),
    "rows of another width": Broken(
        config={"trainable_token_indices": [1]}, tensors={ROWS: torch.ones(1, 64)}, says=(ROWS, "is for (1, 64)")
    ),
    "rows of another matrix": Broken(
        config={"trainable_token_indices": {"wte": [1]}},
        tensors={"wte.token_adapter.trainable_tokens_delta": torch.ones(1, 128)},
        says=("wte.token_adapter", "its module is not in the base"),
    ),
    "rows that the config does not list": Broken(
        config={"trainable_token_indices": {"wte": [1]}},
        tensors={ROWS: torch.ones(1, 128)},
        says=("adapter_config.json", "lists no tokens for model.embed_tokens"),
        status=2,
    ),
    "activated LoRA": Broken(config={"alora_invocation_tokens": [1]}, says=("alora_invocation_tokens",)),
    "Arrow": Broken(config={"arrow_config": {"top_k": 2}}, says=("arrow_config",)),
    "a magnitude": Broken(
        tensors={f"{Q0}.lora_magnitude_vector": torch.ones(128)}, says=(f"{Q0}.lora_magnitude_vector", "use_dora")
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
    "a layer not in the base is shown beside the nearest": Broken(
        tensors=dict(lora_tensors("model.layers.7.mlp.up_proj", (128, 128))),
        says=("called like model.layers.", ".mlp.up_proj)"),
    ),
    "two adapters in one file": Broken(
        tensors={f"{Q0}.lora_A.one.weight": torch.ones(4, 128), f"{Q0}.lora_A.two.weight": torch.ones(4, 128)},
        says=("holds several adapters: one, two", "save_pretrained"),
    ),
    # what a sharded training run leaves
    "an empty factor": Broken(
        tensors={f"{Q0}.lora_B.weight": torch.zeros(0)},
        says=(
            f"{Q0}.lora_B.weight",
            "is empty",
            "ZeRO-3",
            "zero_to_fp32.py",
            "stage3_gather_16bit_weights_on_model_save",
        ),
    ),
    "an empty factor of two dimensions": Broken(
        tensors={f"{Q0}.lora_A.weight": torch.zeros(0, 128)},
        says=(f"{Q0}.lora_A.weight", "is empty", "zero_to_fp32.py"),
    ),
    "an empty head": Broken(
        tensors={"lm_head.weight": torch.zeros(0)},
        config={"modules_to_save": ["lm_head"]},
        says=("lm_head.weight", "is empty", "zero_to_fp32.py"),
    ),
    "a flat factor": Broken(
        tensors={f"{Q0}.lora_A.weight": torch.ones(256)}, says=("lora_A.weight", "not a matrix", "FULL_STATE_DICT")
    ),
    "half of the rows of lora_A": Broken(
        tensors={f"{Q0}.lora_A.weight": torch.ones(2, 128)},
        says=("lora_A.weight", "holds 2 of 4 rows", "FULL_STATE_DICT"),
    ),
    "half of the rows of lora_B": Broken(
        tensors={f"{Q0}.lora_B.weight": torch.ones(64, 4)}, says=("lora_B.weight", "(64, 128)", "FULL_STATE_DICT")
    ),
    "half of the rows of a head": Broken(
        tensors={"lm_head.weight": torch.ones(80, 128)},
        config={"modules_to_save": ["lm_head"]},
        says=("lm_head.weight", "(80, 128)", "FULL_STATE_DICT"),
    ),
    "a flat head": Broken(
        tensors={"lm_head.weight": torch.ones(80 * 128)},
        config={"modules_to_save": ["lm_head"]},
        says=("lm_head.weight", "(10240,)", "FULL_STATE_DICT"),
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
        ("llama", {**QV, "init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ("llama", {**QV, "init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ("llama", {**QV, "layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ("t5", {"target_modules": ["q", "shared"]}, "it would change the head too"),
    ],
)
def test_what_peft_itself_writes_and_merging_cannot_represent_is_refused(
    base, config, says, checkpoints, tmp_path, capsys
):
    auto = "AutoModelForSeq2SeqLM" if base == "t5" else "AutoModelForCausalLM"
    made = made_by_peft(checkpoints / base, tmp_path / "adapter", auto, **config)

    status, line = refused(capsys, checkpoints / base, made.path, tmp_path / "out")

    assert (status, says in line) == (4, True), line
    assert names_in(tmp_path) == ["adapter"]


def test_an_adapter_for_a_model_of_another_size_is_refused(checkpoints, tmp_path, capsys):
    made = made_by_peft(checkpoints / "bert", tmp_path / "adapter", SEQ_CLS, target_modules=["query"])

    status, line = refused(capsys, checkpoints / "llama", made.path, tmp_path / "out")

    assert (status, "bert.encoder.layer.0.attention.self.query.lora_A.weight" in line) == (4, True), line


def test_one_factor_under_two_names_is_refused(checkpoints, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))
    again = {f"{Q0}.lora_B.weight": torch.ones(128, 4)}  # without PEFT's prefix
    edit_tensors(adapter / "adapter_model.safetensors", lambda tensors: tensors.update(again))

    status, line = refused(capsys, checkpoints / "llama", adapter, tmp_path / "out")

    assert (status, f"has the same place as {PREFIX}{Q0}.lora_B.weight" in line) == (4, True), line


def test_an_adapter_without_tensors_is_refused(checkpoints, tmp_path, capsys):
    status, line = refused(capsys, checkpoints / "llama", write_adapter(tmp_path / "adapter", {}), tmp_path / "out")

    assert (status, "holds no tensor" in line) == (4, True), line


def test_a_name_in_an_adapter_cannot_write_to_the_terminal(checkpoints, tmp_path, capsys):
    tensors = {**lora_tensors(Q0, (128, 128)), "evil\x1b[2J\n.weight": torch.ones(2)}

    _, line = refused(capsys, checkpoints / "llama", write_adapter(tmp_path / "adapter", tensors), tmp_path / "out")

    assert "\x1b" not in line
    assert r"evil\x1b[2J\n.weight" in line


def test_a_folder_of_adapters_names_the_adapters(checkpoints, tmp_path, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("b", "a"):
        write_adapter(folder / name, lora_tensors(Q0, (128, 128)))
    (folder / "runs").mkdir()

    status, line = refused(capsys, checkpoints / "llama", folder, tmp_path / "out")

    assert status != 0
    assert line.endswith(f"(name one of the adapters in it: {folder}/a, {folder}/b)")


def test_a_folder_without_adapters_below_asks_for_an_adapter(checkpoints, tmp_path, capsys):
    (tmp_path / "adapter" / "runs").mkdir(parents=True)

    assert refused(capsys, checkpoints / "llama", tmp_path / "adapter", tmp_path / "out")[1].endswith(
        "holds no adapter_config.json (name a PEFT adapter directory)"
    )
