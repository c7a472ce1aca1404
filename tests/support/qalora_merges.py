"""QA-LoRA bases, adapters and merges of them.

Weights are read from the raw tensors with numpy's bit operations and added up in float64.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from support.adapters import PREFIX, edit_json, effective_update, names_in, tensors_of
from support.conversions import run_conversion

Q0 = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
LINEARS = sorted(
    [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    + [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
)


CONTAINERS = {
    "compressed-tensors": {},
    "compressed-tensors of float32": {"model": "float32"},
    "gptq": {"layout": "gptq"},
    "metal": {"layout": "metal"},
    "mlx": {"layout": "mlx"},
}
BASES = [(name, bits) for name in CONTAINERS for bits in (2, 3, 4, 8) if (name, bits) != ("metal", 3)]


# Containers, read again.


@dataclass(frozen=True)
class Grid:
    """A stored matrix: codes [out, in], scales and what is added to code · scale [out, groups] in float64."""

    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def zero_points(self) -> np.ndarray:
        return -self.offsets / self.scales

    @property
    def values(self) -> np.ndarray:
        wide = [np.repeat(part, self.group_size, axis=1) for part in (self.scales, self.offsets)]
        return self.codes * wide[0] + wide[1]


def bit_stream(words: torch.Tensor, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of each row of 32-bit words: element i at bit i · bits, little-endian."""
    rows = words.contiguous().view(torch.int32).numpy().astype("<i4").view(np.uint8)
    found = np.unpackbits(rows, axis=1, bitorder="little")[:, : count * bits]
    return found.reshape(len(rows), count, bits) @ (1 << np.arange(bits))


def container_of(directory: Path) -> tuple[str, int, int]:
    """Its name, the bits and the group size, from config.json."""
    config = config_of(directory)
    if "quantization" in config:
        return "mlx", config["quantization"]["bits"], config["quantization"]["group_size"]
    found = config["quantization_config"]
    if found["quant_method"] == "compressed-tensors":
        weights = found["config_groups"]["group_0"]["weights"]
        return "compressed-tensors", weights["num_bits"], weights["group_size"]
    return found["quant_method"], found["bits"], found["group_size"]


def grids(directory: Path) -> dict[str, Grid]:
    """Every quantized matrix of a directory, by module name."""
    (name, bits, group_size), tensors = container_of(directory), tensors_of(directory)
    ending = {"compressed-tensors": "weight_packed", "gptq": "qweight"}.get(name, "scales")
    modules = [key.removesuffix(f".{ending}") for key in tensors if key.endswith(f".{ending}")]
    found = {}
    for module in modules:
        parts = {key.removeprefix(f"{module}."): tensors[key] for key in tensors if key.startswith(f"{module}.")}
        found[module] = _grid(name, parts, bits)
        assert found[module].group_size == group_size
    return found


