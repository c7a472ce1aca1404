"""`loftq inspect --verify` calls nothing damaged that is whole; the words that it prints."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from support import models
from support.adapters import edit_json
from support.conversions import run_conversion, run_merge
from support.verified_results import ADAPTER, MODEL, NORM, Q0, flip, places, sign

from loftq_cli.cli.main import _run


@pytest.mark.parametrize(
    ("layout", "recipe"),
    [
        ("bitsandbytes", {}),
        ("bitsandbytes", {"double_quant": False, "method": "qlora"}),
        ("dense", {"iterations": 1}),
        ("compressed-tensors", {"quant_type": "int4"}),
        ("compressed-tensors", {"quant_type": "int8"}),
        ("gptq", {"quant_type": "int4", "method": "qalora"}),
        ("gptq", {"quant_type": "int8", "method": "qlora"}),
        ("metal", {"quant_type": "int4"}),
        ("mlx", {"quant_type": "int3", "method": "qalora"}),
    ],
)
@pytest.mark.parametrize("tensors", [True, False], ids=["tensors listed", "files listed"])
def test_a_result_of_any_layout_and_what_is_merged_from_it_are_whole(
    layout, recipe, tensors, original, tmp_path, verify
):
    base = tmp_path / "base"
    outcome = run_conversion(original, base, rank=4, layout=layout, verify=False, **recipe)
    found = verify(sign(base, tensors=tensors))
    assert found["problems"] == found["notes"] == []
    assert found["checksums"] is True
    assert found["tensors"] == len(load_file(base / MODEL)) + len(load_file(outcome.adapter / ADAPTER.split("/")[1]))
    assert found["files"] == len(json.loads((base / "checksums.json").read_text())["files"])

    merged = verify(run_merge(base, outcome.adapter, tmp_path / "merged"))
    assert (merged["problems"], merged["checksums"]) == ([], True)


@pytest.mark.parametrize("name", ["gpt2", "tied llama", "mixtral", "bert"])
def test_results_of_other_models_are_whole(name, tmp_path, verify):
    run_conversion(models.BUILDERS[name](tmp_path / "original"), tmp_path / "base", rank=4, iterations=1, verify=False)
    assert verify(tmp_path / "original")["verified"]
    assert verify(sign(tmp_path / "base"))["problems"] == []


def test_several_shards_with_overrides_are_whole(original, tmp_path, verify):
    model = models.llama(tmp_path / "model", layers=8)
    recipe = tmp_path / "recipe.toml"
    override = '[[override]]\nmatch = "down_proj"\nrank = 8'
    recipe.write_text(f'rank = 4\niterations = 1\nlayout = "dense"\nmax_shard_size = "1MB"\n{override}\n')
    assert _run(["quantize", str(model), str(tmp_path / "base"), "--recipe", str(recipe), "-q"]) == 0
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    assert verify(tmp_path / "base")["problems"] == []


def test_threads_do_not_change_what_is_found(result, verify):
    flip(result / MODEL, places(result / MODEL)[NORM][0])
    assert verify(result) == verify(result, "--threads", 3)


def test_a_torch_file_and_the_model_inside_the_package_are_whole(tmp_path, verify):
    assert verify(models.torch_llama(tmp_path / "torch"))["verified"]
    found = verify("builtin:tiny-llama")
    assert found["verified"] and not found["checksums"] and found["tensors"] == 39


def test_the_words_of_a_whole_result(result, sharded, capsys):
    listed = len(json.loads((result / "checksums.json").read_text())["files"])
    assert _run(["inspect", str(result), "--verify"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"verified: {listed} files with their checksums, ") and "tensors, all finite, " in out
    assert err == ""
    assert _run(["inspect", str(sharded), "--verify"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("verified: 4 files without checksums, 4 tensors, all finite, ")
    assert err == "no checksums to compare with: only headers, index, config and numbers were checked\n"


def test_the_words_of_a_damaged_result(result, capsys):
    flip(result / MODEL, places(result / MODEL)[Q0][0])
    flip(result / "tokenizer.json", 3)
    assert _run(["inspect", str(result), "--verify"]) == 2
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "tokenizer.json: does not have the sha256 that checksums.json lists"
    assert lines[1] == f"model.safetensors: tensor {Q0}: does not have its sha256"
    assert lines[2].startswith("damaged: 2 problems in ") and len(lines) == 3
    assert err == f"error: {result}: 2 problems found (download or convert it again)\n"


def test_many_problems_are_cut_on_a_terminal_and_all_there_in_json(result, verify, capsys):
    more = {f"missing-{i}": "0" * 64 for i in range(30)}
    files = json.loads((result / "checksums.json").read_text())["files"]
    edit_json(result / "checksums.json", files={**files, **more})
    assert _run(["inspect", str(result), "--verify"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 22 and lines[20] == "and 10 more" and lines[21].startswith("damaged: 30 problems in ")
    assert len(verify(result)["problems"]) == 30
