"""`loftq inspect --verify`: every kind of damage is found and named, and nothing that is whole is called damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from support.adapters import PREFIX, edit_json, edit_tensors, write_adapter
from support.conversions import StopAfter, run_conversion, run_merge

from loftq_cli.cli.main import _run

Q0 = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
LORA_B = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight"
MODEL, ADAPTER = "model.safetensors", "loftq_init/adapter_model.safetensors"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Name of each tensor in a file -> where its bytes begin and end."""
    data = path.read_bytes()
    nbytes = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + nbytes])
    entries = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: (8 + nbytes + begin, 8 + nbytes + end) for name, (begin, end) in entries.items()}


def tensor_sums(path: Path) -> dict[str, str]:
    return {name: sha256(path.read_bytes()[begin:end]) for name, (begin, end) in places(path).items()}


def sign(directory: Path, *, tensors: bool = True) -> Path:
    """Write the checksums of what lies in `directory` now, as a conversion would."""
    listed = json.loads((directory / "checksums.json").read_text())["files"]
    files = {name: sha256((directory / name).read_bytes()) for name in listed}
    weights = [name for name in files if name.endswith(".safetensors")] if tensors else []
    edit_json(
        directory / "checksums.json", files=files, tensors={name: tensor_sums(directory / name) for name in weights}
    )
    return directory


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = models.llama(tmp_path_factory.mktemp("original") / "llama", layers=2)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    return directory


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, original: Path) -> Path:
    output = tmp_path_factory.mktemp("converted") / "base"
    run_conversion(original, output, rank=4, alpha=8.0, iterations=1, verify=False)
    return sign(output)


@pytest.fixture
def result(converted: Path, tmp_path: Path) -> Path:
    """A fresh copy of a converted directory."""
    shutil.copytree(converted, tmp_path / "result")
    return tmp_path / "result"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint in two files."""
    directory = tmp_path_factory.mktemp("sharded") / "model"
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    names = {f"model.layers.{i}.mlp.up_proj.weight": f"model-0000{1 + i}-of-00002.safetensors" for i in range(2)}
    for name, file in names.items():
        tensors = {
            name: torch.randn(64, 64, generator=generator),
            f"{name.removesuffix('weight')}bias": torch.zeros(64),
        }
        save_file(tensors, directory / file)
    weight_map = {tensor: file for file in names.values() for tensor in load_file(directory / file)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    shutil.copytree(sharded, tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What --json says, with the problems as (file, tensor, what); the exit status must agree with it."""

    def run(path: object, *options: object) -> dict[str, Any]:
        capsys.readouterr()
        status = _run(["inspect", str(path), "--verify", "--json", "--threads", "1", *map(str, options)])
        out, err = capsys.readouterr()
        values: dict[str, Any] = json.loads(out)
        assert values["verified"] == (status == 0) == (not values["problems"])
        assert status in (0, 2) and "Traceback" not in err
        values["problems"] = [(p["file"], p["tensor"], p["what"]) for p in values["problems"]]
        return values

    return run


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


# What is whole.


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


# Bytes.


@pytest.mark.parametrize("name", [Q0, f"{Q0}.absmax", NORM])
def test_a_flipped_bit_is_named_by_its_tensor(name, result, verify):
    flip(result / MODEL, places(result / MODEL)[name][1] - 1)
    assert verify(result)["problems"] == [(MODEL, name, "does not have its sha256")]


def test_a_flipped_bit_in_the_adapter_is_named_by_its_tensor(result, verify):
    flip(result / ADAPTER, places(result / ADAPTER)[LORA_B][0])
    assert verify(result)["problems"] == [(ADAPTER, LORA_B, "does not have its sha256")]


@pytest.mark.parametrize("name", [Q0, NORM])
def test_without_sums_of_tensors_the_file_is_named(name, result, verify):
    sign(result, tensors=False)
    flip(result / MODEL, places(result / MODEL)[name][0])
    assert verify(result)["problems"] == [(MODEL, None, "does not have the sha256 that checksums.json lists")]


