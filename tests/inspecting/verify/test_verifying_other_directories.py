"""Unfinished results, adapters by themselves, and hostile directories."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from support.adapters import edit_json, edit_tensors
from support.conversions import StopAfter, run_conversion
from support.verified_results import ADAPTER, LORA_B, MODEL, flip, places, sign

from loftq_cli.cli.main import _run

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
    (note,) = verify(adapter)["notes"]
    assert note.endswith("has no lora_magnitude_vector beside it, and adapter_config.json says use_dora")


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
