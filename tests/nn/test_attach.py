"""A loaded model gets adapters in place: the layers, the numbers and the forward pass are those of the directory that
`loftq quantize` writes, and nothing is decided by rules of its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from support import models
from support.conversions import run_conversion
from torch import nn

from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.checkpoint.statistics import open_statistics
from loftq_cli.cli.main import _run
from loftq_cli.errors import InputError, LoftqError, MismatchError, UsageError
from loftq_cli.model.builtin import resolve_model
from loftq_cli.nn import (
    AdaptedLinear,
    FakeQuantizedLinear,
    LoftQLinear,
    QALoRALinear,
    QLoRALinear,
    attach,
    load_adapted,
    save_adapter,
)
from loftq_cli.planning.planner import build_plan
from loftq_cli.planning.recipe import Override
from loftq_cli.planning.settle import make_recipe

OVERRIDE = {"match": r"layers\.0\.mlp\.down_proj", "rank": 2}
FULL = {"match": r"layers\.1\.self_attn", "quantize": False}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "the defaults of the command line": ("llama", {}),
    "LoftQ with overrides": ("llama", {"rank": 4, "fit": "loftq", "override": [OVERRIDE, FULL]}),
    "QLoRA with targets": (
        "llama",
        {"method": "qlora", "include": ["q_proj", "mlp"], "exclude": ["up_proj"], "seed": 5},
    ),
    "a head": ("llama", {"method": "qlora", "include": ["lm_head", "k_proj"], "rank": 8, "alpha": 4}),
    "QA-LoRA, int4": ("llama", {"method": "qalora", "quant_type": "int4", "group_size": 32, "rank": 4}),
    "int4 with float offsets": ("llama", {"quant_type": "int4", "layout": "mlx", "fit": "loftq", "iterations": 2}),
    "float16 scales of GPTQ": ("llama", {"method": "qlora", "quant_type": "int4", "layout": "gptq"}),
    "tied embeddings": ("tied_llama", {"method": "qlora"}),
    "Conv1D": ("gpt2", {"fit": "loftq", "iterations": 2, "rank": 4}),
    "an encoder": ("bert", {"method": "qlora", "adapter_dtype": "bfloat16"}),
}
CLASSES = {
    "bert": transformers.AutoModelForSequenceClassification,
    "gpt2": transformers.AutoModelForCausalLM,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    names = {name for name, _ in CASES.values()}
    return {name: getattr(models, name)(tmp_path_factory.mktemp("model") / "model") for name in names}


def loaded(path: Path, kind: Any = transformers.AutoModelForCausalLM) -> nn.Module:
    return kind.from_pretrained(path, dtype="auto").eval()


def small(**options: Any) -> nn.Sequential:
    """A model of no framework: a linear, a block, a head."""
    torch.manual_seed(0)
    block = nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)})
    return nn.Sequential(nn.Linear(64, 64, **options), nn.ModuleList([block]), nn.Linear(64, 32))


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds == {name: type(module) for name, module in expected.named_modules()}
    state, expected_state = model.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    for name, module in expected.named_modules():
        if isinstance(module, AdaptedLinear):
            assert model.get_submodule(name).lora == module.lora, name


@pytest.mark.parametrize("case", CASES)
def test_a_model_gets_what_loading_the_converted_directory_gives(case, checkpoints, tmp_path):
    name, options = CASES[case]
    kind = CLASSES.get(name, transformers.AutoModelForCausalLM)
    recipe = {**options}
    if "override" in recipe:
        recipe["override"] = tuple(Override(**entry) for entry in recipe["override"])
    for key in ("include", "exclude"):
        if key in recipe:
            recipe[key] = tuple(recipe[key])
    # run_conversion would choose the paper's fit where the recipe names none.
    if not options:
        assert _run(["quantize", str(checkpoints[name]), str(tmp_path / "out"), "--quiet"]) == 0
    else:
        recipe = recipe if "fit" in recipe or recipe.get("method") == "qlora" else {**recipe, "fit": "joint"}
        run_conversion(checkpoints[name], tmp_path / "out", **recipe)
    expected = load_adapted(loaded(checkpoints[name], kind), tmp_path / "out")

    model = loaded(checkpoints[name], kind)
    returned = attach(model, **options)

    assert returned is model
    assert any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert_same(model, expected)
    tokens = torch.arange(16)[None]
    assert torch.equal(model(input_ids=tokens).logits, expected(input_ids=tokens).logits)


def test_of_a_model_with_fused_experts_the_linears_of_the_command_line_get_adapters(tmp_path):
    path = models.qwen2_moe(tmp_path / "model")
    with open_checkpoint(path) as checkpoint:
        plan = build_plan(checkpoint.tensors, checkpoint.config(), make_recipe(method="qlora", rank=4))

    model = attach(loaded(path), method="qlora", rank=4)

    adapted = {name for name, module in model.named_modules() if isinstance(module, QLoRALinear)}
    assert adapted == {job.module for job in plan.layers}
    assert not any("experts" in name or name.endswith("gate") for name in adapted)


def test_the_builtin_model_and_a_preset(tmp_path):
    path = resolve_model("builtin:tiny-llama")
    options = {"rank": 4, "fit": "loftq", "iterations": 1, "exclude": ["mlp"]}
    arguments = ["--rank", "4", "--fit", "loftq", "--iterations", "1", "--exclude", "mlp", "--quiet"]
    assert _run(["quantize", str(path), str(tmp_path / "out"), "--recipe", "loftq-nf4", *arguments]) == 0

    model = attach(loaded(path), "loftq-nf4", **options)

    assert_same(model, load_adapted(loaded(path), tmp_path / "out"))


def test_a_calibration_weighs_errors_as_on_the_command_line(checkpoints, tmp_path):
    path = tmp_path / "calibration"
    _write_statistics(path, checkpoints["llama"])
    assert open_statistics(path).names
    options: dict[str, Any] = {"calibration": str(path), "rank": 4, "rounds": 1, "iterations": 1}
    run_conversion(checkpoints["llama"], tmp_path / "out", **options)

    model = attach(loaded(checkpoints["llama"]), **options)

    assert_same(model, load_adapted(loaded(checkpoints["llama"]), tmp_path / "out"))
    with pytest.raises(MismatchError, match="has no statistics there"):
        attach(small(), include=["0"], calibration=str(path), rank=4)


def _write_statistics(path: Path, checkpoint: Path) -> None:
    """Second moments of inputs in which some columns are far larger, for every linear of a model."""
    path.mkdir()
    inputs, tensors = {}, {}
    for name, module in loaded(checkpoint).named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            inputs[f"{name}.weight"] = name
            tensors[name] = torch.linspace(0.1, 3.0, module.in_features).square()
    save_file(tensors, path / "statistics.safetensors")
    values = {
        "tool": "loftq-cli",
        "format": 1,
        "kind": "diagonal",
        "tokens": 64,
        "inputs": inputs,
        "statistics_sha256": hashlib.sha256((path / "statistics.safetensors").read_bytes()).hexdigest(),
    }
    (path / "calibration.json").write_text(json.dumps(values))


# What trains, and what is kept


def test_only_the_adapters_train(checkpoints):
    model = attach(loaded(checkpoints["llama"]), method="qlora", rank=4)

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained and all(name.endswith(("lora_A", "lora_B")) for name in trained)


def test_an_unfrozen_base_trains_the_weights_of_the_adapted_linears_too():
    model = attach(small(), include=["^0$", "up"], method="qlora", rank=4, freeze_base=False)

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    parts = {"lora_A", "lora_B", "base_layer.weight", "base_layer.bias"}
    assert trained == {f"{layer}.{part}" for layer in ("0", "1.0.up") for part in parts}
    assert isinstance(model[0].base_layer, FakeQuantizedLinear)


def test_blocks_of_any_module_are_found_and_heads_are_not():
    model = attach(small(), quant_type="int4", group_size=32, rank=4, fit="loftq", iterations=1)

    adapted = {name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}

    assert adapted == {"1.0.up", "1.0.down"}
    assert isinstance(model[1][0]["up"], LoftQLinear)


def test_each_method_has_its_class():
    for kind, options in (
        (LoftQLinear, {"method": "loftq", "iterations": 1}),
        (QLoRALinear, {"method": "qlora"}),
        (QALoRALinear, {"method": "qalora", "quant_type": "int4", "group_size": 32, "init": "standard"}),
    ):
        assert type(attach(small(), include=["0"], rank=4, **options)[0]) is kind


def test_a_module_in_two_places_is_replaced_in_both():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"first": nn.Sequential(shared), "second": nn.Sequential(shared)})

    with pytest.raises(UsageError) as caught:
        attach(model, include=["first", "second"], method="qlora", rank=4)
    assert "are one module, which cannot have two adapters (exclude=['^second.0$'])" in str(caught.value)
    assert model["first"][0] is shared

    attach(model, include=["first"], method="qlora", rank=4)
    assert isinstance(model["first"][0], QLoRALinear) and model["second"][0] is model["first"][0]


def test_dtypes_and_modes_of_layers_are_kept():
    model = small(dtype=torch.bfloat16)
    model[1].eval()

    attach(model, include=["0", "up"], method="qlora", rank=4)

    assert model[0].weight.dtype == torch.bfloat16 and model[0].training
    assert model[1][0]["up"].weight.dtype == torch.float32 and not model[1][0]["up"].training


def test_the_weight_of_a_layer_is_let_go_before_the_next_one_is_made(monkeypatch):
    module = sys.modules["loftq_cli.nn.attach"]  # `loftq_cli.nn.attach` itself is the function
    model = small()
    weights = [weakref.ref(model[1][0][name].weight) for name in ("up", "down")]
    alive, make_start = [], module.make_start  # type: ignore[attr-defined]

    def watched(*arguments: Any, **keywords: Any) -> Any:
        alive.append([weight() is not None for weight in weights])
        return make_start(*arguments, **keywords)

    monkeypatch.setattr(module, "make_start", watched)

    attach(model, method="qlora", rank=4)

    assert alive == [[True, True], [False, True]]
    assert [weight() for weight in weights] == [None, None]


def test_what_is_trained_is_saved_and_loads_over_the_converted_directory(checkpoints, tmp_path):
    options: dict[str, Any] = {"rank": 4, "fit": "loftq", "iterations": 1}
    run_conversion(checkpoints["gpt2"], tmp_path / "out", **options)
    model = attach(loaded(checkpoints["gpt2"]), **options)
    tokens = torch.arange(32)[None]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()

    save_adapter(model, tmp_path / "trained")

    with pytest.raises(MismatchError, match="could not check that the adapter belongs to this base"):
        load_adapted(loaded(checkpoints["gpt2"]), tmp_path / "out", adapter=tmp_path / "trained")
    again = load_adapted(loaded(checkpoints["gpt2"]), tmp_path / "out", adapter=tmp_path / "trained", force=True)
    assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)


# What is refused


def with_nan() -> nn.Module:
    model = small()
    model[1][0]["down"].weight.data[0, 0] = float("nan")
    return model


def over_peft() -> nn.Module:
    return get_peft_model(small(), LoraConfig(target_modules=["2"]))


def quantized_already() -> nn.Module:
    model = small()
    model.config = transformers.LlamaConfig()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


class Rotary(nn.Module):
    """A module with a weight that is a matrix, and no linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64, 64))


