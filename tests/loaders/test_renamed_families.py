"""Families that transformers loads under other names than the files have: every adapter arrives, counted by the loaded
model's own modules, and every adapter that PEFT trains merges.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.conversions import quick_recipe, run_conversion, run_merge
from support.families import as_on_the_hub, build_family

from loftq_cli.conversion.prepare import prepare_conversion
from loftq_cli.errors import UsageError
from loftq_cli.planning.plan import Plan


def load_from(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    return model, info


def plan_of(model: Path) -> Plan:
    return prepare_conversion(str(model), model.with_name("planned"), quick_recipe(rank=4)).plan


def check_all_adapted(name: str, output: Path, adapter: Path) -> None:
    """Every stored matrix is a 4-bit layer with an adapter, nothing else is, and no tensor is missed or dropped."""
    layers = {layer["module"] for layer in json.loads((output / "loftq_report.json").read_text())["layers"]}
    model, info = load_from(name, output)
    assert (set(info["missing_keys"]), set(info["unexpected_keys"])) == (set(), set())
    assert {module for module, layer in model.named_modules() if isinstance(layer, Linear4bit)} == layers
    stored = load_file(adapter / "adapter_model.safetensors")
    peft = PeftModel.from_pretrained(model, output, subfolder=adapter.name)
    held = {key.replace(".default.", "."): tensor for key, tensor in peft.state_dict().items() if ".lora_" in key}
    assert held.keys() == stored.keys()
    assert len(held) == 2 * len(layers)
    assert all(torch.equal(tensor.cpu(), stored[key].to(tensor.dtype)) for key, tensor in held.items())


@pytest.mark.parametrize(
    "name", ["Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration"]
)
def test_a_vision_tower_with_the_names_of_the_hub_keeps_its_adapters(name, tmp_path):
    outcome = run_conversion(as_on_the_hub(name, tmp_path / "model"), tmp_path / "base", rank=4, iterations=1)
    assert any("vision_tower.encoder" in job.module for job in plan_of(tmp_path / "model").layers)
    check_all_adapted(name, tmp_path / "base", outcome.adapter)


def train(name: str, model: Path, adapter: Path, targets: list[str]) -> dict[str, torch.Tensor]:
    """Save an adapter with random factors, and return the tensors of the model that PEFT merges, by loaded name."""
    torch.manual_seed(1)
    peft = get_peft_model(load_from(name, model)[0].float(), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for key, parameter in peft.named_parameters():
            if ".lora_" in key:
                parameter.normal_(0, 0.05)
    peft.save_pretrained(adapter)
    return peft.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("ViTForImageClassification", build_family),
        ("Dinov2ForImageClassification", build_family),
        ("Gemma3ForConditionalGeneration", as_on_the_hub),
    ],
)
def test_an_adapter_trained_under_the_loaded_names_merges_as_in_peft(name, build, tmp_path):
    model = build(name, tmp_path / "model")
    expected = train(name, model, tmp_path / "adapter", ["q_proj", "v_proj"])
    run_merge(model, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    merged = load_from(name, tmp_path / "merged")[0].state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.allclose(merged[key], expected[key], rtol=0, atol=1e-6) for key in expected)


def test_an_adapter_with_the_names_of_the_files_merges_to_the_same_model(tmp_path):
    name = "ViTForImageClassification"
    model = build_family(name, tmp_path / "model")
    train(name, model, tmp_path / "adapter", ["q_proj", "v_proj", "fc1"])
    run_merge(model, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    old = {
        ".layers.": ".encoder.layer.",
        "attention.q_proj": "attention.attention.query",
        "attention.v_proj": "attention.attention.value",
        "mlp.fc1": "intermediate.dense",
    }
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = {}
    for key, tensor in load_file(file).items():
        for new_part, old_part in old.items():
            key = key.replace(new_part, old_part)
        tensors[key] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["target_modules"] = ["query", "value", "intermediate.dense"]
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    run_merge(model, tmp_path / "adapter", tmp_path / "merged_too", dtype="float32")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "merged_too"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_matrix_that_the_loader_splits_cannot_be_included(tmp_path):
    model = build_family("NomicBertModel", tmp_path / "model")
    with pytest.raises(UsageError, match=r"Wqkv\.weight: --include asks for a matrix that transformers splits"):
        run_conversion(model, tmp_path / "base", include=("Wqkv",))
