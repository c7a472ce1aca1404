"""--task: a base and an adapter that start a classifier, a reward model or an encoder, as PEFT and transformers load
them: every adapter arrives, and the new head trains and is saved.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from support.adapters import edit_json, tensors_of
from support.conversions import run_conversion
from support.trained import IDS, LLAMA, SIZES, config_of, loaded, outputs, saved, saved_all

from loftq_cli.cli.main import _run

GPT2 = {"vocab_size": 160, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
BASES = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bert": ("BertModel", SIZES),
    "classifier": ("BertForSequenceClassification", {**SIZES, "num_labels": 3}),
}
SEQ, TOKENS = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
# base, auto class, arguments, labels, modules that train in full
TASKS: dict[str, tuple[str, str, dict[str, Any], int, list[str]]] = {
    "reward model": ("llama", SEQ, {"task": "SEQ_CLS"}, 1, ["score"]),
    "classifier": ("llama", SEQ, {"task": "SEQ_CLS", "num_labels": 3}, 3, ["score"]),
    "tokens": ("gpt2", TOKENS, {"task": "TOKEN_CLS", "num_labels": 5}, 5, ["classifier"]),
    "a model without a prefix": ("bert", SEQ, {"task": "SEQ_CLS"}, 2, ["classifier"]),
    "the model's own head": ("classifier", SEQ, {"task": "SEQ_CLS"}, 3, ["classifier"]),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_all(BASES, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("case", TASKS)
def test_the_start_of_a_task_loads_trains_and_merges(case, checkpoints, tmp_path):
    base, auto, recipe, labels, modules = TASKS[case]
    made = run_conversion(checkpoints / base, tmp_path / "base", rank=4, method="qlora", layout="dense", **recipe)

    model = getattr(transformers, auto).from_pretrained(made.output, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, made.adapter, is_trainable=True)

    assert model.config.num_labels == labels
    trainable = {name for name, parameter in peft.named_parameters() if parameter.requires_grad}
    assert sum("lora_A" in name for name in trainable) == len(made.layers)
    assert {name.split(".")[2] for name in trainable if "lora_" not in name} == set(modules)
    targets = torch.zeros(
        (*IDS.shape,) if auto == TOKENS else (len(IDS),), dtype=torch.float if labels == 1 else torch.long
    )
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.5)
    peft(input_ids=IDS, labels=targets).loss.backward()
    optimizer.step()
    peft.eval().save_pretrained(tmp_path / "trained")
    assert (
        _run(["merge", str(made.output), str(tmp_path / "trained"), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    )
    torch.testing.assert_close(outputs(loaded(tmp_path / "out", auto)), outputs(peft), rtol=0, atol=1e-5)


def test_an_encoder_of_a_language_model_has_the_names_of_its_class(checkpoints, tmp_path):
    made = run_conversion(checkpoints / "llama", tmp_path / "base", rank=4, task="FEATURE_EXTRACTION", layout="dense")

    model = transformers.AutoModel.from_pretrained(made.output, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, made.adapter)

    config = json.loads((made.adapter / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("FEATURE_EXTRACTION", None)
    loaded_names = {name for name, _ in peft.named_parameters() if "lora_A" in name}
    assert len(loaded_names) == len(made.layers)
    stored = tensors_of(made.adapter)
    state = peft.state_dict()
    assert all(torch.equal(state[name.replace(".weight", ".default.weight")], value) for name, value in stored.items())


def test_the_base_in_4_bits_keeps_the_head_dense(checkpoints, tmp_path):
    made = run_conversion(checkpoints / "llama", tmp_path / "base", rank=4, task="SEQ_CLS")

    assert "score" in config_of(made.output)["quantization_config"]["llm_int8_skip_modules"]
    assert config_of(made.output)["architectures"] == ["LlamaForSequenceClassification"]
    head = tensors_of(made.adapter)["base_model.model.score.weight"]
    assert head.shape == (1, 64)
    assert 0.005 < float(head.std()) < 0.04  # initializer_range is 0.02


def test_the_models_own_head_is_the_start(checkpoints, tmp_path):
    made = run_conversion(checkpoints / "classifier", tmp_path / "base", rank=4, method="qlora", task="SEQ_CLS")

    own, stored = tensors_of(checkpoints / "classifier"), tensors_of(made.adapter)
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(stored[f"base_model.model.{name}"], own[name])


def test_the_head_depends_on_the_seed_alone(checkpoints, tmp_path):
    heads = [
        tensors_of(run_conversion(checkpoints / "llama", tmp_path / str(i), rank=4, task="SEQ_CLS", seed=seed).adapter)
        for i, seed in enumerate((0, 0, 1))
    ]
    first, again, other = (tensors["base_model.model.score.weight"] for tensors in heads)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--task", "POETRY"), "--task 'POETRY' does not exist (one of CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS"),
        (("--num-labels", "3"), "--num-labels is for --task SEQ_CLS and TOKEN_CLS (leave --num-labels out)"),
        (("--task", "CAUSAL_LM", "--num-labels", "3"), "--num-labels means nothing with --task CAUSAL_LM"),
        (("--task", "SEQ_CLS", "--num-labels", "0"), "num_labels"),
        (
            ("--task", "SEQ_CLS", "--quant-type", "int4", "--group-size", "32", "--layout", "mlx"),
            "--task SEQ_CLS needs PEFT, which trains the head, and PEFT does not train on --layout mlx",
        ),
        (
            ("--task", "SEQ_CLS", "--recipe", "qalora-int4", "--group-size", "32"),
            "PEFT does not train on pooled inputs on --layout compressed-tensors (--method loftq)",
        ),
    ],
)
def test_a_task_without_meaning_is_refused(arguments, says, checkpoints, tmp_path, capsys):
    assert _run(["quantize", str(checkpoints / "llama"), str(tmp_path / "base"), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_family_without_a_head_for_the_task_is_refused(tmp_path, capsys):
    assert _run(["quantize", "builtin:tiny-llama", str(tmp_path / "base"), "--task", "SEQ_CLS", "--dry-run"]) == 0
    saved("MambaForCausalLM", tmp_path / "mamba", vocab_size=160, hidden_size=64, num_hidden_layers=1)
    assert _run(["quantize", str(tmp_path / "mamba"), str(tmp_path / "out"), "--task", "SEQ_CLS"]) == 2
    assert "--task SEQ_CLS: no head" in capsys.readouterr().err


@pytest.mark.parametrize(
    "junk",
    [
        {"id2label": {"first": "a", "second": "b"}},
        {"id2label": {"0": ["a"], "1": {}}},
        {"id2label": 3, "num_labels": "many"},
        {"initializer_range": 1e300},
        {"initializer_range": "wide"},
    ],
    ids=str,
)
def test_labels_and_widths_of_no_meaning_are_passed_over(junk, checkpoints, tmp_path):
    shutil.copytree(checkpoints / "llama", tmp_path / "junk")
    edit_json(tmp_path / "junk" / "config.json", **junk)

    made = run_conversion(tmp_path / "junk", tmp_path / "base", rank=4, method="qlora", task="SEQ_CLS")

    assert config_of(made.output)["id2label"] == {"0": "LABEL_0"}
    assert tensors_of(made.adapter)["base_model.model.score.weight"].abs().max() < 0.1
