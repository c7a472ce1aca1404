"""Offsets that a dtype cannot hold, groups of zeros, and numbers that are not finite."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import models
from support.adapters import PREFIX, edit_tensors, effective_update
from support.conversions import run_conversion
from support.qalora_merges import DOWN, grids, largest, refused, trained


def test_offsets_beyond_float16_are_refused(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", share=1e8, modules=[DOWN])

    ran = merge(base, adapter, tmp_path / "out", "--scale-dtype", "float16", "--force")

    refused(ran, tmp_path, 2, f"{DOWN}.weight", "scales or offsets are too large for float16", "--scale-dtype float32")


@pytest.mark.parametrize("container", ["compressed-tensors", "gptq"])
def test_groups_of_zeros_in_a_symmetric_base_hold_an_update_exactly(container, llamas, merge, tmp_path):
    shutil.copytree(llamas["float32"], tmp_path / "model")
    edit_tensors(tmp_path / "model" / "model.safetensors", lambda t: t[f"{DOWN}.weight"][5].zero_())
    form = {"quant_type": "int4", "symmetric": True, "group_size": 32, "layout": container}
    run_conversion(tmp_path / "model", tmp_path / "base", method="qlora", rank=4, alpha=6.0, **form)
    adapter = trained(tmp_path / "base", tmp_path / "adapter")

    ran = merge(tmp_path / "base", adapter, tmp_path / "out")

    assert ran.status == 0, ran.err
    before, after = grids(tmp_path / "base")[DOWN], grids(tmp_path / "out")[DOWN]
    assert np.array_equal(after.codes, before.codes)
    assert largest((after.values - adapter.updates[DOWN])[5]) <= 1e-7 * largest(adapter.updates[DOWN])
    exact = before.values + adapter.updates[DOWN]
    assert largest(after.values - exact) <= 1e-6 * largest(exact)


def test_the_measured_difference_is_that_of_the_factors_in_float64(converted, merge, tmp_path):
    """Factors whose products cancel: what float32 makes of them is another update altogether."""
    base = converted("compressed-tensors", model="float32")
    adapter = trained(base, tmp_path / "adapter", modules=[DOWN])

    def cancel(factors):
        lora_A, lora_B = (factors[f"{PREFIX}{DOWN}.lora_{part}.weight"] for part in "AB")
        lora_A[2:], lora_B[:, 2:] = -lora_A[:2] * (1 + 2e-6 * torch.rand(lora_A[:2].shape)), lora_B[:, :2]
        lora_B *= 1e4

    edit_tensors(adapter.path / "adapter_model.safetensors", cancel)
    factors = load_file(adapter.path / "adapter_model.safetensors")
    parts = (factors[f"{PREFIX}{DOWN}.lora_{part}.weight"] for part in "AB")
    update = effective_update(*parts, 6 / 4, "peft", 32).numpy()

    assert merge(base, adapter, tmp_path / "out").status == 0

    exact = grids(base)[DOWN].values + update
    assert largest(grids(tmp_path / "out")[DOWN].values - exact) <= 1e-6 * largest(exact)


@pytest.mark.parametrize("arguments", [(), ("--round-zeros", "--force")])
@pytest.mark.parametrize(("container", "part"), [("metal", "qbiases"), ("mlx", "biases"), ("gptq", "scales")])
def test_a_base_with_nan_is_refused_by_name(container, part, arguments, converted, merge, tmp_path):
    shutil.copytree(converted(container), tmp_path / "base")
    adapter = trained(tmp_path / "base", tmp_path / "adapter")
    edit_tensors(tmp_path / "base" / "model.safetensors", lambda t: t[f"{DOWN}.{part}"][0].fill_(float("nan")))

    ran = merge(tmp_path / "base", adapter, tmp_path / "out", "--force", *arguments)

    assert (ran.status, (tmp_path / "out").exists()) == (2, False)
    assert f"{DOWN}.weight: holds NaN or infinite values" in ran.line


def test_an_update_that_overflows_is_refused_by_name_and_clamped_on_demand(converted, merge, tmp_path):
    base = converted("metal")
    adapter = trained(base, tmp_path / "adapter")
    # 1e61 is finite in float64, in which offsets are computed, and not in float32.
    edit_tensors(adapter.path / "adapter_model.safetensors", lambda t: [v.fill_(3e30) for v in t.values()])

    ran = merge(base, adapter, tmp_path / "out")

    refused(ran, tmp_path, 2, f"{DOWN}.weight", "scales or offsets are too large for float32", "--layout dense")
    rounded = merge(base, adapter, tmp_path / "out", "--round-zeros", "--force", "--json")
    assert (rounded.status, rounded.json["lost"]) == (0, pytest.approx(1.0))


@pytest.mark.parametrize("arguments", [("--scale-dtype", "float16"), ("--layout", "gptq")])
def test_scales_beyond_float16_are_refused_beside_rounded_zero_points(arguments, merge, tmp_path):
    model = models.llama(tmp_path / "model", layers=1, dtype=torch.float32)
    edit_tensors(model / "model.safetensors", lambda t: [v.mul_(1e7) for n, v in t.items() if "_proj" in n])
    form = {"method": "qalora", "quant_type": "int4", "group_size": 32, "rank": 4, "alpha": 6.0, "init": "standard"}
    run_conversion(model, tmp_path / "base", **form)
    adapter = trained(tmp_path / "base", tmp_path / "adapter", share=0.3)

    ran = merge(tmp_path / "base", adapter, tmp_path / "out", "--round-zeros", *arguments)

    refused(ran, tmp_path, 2, "too large for float16", left=("adapter", "base", "model"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pooled_adapter_that_is_not_finite_is_refused(value, converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")
    name = f"{PREFIX}{DOWN}.lora_A.weight"
    edit_tensors(adapter.path / "adapter_model.safetensors", lambda t: t[name].view(-1)[3:4].fill_(value))

    refused(merge(base, adapter, tmp_path / "out"), tmp_path, 2, name, "holds NaN or infinite values")
