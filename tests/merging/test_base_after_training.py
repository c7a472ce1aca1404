"""The base of an adapter that PEFT trained is known by its fingerprint, wherever training ran and wherever the merge
runs; for every kind of start that is fitted to its base.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from support import models
from support.adapters import names_in, quietly
from support.conversions import run_conversion
from support.loading import keep_trainable

from loftq_cli.cli.main import _run
from loftq_cli.errors import MismatchError
from loftq_cli.nn import load_adapted, save_adapter

STARTS = {
    "loftq": {"method": "loftq", "fit": "loftq", "iterations": 2},
    "joint": {"method": "loftq", "fit": "joint"},
    "pissa": {"method": "pissa"},
}


def train(base: Path, adapter: Path, output: Path) -> Path:
    """One step of a PeftModel, saved by PEFT."""
    model = keep_trainable(transformers.AutoModelForCausalLM.from_pretrained(base))
    peft = PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
    ids = torch.arange(20).view(2, 10)
    peft(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.5).step()
    peft.save_pretrained(output)
    return output


@pytest.fixture(scope="module", params=STARTS)
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an original, the conversion "right", another conversion "wrong", and an adapter that PEFT trained
    over "right" under a path that is gone: "trained".
    """
    folder = tmp_path_factory.mktemp(request.param)
    models.llama(folder / "original", layers=1)
    with pytest.MonkeyPatch.context() as patch:
        (folder / "there").mkdir()
        patch.chdir(folder / "there")
        outcome = run_conversion("../original", Path("base"), rank=4, **STARTS[request.param])
        quietly(train, Path("base"), outcome.adapter, folder / "trained")
        shutil.move("base", folder / "right")
    run_conversion(folder / "original", folder / "wrong", rank=4, block_size=32, **STARTS[request.param])
    return folder


def merge(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = _run(["merge", *map(str, arguments), "--quiet"])
    return status, capsys.readouterr().err


def fingerprint(folder: Path) -> str:
    return json.loads((folder / "loftq_report.json").read_text())["base_fingerprint"][:12]


@pytest.fixture(params=["its folder", "another folder"])
def here(request: pytest.FixtureRequest, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the merge runs. In the other folder, the path in the adapter's config leads to the wrong base."""
    if request.param == "another folder":
        shutil.copytree(started / "wrong", tmp_path / "base")
        monkeypatch.chdir(tmp_path)
    else:
        monkeypatch.chdir(started)
    return tmp_path / "out"


def test_the_right_base_is_accepted_and_nothing_is_said(started, here, capsys):
    assert merge(capsys, started / "right", started / "trained", here) == (0, "")


def test_a_wrong_base_is_refused_and_both_are_named(started, here, capsys):
    status, said = merge(capsys, started / "wrong", started / "trained", here)

    assert status == 4
    assert f"fingerprint {fingerprint(started / 'right')} of original in adapter_config.json" in said
    assert f"{fingerprint(started / 'wrong')} of original here" in said
    assert "(merge it into the base it was made for, or --force)" in said
    assert not here.exists()


def test_the_original_is_refused_as_a_base(started, here, capsys):
    status, said = merge(capsys, started / "original", started / "trained", here)

    assert (status, "and this base is not quantized" in said) == (4, True), said


def test_force_merges_into_the_wrong_base_and_quiet_does_not_hide_it(started, here, capsys):
    status, said = merge(capsys, started / "wrong", started / "trained", here, "--force")

    assert status == 0
    assert said.startswith("warning: the ")
    assert "this base is another quantized base, merged all the same (--force): fingerprint" in said


def test_a_wrong_base_without_a_report_is_refused_by_its_bytes(started, tmp_path, capsys):
    base = shutil.copytree(started / "wrong", tmp_path / "base")
    (base / "loftq_report.json").unlink()

    status, said = merge(capsys, base, started / "trained", tmp_path / "out")

    assert status == 4
    assert "its quantized weights are not those the adapter was made for: fingerprint " in said
    assert f"and {fingerprint(started / 'right')} is recorded" in said


def test_inspect_refuses_a_fitted_adapter_of_another_base_and_verify_names_its_file(started, tmp_path, capsys):
    base = shutil.copytree(started / "wrong", tmp_path / "base")
    own = next(base.glob("*_init"))
    shutil.rmtree(own)
    shutil.copytree(started / "trained", own)

    assert _run(["inspect", str(base)]) == 4
    assert f"{fingerprint(started / 'right')} of original in adapter_config.json" in capsys.readouterr().err
    assert _run(["inspect", str(base), "--verify"]) == 2
    what = "adapter_config.json: is of other quantized weights than those here (base_fingerprint)"
    assert f"{own.name}/{what}" in capsys.readouterr().out


def test_loading_for_training_refuses_the_wrong_base_and_saving_keeps_the_record(started, tmp_path):
    config = transformers.AutoConfig.from_pretrained(started / "original")
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(MismatchError, match=r"this base is another quantized base"):
        load_adapted(model, started / "wrong", adapter=started / "trained")

    save_adapter(load_adapted(model, started / "right", adapter=started / "trained"), tmp_path / "again")
    before, after = (
        json.loads((path / "adapter_config.json").read_text()) for path in (started / "trained", tmp_path / "again")
    )
    assert before["megatron_core"] == after["megatron_core"]


def test_the_record_is_in_the_config_of_every_start_and_holds_no_path(started):
    record = json.loads(
        json.loads(next((started / "right").glob("*_init/adapter_config.json")).read_text())["megatron_core"]
    )
    assert record["base_fingerprint"][:12] == fingerprint(started / "right")
    assert not any("/" in str(value) for value in record.values())
    assert names_in(started) == ["original", "right", "there", "trained", "wrong"]
