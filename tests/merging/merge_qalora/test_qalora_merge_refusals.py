"""Options, containers, adapters and bases that a merge of a QA-LoRA adapter refuses, or notes."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.adapters import PREFIX, edit_json, edit_tensors
from support.qalora_merges import Q0, assert_exact, config_of, refused, trained

from loftq_cli.cli.main import _run

OPTIONS = {
    "integers without rounding": (
        ("--layout", "compressed-tensors"),
        ("--layout compressed-tensors holds integer zero points", "--layout metal or mlx is exact", "--round-zeros"),
    ),
    "GPTQ without rounding": (("--layout", "gptq"), ("--layout gptq holds integer zero points",)),
    "rounding to float offsets": (
        ("--layout", "metal", "--round-zeros"),
        ("--layout metal has no integer zero points to round to", "leave out --round-zeros"),
    ),
    "new codes and the old ones": (
        ("--requantize", "int4", "--round-zeros"),
        ("--requantize chooses new codes, and --round-zeros keeps them",),
    ),
    "a group size for old codes": (
        ("--group-size", "64"),
        ("--group-size and --symmetric are for --requantize", "leave them out"),
    ),
    "no zero points for old codes": (("--symmetric",), ("--group-size and --symmetric are for --requantize",)),
    "new codes in no container": (
        ("--requantize", "int4", "--layout", "dense"),
        ("--requantize writes codes, and --layout dense has none",),
    ),
    "scales of no container": (
        ("--layout", "dense", "--scale-dtype", "float16"),
        ("--scale-dtype is for a quantized result",),
    ),
    "a model of two dtypes": (
        ("--dtype", "bfloat16"),
        ("--layout metal needs one dtype for scales and model", "--scale-dtype bfloat16"),
    ),
    "bfloat16 scales in GPTQ": (
        ("--layout", "gptq", "--round-zeros", "--scale-dtype", "bfloat16"),
        ("--layout gptq has no bfloat16 scales (float16)",),
    ),
    "a codebook in groups": (
        ("--requantize", "nf4", "--group-size", "64"),
        ("group_size means nothing with quant_type nf4",),
    ),
    "a group size that is none": (
        ("--requantize", "int4", "--group-size", "48"),
        ("group_size 48 does not exist for int4", "one of 16, 32"),
    ),
    "integers in bitsandbytes": (
        ("--requantize", "int4", "--layout", "bitsandbytes"),
        ("layout bitsandbytes does not hold int4",),
    ),
    "symmetric float offsets": (
        ("--requantize", "int4", "--layout", "metal", "--symmetric"),
        ("layout metal stores an offset for every group", "--asymmetric"),
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_contradict_each_other_are_refused(case, converted, merge, tmp_path):
    arguments, says = OPTIONS[case]
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")

    refused(merge(base, adapter, tmp_path / "out", *arguments), tmp_path, 2, *says)


@pytest.mark.parametrize(("bits", "group_size", "layout"), [(3, 32, "metal"), (4, 16, "mlx"), (4, 16, "bitsandbytes")])
def test_a_container_that_does_not_hold_the_bases_codes_is_refused(
    bits, group_size, layout, converted, merge, tmp_path
):
    base = converted("compressed-tensors", bits, group_size=group_size)
    adapter = trained(base, tmp_path / "adapter", group_size=group_size)

    ran = merge(base, adapter, tmp_path / "out", "--layout", layout)

    refused(ran, tmp_path, 2, f"--layout {layout}")


def test_three_bits_in_groups_of_16_have_no_container_and_become_dense(converted, merge, tmp_path):
    base = converted("compressed-tensors", 3, group_size=16)
    adapter = trained(base, tmp_path / "adapter", group_size=16)

    ran = merge(base, adapter, tmp_path / "out", "--json")

    assert (ran.status, ran.json["layout"]) == (0, "dense")


def test_rounding_is_for_pooled_adapters_on_integers(converted, merge, tmp_path):
    base = converted("compressed-tensors", quant_type="nf4", method="qlora", group_size=None)

    ran = merge(base, base / "qlora_init", tmp_path / "out", "--round-zeros")

    refused(ran, tmp_path, 2, "--round-zeros is for a QA-LoRA adapter on an integer base", left=())


def test_an_adapter_without_pooling_has_no_offsets_to_go_to(converted, merge, tmp_path):
    base = converted("compressed-tensors", method="qlora")

    ran = merge(base, base / "qlora_init", tmp_path / "out", "--layout", "metal")

    says = ("--layout metal needs codes", "only a QA-LoRA adapter on an integer base keeps them", "--layout dense")
    refused(ran, tmp_path, 2, *says, left=())


def test_one_module_without_pooling_among_pooled_ones_is_refused_by_name(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")
    edit_tensors(
        adapter.path / "adapter_model.safetensors",
        lambda t: t.update({f"{PREFIX}{Q0}.lora_A.weight": torch.ones(4, 128)}),
    )

    ran = merge(base, adapter, tmp_path / "out")

    refused(ran, tmp_path, 4, f"{Q0}.lora_A.weight", "has no pooled input", f"{Q0}.weight", "(--layout dense)")


def test_a_residual_adapter_on_another_base_is_refused(converted, merge, tmp_path):
    base = converted("compressed-tensors", init="residual")
    other = converted("compressed-tensors", 3)

    ran = merge(other, base / "qalora_init", tmp_path / "out")

    says = ("the qalora adapter was made for a base of ", "this base is another quantized base", "--force")
    refused(ran, tmp_path, 4, *says, left=())
    assert merge(other, base / "qalora_init", tmp_path / "out", "--force").status == 0
    assert merge(base, base / "qalora_init", tmp_path / "own").status == 0


def test_a_residual_adapter_on_the_original_is_refused(converted, llamas, merge, tmp_path):
    base = converted("compressed-tensors", init="residual")

    ran = merge(llamas["bfloat16"], base / "qalora_init", tmp_path / "out")

    refused(ran, tmp_path, 4, "the qalora adapter was made for", "this base is not quantized", left=())


def test_a_residual_adapter_that_peft_saved_is_refused_on_another_base(converted, merge, tmp_path):
    base = converted("compressed-tensors", init="residual")
    shutil.copytree(base / "qalora_init", tmp_path / "adapter")
    (tmp_path / "adapter" / "loftq_provenance.json").unlink()

    ran = merge(converted("compressed-tensors", 3), tmp_path / "adapter", tmp_path / "out")

    refused(ran, tmp_path, 4, "the qalora adapter was made for", "this base is another quantized base")


def test_a_standard_adapter_on_another_base_is_noted(converted, tmp_path, capsys):
    base, other = converted("compressed-tensors"), converted("compressed-tensors", 3)
    adapter = trained(base, tmp_path / "adapter")

    status = _run(["merge", str(other), str(adapter.path), str(tmp_path / "out")])

    said = capsys.readouterr().err
    assert status == 0
    assert "note: the qalora adapter was made for a base of bfloat16, and this base is another quantized base" in said
    assert "--force" not in said
    assert_exact(other, tmp_path / "out", adapter.updates)


def test_a_standard_adapter_on_another_base_without_a_report_is_noted(converted, tmp_path, capsys):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter")
    shutil.copytree(converted("compressed-tensors", 3), tmp_path / "other")
    (tmp_path / "other" / "loftq_report.json").unlink()

    status = _run(["merge", str(tmp_path / "other"), str(adapter.path), str(tmp_path / "out")])

    said = capsys.readouterr().err
    assert status == 0, said
    assert "--force" not in said


def test_a_base_that_says_act_order_is_refused(converted, merge, tmp_path):
    shutil.copytree(converted("gptq"), tmp_path / "base")
    config = config_of(tmp_path / "base")["quantization_config"]
    edit_json(tmp_path / "base" / "config.json", quantization_config={**config, "desc_act": True})

    ran = merge(tmp_path / "base", tmp_path / "base" / "qalora_init", tmp_path / "out")

    refused(ran, tmp_path, 2, "act-order (desc_act)", "not neighbouring columns", left=["base"])


def test_a_base_with_shuffled_groups_is_refused(converted, merge, tmp_path):
    shutil.copytree(converted("gptq"), tmp_path / "base")
    shuffle = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    edit_tensors(
        tmp_path / "base" / "model.safetensors", lambda t: t.update({f"{Q0}.g_idx": t[f"{Q0}.g_idx"][shuffle]})
    )

    ran = merge(tmp_path / "base", tmp_path / "base" / "qalora_init", tmp_path / "out", "--force")

    refused(ran, tmp_path, 2, f"{Q0}.g_idx", "act-order: the groups are not neighbouring columns", left=["base"])
