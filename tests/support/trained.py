"""Adapters that PEFT trained, a step of random numbers, and the outputs of PEFT's own forward pass in float64."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

IDS = (torch.arange(24).reshape(2, 12) * 7 + 5) % 150
IDS[:, -1] = 1  # the end of a text, where T5 and BART read the class
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Trained:
    """An adapter's directory, and the outputs of PEFT's forward pass over `IDS`."""

    path: Path
    outputs: torch.Tensor


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` with matrices and biases large enough for outputs that differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval()


def saved(kind: str, directory: Path, **config: Any) -> Path:
    """A random model of the class called `kind` in float32, at `directory`."""
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    randomized(model_class(model_class.config_class(**config))).save_pretrained(directory)
    return directory


def saved_all(bases: dict[str, tuple[str, dict[str, Any]]], folder: Path) -> Path:
    """A model of each of `bases`, name -> (class, config), in `folder` under the name; returns `folder`."""
    for name, (kind, config) in bases.items():
        saved(kind, folder / name, **config)
    return folder


def outputs(model: Any) -> torch.Tensor:
    """The model's outputs over `IDS`, computed in float64."""
    with torch.no_grad():
        found = model.double().eval()(input_ids=IDS)
    return found.logits if "logits" in found else found.last_hidden_state


def loaded(directory: Path, auto: str = "AutoModelForCausalLM", **options: Any) -> Any:
    """The model in a directory, in float32; nothing may be missing but what `options` say."""
    model_class = getattr(transformers, auto)
    model, info = model_class.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **options)
    assert not info["mismatched_keys"]
    return model.eval()


def trained(model: Any, directory: Path, seed: int = 1, **config: Any) -> Trained:
    """An adapter on `model`, with every trained parameter moved, at `directory`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        wrapped.eval().save_pretrained(directory)
    return Trained(directory, outputs(wrapped))


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())
