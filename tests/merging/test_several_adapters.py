"""Several adapters merge at once: what each alone adds to the base, times a weight, adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.adapters import tensors_of
from support.conversions import run_conversion
from support.trained import LLAMA, loaded, outputs, saved, trained

import loftq_cli as loftq
from loftq_cli.cli.main import _run

EMBEDDING = "model.embed_tokens.weight"
SECOND = {"target_modules": ["q_proj", "v_proj"], "r": 2, "rank_pattern": {"v_proj": 3}, "use_rslora": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and the adapters `one` and `two`; `lengths` is DoRA, `rows` and `head` train beside factors."""
    folder = tmp_path_factory.mktemp("made")
    saved("LlamaForCausalLM", folder / "base", **LLAMA)
    trained(loaded(folder / "base"), folder / "one", target_modules=["q_proj", "down_proj"])
    trained(loaded(folder / "base"), folder / "two", seed=2, **SECOND)
    trained(loaded(folder / "base"), folder / "lengths", seed=3, target_modules=["q_proj"], use_dora=True)
    trained(loaded(folder / "base"), folder / "rows", target_modules=["q_proj"], trainable_token_indices=[3, 5])
    for seed, name in enumerate(("head", "other head")):
        trained(loaded(folder / "base"), folder / name, seed, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return folder


def merge(*arguments: object) -> int:
    return _run(["merge", *map(str, arguments), "--dtype", "float32"])


@pytest.mark.parametrize(
    "command",
    ["{base} {one}:0.7 {out} --adapter {two}:-0.4", "{base} {out} --adapter {one}:0.7 --adapter {two}:-0.4"],
)
def test_the_sum_is_that_of_peft(command, made, tmp_path, capsys):
    model = PeftModel.from_pretrained(loaded(made / "base"), made / "one", adapter_name="one")
    model.load_adapter(made / "two", adapter_name="two")
    model.base_model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", combination_type="cat")
    model.base_model.set_adapter("sum")
    paths = {name: made / name for name in ("base", "one", "two")}

    assert merge(*command.format(**paths, out=tmp_path / "out").split()) == 0

    torch.testing.assert_close(outputs(loaded(tmp_path / "out")), outputs(model), rtol=0, atol=1e-5)
    assert "merged: 0.7 × one + -0.4 × two" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "loftq_merge_report.json").read_text())
    assert [(entry["adapter"], entry["weight"]) for entry in report["adapters"]] == [("one", 0.7), ("two", -0.4)]


def test_python_takes_several_adapters(made, tmp_path):
    adapters = [made / "two"]
    result = loftq.merge(made / "base", f"{made / 'one'}:0.5", tmp_path / "out", adapters=adapters, dtype="float32")
    assert len(result.layers) == 6  # two layers with q, v and down
    assert merge(made / "base", f"{made / 'one'}:0.5", tmp_path / "again", "--adapter", made / "two") == 0
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_dora_and_rows_add_what_each_adapter_alone_adds(made, tmp_path):
    for name in ("one", "lengths", "rows"):
        assert merge(made / "base", made / name, tmp_path / name) == 0

    further = ["--adapter", f"{made / 'lengths'}:0.5", "--adapter", f"{made / 'rows'}:0.25"]
    assert merge(made / "base", made / "one", tmp_path / "out", *further) == 0

    base, merged = tensors_of(made / "base"), tensors_of(tmp_path / "out")
    alone = {name: tensors_of(tmp_path / name) for name in ("one", "lengths", "rows")}
    for name, value in merged.items():
        weights = {"one": 1.0, "lengths": 0.5, "rows": 0.25}
        change = sum(w * (alone[a][name].double() - base[name].double()) for a, w in weights.items())
        torch.testing.assert_close(value.double(), base[name].double() + change, rtol=0, atol=1e-6)


def test_a_saved_head_of_one_adapter_is_taken_whole(made, tmp_path, capsys):
    assert merge(made / "base", f"{made / 'head'}:0.5", tmp_path / "out", "--adapter", made / "one") == 0

    head = tensors_of(made / "head")["base_model.model.lm_head.weight"]
    assert torch.equal(tensors_of(tmp_path / "out")["lm_head.weight"], head)
    assert "tensors saved in full are taken as they are" in capsys.readouterr().err


def test_weights_over_a_fitted_base_that_do_not_add_up_to_one_are_noted(tmp_path, capsys):
    """A LoftQ adapter holds the error of the base, which a weight of 0.5 halves."""
    base = run_conversion("builtin:tiny-llama", tmp_path / "base", rank=4, include=[r"layers\.0\.self_attn\.q"])

    for weight, is_noted in (("0.5", True), ("1", False)):
        arguments = (base.output, f"{base.adapter}:{weight}", tmp_path / f"out {weight}", "--force")
        assert merge(*arguments) == 0
        assert ("the weights of the adapters add up to 0.5" in capsys.readouterr().err) is is_noted


def test_heads_of_two_adapters_are_refused_as_in_peft(made, tmp_path, capsys):
    assert merge(made / "base", made / "head", tmp_path / "out", "--adapter", made / "other head") == 4
    assert "is saved in full by two adapters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("adapter", "status", "says"),
    [
        ("one:heavy", 2, "the weight 'heavy' is no number (--adapter DIR:0.5)"),
        ("one:inf", 2, "the weight is not finite"),
        ("two", 2, "the adapter is named twice (name it once, with the sum of the weights)"),
        ("three", 2, "is no directory"),
    ],
)
def test_what_is_no_adapter_or_no_weight_is_refused(adapter, status, says, made, tmp_path, capsys):
    assert merge(made / "base", made / "two", tmp_path / "out", "--adapter", made / adapter) == status
    assert says in capsys.readouterr().err


def test_a_command_without_an_output_is_refused(made, capsys):
    assert merge(made / "base", made / "one") == 2
    assert "no OUTPUT to write (loftq merge BASE ADAPTER OUTPUT)" in capsys.readouterr().err
