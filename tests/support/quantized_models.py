"""Checkpoints in the quantized forms that people publish, written by formulas of the formats alone: the names of
tensors, and codes with scales. FP8 forms come with the decoded values.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support import models

F8 = torch.float8_e4m3fn
Form = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor | None]]


def fp8_block(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """FP8 in blocks of 128 by 128, as DeepSeek-V3: the tensors, and the decoded weight in float32."""
    grid = [-(-side // 128) for side in weight.shape]
    codes, decoded, scale = torch.empty(weight.shape, dtype=F8), torch.empty(weight.shape), torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
            scale[i, j] = weight[part].float().abs().max() / 448
            codes[part] = (weight[part].float() / scale[i, j]).to(F8)
            decoded[part] = codes[part].float() * scale[i, j]
    return {name: codes, f"{name}_scale_inv": scale}, decoded


def fp8_rows(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """FP8 with a scale for each row, as compressed-tensors writes it."""
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scale).to(F8)
    return {name: codes, f"{name}_scale": scale}, codes.float() * scale


def fp8_tensor(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """FP8 with one scale for the matrix and one for its inputs, as ModelOpt writes it."""
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(F8)
    inputs = {f"{name.removesuffix('weight')}input_scale": torch.tensor(0.5)}
    return {name: codes, f"{name}_scale": scale, **inputs}, codes.float() * scale


def bytes_and(*endings: str, dtype: torch.dtype = torch.uint8, name_of: Callable[[str], str] = str) -> Form:
    """A form that the tool does not decode: codes of half the width, and further tensors, which only have names."""

    def write(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], None]:
        codes = torch.ones(weight.shape[0], weight.shape[1] // 2).to(dtype)
        module = name.removesuffix("weight")
        return {name_of(name): codes, **{module + ending: torch.ones(4) for ending in endings}}, None

    return write


# Form -> how it writes a weight, the description of the quantization, and the place of the description.
UNREAD: dict[str, tuple[Form, dict[str, Any] | None, str]] = {
    "NVFP4 of ModelOpt": (
        bytes_and("weight_scale", "weight_scale_2"),
        {"quantization": {"quant_algo": "NVFP4"}},
        "hf_quant_config.json",
    ),
    "NVFP4 of compressed-tensors": (
        bytes_and("weight_scale", "weight_global_scale", name_of=lambda name: f"{name}_packed"),
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        "config.json",
    ),
    "AWQ": (
        bytes_and("qzeros", "scales", dtype=torch.int32, name_of=lambda name: name.replace("weight", "qweight")),
        {"quant_method": "awq", "bits": 4},
        "config.json",
    ),
    "AWQ, described in a side file": (
        bytes_and("qzeros", "scales", dtype=torch.int32, name_of=lambda name: name.replace("weight", "qweight")),
        {"w_bit": 4},
        "quant_config.json",
    ),
    "scaled FP8 of ComfyUI": (bytes_and("scale_weight", dtype=F8), None, ""),
    "FP8 without scales": (bytes_and(dtype=F8), None, ""),
    "LLM.int8": (bytes_and("SCB", dtype=torch.int8), None, ""),
    "MXFP4 of one matrix": (bytes_and("weight_scales", name_of=lambda name: f"{name}_blocks"), None, ""),
    "bitsandbytes without its states": (bytes_and("weight.absmax", "weight.quant_map"), None, ""),
    "compressed-tensors nested in a part": (
        bytes_and("weight_scale", name_of=lambda name: f"{name}_packed"),
        {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
        "text_config",
    ),
}


def write(
    directory: Path,
    source: Path,
    form: Form,
    description: dict[str, Any] | None = None,
    place: str = "config.json",
    *,
    only: str = "proj",
    decoded: Path | None = None,
) -> Path:
    """Write the Llama in `source` with the linears called `only` in a form.

    description   the description of the quantization; None for none
    place         "config.json", the key of a part of the config, or the name of a side file
    decoded       the folder for the same model with decoded weights, in the dtype of `source`
    """
    config = json.loads((source / "config.json").read_text())
    tensors, plain = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        written, value = form(name, weight) if only in name else ({name: weight}, weight)
        tensors |= written
        plain[name] = weight if value is None else value.to(weight.dtype)
    directory.mkdir(parents=True)
    if decoded is not None:
        decoded.mkdir(parents=True)
        (decoded / "config.json").write_text(json.dumps(config))
        save_file(plain, decoded / "model.safetensors", metadata={"format": "pt"})
    if description is not None and place.endswith(".json") and place != "config.json":
        (directory / place).write_text(json.dumps(description))
    elif description is not None:
        key = {"quantization_config": description}
        config |= key if place == "config.json" else {place: key}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def source_llama(directory: Path) -> Path:
    """A Llama in bfloat16 whose linears are several blocks of 128 wide and high."""
    return models.llama(directory, hidden=256, layers=1)
