"""`inspect --verify` asks transformers: each packed weight, adapter and layer in 16 bits against the model that would
be loaded, and what differs by name.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.adapters import edit_json
from support.conversions import run_conversion
from support.families import as_on_the_hub, build_family
from support.verified_results import sign

from loftq_cli.activations import loader_question
from loftq_cli.inspecting.verification import verify
from loftq_cli.model import family


def problems(folder: Path) -> list[tuple[str | None, str | None, str]]:
    return [(problem.file, problem.tensor, problem.what) for problem in verify(folder).problems]


def edit_quantization(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", quantization_config={**config["quantization_config"], **values})


def convert_without_the_table(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build=build_family) -> Path:
    """A conversion under the names of the files, as for a class that the table of loaded names lacks."""
    with monkeypatch.context() as patch:
        patch.setattr(family, "loaded_names", lambda config: None)
        run_conversion(build(name, tmp_path / "model"), tmp_path / "base", rank=4, iterations=1)
    return tmp_path / "base"


def test_a_result_meets_the_model_that_is_loaded(result):
    assert problems(result) == []
    assert not any("transformers" in note.what for note in verify(result).notes)


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "SwinForImageClassification", "T5ForConditionalGeneration"]
)
def test_a_result_of_a_family_meets_the_model_that_is_loaded(name, tmp_path):
    run_conversion(build_family(name, tmp_path / "model"), tmp_path / "base", rank=4, iterations=1)
    assert problems(tmp_path / "base") == []


def test_adapters_under_names_that_the_class_has_not_are_named(tmp_path, monkeypatch):
    base = convert_without_the_table("ViTForImageClassification", tmp_path, monkeypatch)

    found = [problem for problem in problems(base) if "PEFT drops its adapter" in problem[2]]

    assert len(found) == 12
    module = "vit.encoder.layer.0.attention.attention.key"
    file, tensor, what = next(problem for problem in found if module in problem[2])
    assert (file, tensor) == ("loftq_init/adapter_model.safetensors", f"base_model.model.{module}.lora_A.weight")
    assert what.startswith("ViTForImageClassification of transformers ") and f"has no linear {module}" in what


def test_packed_weights_that_the_class_splits_are_named(tmp_path, monkeypatch):
    base = convert_without_the_table("NomicBertModel", tmp_path, monkeypatch)

    found = {tensor for _, tensor, what in problems(base) if "splits or merges it while loading" in what}

    assert found == {f"encoder.layers.{block}.attn.Wqkv.weight" for block in range(2)}


def test_a_tower_with_the_names_of_the_hub_is_checked_by_the_loaded_names(tmp_path, monkeypatch):
    base = convert_without_the_table("Gemma3ForConditionalGeneration", tmp_path, monkeypatch, as_on_the_hub)

    found = problems(base)

    assert sum("PEFT drops its adapter" in what for *_, what in found) == 12


def test_a_packed_weight_in_the_list_of_layers_in_16_bits_is_named(result):
    edit_quantization(result, llm_int8_skip_modules=["lm_head", "model.layers.0.mlp.up_proj"])
    sign(result)

    (file, tensor, what) = problems(result)[0]

    assert (file, tensor) == ("model.safetensors", "model.layers.0.mlp.up_proj.weight")
    assert what.startswith("is packed, and transformers ")
    assert what.endswith("loads model.layers.0.mlp.up_proj as a dense layer")


def test_a_layer_in_16_bits_outside_of_the_list_is_named(original, tmp_path):
    run_conversion(original, tmp_path / "base", rank=4, iterations=1, exclude=("down_proj",))
    assert problems(tmp_path / "base") == []
    edit_quantization(tmp_path / "base", llm_int8_skip_modules=["lm_head"])
    sign(tmp_path / "base")

    found = problems(tmp_path / "base")

    assert [(file, tensor) for file, tensor, _ in found] == [("config.json", None)] * 2
    name = "model.layers.0.mlp.down_proj"
    assert found[0][2].endswith(f"load {name} from packed weights, and the directory stores {name}.weight in 16 bits")


def test_modules_that_peft_would_adapt_without_a_stored_adapter_are_named(result):
    modules = json.loads((result / "loftq_init/adapter_config.json").read_text())["target_modules"]
    edit_json(result / "loftq_init/adapter_config.json", target_modules=[*modules, "lm_head"])
    sign(result)

    what = "its target_modules give PEFT fresh adapters for lm_head"
    assert ("loftq_init/adapter_config.json", None, what) in problems(result)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"architectures": ["OurModel"]}, "names the class OurModel, which transformers has not"),
        ({"model_type": "ours"}, "transformers cannot read it"),
        ({"hidden_act": "no such function"}, "transformers cannot build the model"),
    ],
)
def test_a_model_that_transformers_does_not_build_is_a_note(values, says, result):
    edit_json(result / "config.json", **values)
    sign(result)

    assert any("was not asked" in note.what and says in note.what for note in verify(result).notes)


def test_a_model_without_an_end_is_a_note(result, monkeypatch):
    monkeypatch.setattr(loader_question, "_SECONDS", 3.0)
    edit_json(result / "config.json", num_hidden_layers=10**7)
    sign(result)

    assert any(
        "transformers' model of config.json takes more than 3 seconds" in note.what for note in verify(result).notes
    )


def test_nothing_is_asked_about_a_checkpoint_of_others(original, monkeypatch):
    monkeypatch.setattr("loftq_cli.inspecting.loader_check.ask_loader", os.abort)

    assert problems(original) == []


def test_nothing_is_asked_without_the_libraries(result, monkeypatch):
    monkeypatch.setattr("loftq_cli.inspecting.loader_check.can_ask", lambda: False)
    monkeypatch.setattr("loftq_cli.inspecting.loader_check.ask_loader", os.abort)

    assert problems(result) == []