def test_a_flipped_bit_in_a_side_file_is_named(result, verify):
    flip(result / "tokenizer.json", 3)
    assert verify(result)["problems"] == [
        ("tokenizer.json", None, "does not have the sha256 that checksums.json lists")
    ]


def test_every_damaged_tensor_and_file_is_named(result, verify):
    for name in (Q0, NORM):
        flip(result / MODEL, places(result / MODEL)[name][0])
    flip(result / ADAPTER, places(result / ADAPTER)[LORA_B][0])
    (result / "README.md").unlink()
    assert {(file, tensor) for file, tensor, _ in verify(result)["problems"]} == {
        (MODEL, Q0),
        (MODEL, NORM),
        (ADAPTER, LORA_B),
        ("README.md", None),
    }


def test_a_changed_header_over_the_same_numbers_is_named(result, verify):
    data = (result / MODEL).read_bytes()
    (result / MODEL).write_bytes(data.replace(b'{"format":"pt"}', b'{"format":"np"}', 1))
    assert verify(result)["problems"] == [(MODEL, None, "its header is not the one that was written, its tensors are")]


def test_a_missing_and_an_extra_tensor_are_named(result, verify):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["extra.weight"] = tensors.pop(NORM)

    edit_tensors(result / MODEL, change)
    assert verify(result)["problems"] == [
        (MODEL, NORM, "is missing"),
        (MODEL, "extra.weight", "is not part of the result"),
    ]


def test_a_truncated_file_is_named_and_the_rest_is_still_checked(result, verify):
    with open(result / MODEL, "r+b") as file:
        file.truncate(places(result / MODEL)[NORM][0] + 1)
    flip(result / ADAPTER, places(result / ADAPTER)[LORA_B][0])
    problems = verify(result)["problems"]
    assert [file for file, *_ in problems] == [MODEL, ADAPTER]
    assert "the file holds" in problems[0][2]


