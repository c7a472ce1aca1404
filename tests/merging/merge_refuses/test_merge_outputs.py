"""Where a merge writes, what it leaves as it was, and what reaches the shell."""

from __future__ import annotations

import json
import shutil

import pytest
from support.adapters import PREFIX, lora_tensors, names_in, tensors_of, write_adapter
from support.conversions import loftq
from support.merge_refusals import NAN, Q0, refused

from loftq_cli.cli.main import _run


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
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)), alora_invocation_tokens=[1])

    run = loftq("merge", checkpoints / "llama", adapter, tmp_path / "out")

    assert run.returncode == 4
    assert run.stdout == ""
    assert run.stderr == (
        f"error: {adapter}/adapter_config.json: alora_invocation_tokens: activated LoRA depends on the prompt "
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


def test_the_adapter_is_not_changed(checkpoints, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(Q0, (128, 128)))
    before = {name: (adapter / name).read_bytes() for name in names_in(adapter)}

    assert _run(["merge", str(checkpoints / "llama"), str(adapter), str(tmp_path / "out"), "--quiet"]) == 0

    assert {name: (adapter / name).read_bytes() for name in names_in(adapter)} == before
    assert set(tensors_of(adapter)) == {f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"}
    assert json.loads(before["adapter_config.json"])["r"] == 4