def _grid(name: str, parts: dict[str, torch.Tensor], bits: int) -> Grid:
    if name == "gptq":
        scales = parts["scales"].T.double().numpy()
        codes = bit_stream(parts["qweight"].T, bits, len(parts["g_idx"]))
        return Grid(codes, scales, -scales * bit_stream(parts["qzeros"], bits, len(scales)).T)
    if name != "compressed-tensors":
        scales, offsets = parts["scales"].double().numpy(), parts["qbiases" if name == "metal" else "biases"]
        codes = bit_stream(parts["weight"], bits, parts["weight"].shape[1] * 32 // bits)
        return Grid(codes, scales, offsets.double().numpy())
    out_features, in_features = parts["weight_shape"].tolist()
    scales = parts["weight_scale"].double().numpy()
    codes = bit_stream(parts["weight_packed"], bits, in_features)
    if "weight_zero_point" not in parts:
        return Grid(codes, scales, -scales * 2 ** (bits - 1))
    return Grid(codes, scales, -scales * bit_stream(parts["weight_zero_point"].T, bits, out_features).T)


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


class Conversions:
    """QA-LoRA bases with an adapter of rank 4 that starts at zero, each made once."""

    def __init__(self, llamas: dict[str, Path], folder: Path) -> None:
        self.llamas, self.folder, self.made = llamas, folder, {}

    def __call__(self, container: str, bits: int = 4, **recipe: Any) -> Path:
        key = (container, bits, *sorted(recipe.items()))
        if key not in self.made:
            options = {"model": "bfloat16", **CONTAINERS[container], "rank": 4, "alpha": 6.0, "group_size": 32}
            options |= {"method": "qalora", "quant_type": f"int{bits}", **recipe}
            if options["method"] == "qalora":
                options = {"init": "standard", **options}
            self.made[key] = self.folder / f"base{len(self.made)}"
            run_conversion(self.llamas[options.pop("model")], self.made[key], **options)
        return self.made[key]


@dataclass(frozen=True)
class Trained:
    """An adapter directory as training would leave it, and the update [out, in] of each module in float64."""

    path: Path
    updates: dict[str, np.ndarray]


def trained(
    base: Path,
    directory: Path,
    *,
    share: float = 0.02,
    convention: str = "peft",
    group_size: int = 32,
    modules: Sequence[str] = LINEARS,
    stored: dict[str, np.ndarray] | None = None,
) -> Trained:
    """Random factors of rank 4 and alpha 6 in a copy of the base's adapter, each update `share` of its weight."""
    shutil.copytree(next(base.glob("*_init")), directory)
    stored = stored or {name: grid.values for name, grid in grids(base).items()}
    generator = torch.Generator().manual_seed(11)
    factors, updates = {}, {}
    for module in modules:
        out_features, in_features = stored[module].shape
        lora_A = torch.randn(4, in_features // group_size, generator=generator)
        lora_B = torch.randn(out_features, 4, generator=generator)
        if group_size > 1:
            update = effective_update(lora_A, lora_B, 6 / 4, convention, group_size)
        else:
            update = 6 / 4 * lora_B.double() @ lora_A.double()
        factor = share * float(np.linalg.norm(stored[module])) / float(update.norm())
        lora_B = lora_B * factor
        factors |= {f"{PREFIX}{module}.lora_A.weight": lora_A, f"{PREFIX}{module}.lora_B.weight": lora_B}
        if group_size > 1:
            updates[module] = effective_update(lora_A, lora_B, 6 / 4, convention, group_size).numpy()
        else:
            updates[module] = (6 / 4 * lora_B.double() @ lora_A.double()).numpy()
    save_file(factors, directory / "adapter_model.safetensors")
    if group_size > 1:
        says = {"use_qalora": True} if convention == "peft" else {"use_qalora": False, "qalora_pooling": convention}
        edit_json(directory / "adapter_config.json", **says, qalora_group_size=group_size)
    return Trained(directory, updates)


@dataclass(frozen=True)
class Ran:
    """One merge: its exit status, what it printed and what it said."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    @property
    def line(self) -> str:
        """The one line of a refusal, beside notes and warnings."""
        lines = [line for line in self.err.splitlines() if not line.startswith(("note: ", "warning: "))]
        assert len(lines) == 1, self.err
        return lines[0]


def largest(values: np.ndarray) -> float:
    return float(np.abs(values).max())


def assert_exact(base: Path, out: Path, updates: dict[str, np.ndarray]) -> None:
    """The base's codes and scales, and (code − zero) · scale + update to a millionth of the largest weight."""
    before, after = grids(base), grids(out)
    assert sorted(after) == sorted(before) == LINEARS
    for module, grid in after.items():
        assert np.array_equal(grid.codes, before[module].codes)
        assert np.array_equal(grid.scales, before[module].scales)
        exact = before[module].values + updates.get(module, 0.0)
        assert largest(grid.values - exact) <= 1e-6 * largest(exact), module


def lost_by_hand(base: Path, out: Path, updates: dict[str, np.ndarray]) -> float:
    """||W_merged − W_exact|| / ||update|| over all modules that have one."""
    before, after = grids(base), float32_values(out)
    wrong = sum(np.square(after[m].double().numpy() - before[m].values - x).sum() for m, x in updates.items())
    return float(np.sqrt(wrong / sum(np.square(update).sum() for update in updates.values())))


def loaded_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The linears of the block as transformers has them, which must find every tensor and need no other."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return {module: model.get_submodule(module).weight.detach() for module in LINEARS}


def float32_values(directory: Path) -> dict[str, torch.Tensor]:
    """code · scale + bias as a loader of float offsets computes it, in float32."""
    found = {}
    for module, grid in grids(directory).items():
        codes, scales, offsets = (torch.from_numpy(x).float() for x in (grid.codes, grid.scales, grid.offsets))
        wide = [part.repeat_interleave(grid.group_size, dim=1) for part in (scales, offsets)]
        found[module] = codes * wide[0] + wide[1]
    return found


# What is refused.


def refused(ran: Ran, tmp_path: Path, status: int, *says: str, left: Sequence[str] = ("adapter",)) -> None:
    assert (ran.status, ran.out) == (status, ""), ran.err
    assert all(part in ran.line for part in says), ran.line
    assert names_in(tmp_path) == sorted(left)


# Integers, quantized again.


def grid_values(directory: Path) -> dict[str, torch.Tensor]:
    """What compressed-tensors decodes to in a bfloat16 model: products of bfloat16 scales, rounded once."""
    return {m: torch.from_numpy(grid.values).to(torch.bfloat16) for m, grid in grids(directory).items()}
