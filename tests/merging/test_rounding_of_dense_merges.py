"""A dense merge stores W + Δ in 16 bits: the surviving part of Δ is measured, printed, and bounded as for --requantize.

Expected numbers are float64 arithmetic on the tensors of base, adapter and result.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import models
from support.adapters import delta, lora_tensors, names_in, tensors_of, write_adapter
from support.conversions import run_conversion
from support.qalora_merges import trained

from loftq_cli.cli.main import _run

MODULES = [f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up")]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("dense") / "llama")


def updated(base: Path, directory: Path, size: float) -> Path:
    """A rank-4 adapter on the dense `base` with ||s·B·A|| = size · ||W|| on each of MODULES."""
    tensors, stored = {}, tensors_of(base)
    for seed, module in enumerate(MODULES):
        weight = stored[f"{module}.weight"].double()
        (a, lora_A), (b, lora_B) = lora_tensors(module, tuple(weight.shape), seed=seed).items()
        tensors |= {a: lora_A, b: lora_B * float(size * weight.norm() / (lora_B @ lora_A).norm())}
    return write_adapter(directory, tensors)


def merge(*arguments: object) -> int:
    return _run(["merge", *map(str, arguments)])


# What rounding to nearest does to normal W in bfloat16 and normal Δ of 0.3 %: 93 % in bfloat16, all in finer dtypes.
@pytest.mark.parametrize(("dtype", "low", "high"), [("bfloat16", 0.85, 0.97), ("float16", 0.99, 1.01)])
def test_retention_and_loss_are_those_of_the_stored_numbers(dtype, low, high, dense, tmp_path, capsys):
    adapter = updated(dense, tmp_path / "adapter", 0.003)

    assert merge(dense, adapter, tmp_path / "out", "--json", "--dtype", dtype) == 0

    values = json.loads(capsys.readouterr().out)
    before, after, sums = tensors_of(dense), tensors_of(tmp_path / "out"), torch.zeros(3, dtype=torch.float64)
    assert [layer["name"].removesuffix(".weight") for layer in values["layers"]] == sorted(MODULES)
    for layer in values["layers"]:
        weight, merged = before[layer["name"]].double(), after[layer["name"]].double()
        added = delta(adapter, layer["name"].removesuffix(".weight"), 1.0)
        retained, rounding = ((merged - weight) * added).sum(), (merged - weight - added).square().sum()
        assert layer["retention"] == pytest.approx(float(retained / added.square().sum()), rel=1e-4)
        assert layer["lost"] == pytest.approx(float((rounding / added.square().sum()).sqrt()), rel=1e-4)
        sums += torch.stack((retained, rounding, added.square().sum()))
    assert values["retention"] == pytest.approx(float(sums[0] / sums[2]), rel=1e-4)
    assert values["lost"] == pytest.approx(float((sums[1] / sums[2]).sqrt()), rel=1e-4)
    assert low < values["retention"] < high


@pytest.mark.parametrize("size", [0.03, 0.003])
def test_updates_of_ordinary_size_pass(size, dense, tmp_path, capsys):
    assert merge(dense, updated(dense, tmp_path / "adapter", size), tmp_path / "out", "--quiet") == 0
    said = capsys.readouterr().out
    assert "of the adapter" in said
    assert "of the update, to bfloat16 (--dtype float32 loses none)" in said


def test_an_update_below_the_steps_of_bfloat16_is_refused_and_the_remedies_work(dense, tmp_path, capsys):
    """0.03 % of ||W||: a fifth survives. At 0.3 %, above, nine tenths do; the bound is a half."""
    adapter = updated(dense, tmp_path / "adapter", 0.0003)

    assert merge(dense, adapter, tmp_path / "out", "--quiet") == 5

    line = capsys.readouterr().err.strip()
    assert "rounded to bfloat16, " in line and "of the adapter would survive" in line
    assert "(--dtype float32 keeps all of it; or keep base and adapter apart; or --force)" in line
    assert names_in(tmp_path) == ["adapter"]
    assert merge(dense, adapter, tmp_path / "wide", "--dtype", "float32", "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["retention"] == pytest.approx(1.0, abs=1e-3)
    assert merge(dense, adapter, tmp_path / "forced", "--force", "--json", "--quiet") == 0
    assert 0.05 < json.loads(capsys.readouterr().out)["retention"] < 0.5


@pytest.mark.parametrize(("size", "status"), [(0.0011, 0), (0.0007, 5)])
def test_the_bound_is_a_half(size, status, dense, tmp_path, capsys):
    adapter = updated(dense, tmp_path / "adapter", size)
    assert merge(dense, adapter, tmp_path / "out", "--quiet") == status
    capsys.readouterr()
    assert merge(dense, adapter, tmp_path / "forced", "--quiet", "--force", "--json") == 0
    assert (json.loads(capsys.readouterr().out)["retention"] >= 0.5) is (status == 0)


def test_an_adapter_that_adds_nothing_loses_nothing(dense, tmp_path, capsys):
    """Its base has more digits than bfloat16: rounding the base is no loss of the adapter."""
    wide = models.llama(tmp_path / "wide", dtype=torch.float32)
    assert merge(wide, updated(wide, tmp_path / "adapter", 0.0), tmp_path / "out", "--dtype", "bfloat16", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["retention"], values["lost"]) == (1.0, None)


def test_rounding_a_base_of_more_digits_is_noise_that_averages_out(tmp_path, capsys):
    """The update is far below the steps of bfloat16, and the model moves by the update all the same."""
    wide = models.llama(tmp_path / "wide", dtype=torch.float32)
    adapter = updated(wide, tmp_path / "adapter", 0.0003)
    assert merge(wide, adapter, tmp_path / "out", "--dtype", "bfloat16", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["retention"] == pytest.approx(1.0, abs=0.2)
    assert values["lost"] > 1.0


def test_a_qalora_adapter_in_a_dense_int8_model_says_what_bfloat16_takes(tmp_path, capsys):
    """Offsets hold the update whole; bfloat16 takes a third at 0.5 % of the weights, and says so."""
    model = models.llama(tmp_path / "llama", layers=1)
    recipe = {"method": "qalora", "quant_type": "int8", "group_size": 32, "init": "standard", "alpha": 6.0}
    run_conversion(model, tmp_path / "base", rank=4, **recipe)
    adapter = trained(tmp_path / "base", tmp_path / "adapter", share=0.005)

    assert merge(tmp_path / "base", adapter.path, tmp_path / "out", "--layout", "dense") == 0

    printed = capsys.readouterr()
    assert "retained 9" in printed.out or "retained 100" in printed.out
    lost = float(printed.out.partition("lost")[2].split("%")[0])
    assert 25.0 < lost < 40.0
    assert "(--dtype float32 loses none)" in printed.out
    assert "of it retained, 0.3" in printed.err
