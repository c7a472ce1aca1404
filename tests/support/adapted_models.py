"""Models over packed weights: built with random numbers, computed from files alone, and trained for two steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from loftq_cli.model.stored import BaseModel
from support.adapters import PREFIX

# Loading


AUTO = {"bert": "AutoModelForSequenceClassification"}
IDS = torch.arange(24).view(2, 12) * 5 % 160


def fresh(checkpoint: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a checkpoint with random numbers in it."""
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    torch.manual_seed(7)
    return getattr(transformers, AUTO.get(name, "AutoModelForCausalLM")).from_config(config, dtype=dtype).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def product_of(adapter: Path, module: str) -> torch.Tensor:
    """What the adapter adds to the weight of `module`, [out, in] in float64, from its files alone."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    lora_A, lora_B = (tensors[f"{PREFIX}{module}.lora_{x}.weight"].double() for x in "AB")
    product = config["lora_alpha"] / config["r"] * lora_B @ lora_A
    if not (config.get("use_qalora") or config.get("qalora_pooling")):
        return product
    size = config["qalora_group_size"]
    factor = {"paper": 1.0, "repo": 1 / size}.get(config.get("qalora_pooling"), lora_A.shape[1] / size)
    return factor * product.repeat_interleave(size, 1)


def reference(checkpoint: Path, base: Path, adapter: Path | None, name: str = "llama") -> nn.Module:
    """The dense float64 model with dequant(Q) + s·B·A in every converted layer."""
    auto = getattr(transformers, AUTO.get(name, "AutoModelForCausalLM"))
    model = auto.from_pretrained(checkpoint, dtype=torch.float32).double().eval()
    with BaseModel.open(base) as opened, torch.no_grad():
        for layer in json.loads((base / "loftq_report.json").read_text())["layers"]:
            weight = opened.matrix(layer["name"]).double()
            if adapter is not None:
                weight = weight + product_of(adapter, layer["module"])
            module = model.get_submodule(layer["module"])
            module.weight.copy_(weight.T if hasattr(module, "nf") else weight)
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}


# Saving


def trained(model: nn.Module, **save: Any) -> nn.Module:
    """The model after two steps that change every factor."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model
