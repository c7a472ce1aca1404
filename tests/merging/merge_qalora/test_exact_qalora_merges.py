"""A QA-LoRA adapter is merged into the offsets of groups, exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.adapters import PREFIX, decoded, edit_json, edit_tensors, effective_update, loaded, names_in, tensors_of
from support.qalora_merges import (
    BASES,
    CONTAINERS,
    DOWN,
    LINEARS,
    Q0,
    assert_exact,
    config_of,
    container_of,
    float32_values,
    grids,
    largest,
    loaded_weights,
    lost_by_hand,
    trained,
)

from loftq_cli.cli.main import _run
from loftq_cli.model.stored import BaseModel


@pytest.mark.parametrize("convention", ["peft", "paper", "repo"])
@pytest.mark.parametrize(("container", "bits"), BASES)
def test_an_adapter_merges_into_the_offsets_exactly(container, bits, convention, converted, merge, tmp_path):
    base = converted(container, bits)
    adapter = trained(base, tmp_path / "adapter", convention=convention)

    ran = merge(base, adapter, tmp_path / "out", "--json")

    assert (ran.status, ran.err) == (0, "")
    own = container if container in ("metal", "mlx") else "mlx" if bits == 3 else "metal"
    assert container_of(tmp_path / "out") == (own, bits, 32)
    assert_exact(base, tmp_path / "out", adapter.updates)
    assert ran.json["layout"] == own
    assert [layer["name"] for layer in ran.json["layers"]] == [f"{module}.weight" for module in LINEARS]
    assert ran.json["lost"] == pytest.approx(lost_by_hand(base, tmp_path / "out", adapter.updates), abs=1e-6)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_the_printed_difference_is_that_of_the_written_weights(container, scale_dtype, converted, merge, tmp_path):
    base = converted(container)
    adapter = trained(base, tmp_path / "adapter")

    text = merge(base, adapter, tmp_path / "text", "--scale-dtype", scale_dtype)
    ran = merge(base, adapter, tmp_path / "out", "--scale-dtype", scale_dtype, "--json")

    assert (text.status, ran.status) == (0, 0)
    before, after = grids(base), float32_values(tmp_path / "out")
    lost = lost_by_hand(base, tmp_path / "out", adapter.updates)
    differences, shares = [], []
    for layer in ran.json["layers"]:
        module = layer["name"].removesuffix(".weight")
        exact = before[module].values + adapter.updates[module]
        differences.append(largest(after[module].double().numpy() - exact))
        shares.append(differences[-1] / largest(exact))
        # the sum is measured with s·B·A of float32 factors, which is itself off by its float32 rounding
        off = 2e-7 * largest(adapter.updates[module])
        assert layer["max_difference"] == pytest.approx(differences[-1], rel=1e-5, abs=off)
        assert layer["relative_difference"] == pytest.approx(shares[-1], rel=1e-5, abs=off / largest(exact))
    assert ran.json["lost"] == pytest.approx(lost, rel=1e-4, abs=1e-6)
    assert text.out.splitlines()[2] == f"lost     {ran.json['lost']:.2%} of the update"
    printed = [max(layer[key] for layer in ran.json["layers"]) for key in ("max_difference", "relative_difference")]
    expected = f"at most {printed[0]:.1e} from base and adapter ({printed[1]:.1e} of the largest weight)"
    assert expected in text.out
    report = json.loads((tmp_path / "out" / "loftq_merge_report.json").read_text())
    assert (report["lost"], report["layers"]) == (ran.json["lost"], ran.json["layers"])


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_16_bit_offsets_lose_a_share_of_a_small_update(scale_dtype, converted, merge, tmp_path):
    # FORMATS, section 4: of an update of 3 % at 4 bits, bfloat16 loses 12 % and float16 1.5 %. Scales of a bfloat16
    # base are bfloat16 already.
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", share=0.03)

    ran = merge(base, adapter, tmp_path / "out", "--scale-dtype", scale_dtype, "--json")

    low, high = {"float16": (0.005, 0.03), "bfloat16": (0.05, 0.2)}[scale_dtype]
    assert low < ran.json["lost"] < high
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {
        torch.uint32,
        getattr(torch, scale_dtype),
    }


def test_offsets_that_lose_most_of_a_tiny_update_are_refused(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", share=0.002)

    ran = merge(base, adapter, tmp_path / "out", "--scale-dtype", "bfloat16")

    assert (ran.status, ran.out) == (5, "")
    assert "with such offsets," in ran.line
    assert "of the update would be lost (float32 offsets keep all of it" in ran.line
    assert names_in(tmp_path) == ["adapter"]
    assert merge(base, adapter, tmp_path / "out").status == 0


@pytest.mark.parametrize(("container", "bits"), [(c, b) for c, b in BASES if c != "mlx" and b != 3])
def test_transformers_loads_the_merged_weights(container, bits, converted, merge, tmp_path):
    base = converted(container, bits)
    assert merge(base, trained(base, tmp_path / "adapter"), tmp_path / "out").status == 0

    weights = loaded_weights(tmp_path / "out")

    for module, expected in float32_values(tmp_path / "out").items():
        assert weights[module].dtype == torch.float32
        assert torch.equal(weights[module], expected), module
    assert config_of(tmp_path / "out")["dtype"] == "float32"


def test_every_tensor_of_a_metal_model_has_one_dtype(converted, llamas, merge, tmp_path):
    base = converted("compressed-tensors")
    assert merge(base, trained(base, tmp_path / "adapter"), tmp_path / "out").status == 0

    merged, original = tensors_of(tmp_path / "out"), tensors_of(llamas["bfloat16"])
    untouched = [name for name in original if "_proj" not in name]
    assert len(untouched) == 5
    for name in untouched:
        assert merged[name].dtype == torch.float32
        assert torch.equal(merged[name], original[name].float())


@pytest.mark.parametrize("container", CONTAINERS)
def test_weights_without_an_adapter_keep_their_values(container, converted, merge, tmp_path):
    base = converted(container)
    adapter = trained(base, tmp_path / "adapter", modules=[DOWN])

    ran = merge(base, adapter, tmp_path / "out", "--json")

    assert [layer["name"] for layer in ran.json["layers"]] == [f"{DOWN}.weight"]
    assert_exact(base, tmp_path / "out", adapter.updates)
    before, after = grids(base), grids(tmp_path / "out")
    for module in set(LINEARS) - {DOWN}:
        # -zero point · scale of a 16-bit scale is exact in float32, and a bias is kept; of a float32 scale it is
        # rounded once
        offsets = before[module].offsets.astype(np.float32).astype(np.float64)
        assert np.array_equal(after[module].offsets, offsets)
        assert np.array_equal(offsets, before[module].offsets) == (container != "compressed-tensors of float32")


def test_adapter_groups_of_several_base_groups_merge_exactly(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", group_size=64)

    assert merge(base, adapter, tmp_path / "out").status == 0

    assert container_of(tmp_path / "out") == ("metal", 4, 32)
    assert_exact(base, tmp_path / "out", adapter.updates)


def test_a_group_of_the_whole_row_merges_exactly(converted, merge, tmp_path):
    base = converted("gptq")
    adapter = trained(base, tmp_path / "adapter", group_size=192, modules=[DOWN])

    assert merge(base, adapter, tmp_path / "out").status == 0

    assert_exact(base, tmp_path / "out", adapter.updates)


def test_a_symmetric_base_gets_offsets_of_its_own(converted, merge, tmp_path):
    base = converted("compressed-tensors", 8, method="qlora", symmetric=True)
    adapter = trained(base, tmp_path / "adapter")

    assert merge(base, adapter, tmp_path / "out").status == 0

    assert "weight_zero_point" not in {name.rpartition(".")[2] for name in tensors_of(base)}
    assert_exact(base, tmp_path / "out", adapter.updates)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_dense_merge_is_the_decoded_weight_plus_the_update_in_the_models_dtype(container, converted, merge, tmp_path):
    base = converted(container)
    adapter = trained(base, tmp_path / "adapter")

    ran = merge(base, adapter, tmp_path / "out", "--layout", "dense", "--json")

    dtype = torch.float32 if container.endswith("float32") else torch.bfloat16
    assert ran.status == 0
    assert ran.json["lost"] < (1e-4 if dtype == torch.float32 else 0.1)  # an update of 2 %
    assert ran.json["retention"] == pytest.approx(1.0, abs=0.01)
    merged, stored = tensors_of(tmp_path / "out"), grids(base)
    assert "quantization_config" not in config_of(tmp_path / "out")
    for module in LINEARS:
        weight, values = merged[f"{module}.weight"], torch.from_numpy(stored[module].values)
        # what the base's loader decodes to: the model's dtype, which the scales have too, but for GPTQ
        rounding = torch.float16 if container == "gptq" else dtype
        before = values.to(rounding).double() if dtype == torch.bfloat16 else values
        exact = before + torch.from_numpy(adapter.updates[module])
        assert weight.dtype == dtype
        unit = torch.exp2(torch.frexp(exact.abs()).exponent.double() - 1) * torch.finfo(dtype).eps
        float32_error = 2 * torch.finfo(torch.float32).eps * largest(exact.numpy())
        assert bool(((weight.double() - exact).abs() <= unit / 2 + float32_error).all())
    assert sorted(loaded(tmp_path / "out").state_dict()) == sorted(merged)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_merged_directory_is_a_base_again(container, converted, merge, tmp_path, capsys):
    base = converted(container)
    adapter = trained(base, tmp_path / "adapter")
    assert merge(base, adapter, tmp_path / "out").status == 0

    with BaseModel.open(tmp_path / "out") as opened:
        assert opened.layout.name == container_of(tmp_path / "out")[0]
        for module, expected in float32_values(tmp_path / "out").items():
            assert torch.equal(opened.matrix(f"{module}.weight"), expected)

    capsys.readouterr()
    assert _run(["inspect", str(tmp_path / "out"), "--json"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown)
    assert all(module in shown for module in LINEARS)
    # and the same update goes on top of the first
    assert merge(tmp_path / "out", adapter, tmp_path / "twice", "--force").status == 0
    assert_exact(base, tmp_path / "twice", {module: 2 * update for module, update in adapter.updates.items()})


def test_patterns_and_rank_stabilized_scaling_are_inside_the_offsets(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")
    edit_json(adapter.path / "adapter_config.json", use_rslora=True, alpha_pattern={DOWN: 3})

    assert merge(base, adapter, tmp_path / "out").status == 0

    # written for alpha / rank = 6 / 4; now alpha / √rank, with alpha 3 for one
    updates = {m: update * (3 / 2 if m == DOWN else 6 / 2) / (6 / 4) for m, update in adapter.updates.items()}
    assert_exact(base, tmp_path / "out", updates)


def test_a_pooled_adapter_of_16_bits_merges_exactly(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")
    weights = adapter.path / "adapter_model.safetensors"
    edit_tensors(weights, lambda t: t.update({name: value.to(torch.bfloat16) for name, value in t.items()}))

    assert merge(base, adapter, tmp_path / "out").status == 0

    factors = load_file(weights)
    names = {m: [f"{PREFIX}{m}.lora_{x}.weight" for x in "AB"] for m in LINEARS}
    updates = {m: effective_update(factors[a], factors[b], 6 / 4, "peft", 32).numpy() for m, (a, b) in names.items()}
    assert_exact(base, tmp_path / "out", updates)


def test_a_linear_saved_whole_stays_dense_among_moved_offsets(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", modules=[Q0])
    whole = torch.randn(128, 192, generator=torch.Generator().manual_seed(5))
    edit_tensors(adapter.path / "adapter_model.safetensors", lambda t: t.update({f"{PREFIX}{DOWN}.weight": whole}))
    edit_json(adapter.path / "adapter_config.json", modules_to_save=["down_proj"])

    assert merge(base, adapter, tmp_path / "out").status == 0

    assert sorted(grids(tmp_path / "out")) == [module for module in LINEARS if module != DOWN]
    weights, offsets = loaded_weights(tmp_path / "out"), float32_values(tmp_path / "out")
    assert torch.equal(weights[DOWN], whole)
    assert all(torch.equal(weights[module], offsets[module]) for module in offsets)


def test_a_plan_names_what_a_merge_writes(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")

    plan = merge(base, adapter, tmp_path / "out", "--dry-run", "--json")
    assert names_in(tmp_path) == ["adapter"]
    assert merge(base, adapter, tmp_path / "out").status == 0

    planned = {t["name"]: (t["dtype"], tuple(t["shape"])) for t in plan.json["tensors"]}
    written = tensors_of(tmp_path / "out")
    assert planned == {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in written.items()}


@pytest.mark.parametrize("kind", ["nf4", "original"])
def test_a_pooled_adapter_on_another_kind_of_base_merges_densely(kind, converted, llamas, merge, tmp_path):
    integers = converted("compressed-tensors")
    adapter = trained(integers, tmp_path / "adapter")
    base = llamas["bfloat16"]
    if kind == "nf4":
        base = converted("compressed-tensors", quant_type="nf4", method="qlora", group_size=None)
    before = decoded(base) if kind == "nf4" else tensors_of(base)

    ran = merge(base, adapter, tmp_path / "out", "--dtype", "float32", "--json")

    assert (ran.status, ran.json["layout"]) == (0, "dense")
    for module in LINEARS:
        exact = before[f"{module}.weight"].double().numpy() + adapter.updates[module]
        found = tensors_of(tmp_path / "out")[f"{module}.weight"].double().numpy()
        assert largest(found - exact) <= 1e-6 * largest(exact)
