"""load_adapted: every layout, convention and family computes with the effective weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapted_models import fresh, logits, product_of, reference, trainable
from support.adapted_modules import CLASSES, IN, POOLED, assert_close, random
from support.adapters import PREFIX, edit_tensors, lora_tensors, quietly, write_adapter
from support.conversions import run_conversion
from torch import nn
from torch.nn import functional

from loftq_cli.model.stored import BaseModel
from loftq_cli.nn import LoftQLinear, QALoRALinear, QuantizedLinear, load_adapted


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("method", ["loftq", "qlora"])
@pytest.mark.parametrize("name", ["llama", "tied llama", "torch llama", "gpt2", "gpt2 of the hub", "bert"])
def test_a_loaded_model_computes_with_the_effective_weights(name, method, cache, checkpoints, tmp_path):
    base = tmp_path / "base"
    run_conversion(checkpoints / name, base, method=method, rank=4, alpha=8.0)
    if method == "qlora":  # a start that adds nothing would hide a wrong scaling
        edit_tensors(
            base / "qlora_init" / "adapter_model.safetensors",
            lambda tensors: tensors.update({key: random(*value.shape) * 0.05 for key, value in tensors.items()}),
        )

    model = load_adapted(fresh(base, name), base, cache=cache)

    expected = reference(checkpoints / name, base, base / f"{method}_init", name)
    assert_close(logits(model), logits(expected), 1e-4)  # float32 through two blocks
    modules = [m for m in model.modules() if type(m) is CLASSES[method]]
    assert len(modules) == len(json.loads((base / "loftq_report.json").read_text())["layers"])
    assert all(m.base_layer.cache is cache for m in modules)
    assert trainable(model) == {"lora_A", "lora_B"}


@pytest.mark.parametrize(
    ("layout", "quant_type"),
    [
        ("compressed-tensors", "int2"),
        ("compressed-tensors", "int3"),
        ("compressed-tensors", "int8"),
        ("gptq", "int4"),
        ("metal", "int4"),
        ("mlx", "int3"),
        ("dense", "int4"),
        ("dense", "nf4"),
    ],
)
@pytest.mark.parametrize("method", ["loftq", "qalora"])
def test_every_layout_loads(layout, quant_type, method, checkpoints, tmp_path):
    if (method, quant_type) == ("qalora", "nf4"):
        pytest.skip("there is no such conversion")
    base = tmp_path / "base"
    run_conversion(checkpoints / "llama", base, method=method, quant_type=quant_type, layout=layout, rank=4)

    model = load_adapted(fresh(base), base)

    expected = reference(checkpoints / "llama", base, base / f"{method}_init")
    assert_close(logits(model), logits(expected), 1e-4)
    kind = LoftQLinear if method == "loftq" else QALoRALinear
    inner = nn.Linear if layout == "dense" else QuantizedLinear
    modules = [m for m in model.modules() if isinstance(m, kind)]
    assert len(modules) == 14 and all(type(m.base_layer) is inner for m in modules)
    assert trainable(model) == {"lora_A", "lora_B"}


@pytest.mark.parametrize("pooling", POOLED)
def test_pooled_adapters_load_in_their_convention(pooling, checkpoints, tmp_path):
    base = tmp_path / "base"
    run_conversion(checkpoints / "llama", base, method="qalora", quant_type="int2", pooling=pooling, rank=4, alpha=6.0)

    model = load_adapted(fresh(base), base)

    assert_close(logits(model), logits(reference(checkpoints / "llama", base, base / "qalora_init")), 1e-4)


def test_the_dtype_and_the_mode_of_the_model_are_kept(converted):
    model = load_adapted(fresh(converted, dtype=torch.bfloat16).train(), converted)

    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == torch.bfloat16
    assert (layer.lora_A.dtype, layer.training, layer.base_layer.training) == (torch.float32, True, True)
    assert logits(model).dtype == torch.bfloat16
    assert not any(module.training for module in load_adapted(fresh(converted), converted).modules())


def test_any_module_with_the_right_names_is_loaded(tmp_path):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(IN, 64)
            self.norm = nn.LayerNorm(64)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])
            self.layers[1] = self.layers[0]  # one module under two names
            self.register_buffer("steps", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[1].norm(self.layers[1].proj(x)) + self.steps.sum()

    tensors = {
        "layers.0.proj.weight": random(64, IN),
        "layers.0.proj.bias": random(64, seed=1),
        "layers.0.norm.weight": random(64, seed=2),
        "layers.0.norm.bias": random(64, seed=3),
        "steps": torch.arange(3.0),
    }
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    run_conversion(tmp_path / "model", tmp_path / "base", rank=4)

    model = load_adapted(Plain(), tmp_path / "base")

    assert model.layers[0].proj is model.layers[1].proj and isinstance(model.layers[0].proj, LoftQLinear)
    with BaseModel.open(tmp_path / "base") as base:
        weight = base.matrix("layers.0.proj.weight").double()
    weight = weight + product_of(tmp_path / "base" / "loftq_init", "layers.0.proj")
    x = random(5, IN)
    hidden = x.double() @ weight.T + tensors["layers.0.proj.bias"]
    expected = functional.layer_norm(
        hidden, (64,), tensors["layers.0.norm.weight"].double(), tensors["layers.0.norm.bias"].double()
    )
    assert_close(model(x), expected + 3, 1e-5)


def test_layers_without_an_adapter_and_directories_without_one(converted, checkpoints, tmp_path):
    some = tmp_path / "some"
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    shutil.copytree(converted / "loftq_init", some)
    kept = {f"{PREFIX}{name}.lora_{x}.weight" for name in names for x in "AB"}
    edit_tensors(
        some / "adapter_model.safetensors", lambda t: [t.pop(name) for name in list(t) if name not in kept] and None
    )
    model = load_adapted(fresh(converted), converted, adapter=some)
    assert {name for name, m in model.named_modules() if isinstance(m, LoftQLinear)} == set(names)
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 14

    bare = tmp_path / "bare"
    shutil.copytree(converted, bare, ignore=shutil.ignore_patterns("loftq_init"))
    model = load_adapted(fresh(bare), bare)
    assert trainable(model) == set()
    assert_close(logits(model), logits(reference(checkpoints / "llama", bare, None)), 1e-4)


def test_an_adapter_that_peft_trained_is_loaded(converted, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(model, converted, subfolder="loftq_init", is_trainable=True)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(random(*parameter.shape) * 0.01)
    quietly(wrapped.save_pretrained, tmp_path / "trained")

    model = load_adapted(fresh(converted), converted, adapter=tmp_path / "trained")

    layer = model.model.layers[1].mlp.down_proj
    assert type(layer) is LoftQLinear
    with BaseModel.open(converted) as base:
        exact = base.matrix("model.layers.1.mlp.down_proj.weight").double()
    exact = exact + product_of(tmp_path / "trained", "model.layers.1.mlp.down_proj")
    assert_close(layer.weight.clone(), exact, 1e-6)


def test_a_pooled_adapter_reads_every_input_where_peft_could_not_pool(converted, tmp_path):
    # PEFT pools only on GPTQ layers, and trains an ordinary adapter on every other one under the same config.
    q_proj = "model.layers.0.self_attn.q_proj"
    adapter = write_adapter(
        tmp_path / "adapter", lora_tensors(q_proj, (128, 128)), use_qalora=True, qalora_group_size=32, r=4
    )

    model = load_adapted(fresh(converted), converted, adapter=adapter)

    layer = model.get_submodule(q_proj)
    assert isinstance(layer, LoftQLinear)
    factors = load_file(adapter / "adapter_model.safetensors")
    lora_A, lora_B = (factors[f"{PREFIX}{q_proj}.lora_{x}.weight"].double() for x in "AB")
    assert_close(layer.weight.clone(), layer.base_layer.dequantized().double() + lora_B @ lora_A, 1e-6)
