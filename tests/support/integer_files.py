"""Integer containers: decoders that use nothing but bits and torch's arithmetic, recipes for every container, ways to
damage a file.

Expected values are float64 arithmetic on what `decoded` takes bit by bit from the files, as the containers' documents
describe them.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loftq_cli.cli.main import _run
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.quant.formats import FORMATS
from support import models
from support.adapters import edit_json, edit_tensors, tensors_of
from support.loading import relative_error

PREFIX = "base_model.model."
CAUSAL, BASE = "AutoModelForCausalLM", "AutoModel"
INTEGERS = {name: row.bits for name, row in FORMATS.items() if row.is_affine}
CONTAINERS = [name for name, row in LAYOUTS.items() if name != "dense" and set(row.quant_types) & set(INTEGERS)]
FAST = {"group_size": 32, "rank": 4, "alpha": 8.0, "iterations": 2}


# What the files say, read with nothing but bits and torch's arithmetic.


def codes_in(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int64 [rows, count]: unsigned numbers of `bits` bits, one little-endian bit stream along each row of words."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    return torch.from_numpy(stream.reshape(len(words), count, bits) @ (1 << np.arange(bits)))


def words_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse: int32 words [rows, count * bits / 32]."""
    stream = (codes.numpy().astype(np.uint8)[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little").view("<i4").copy())


def wide(groups: torch.Tensor, columns: int) -> torch.Tensor:
    """[out, columns]: one number a group, for every weight of it."""
    return groups.repeat_interleave(columns // groups.shape[1], dim=1)


def of_compressed_tensors(config: dict[str, Any], tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """(code - zero point) * scale in the scales' dtype, as the model's."""
    scheme = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    name, bits = f"{module}.weight", scheme["num_bits"]
    rows, columns = tensors[f"{name}_shape"].tolist()
    scales = tensors[f"{name}_scale"]
    if scheme["symmetric"]:
        zero_points = torch.full(scales.shape, 2 ** (bits - 1))
    else:
        zero_points = codes_in(tensors[f"{name}_zero_point"].T, bits, rows).T
    steps = codes_in(tensors[f"{name}_packed"], bits, columns) - wide(zero_points, columns)
    return (steps.to(scales.dtype) * wide(scales, columns)).to(getattr(torch, config["dtype"]))


def of_gptq(config: dict[str, Any], tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """The same in float16; codes lie down the columns, groups too."""
    bits, index = config["quantization_config"]["bits"], tensors[f"{module}.g_idx"].long()
    codes = codes_in(tensors[f"{module}.qweight"].T, bits, len(index)).T  # [in, out]
    zero_points = codes_in(tensors[f"{module}.qzeros"], bits, codes.shape[1])  # [groups, out]
    return ((codes - zero_points[index]).float() * tensors[f"{module}.scales"].float()[index]).half().T


def of_biased(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], module: str, *, key: str, biases: str
) -> torch.Tensor:
    """code * scale + bias in float32, as the scales' dtype."""
    size, bits = config[key]["group_size"], config[key]["bits"]
    scales, offsets = tensors[f"{module}.scales"], tensors[f"{module}.{biases}"]
    columns = scales.shape[1] * size
    codes = codes_in(tensors[f"{module}.weight"], bits, columns)
    return (codes * wide(scales.float(), columns) + wide(offsets.float(), columns)).to(scales.dtype)


# The part that only a quantized weight has, and what the parts of one mean.
DECODERS: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "compressed-tensors": (".weight_packed", of_compressed_tensors),
    "gptq": (".qweight", of_gptq),
    "metal": (".qbiases", functools.partial(of_biased, key="quantization_config", biases="qbiases")),
    "mlx": (".biases", functools.partial(of_biased, key="quantization", biases="biases")),
}


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def report_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "loftq_report.json").read_text())


def decoded(directory: Path) -> dict[str, torch.Tensor]:
    """Every quantized weight [out, in] as its loader computes it, by name; of a dense directory the stored ones."""
    config, tensors = config_of(directory), tensors_of(directory)
    layout = report_of(directory)["recipe"]["layout"]
    if layout not in DECODERS:
        return {layer["name"]: tensors[layer["name"]] for layer in report_of(directory)["layers"]}
    part, decode = DECODERS[layout]
    modules = [name.removesuffix(part) for name in tensors if name.endswith(part)]
    return {f"{module}.weight": decode(config, tensors, module) for module in modules}


def added(directory: Path, module: str, columns: int) -> torch.Tensor:
    """What the adapter adds to a weight of `columns` inputs, float64 [out, in]. A pooled input is the sum of its group
    ("paper"), its mean ("repo"), or its mean times the number of groups (PEFT).
    """
    (folder,) = directory.glob("*_init")
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(next(folder.glob("*.saf*")))
    lora_A, lora_B = (tensors[f"{PREFIX}{module}.lora_{x}.weight"].double() for x in "AB")
    product, pooled = config["lora_alpha"] / config["r"] * lora_B @ lora_A, lora_A.shape[1]
    if pooled == columns:
        return product
    assert pooled * config["qalora_group_size"] == columns
    convention = "peft" if config.get("use_qalora") else config["qalora_pooling"]
    size = config["qalora_group_size"]
    return wide(product * {"paper": 1.0, "repo": 1 / size, "peft": pooled / size}[convention], columns)


# Every number format, with every method, in every container that holds it.


@dataclass(frozen=True)
class Converted:
    source: Path
    output: Path
    recipe: dict[str, Any]

    @property
    def originals(self) -> dict[str, torch.Tensor]:
        return tensors_of(self.source)

    @property
    def report(self) -> dict[str, Any]:
        return report_of(self.output)


Converter = Callable[..., Converted]


def combination(quant_type: str, method: str, layout: str) -> dict[str, Any]:
    """A recipe; int8 without zero points, as by default, where a container does not ask for them."""
    symmetric = quant_type == "int8" and method != "qalora" and LAYOUTS[layout].zero_point != "float"
    return {"quant_type": quant_type, "method": method, "layout": layout, "symmetric": symmetric}


def assert_reported_errors(converted: Converted) -> None:
    weights, originals = decoded(converted.output), converted.originals
    squared_error = squared_weight = 0.0
    assert weights.keys() == {layer["name"] for layer in converted.report["layers"]}
    for layer in converted.report["layers"]:
        original, base = originals[layer["name"]].double(), weights[layer["name"]].double()
        difference = original - base - added(converted.output, layer["module"], base.shape[1])
        # Ours is float32 arithmetic; of int8, 2⁻²⁴ of a weight is up to 1e-5 of its error.
        assert layer["error"]["base_error"] == pytest.approx(relative_error(original, base), rel=1e-5)
        assert layer["error"]["error"] == pytest.approx(float(difference.norm() / original.norm()), rel=1e-5)
        assert layer["error"]["max_error"] == pytest.approx(float(difference.abs().max()), rel=1e-4)
        squared_error += float(difference.square().sum())
        squared_weight += float(original.square().sum())
    total = math.sqrt(squared_error / squared_weight)
    assert converted.report["totals"]["error"] == pytest.approx(total, rel=1e-5)
    # A step of a group of 32 normal weights is 4.1 σ / (2^bits - 1) and its error step / √12; with values read in
    # another order, the error would be about √2.
    assert total < 1.3 * 4.1 / math.sqrt(12) / (2 ** INTEGERS[converted.recipe["quant_type"]] - 1)


def bfloat16_llama(directory: Path) -> Path:
    return models.llama(directory, layers=1)


def int4(layout: str, **recipe: Any) -> dict[str, Any]:
    return {"quant_type": "int4", "layout": layout, **recipe}


# What is refused when it is read, and what others write.


Q0 = "model.layers.0.self_attn.q_proj"
Change = Callable[[Path], None]


def config_with(**values: Any) -> Change:
    """Changes of the quantization, of its one scheme too."""

    def change(directory: Path) -> None:
        config = config_of(directory)
        key = "quantization" if "quantization" in config else "quantization_config"
        parts = [config[key], *(group["weights"] for group in config[key].get("config_groups", {}).values())]
        for name, value in values.items():
            (part,) = [part for part in parts if name in part] or parts[-1:]
            part[name] = value
        edit_json(directory / "config.json", **{key: config[key]})

    return change


def a_second_scheme(directory: Path) -> None:
    groups = config_of(directory)["quantization_config"]["config_groups"]
    config_with(config_groups={**groups, "group_1": groups["group_0"]})(directory)


def without(name: str) -> Change:
    return lambda directory: edit_tensors(directory / "model.safetensors", lambda tensors: tensors.pop(name))


def replaced(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = value(tensors[name]).contiguous()

    return lambda directory: edit_tensors(directory / "model.safetensors", change)


# What inspect says of it.


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert _run(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)
