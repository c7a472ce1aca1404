"""Adapters for tests: made by PEFT on a dense model, with what PEFT itself merges, or written by hand; and what
bitsandbytes reads from a 4-bit file.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Made:
    """An adapter directory, and the weights that PEFT's own merge gives, by name in the loaded model."""

    path: Path
    merged: dict[str, torch.Tensor]


def quietly(function: Any, *arguments: Any, **keywords: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **keywords)


def made_by_peft(base: Path, directory: Path, auto: str = "AutoModelForCausalLM", **config: Any) -> Made:
    """A random adapter on the dense model `base` in float32: everything that PEFT would train is moved."""
    model = getattr(transformers, auto).from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    wrapped = quietly(get_peft_model, model, LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    quietly(wrapped.save_pretrained, directory)
    merged = quietly(wrapped.merge_and_unload)
    return Made(directory, {name: value.clone() for name, value in merged.state_dict().items()})


def write_adapter(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter directory by hand; names without PEFT's prefix."""
    directory.mkdir()
    save_file({f"{PREFIX}{name}": value for name, value in tensors.items()}, directory / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **config}
    (directory / "adapter_config.json").write_text(json.dumps(values))
    return directory


def lora_tensors(module: str, shape: tuple[int, int], rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random factors for `module` of [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, shape[1], generator=generator),
        f"{module}.lora_B.weight": torch.randn(shape[0], rank, generator=generator) * 0.01,
    }


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(path: Path, change: Any) -> None:
    """Rewrite a safetensors file after `change` was applied to the dict of its tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(directory.glob("*.safetensors")) for name, value in load_file(path).items()}


def decoded(directory: Path) -> dict[str, torch.Tensor]:
    """Every 4-bit weight in a directory as bitsandbytes decodes it: [out, in], in the dtype of its quant_state."""
    tensors = tensors_of(directory)
    marks = [name for name in tensors if ".quant_state.bitsandbytes__" in name]
    weights = {}
    for name in (mark.partition(".quant_state.")[0] for mark in marks):
        parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        state = bitsandbytes.functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        weights[name] = bitsandbytes.functional.dequantize_4bit(tensors[name], state)
    return weights


def delta(adapter: Path, module: str, scaling: float) -> torch.Tensor:
    """s·B·A in float64, from the stored factors."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    product = tensors[f"{PREFIX}{module}.lora_B.weight"].double() @ tensors[f"{PREFIX}{module}.lora_A.weight"].double()
    return scaling * product


def loaded(directory: Path, auto: str = "AutoModelForCausalLM") -> nn.Module:
    """The directory in transformers, which must find every weight and need no other."""
    model, info = getattr(transformers, auto).from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def state_of(directory: Path, auto: str = "AutoModelForCausalLM") -> dict[str, torch.Tensor]:
    return loaded(directory, auto).state_dict()


def names_in(directory: Path) -> list[str]:
    """Everything that lies in a directory, hidden or not."""
    return sorted(os.listdir(directory))


def effective_update(
    lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, convention: str, group_size: int
) -> torch.Tensor:
    """What an adapter adds to a weight [out, in], by the definition of its pooled input, applied to the identity."""
    in_features = lora_A.shape[1] * group_size
    inputs = torch.eye(in_features, dtype=torch.float64).view(in_features, -1, group_size)
    pool = {
        "paper": inputs.sum(dim=2),
        "repo": inputs.mean(dim=2),
        "peft": inputs.mean(dim=2) * (in_features // group_size),
    }[convention]
    return (scaling * (pool @ lora_A.double().T) @ lora_B.double().T).T
