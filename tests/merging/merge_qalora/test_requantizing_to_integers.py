"""Integers, quantized again after a merge: what survives is measured and reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.adapters import decoded, names_in, tensors_of
from support.qalora_merges import (
    DOWN,
    LINEARS,
    Conversions,
    config_of,
    container_of,
    float32_values,
    grid_values,
    grids,
    loaded_weights,
    refused,
    trained,
)

from loftq_cli.cli.main import _run
from loftq_cli.model.stored import BaseModel


def ordinary_base(kind: str, converted: Conversions) -> tuple[Path, dict[str, torch.Tensor]]:
    """A base of LoftQ or QLoRA, NF4 or INT4 in groups of 64, and the weights that its loader computes with."""
    method, quant_type = kind.split()
    if quant_type == "nf4":
        base = converted("compressed-tensors", quant_type="nf4", method=method, group_size=None)
        return base, {name.removesuffix(".weight"): value for name, value in decoded(base).items()}
    base = converted("compressed-tensors", method=method, group_size=64)
    return base, grid_values(base)


def retention_by_hand(before, after, updates) -> tuple[dict[str, float], float]:
    """<requantized − base, Δ> / <Δ, Δ> of each module, and of all."""
    kept = {m: float(((after[m].double() - before[m].double()).numpy() * x).sum()) for m, x in updates.items()}
    squares = {module: float(np.square(update).sum()) for module, update in updates.items()}
    return {module: kept[module] / squares[module] for module in kept}, sum(kept.values()) / sum(squares.values())


REQUANTIZED = [
    ("int4", ()),
    ("int4", ("--group-size", "32")),
    ("int4", ("--symmetric",)),
    ("int3", ()),
    ("int8", ()),
    ("int8", ("--group-size", "128", "--asymmetric")),
]


@pytest.mark.parametrize(("quant_type", "arguments"), REQUANTIZED)
@pytest.mark.parametrize("kind", ["loftq nf4", "qlora nf4", "loftq int4", "qlora int4"])
def test_requantizing_to_integers_reports_what_survives(kind, quant_type, arguments, converted, merge, tmp_path):
    base, before = ordinary_base(kind, converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.01, group_size=1, stored=stored)
    if arguments[:1] == ("--group-size",) and arguments[1] == "128":
        arguments = ("--group-size", "64", *arguments[2:])  # rows of 192 are no whole groups of 128

    ran = merge(base, adapter, tmp_path / "out", "--requantize", quant_type, *arguments, "--force", "--json")

    assert (ran.status, ran.err) == (0, "")
    group_size = int(arguments[1]) if "--group-size" in arguments else 64
    symmetric = (quant_type == "int8" and "--asymmetric" not in arguments) or "--symmetric" in arguments
    assert container_of(tmp_path / "out") == ("compressed-tensors", int(quant_type[3:]), group_size)
    scheme = config_of(tmp_path / "out")["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert scheme["symmetric"] is symmetric
    after, found = grid_values(tmp_path / "out"), grids(tmp_path / "out")
    by_module, total = retention_by_hand(before, after, adapter.updates)
    # sums of products of float32 numbers in float64
    for layer in ran.json["layers"]:
        assert layer["retention"] == pytest.approx(by_module[layer["name"].removesuffix(".weight")], rel=1e-4, abs=1e-4)
    assert ran.json["retention"] == pytest.approx(total, rel=1e-4, abs=1e-4)
    for module, grid in found.items():
        # no weight is farther than half a step, and half a unit of the bfloat16 it decodes to
        exact = stored[module] + adapter.updates[module]
        step = np.repeat(grid.scales, group_size, axis=1)
        # a rounded bfloat16 scale moves the ends of the range by 2^-9 of them
        slack = np.abs(exact).max() * 2.0**-7
        assert bool((np.abs(grid.values - exact) <= 0.5 * step + slack).all()), module


@pytest.mark.parametrize("kind", ["loftq nf4", "qlora nf4", "loftq int4", "qlora int4"])
def test_eight_bits_keep_nearly_all_of_a_small_update(kind, converted, merge, tmp_path):
    base, before = ordinary_base(kind, converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.01, group_size=1, stored=stored)

    ran = merge(base, adapter, tmp_path / "out", "--requantize", "int8")

    assert ran.status == 0
    _, total = retention_by_hand(before, grid_values(tmp_path / "out"), adapter.updates)
    assert total > 0.9
    assert f"retained {total:.1%} of the adapter" in ran.out


def test_a_small_update_does_not_survive_the_grid_that_the_base_lies_on(converted, merge, tmp_path):
    base, before = ordinary_base("qlora int4", converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.01, group_size=1, stored=stored)

    ran = merge(base, adapter, tmp_path / "out", "--requantize", "int4")

    assert (ran.status, ran.out) == (5, "")
    assert "quantized again to int4," in ran.line
    assert "of the adapter would survive" in ran.line
    assert names_in(tmp_path) == ["adapter"]


@pytest.mark.parametrize(("share", "low", "high", "status"), [(0.0685, 0.48, 0.5, 5), (0.0705, 0.5, 0.52, 0)])
def test_half_of_an_adapter_must_survive_being_quantized_again(share, low, high, status, converted, merge, tmp_path):
    base, before = ordinary_base("qlora int4", converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=share, group_size=1, stored=stored)
    arguments = (base, adapter, tmp_path / "out", "--requantize", "int4")
    assert merge(*arguments, "--force").status == 0
    _, total = retention_by_hand(before, grid_values(tmp_path / "out"), adapter.updates)
    assert low < total < high

    assert merge(*arguments, "--overwrite").status == status


@pytest.mark.parametrize(("quant_type", "arguments"), [("int4", ("--group-size", "32")), ("int8", ())])
@pytest.mark.parametrize("kind", ["loftq nf4", "qlora int4"])
def test_transformers_loads_the_requantized_weights(kind, quant_type, arguments, converted, merge, tmp_path):
    base, before = ordinary_base(kind, converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", group_size=1, stored=stored)
    assert merge(base, adapter, tmp_path / "out", "--requantize", quant_type, *arguments, "--force").status == 0

    weights, by_hand = loaded_weights(tmp_path / "out"), grid_values(tmp_path / "out")

    with BaseModel.open(tmp_path / "out") as opened:
        for module in LINEARS:
            assert torch.equal(weights[module], by_hand[module])
            assert torch.equal(weights[module].float(), opened.matrix(f"{module}.weight"))


def test_requantizing_leaves_an_integer_weight_without_an_adapter_byte_for_byte(converted, merge, tmp_path):
    base, before = ordinary_base("qlora int4", converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.3, group_size=1, stored=stored, modules=[DOWN])

    assert merge(base, adapter, tmp_path / "out", "--requantize", "int4").status == 0

    kept, written = tensors_of(base), tensors_of(tmp_path / "out")
    assert kept.keys() == written.keys()
    changed = {name for name in kept if not torch.equal(kept[name], written[name])}
    assert changed == {f"{DOWN}.weight_{part}" for part in ("packed", "scale", "zero_point")}


def test_requantizing_an_nf4_base_writes_one_container(converted, merge, tmp_path):
    base, before = ordinary_base("qlora nf4", converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.3, group_size=1, stored=stored, modules=[DOWN])

    assert merge(base, adapter, tmp_path / "out", "--requantize", "int8").status == 0

    assert sorted(grids(tmp_path / "out")) == LINEARS
    assert not any("bitsandbytes" in name or "absmax" in name for name in tensors_of(tmp_path / "out"))


def test_a_pooled_adapter_can_be_quantized_again_too(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", share=0.01)

    ran = merge(base, adapter, tmp_path / "out", "--requantize", "int8", "--json")

    assert (ran.status, ran.json["layout"]) == (0, "compressed-tensors")
    _, total = retention_by_hand(grid_values(base), grid_values(tmp_path / "out"), adapter.updates)
    assert ran.json["retention"] == pytest.approx(total, rel=1e-4)
    assert total > 0.9


@pytest.mark.parametrize("layout", ["metal", "mlx", "gptq"])
def test_any_container_of_integers_takes_the_requantized_weights(layout, converted, merge, tmp_path):
    base, before = ordinary_base("qlora nf4", converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.1, group_size=1, stored=stored)

    ran = merge(base, adapter, tmp_path / "out", "--requantize", "int8", "--layout", layout, "--asymmetric", "--json")

    assert (ran.status, container_of(tmp_path / "out")) == (0, (layout, 8, 64))
    dtype = torch.float16 if layout == "gptq" else torch.bfloat16
    after = {module: values.to(dtype) for module, values in float32_values(tmp_path / "out").items()}
    _, total = retention_by_hand(before, after, adapter.updates)
    assert ran.json["retention"] == pytest.approx(total, rel=1e-4)
    if layout == "metal":
        weights = loaded_weights(tmp_path / "out")
        assert all(torch.equal(weights[module], after[module]) for module in LINEARS)


def test_requantizing_in_groups_that_no_weight_has_is_refused(converted, merge, tmp_path):
    base, before = ordinary_base("qlora int4", converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.3, group_size=1, stored=stored)

    ran = merge(base, adapter, tmp_path / "out", "--requantize", "int4", "--group-size", "1024")

    refused(ran, tmp_path, 2, f"{base}: tensor ", "not whole groups of 1024")


def test_a_weight_that_the_groups_do_not_fit_is_kept_dense_and_it_is_said(converted, tmp_path, capsys):
    base, before = ordinary_base("qlora int4", converted)
    stored = {module: weight.double().numpy() for module, weight in before.items()}
    adapter = trained(base, tmp_path / "adapter", share=0.3, group_size=1, stored=stored)
    arguments = [str(base), str(adapter.path), str(tmp_path / "out"), "--requantize", "int4", "--group-size", "128"]
    capsys.readouterr()

    assert _run(["merge", *arguments]) == 0

    said = capsys.readouterr().err
    weight = loaded_weights(tmp_path / "out")[DOWN]
    exact = torch.from_numpy(stored[DOWN] + adapter.updates[DOWN])
    assert sorted(grids(tmp_path / "out")) == [module for module in LINEARS if module != DOWN]
    assert torch.allclose(weight.double(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-7)
    assert f"note: {DOWN}.weight" in said
    assert "rows of 192 are not whole groups of 128" in said
