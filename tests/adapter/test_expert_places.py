"""The facts about classes of experts are those of the installed transformers, and places follow the loader."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from loftq_cli.adapter.experts.places import INTERLEAVED, SAYS_IN_OUT, STORED_IN_OUT, ExpertPlace, place_of
from loftq_cli.adapter.parameters import wrapped_parameters
from loftq_cli.model.family import Family


@cache
def classes_of_experts():
    """List (model_type of the folder, decorator's text, names of the parameters in order) of every class of experts."""
    transformers = pytest.importorskip("transformers")
    found = []
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = file.read_text()
        if "Experts" not in text or "gate_up_proj" not in text:
            continue
        for kind in ast.parse(text).body:
            if isinstance(kind, ast.ClassDef) and "Experts" in kind.name:
                source = ast.unparse(kind)
                names = re.findall(r"self\.(\w+) = nn\.Parameter\(", source)
                if "down_proj" in names:
                    found.append((file.parent.name, " ".join(map(ast.unparse, kind.decorator_list)), names))
    return found


def test_transposed_and_interleaved_families_are_those_of_the_installed_transformers():
    found = classes_of_experts()
    assert len(found) > 60
    says = {family for family, decorators, _ in found if "is_transposed=True" in decorators}
    assert {re.sub("_text$", "", family) for family in SAYS_IN_OUT} == says
    assert {family for family, decorators, _ in found if "is_concatenated=False" in decorators} == INTERLEAVED
    silent = {family for family, decorators, _ in found if "use_experts_implementation" not in decorators}
    assert {"llama4"} <= silent & {re.sub("_text$", "", family) for family in STORED_IN_OUT - SAYS_IN_OUT}


def test_parameters_are_nested_in_the_order_of_every_class():
    for _, _, names in classes_of_experts():
        config = {"target_parameters": [f"experts.{name}" for name in sorted(names)]}
        wrappers = [f"h.0.experts{'.base_layer' * depth}" for depth in range(len(names))]
        found = wrapped_parameters(config, wrappers)
        assert [found[wrapper].rpartition(".")[2] for wrapper in reversed(wrappers)] == names


PLACES = {
    "a gate": ("qwen3_moe", "model.layers.0.mlp.experts.7.gate_proj.weight", ("mlp.experts.gate_up_proj", 7, 0)),
    "an up": ("phimoe", "model.layers.0.block_sparse_moe.experts.1.w3.weight", ("mlp.experts.gate_up_proj", 1, 1)),
    "a down": ("mixtral", "model.layers.0.block_sparse_moe.experts.1.w2.weight", ("mlp.experts.down_proj", 1, None)),
    "all of gate and up": (
        "granitemoe",
        "model.layers.0.block_sparse_moe.input_linear.weight",
        ("block_sparse_moe.experts.gate_up_proj", None, None),
    ),
    "all of a family that keeps the names": (
        *("gpt_oss", "model.layers.0.mlp.experts.down_proj"),
        ("mlp.experts.down_proj", None, None),
    ),
    "experts without a gate": (
        *("nemotron_h", "model.layers.0.mixer.experts.2.up_proj.weight"),
        ("mixer.experts.up_proj", 2, None),
    ),
    "one expert of a family that fuses nothing": (
        *("gpt_oss", "model.layers.0.mlp.experts.2.gate_up_proj.weight"),
        ("mlp.experts.gate_up_proj", 2, None),
    ),
    "a linear": ("qwen3_moe", "model.layers.0.self_attn.q_proj.weight", ("self_attn.q_proj.weight", None, None)),
}
CLASSES = {
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
}


@pytest.mark.parametrize("case", PLACES)
def test_a_tensor_of_the_files_has_the_place_of_the_loader(case):
    model_type, name, (parameter, expert, part) = PLACES[case]
    family = Family({"model_type": model_type, "architectures": [CLASSES[model_type]]})
    assert place_of(name, family, [name]) == ExpertPlace(f"model.layers.0.{parameter}", expert, part)


def test_a_config_without_a_class_has_the_names_of_the_first_families():
    name = "layers.0.block_sparse_moe.experts.2.w1.weight"
    assert place_of(name, Family({}), [name]) == ExpertPlace("layers.0.mlp.experts.gate_up_proj", 2, 0)


def test_the_router_of_all_linear_is_told_from_the_experts():
    config = {"target_parameters": ["down_proj", "gate.weight", "gate_up_proj"]}
    found = wrapped_parameters(config, ["h.0.mlp.gate", "h.0.mlp.experts", "h.0.mlp.experts.base_layer"])
    assert found == {
        "h.0.mlp.gate": "h.0.mlp.gate.weight",
        "h.0.mlp.experts.base_layer": "h.0.mlp.experts.gate_up_proj",
        "h.0.mlp.experts": "h.0.mlp.experts.down_proj",
    }