REFUSED: dict[str, tuple[Any, type[LoftqError], str]] = {
    "nothing in blocks": (
        lambda: attach(nn.Sequential(nn.Linear(64, 64))),
        UsageError,
        "no linear to quantize among the 1 matrices of the model: 0.weight (outside the blocks) "
        "(include=['...'] takes expressions that find the names of other linears)",
    ),
    "an expression that finds nothing": (
        lambda: attach(small(), include=["q_proj"]),
        UsageError,
        "include=['q_proj'] finds no linear weight",
    ),
    "a single linear": (
        lambda: attach(nn.Linear(64, 64)),
        UsageError,
        "the model is a single linear (LoftQLinear.from_linear adapts one linear)",
    ),
    "a second time": (
        lambda: attach(attach(small(), method="qlora", rank=4), method="qlora"),
        UsageError,
        "1.0.up has an adapter already (merge or unload the adapters, or load the model anew)",
    ),
    "adapters of PEFT": (
        lambda: attach(over_peft(), rank=4),
        UsageError,
        "base_model.model.2 has an adapter already",
    ),
    "the meta device": (
        lambda: attach(small().to("meta"), rank=4),
        UsageError,
        "tensor 0.weight: is on the meta device (give the model memory first, as with to_empty and load_state_dict)",
    ),
    "NaN": (
        lambda: attach(with_nan(), rank=4),
        InputError,
        "tensor 1.0.down.weight: holds NaN or infinite values (exclude it)",
    ),
    "a quantized model": (
        lambda: attach(quantized_already()),
        InputError,
        "the model is quantized already (bitsandbytes) (start from the checkpoint in 16 bits",
    ),
    "a module that is no linear": (
        lambda: attach(nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"rot": Rotary()})])}), rank=4),
        UsageError,
        "tensor h.0.rot.weight: Rotary is not a linear (exclude=['^h.0.rot$'])",
    ),
    "an unknown option": (
        lambda: attach(small(), bitts=4),
        UsageError,
        "unknown option bitts (known: method, quant_type",
    ),
    "a size of files": (
        lambda: attach(small(), max_shard_size="1GB"),
        UsageError,
        "option max_shard_size means nothing here",
    ),
    "a rank above a matrix's": (
        lambda: attach(small(), rank=65),
        UsageError,
        "rank 65 is more than the matrix has (96 by 64) (rank=64, an [[override]] with a smaller rank, or "
        "exclude=['1.0.up'])",
    ),
    "an override of nothing": (
        lambda: attach(small(), rank=4, override=[{"match": "q_proj", "rank": 2}]),
        UsageError,
        "the override 'q_proj' matches no module",
    ),
    "an override without an expression": (
        lambda: attach(small(), override=[{"rank": 2}]),
        UsageError,
        "an override has no match (override=[{'match': 'down_proj', 'rank': 32}])",
    ),
    "an override of something unknown": (
        lambda: attach(small(), override=[{"match": "up", "rnak": 2}]),
        UsageError,
        "unknown option rnak (did you mean rank?)",
    ),
    "a text for a list": (
        lambda: attach(small(), exclude="up"),
        UsageError,
        "exclude must be a list of texts, not 'up' (exclude=['...'])",
    ),
    "no thread": (lambda: attach(small(), rank=4, threads=0), UsageError, "threads must be at least 1, not 0"),
    "an unknown preset": (lambda: attach(small(), "nf5"), UsageError, "no recipe 'nf5'"),
    "a cache of weights that train": (
        lambda: attach(small(), freeze_base=False, cache=True),
        UsageError,
        "cache means nothing with freeze_base=False: weights change with every step (leave cache out)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_each_wrong_model_or_option_gives_one_clear_error(case):
    build, kind, message = REFUSED[case]

    with pytest.raises(kind) as caught:
        build()

    assert message in str(caught.value)


def test_a_refused_model_stays_as_it_is():
    model = with_nan()

    with pytest.raises(InputError):
        attach(model, rank=4)

    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_remedies_that_are_printed_work():
    small_rank = attach(small(), rank=64, iterations=1)
    excluded = attach(small(), rank=64, exclude=["1.0.up"], iterations=1)

    assert isinstance(small_rank[1][0]["up"], LoftQLinear)
    assert isinstance(excluded[1][0]["down"], LoftQLinear) and type(excluded[1][0]["up"]) is nn.Linear