def test_truncated_and_missing_shards_are_all_named(shards, verify):
    first, second = sorted(shards.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    problems = verify(shards)["problems"]
    assert [file for file, *_ in problems] == [first.name, second.name]
    assert problems[1][2] == "no such file"


@pytest.mark.parametrize("name", ["config.json", MODEL, ADAPTER, "loftq_init/adapter_config.json", "loftq_report.json"])
def test_a_missing_file_is_named(name, result, verify):
    (result / name).unlink()
    assert (name, None, "no such file") in verify(result)["problems"]


def test_an_index_that_disagrees_is_named_for_each_file(shards, verify):
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    swap = dict(zip(files, reversed(files), strict=True))
    edit_json(shards / "model.safetensors.index.json", weight_map={k: swap[v] for k, v in index["weight_map"].items()})
    problems = verify(shards)["problems"]
    assert [file for file, *_ in problems] == files
    assert all("which model.safetensors.index.json expects in it" in what for *_, what in problems)


# What belongs to a result.


def test_a_file_that_is_not_listed_is_a_note(result, verify):
    write_adapter(result / "trained", {"x.lora_A.weight": torch.ones(4, 8), "x.lora_B.weight": torch.ones(8, 4)})
    found = verify(result)
    assert found["problems"] == []
    assert found["notes"] == [
        "trained/adapter_config.json: is not part of the result",
        "trained/adapter_model.safetensors: is not part of the result",
    ]


def test_an_extra_index_that_loaders_would_follow_is_damage(result, verify):
    weight_map = dict.fromkeys(load_file(result / MODEL), MODEL)
    (result / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert verify(result)["problems"] == [
        ("model.safetensors.index.json", None, "is not part of the result, and loaders take it for its weights")
    ]


@pytest.mark.parametrize("name", ["config.json", "loftq_init/adapter_config.json", "loftq_recipe.toml"])
def test_a_config_that_was_edited_is_named(name, result, verify):
    path = result / name
    path.write_text(path.read_text() + "\n")
    assert verify(result)["problems"] == [(name, None, "does not have the sha256 that checksums.json lists")]


@pytest.mark.parametrize("name", ["config.json", "loftq_init/adapter_config.json", "loftq_report.json"])
def test_a_record_that_is_no_json_is_named_once(name, result, verify):
    (result / name).write_text("{")
    problems = verify(result)["problems"]
    assert len(problems) == 1 and problems[0][0] == name and "is not valid JSON" in problems[0][2]


def test_checksums_that_were_edited_are_named(result, verify):
    values = json.loads((result / "checksums.json").read_text())
    values["files"]["config.json"] = "0" * 64
    values["tensors"][MODEL][NORM] = "1" * 64
    edit_json(result / "checksums.json", **values)
    assert verify(result)["problems"] == [
        ("config.json", None, "does not have the sha256 that checksums.json lists"),
        ("checksums.json", NORM, f"does not have its sha256, and its file {MODEL} has"),
    ]


@pytest.mark.parametrize(
    "values",
    [
        {"files": {"../outside": "0" * 64}},
        {"files": {"/etc/passwd": "0" * 64}},
        {"files": {"a//b": "0" * 64}},
        {"files": {"config.json": "short"}},
        {"files": ["config.json"]},
        {"tool": "other"},
        {"tensors": {"elsewhere": {}}},
    ],
    ids=str,
)
def test_checksums_that_this_tool_does_not_write_are_damage(values, result, verify):
    edit_json(result / "checksums.json", **values)
    found = verify(result)
    assert found["problems"] == [("checksums.json", None, "is not a list of checksums of this tool")]
    assert found["checksums"] is False


# What the records say, where their checksums are right.


def test_the_report_of_another_conversion_is_damage(result, original, tmp_path, verify):
    run_conversion(original, tmp_path / "other", rank=4, alpha=8.0, iterations=2, block_size=128, verify=False)
    shutil.copy(tmp_path / "other" / "loftq_report.json", result)
    problems = verify(sign(result))["problems"]
    assert ("loftq_report.json", Q0, "is stored in another format than it says") in problems
    what = "is of other quantized weights than those here (base_fingerprint)"
    assert ("loftq_report.json", None, what) in problems
    assert ("loftq_recipe.toml", None, "is not the recipe in loftq_report.json") in problems


def test_an_adapter_of_another_conversion_is_damage(result, verify):
    edit_json(result / "loftq_init" / "loftq_provenance.json", base_fingerprint="0" * 64)
    what = "is of other quantized weights than those here (base_fingerprint)"
    assert verify(sign(result))["problems"] == [("loftq_init/loftq_provenance.json", None, what)]


def test_layers_that_the_files_do_not_have_are_damage(result, verify):
    layers = json.loads((result / "loftq_report.json").read_text())["layers"]
    removed, layers[1]["name"], layers[2]["shape"] = layers.pop(0)["name"], "model.gone.weight", [1, 2]
    edit_json(result / "loftq_report.json", layers=layers)
    tensors = {(tensor, what) for file, tensor, what in verify(sign(result))["problems"] if tensor}
    assert ("model.gone.weight", "is a layer in it, and not in the weight files") in tensors
    assert (removed, "is quantized in the weight files, and no layer in it") in tensors
    assert any(tensor == layers[2]["name"] and what.startswith("is (1, 2) in it and (") for tensor, what in tensors)


def test_an_adapter_that_does_not_fit_its_layers_is_damage(result, verify):
    edit_tensors(result / ADAPTER, lambda t: t.update({LORA_B: torch.zeros(7, 4)}))
    edit_json(result / "loftq_init" / "adapter_config.json", lora_alpha=1)
    problems = verify(sign(result))["problems"]
    assert (ADAPTER, LORA_B, "is (7, 4), and its layer asks for (128, 4)") in problems
    config = "loftq_init/adapter_config.json"
    what = "gives model.layers.0.self_attn.q_proj another scaling than loftq_report.json"
    assert (config, None, what) in problems


def test_an_adapter_without_a_layer_of_the_report_is_damage(result, verify):
    edit_tensors(result / ADAPTER, lambda t: [t.pop(name) for name in list(t) if "layers.0.self_attn.q_proj" in name])
    what = "has no adapter for model.layers.0.self_attn.q_proj, says loftq_report.json"
    assert verify(sign(result))["problems"] == [(ADAPTER, None, what)]


def test_parts_of_quantized_weights_that_do_not_fit_are_all_damage(result, verify):
    names = [Q0, Q0.replace("q_proj", "k_proj")]
    edit_tensors(result / MODEL, lambda t: t.update({f"{name}.absmax": t[f"{name}.absmax"][:-1] for name in names}))
    problems = verify(sign(result))["problems"]
    assert [(file, tensor) for file, tensor, _ in problems] == [(MODEL, f"{name}.absmax") for name in sorted(names)]


def test_constants_that_no_quantizer_writes_are_damage(result, verify):
    edit_tensors(result / MODEL, lambda t: t[f"{Q0}.quant_map"].mul_(2))
    problems = verify(sign(result))["problems"]
    assert problems == [(MODEL, f"{Q0}.quant_map", "holds a table that is not the one of its quant_type")]


def test_zero_points_that_contradict_the_config_are_damage(original, tmp_path, verify):
    base = tmp_path / "base"
    run_conversion(
        original, base, method="qlora", rank=4, layout="gptq", quant_type="int8", symmetric=True, verify=False
    )
    name = Q0.replace("weight", "qzeros")
    edit_tensors(base / MODEL, lambda t: t[name].zero_())
    problems = verify(sign(base))["problems"]
    assert problems[0] == (MODEL, name, "holds zero points other than the middle, and the config says sym")


def test_a_recipe_that_does_not_read_is_damage(result, verify):
    (result / "loftq_recipe.toml").write_text("rank = 'many'\n")
    assert verify(sign(result))["problems"] == [("loftq_recipe.toml", None, "rank must be a whole number, not 'many'")]


def test_a_merge_report_that_names_other_layers_is_damage(converted, tmp_path, verify):
    merged = run_merge(converted, converted / "loftq_init", tmp_path / "merged")
    edit_json(merged / "loftq_merge_report.json", layers=[{"name": "gone"}])
    found = verify(sign(merged))["problems"]
    assert found == [("loftq_merge_report.json", "gone", "is a layer in it, and not in the weight files")]


# Numbers, where their checksums are right.


@pytest.mark.parametrize(
    ("file", "name"), [(MODEL, f"{Q0}.nested_absmax"), (ADAPTER, LORA_B)], ids=["constants", "adapter"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_damage_where_we_compute_it(file, name, value, result, verify):
    edit_tensors(result / file, lambda t: t[name].view(-1)[:1].fill_(value))
    problems = verify(sign(result, tensors=False))["problems"]
    assert (file, name, "holds 1 NaN or infinite value") in problems


def test_a_number_that_is_not_finite_is_a_note_where_it_was_copied(result, verify, capsys):
    edit_tensors(result / MODEL, lambda t: t[NORM][:3].fill_(float("nan")))
    found = verify(sign(result))
    assert found["problems"] == []
    assert found["notes"] == [f"{MODEL}: tensor {NORM}: holds 3 NaN or infinite values; it is copied as it is"]
    assert _run(["inspect", str(result), "--verify"]) == 0
    assert "tensors, 1 of them not finite, " in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_in_a_plain_checkpoint_it_is_damage_in_what_quantize_refuses(dtype, tmp_path, verify):
    weight = torch.zeros(3000, 512, dtype=getattr(torch, dtype))
    weight[-1, -1] = weight[0, 0] = float("inf")
    tensors = {"model.layers.0.mlp.up_proj.weight": weight, "mask": torch.full((4, 4), float("-inf"))}
    save_file({**tensors, "coded": torch.zeros(4).to(torch.float8_e5m2)}, tmp_path / MODEL)
    found = verify(tmp_path)
    assert found["problems"] == [(MODEL, "model.layers.0.mlp.up_proj.weight", "holds 2 NaN or infinite values")]
    assert found["notes"] == [f"{MODEL}: tensor mask: holds 16 NaN or infinite values; it is copied as it is"]
    assert verify(tmp_path / MODEL) == {**found, "path": str(tmp_path / MODEL)}


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "complex64"])
def test_rare_dtypes_are_looked_at_too(dtype, tmp_path, verify):
    values = torch.tensor([1.0, float("nan")]).to(getattr(torch, dtype))
    save_file({"odd": values, "empty": torch.zeros(0)}, tmp_path / MODEL)
    assert verify(tmp_path)["notes"] == [f"{MODEL}: tensor odd: holds 1 NaN or infinite value; it is copied as it is"]


# What is not a finished result.


def test_an_unfinished_result_is_damage(original, tmp_path, verify):
    with pytest.raises(KeyboardInterrupt):
        run_conversion(original, tmp_path / "base", rank=4, iterations=1, observer=StopAfter(2))
    problem = (None, None, "is an unfinished result: the command that began it completes it")
    assert verify(tmp_path / ".base.partial")["problems"] == [problem]
    assert verify(tmp_path / ".base.partial" / "result")["problems"] == [problem]


def test_a_result_without_its_checksums_is_damage(result, verify):
    (result / "checksums.json").unlink()
    what = "holds loftq_report.json and no checksums.json, which is written last: it is incomplete"
    assert verify(result)["problems"] == [(None, None, what)]


def test_a_publication_that_was_cut_short_is_damage(shards, verify):
    """Where an output is a mount point, files are moved into it one by one."""
    (shards / ".partial").mkdir()
    what = "holds .partial and no checksums.json, which is written last: it is incomplete"
    assert verify(shards)["problems"] == [(None, None, what)]


def test_an_adapter_is_verified_by_itself(converted, tmp_path, verify):
    adapter = tmp_path / "adapter"
    shutil.copytree(converted / "loftq_init", adapter)
    assert verify(adapter)["verified"]
    edit_tensors(adapter / "adapter_model.safetensors", lambda t: t[LORA_B][0].fill_(float("nan")))
    assert verify(adapter)["problems"] == [("adapter_model.safetensors", LORA_B, "holds 4 NaN or infinite values")]
    edit_json(adapter / "adapter_config.json", use_dora=True)
    assert verify(adapter)["notes"] == ["adapter_config.json: use_dora: DoRA scales the merged weight by a magnitude"]


def test_an_adapter_with_checksums_is_compared_with_them(converted, tmp_path, verify):
    adapter = tmp_path / "adapter"
    shutil.copytree(converted / "loftq_init", adapter)
    shutil.copy(converted / "checksums.json", adapter)
    names = {path.name for path in (converted / "loftq_init").iterdir()}
    edit_json(adapter / "checksums.json", files=dict.fromkeys(names, ""))
    found = verify(sign(adapter))
    assert (found["problems"], found["notes"], found["checksums"]) == ([], [], True)
    flip(adapter / "adapter_model.safetensors", places(adapter / "adapter_model.safetensors")[LORA_B][0])
    assert verify(adapter)["problems"] == [("adapter_model.safetensors", LORA_B, "does not have its sha256")]


def test_a_folder_without_weights_is_damage(tmp_path, verify):
    (tmp_path / "config.json").write_text("{}")
    assert verify(tmp_path)["problems"] == [(None, None, "holds no weights; found config.json")]


def test_a_path_that_is_not_there_is_an_error(tmp_path, capsys):
    assert _run(["inspect", str(tmp_path / "gone"), "--verify"]) == 2
    assert capsys.readouterr() == ("", f"error: {tmp_path / 'gone'}: no such file or folder (check the path)\n")


@pytest.mark.parametrize(
    "options",
    [("--against", "x"), ("--try", "nf4"), ("--sort", "error"), ("--top", "3"), ("--fail-above", "1")],
    ids=lambda options: options[0],
)
def test_options_about_errors_are_refused(options, converted, capsys):
    assert _run(["inspect", str(converted), "--verify", *options]) == 2
    assert f"--verify computes no errors for {options[0]}" in capsys.readouterr().err


# Hostile directories.


@pytest.mark.parametrize(
    "name", ["config.json", MODEL, ADAPTER, "loftq_init/adapter_config.json", "loftq_report.json", "loftq_recipe.toml"]
)
@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling", "device"])
def test_something_else_in_place_of_a_file_is_named_and_never_waited_for(name, kind, result, verify):
    (result / name).unlink()
    if kind == "fifo":
        os.mkfifo(result / name)
    elif kind == "folder":
        (result / name).mkdir()
    else:
        (result / name).symlink_to("/dev/zero" if kind == "device" else "/not/there")
    what = "is a link to a file that is not there" if kind == "dangling" else "is not a regular file"
    assert (name, None, what) in verify(result)["problems"]


def test_a_link_to_a_file_is_followed_and_one_to_a_folder_is_not(result, tmp_path, verify):
    shutil.move(result / MODEL, tmp_path / "blob")
    (result / MODEL).symlink_to(tmp_path / "blob")
    assert verify(result)["verified"]
    shutil.move(result / "loftq_init", tmp_path / "elsewhere")
    (result / "loftq_init").symlink_to(tmp_path / "elsewhere")
    problems = verify(result)["problems"]
    assert {(file, what) for file, _, what in problems} == {
        (f"loftq_init/{path.name}", "lies behind a link to another folder")
        for path in (tmp_path / "elsewhere").iterdir()
    }


@pytest.mark.parametrize("value", [None, 5, "x", [], {}, True, 1e300], ids=str)
@pytest.mark.parametrize("key", ["name", "module", "shape", "rank", "scaling", "quant_type", "group_size", "error"])
def test_a_report_of_anything_is_damage_and_no_traceback(key, value, result, verify):
    layers = json.loads((result / "loftq_report.json").read_text())["layers"]
    edit_json(result / "loftq_report.json", layers=[{**layers[0], key: value}, *layers[1:]])
    assert "loftq_report.json" in {file for file, *_ in verify(result)["problems"]}


def test_names_are_data(result, verify, capsys):
    names = ["[red]x[/red]", "line\nbreak\x1b[31m", "n" * 5000, "\N{RIGHT-TO-LEFT OVERRIDE}"]
    values = json.loads((result / "checksums.json").read_text())
    values["files"] |= dict.fromkeys(names, "0" * 64)
    edit_json(result / "checksums.json", **values)
    files = [file for file, *_ in verify(result)["problems"]]
    assert files[:2] == ["[red]x[/red]", "line\\nbreak\\x1b[31m"]
    assert len(files) == 4 and all(file.isprintable() and len(file) <= 400 for file in files)
    assert _run(["inspect", str(result), "--verify"]) == 2
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and len(out.splitlines()) == 5 and len(err.splitlines()) == 1


def test_names_of_tensors_are_data(tmp_path, verify):
    save_file({"[b]\x1b\n": torch.tensor([float("nan")])}, tmp_path / MODEL)
    assert verify(tmp_path)["notes"] == [
        f"{MODEL}: tensor [b]\\x1b\\n: holds 1 NaN or infinite value; it is copied as it is"
    ]


def test_a_long_list_of_files_is_gone_through(result, verify):
    values = json.loads((result / "checksums.json").read_text())
    values["files"] |= {f"folder/{i}": "0" * 64 for i in range(20_000)}
    edit_json(result / "checksums.json", **values)
    assert len(verify(result)["problems"]) == 20_000


def test_a_malformed_header_is_reported_without_torch(shards):
    for path in shards.glob("*.safetensors"):
        path.write_bytes(b"\xff" * 64)
    code = "import sys; from loftq_cli.cli.main import _run; status = _run(sys.argv[1:]); "
    code += "sys.exit(99 if 'torch' in sys.modules else status)"
    command = [sys.executable, "-c", code, "inspect", str(shards), "--verify"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout.count("its header claims") == 2
