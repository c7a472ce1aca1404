"""Records that contradict the files, and numbers that are not finite, are found where the checksums are right."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.adapters import edit_json, edit_tensors
from support.conversions import run_conversion, run_merge
from support.verified_results import ADAPTER, LORA_B, MODEL, NORM, Q0, sign

from loftq_cli.cli.main import _run

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


@pytest.mark.parametrize(("alpha", "is_whole"), [(8.08, False), (7.9999, False), (8.000001, True), (8.0, True)])
def test_a_scaling_that_differs_from_the_reports_by_more_than_rounding_is_damage(alpha, is_whole, result, verify):
    edit_json(result / "loftq_init" / "adapter_config.json", lora_alpha=alpha)

    problems = verify(sign(result))["problems"]

    what = "gives model.layers.0.self_attn.q_proj another scaling than loftq_report.json"
    assert (("loftq_init/adapter_config.json", None, what) not in problems) == is_whole
    assert (not problems) == is_whole


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


@pytest.mark.parametrize(("nbytes", "is_whole"), [(1_000_000, True), (1_000_001, False)])
def test_a_recipe_of_more_than_a_megabyte_is_damage(nbytes, is_whole, result, verify):
    path = result / "loftq_recipe.toml"
    path.write_text(f"{path.read_text()}#".ljust(nbytes, "#"))
    problems = verify(sign(result))["problems"]
    assert problems == (
        [] if is_whole else [("loftq_recipe.toml", None, "is larger than the 1000000 bytes allowed here")]
    )


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
