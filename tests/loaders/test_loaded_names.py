"""The names of tensors in loaded models: the table against transformers' own renaming, class by class."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from support import loader_table
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from loftq_cli.model.family import Family
from loftq_cli.model.loaded_names import _table, loaded_names

# A class of each family with names of its own, and of families without.
QUICK = [
    "LlamaForCausalLM",
    "LlamaModel",
    "Qwen3MoeForCausalLM",
    "GPT2LMHeadModel",
    "BertForSequenceClassification",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "BeitForImageClassification",
    "ViTMAEForPreTraining",
    "ViTModel",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
    "DINOv3ViTModel",
    "SwinForImageClassification",
    "SegformerForSemanticSegmentation",
    "CLIPModel",
    "SiglipModel",
    "NomicBertModel",
    "GteModel",
    "Gemma3ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "MixtralForCausalLM",
    "Mistral3ForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "WhisperForConditionalGeneration",
]

# Classes with the same attribute inside and outside of the inner model, where attributes alone do not tell which of the
# two a name without the prefix means: convolutions, norms and heads, but for RfDetrForInstanceSegmentation.
AMBIGUOUS = {
    "Data2VecAudioForXVector",
    "PixioBackbone",
    "RfDetrForInstanceSegmentation",
    "ShieldGemma2ForImageClassification",
    "UniSpeechSatForXVector",
    "WavLMForXVector",
    "Wav2Vec2ConformerForXVector",
    "Wav2Vec2ForXVector",
}


def renamings(model: Any) -> Iterator[tuple[str, str, bool]]:
    """Yield name in a file, name in the model and whether a converter takes the tensor, for names that the class saves,
    for names in memory, and for both without the prefix of the class. The last two are transformers' answers.
    """
    state, prefix = model.state_dict(), model.base_model_prefix
    mapping = get_model_conversion_mapping(model)
    back = [entry.reverse_transform() for entry in reversed(get_model_conversion_mapping(model))]
    kinds = (WeightRenaming, WeightConverter)
    forward, backward = ([[e for e in es if isinstance(e, kind)] for kind in kinds] for es in (mapping, back))
    names = {*state, *(rename_source_key(name, *backward, reverse=True)[0] for name in state)}
    names |= {name.removeprefix(f"{prefix}.") for name in names if prefix}
    for name in sorted(names):
        target, pattern = rename_source_key(name, *forward, prefix, state)
        if pattern is not None or target in state:
            yield name, target, pattern is not None


def differences(name: str, model: Any) -> list[tuple[str, str, str]]:
    family = Family({**model.config.to_dict(), "architectures": [name], "quantization_config": None})
    assert family.loader is not None
    found = []
    for file_name, target, is_converted in renamings(model):
        ours = family.loaded_name(file_name, ())
        if family.is_converted(file_name) != is_converted or (not is_converted and ours != target):
            found.append((file_name, target, ours))
    return found


@pytest.mark.parametrize("name", QUICK)
def test_the_table_renames_as_transformers_renames(name):
    model = loader_table.build(name)
    assert any(True for _ in renamings(model))
    assert differences(name, model) == []


@pytest.mark.parametrize("name", QUICK)
def test_the_row_of_a_class_is_the_one_of_the_installed_transformers(name):
    row = loader_table.class_row(name, loader_table.all_transforms())
    assert json.loads(json.dumps(row)) == _table()["classes"][name]


def test_the_transforms_are_those_of_the_installed_transformers():
    assert _table()["transformers"] == transformers.__version__
    told = {name: rows for name, rows in loader_table.all_transforms().items() if rows is not None}
    assert json.loads(json.dumps(told)) == _table()["transforms"]


@pytest.mark.slow
def test_every_class_that_can_be_built_is_in_the_table_and_renames_as_transformers_renames():
    table = json.loads(json.dumps(loader_table.build_table()))
    assert {name: row for name, row in _table()["classes"].items() if name in table["classes"]} == table["classes"]
    wrong = {name: differences(name, loader_table.build(name)) for name in table["classes"]}
    assert {name for name, found in wrong.items() if found} == AMBIGUOUS


def test_a_vision_tower_of_another_family_than_the_default_is_named_as_that_family():
    config = transformers.LlavaConfig(vision_config=transformers.SiglipVisionConfig(num_hidden_layers=1))
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    assert type(model.model.vision_tower).__name__ == "SiglipVisionModel"
    assert differences("LlavaForConditionalGeneration", model) == []
    family = Family({**config.to_dict(), "architectures": ["LlavaForConditionalGeneration"]})
    stored = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    assert family.loaded_name(stored, ()) == "model.vision_tower.encoder.layers.0.self_attn.q_proj"


def test_a_class_outside_the_table_has_no_names():
    assert loaded_names({"model_type": "llama", "architectures": ["OurModel"]}) is None
    assert loaded_names({"model_type": "llama"}) is None


def test_the_class_of_another_model_type_has_no_names():
    assert loaded_names({"model_type": "ours", "architectures": ["LlamaForCausalLM"]}) is None


def test_a_split_matrix_has_the_name_of_each_part():
    family = Family({"model_type": "nomic_bert", "architectures": ["NomicBertModel"]})
    parts = family.loaded_parts("encoder.layers.0.attn.Wqkv", ())
    assert parts == tuple(f"layers.0.self_attn.{name}_proj" for name in "qkv")
    assert (family.is_converted("encoder.layers.0.attn.Wqkv"), family.is_converted("encoder.layers.0.mlp.fc2")) == (
        True,
        False,
    )
