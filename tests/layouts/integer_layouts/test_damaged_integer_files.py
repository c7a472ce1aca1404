"""A damaged container is refused by file and tensor; files of other tools are read as their own loaders read them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.adapters import edit_json, edit_tensors, tensors_of
from support.integer_files import (
    CONTAINERS,
    DECODERS,
    Q0,
    Change,
    Converter,
    a_second_scheme,
    codes_in,
    combination,
    config_of,
    config_with,
    decoded,
    int4,
    of_compressed_tensors,
    replaced,
    without,
    words_of,
)

from loftq_cli.errors import InputError
from loftq_cli.model.stored import BaseModel


def with_zero_point_15(qzeros: torch.Tensor) -> torch.Tensor:
    return words_of(codes_in(qzeros, 4, 128).index_fill_(1, torch.tensor([3]), 15), 4)


# Layout, what is done to it, the tensor that is named, and what is said. Q0 is [128, 128] in groups of 32.
DAMAGES: dict[str, tuple[dict[str, Any], Change, str | None, str]] = {
    **{
        f"{layout} without {part}": (int4(layout), without(f"{Q0}.{part}"), f"{Q0}.{part}", "is missing")
        for layout, parts in {
            "compressed-tensors": ("weight_scale", "weight_shape", "weight_zero_point"),
            "gptq": ("qzeros", "scales", "g_idx"),
            "metal": ("scales", "weight"),
            "mlx": ("scales", "weight"),
        }.items()
        for part in parts
    },
    **{
        f"{layout} with {part} of another shape": (
            int4(layout),
            replaced(f"{Q0}.{part}", lambda tensor: tensor[..., :-1]),
            f"{Q0}.{named}",
            r"asks for .* \(",
        )
        for layout, part, named in (
            ("compressed-tensors", "weight_packed", "weight_packed"),
            ("compressed-tensors", "weight_scale", "weight_scale"),
            ("compressed-tensors", "weight_zero_point", "weight_zero_point"),
            ("gptq", "scales", "scales"),
            ("gptq", "qzeros", "qzeros"),
            ("gptq", "g_idx", "g_idx"),
            ("metal", "qbiases", "qbiases"),
            ("metal", "weight", "weight"),
            ("mlx", "biases", "biases"),
            ("mlx", "weight", "weight"),
        )
    },
    **{
        f"{layout} with {part} as {dtype}": (
            int4(layout),
            replaced(f"{Q0}.{part}", lambda tensor, dtype=dtype: tensor.to(dtype)),
            f"{Q0}.{part}",
            f"is {str(dtype).removeprefix('torch.')}",
        )
        for layout, part, dtype in (
            ("compressed-tensors", "weight_packed", torch.int64),
            ("compressed-tensors", "weight_scale", torch.float64),
            ("compressed-tensors", "weight_zero_point", torch.int8),
            ("compressed-tensors", "weight_shape", torch.float32),
            ("gptq", "qweight", torch.int64),
            ("gptq", "scales", torch.float64),
            ("gptq", "g_idx", torch.int64),
            ("metal", "weight", torch.int64),
            ("metal", "scales", torch.float64),
            ("mlx", "biases", torch.float32),
        )
    },
    "a weight_shape that is not the matrix": (
        int4("compressed-tensors"),
        replaced(f"{Q0}.weight_shape", lambda _: torch.tensor([128, 160])),
        f"{Q0}.weight_packed",
        "its weight_shape and the config's scheme asks for",
    ),
    **{
        f"a weight_shape of {shape}": (
            int4("compressed-tensors"),
            replaced(f"{Q0}.weight_shape", lambda _, shape=shape: torch.tensor(shape)),
            f"{Q0}.weight_shape",
            says,
        )
        for shape, says in (
            ([128, 0], "not a shape"),
            ([-128, 128], "not a shape"),
            ([128, 2**62], "not a shape"),
            ([128, 100], "not whole groups of 32"),
            ([128], r"is int64 \(1,\)"),
        )
    },
    **{
        f"{layout} of 5 bits": (int4(layout), config_with(**{bits: 5}), None, "5 bits, of which we read 2, 3, 4, 8")
        for layout, bits in (("compressed-tensors", "num_bits"), ("gptq", "bits"), ("metal", "bits"), ("mlx", "bits"))
    },
    **{
        f"{layout} in groups of {size!r}": (
            int4(layout),
            config_with(group_size=size),
            None,
            "has group_size .*, not a whole number",
        )
        for layout in CONTAINERS
        for size in (0, None, "32")
    },
    "another format": (
        int4("compressed-tensors"),
        config_with(format="int-quantized"),
        None,
        "'int-quantized', of which",
    ),
    "two schemes": (int4("compressed-tensors"), a_second_scheme, None, "2 schemes of weights for Linear"),
    "floating point": (int4("compressed-tensors"), config_with(type="float"), None, "are float by group; we read int"),
    "blocks": (int4("compressed-tensors"), config_with(strategy="block"), None, "are int by block; we read int"),
    "act-order in its scheme": (int4("compressed-tensors"), config_with(actorder="group"), None, "act-order"),
    "desc_act": (int4("gptq"), config_with(desc_act=True), None, r"act-order \(desc_act\)"),
    "groups of columns that are no neighbours": (
        int4("gptq"),
        replaced(f"{Q0}.g_idx", lambda index: index.flip(0)),
        f"{Q0}.g_idx",
        "act-order: the groups are not neighbouring columns",
    ),
    "zero points in a file that is called sym": (
        int4("gptq"),
        config_with(sym=True),
        "model.layers.0.mlp.down_proj.qzeros",
        "holds zero points other than the middle, and the config says sym",
    ),
    "a v1 zero point that wraps around": (
        int4("gptq"),
        lambda directory: (
            config_with(checkpoint_format="gptq")(directory),
            replaced(f"{Q0}.qzeros", with_zero_point_15)(directory),
        )[0],
        f"{Q0}.qzeros",
        "holds a v1 zero point that wraps around",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_container_is_refused_by_file_and_tensor(name: str, convert_once: Converter, tmp_path: Path) -> None:
    recipe, damage, tensor, says = DAMAGES[name]
    directory = tmp_path / "damaged"
    shutil.copytree(convert_once(**combination("int4", "qlora", recipe["layout"])).output, directory)
    damage(directory)

    with pytest.raises(InputError, match=says) as caught, BaseModel.open(directory) as base:
        for weight in base.quantized:
            base.quantized_tensor(weight)

    assert caught.value.tensor == tensor
    # Tensors that are not there have no file of their own.
    assert caught.value.file in (str(directory), *(str(directory / n) for n in ("config.json", "model.safetensors")))
    assert tensor is not None or caught.value.file.endswith("config.json")
    assert tensor is None or "missing" in says or caught.value.file.endswith("model.safetensors")


def test_a_missing_part_never_makes_a_weight_disappear(convert_once: Converter, tmp_path: Path) -> None:
    # Parts by which a container's weights are found; without one, its other parts are there for nothing.
    for layout, (part, _) in DECODERS.items():
        directory = tmp_path / layout
        shutil.copytree(convert_once(**combination("int4", "qlora", layout)).output, directory)
        without(f"{Q0}{part}")(directory)
        with pytest.raises(InputError, match=re.escape(Q0)), BaseModel.open(directory):
            pass


def test_gptq_v1_holds_zero_points_less_one(convert_once: Converter, tmp_path: Path) -> None:
    converted, directory = convert_once(**combination("int4", "qlora", "gptq")), tmp_path / "v1"
    shutil.copytree(converted.output, directory)

    def less_one(tensors: dict[str, torch.Tensor]) -> None:
        for name, words in tensors.items():
            if name.endswith(".qzeros"):
                tensors[name] = words_of(codes_in(words, 4, words.shape[1] * 8) - 1, 4)

    edit_tensors(directory / "model.safetensors", less_one)
    for checkpoint_format in ("gptq", None):  # the format of files that do not name one
        config_with(checkpoint_format=checkpoint_format)(directory)
        with BaseModel.open(directory) as base:
            for name, weight in decoded(converted.output).items():
                assert torch.equal(base.matrix(name), weight.float())


def test_gptq_calls_rows_that_are_one_group_minus_one(convert_once: Converter, tmp_path: Path) -> None:
    recipe = {**combination("int4", "qlora", "gptq"), "group_size": 128, "include": (r"q_proj",)}
    converted, directory = convert_once(**recipe), tmp_path / "theirs"
    shutil.copytree(converted.output, directory)
    config_with(group_size=-1)(directory)
    with BaseModel.open(directory) as base:
        assert base.quantized.keys() == {f"{Q0}.weight"}
        assert torch.equal(base.matrix(f"{Q0}.weight"), decoded(converted.output)[f"{Q0}.weight"].float())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_are_one_group_are_read_as_transformers_loads_them(
    bits: int, symmetric: bool, source: Path, tmp_path: Path
) -> None:
    # What somebody else writes with strategy "channel": no group_size, one scale a row.
    directory, generator = tmp_path / "theirs", torch.Generator().manual_seed(5)
    shutil.copytree(source, directory)
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel", "dynamic": False}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "dequantize": True,
    }
    edit_json(directory / "config.json", quantization_config=quantization)

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            rows, columns = tensors.pop(name).shape
            tensors[f"{name}_packed"] = words_of(torch.randint(2**bits, (rows, columns), generator=generator), bits)
            tensors[f"{name}_scale"] = (torch.rand(rows, 1, generator=generator) * 0.1).bfloat16()
            tensors[f"{name}_shape"] = torch.tensor([rows, columns])
            if not symmetric:
                zero_points = torch.randint(2**bits, (1, rows), generator=generator)
                tensors[f"{name}_zero_point"] = words_of(zero_points, bits).T.contiguous()

    edit_tensors(directory / "model.safetensors", quantize)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    config, tensors = config_of(directory), tensors_of(directory)
    with BaseModel.open(directory) as base:
        assert len(base.quantized) == 7
        for name in base.quantized:
            module = name.removesuffix(".weight")
            expected = of_compressed_tensors(config, tensors, module)
            assert torch.equal(base.matrix(name), expected.float())
            assert torch.equal(model.get_submodule(module).weight, expected)
