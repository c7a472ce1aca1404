"""An adapter that brings the head of a task makes the base a model of the task: a classifier trained from a language
model loads as a classifier, with the outputs of PEFT's forward pass.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import edit_json, tensors_of
from support.conversions import run_conversion
from support.trained import LLAMA, SIZES, config_of, loaded, outputs, saved, saved_all, trained

from loftq_cli.cli.main import _run

SEQ, TOKENS = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
GPT2 = {"vocab_size": 160, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
T5 = {"vocab_size": 160, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
BASES = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "tied": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bert": ("BertModel", SIZES),
    "masked": ("BertForMaskedLM", SIZES),
    "deberta": ("DebertaV2ForMaskedLM", SIZES),
    "t5": ("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}),
}
SEQ_CLS, TOKEN_CLS = {"task_type": "SEQ_CLS"}, {"task_type": "TOKEN_CLS"}
# base, auto class, labels, config, class of the merged model, parts of names that are gone
TASKS: dict[str, tuple[str, str, int, dict[str, Any], str, set[str]]] = {
    "classifier": ("llama", SEQ, 3, {**SEQ_CLS, "target_modules": ["q_proj"]}, "Llama", {"lm_head"}),
    "reward model": ("tied", SEQ, 1, {**SEQ_CLS, "target_modules": ["q_proj"], "use_dora": True}, "Llama", set()),
    "no task type": (
        "llama",
        SEQ,
        5,
        {"target_modules": ["q_proj"], "modules_to_save": ["score"]},
        "Llama",
        {"lm_head"},
    ),
    "Conv1D": ("gpt2", SEQ, 2, {**SEQ_CLS, "target_modules": ["c_attn"], "fan_in_fan_out": True}, "GPT2", set()),
    "tokens": ("gpt2", TOKENS, 7, {**TOKEN_CLS, "target_modules": ["c_attn"]}, "GPT2", set()),
    "no prefix": ("bert", SEQ, 3, {**SEQ_CLS, "target_modules": ["query"]}, "Bert", set()),
    "masked": (
        "masked",
        SEQ,
        3,
        {**SEQ_CLS, "target_modules": ["query"], "modules_to_save": ["pooler"]},
        "Bert",
        {"cls"},
    ),
    "two layers": (
        *("deberta", SEQ, 4, {**SEQ_CLS, "target_modules": ["query_proj"], "modules_to_save": ["pooler"]}),
        *("DebertaV2", {"cls", "lm_predictions"}),
    ),
    "encoder and decoder": (
        *("t5", SEQ, 3, {**SEQ_CLS, "target_modules": ["q"], "modules_to_save": ["classification_head"]}, "T5"),
        {"lm_head"},
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_all(BASES, tmp_path_factory.mktemp("checkpoints"))


def merge(base: Path, adapter: Path, out: Path, *arguments: str) -> int:
    return _run(["merge", str(base), str(adapter), str(out), "--dtype", "float32", *arguments])


def made_at(base: Path, directory: Path, auto: str, labels: int, config: dict[str, Any]) -> Any:
    torch.manual_seed(2)  # the new head
    return trained(loaded(base, auto, num_labels=labels), directory, **config)


@pytest.mark.parametrize("case", TASKS)
def test_the_merged_model_is_one_of_the_task(case, checkpoints, tmp_path, capsys):
    base, auto, labels, config, stem, gone = TASKS[case]
    made = made_at(checkpoints / base, tmp_path / "adapter", auto, labels, config)

    assert merge(checkpoints / base, made.path, tmp_path / "out") == 0

    merged, written = loaded(tmp_path / "out", auto), config_of(tmp_path / "out")
    assert written["architectures"] == [stem + auto.removeprefix("AutoModel")]
    assert (written["num_labels"], len(written["id2label"]), len(written["label2id"])) == (labels,) * 3
    assert merged.config.num_labels == labels
    torch.testing.assert_close(outputs(merged), made.outputs, rtol=0, atol=1e-5)
    assert not gone & {name.partition(".")[0] for name in tensors_of(tmp_path / "out")}
    assert f"with {labels} label" in capsys.readouterr().err


def test_a_head_of_other_labels_replaces_the_bases(checkpoints, tmp_path):
    saved("BertForSequenceClassification", tmp_path / "base", **SIZES, num_labels=3)
    torch.manual_seed(2)
    model = loaded_with_labels(tmp_path / "base", 5)
    made = trained(model, tmp_path / "adapter", **SEQ_CLS, target_modules=["query"])

    assert merge(tmp_path / "base", made.path, tmp_path / "out") == 0

    assert config_of(tmp_path / "out")["num_labels"] == 5
    torch.testing.assert_close(outputs(loaded(tmp_path / "out", SEQ)), made.outputs, rtol=0, atol=1e-5)


def loaded_with_labels(directory: Path, labels: int) -> Any:
    import transformers

    kind = transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(directory, num_labels=labels, ignore_mismatched_sizes=True)


def test_names_of_labels_come_from_a_config_beside_the_adapter(checkpoints, tmp_path):
    config = {**SEQ_CLS, "target_modules": ["q_proj"]}
    made = made_at(checkpoints / "llama", tmp_path / "adapter", SEQ, 2, config)
    (made.path / "config.json").write_text(json.dumps({"id2label": {"0": "no", "1": "yes"}}))

    assert merge(checkpoints / "llama", made.path, tmp_path / "out") == 0

    written = config_of(tmp_path / "out")
    assert (written["id2label"], written["label2id"]) == ({"0": "no", "1": "yes"}, {"no": 0, "yes": 1})


def test_a_family_without_the_class_is_refused_by_the_name_of_the_head(checkpoints, tmp_path, capsys):
    config = {**SEQ_CLS, "target_modules": ["q_proj"]}
    made = made_at(checkpoints / "llama", tmp_path / "adapter", SEQ, 2, config)
    saved("LlamaForCausalLM", tmp_path / "base", **LLAMA)
    edit_json(tmp_path / "base" / "config.json", model_type="unheard_of")

    assert merge(tmp_path / "base", made.path, tmp_path / "out") == 4
    assert "is a head that the base's config knows nothing of" in capsys.readouterr().err


def test_a_quantized_classifier_keeps_the_head_in_full_precision(checkpoints, tmp_path):
    """The base of a conversion for the task, and a merge that quantizes again."""
    made = run_conversion(
        checkpoints / "llama", tmp_path / "base", rank=4, method="qlora", task="SEQ_CLS", num_labels=3
    )

    assert _run(["merge", str(made.output), str(made.adapter), str(tmp_path / "out"), "--requantize", "int8"]) == 0

    written, tensors = config_of(tmp_path / "out"), tensors_of(tmp_path / "out")
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    assert tensors["score.weight"].shape == (3, 64)
    assert not any(name.startswith("lm_head") for name in tensors)
