"""Integer bases in every container: the tensors on the disk, their sizes, and the reported errors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.conversions import Silent, StopAfter, files_of, quick_recipe, run_conversion
from support.integer_files import CONTAINERS, FAST, Converted, Converter, assert_reported_errors, combination, decoded

from loftq_cli.conversion.prepare import prepare_conversion
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.model.stored import BaseModel
from loftq_cli.tensors.specs import POOLINGS


def test_the_files_hold_the_planned_tensors_and_have_the_reported_size(converted: Converted) -> None:
    plan = prepare_conversion(str(converted.source), converted.output, quick_recipe(**converted.recipe)).plan
    stored = {}
    for path in converted.output.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    planned = [*plan.adapter_tensors, *(tensor for shard in plan.shards for tensor in shard.tensors)]
    assert {tensor.name: (f"torch.{tensor.dtype}", tensor.shape) for tensor in planned} == {
        name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in stored.items()
    }
    nbytes = {name: tensor.nbytes for name, tensor in stored.items()}
    totals, in_layers = converted.report["totals"], 0
    assert totals["base_nbytes"] == sum(size for name, size in nbytes.items() if ".lora_" not in name)
    assert totals["adapter_nbytes"] == sum(size for name, size in nbytes.items() if ".lora_" in name)
    for layer in converted.report["layers"]:
        module = layer["name"].removesuffix("weight")
        size = sum(size for name, size in nbytes.items() if name.startswith(module))
        assert layer["bits_per_weight"] == pytest.approx(8 * size / math.prod(layer["shape"]), abs=1e-4)
        in_layers += size
    assert totals["bits_per_weight"] == pytest.approx(8 * in_layers / totals["weights"], abs=1e-4)


def test_the_reported_error_is_that_of_what_is_stored(converted: Converted) -> None:
    assert_reported_errors(converted)


def test_what_is_read_back_is_what_is_stored(converted: Converted) -> None:
    with BaseModel.open(converted.output) as base:
        for name, weight in decoded(converted.output).items():
            assert base.matrix(name).dtype == torch.float32
            assert torch.equal(base.matrix(name), weight.float())


@pytest.mark.parametrize("init", ["residual", "standard"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layout", ["gptq", "metal"])
def test_every_pooling_has_the_reported_error(layout: str, pooling: str, init: str, convert_once: Converter) -> None:
    recipe = combination("int4", "qalora", layout)
    converted = convert_once(**recipe, pooling=pooling, init=init)
    assert_reported_errors(converted)
    standard = convert_once(**recipe, pooling=pooling, init="standard").report["totals"]["error"]
    assert (converted.report["totals"]["error"] < standard) == (init == "residual")


@pytest.mark.parametrize("layout", CONTAINERS)
def test_searched_scales_leave_less(layout: str, convert_once: Converter) -> None:
    recipe = combination("int4", "qlora", layout)
    assert_reported_errors(convert_once(**recipe, scales="search"))
    errors = [convert_once(**recipe, scales=scales).report["totals"]["error"] for scales in ("search", "absmax")]
    assert errors[0] < 0.98 * errors[1]


@pytest.mark.parametrize(
    ("quant_type", "layout", "bits"),
    [
        ("int2", "compressed-tensors", 2 + 16 / 32 + 2 / 32 + 128 / 128**2),
        ("int3", "compressed-tensors", 3 + 16 / 32 + 3 / 32 + 128 / 128**2),
        ("int8", "compressed-tensors", 8 + 16 / 32 + 128 / 128**2),
        ("int4", "gptq", 4 + 16 / 32 + 4 / 32 + 32 / 128),
        ("int4", "metal", 4 + 2 * 16 / 32),
        ("int3", "mlx", 3 + 2 * 16 / 32),
        ("int3", "dense", 16),
    ],
)
def test_bits_of_a_weight_by_hand(quant_type: str, layout: str, bits: float, convert_once: Converter) -> None:
    # [128, 128] in groups of 32: code, scale, offset; weight_shape has 128 bits, g_idx 32 for each column.
    layers = convert_once(**combination(quant_type, "qlora", layout)).report["layers"]
    (query,) = [layer for layer in layers if layer["name"].endswith("q_proj.weight")]
    assert query["bits_per_weight"] == round(bits, 4)


@pytest.mark.parametrize("layout", [name for name in CONTAINERS if LAYOUTS[name].zero_point == "float"])
def test_int8_has_offsets_by_default_where_the_container_stores_them(layout: str, source: Path, tmp_path: Path) -> None:
    outcome = run_conversion(source, tmp_path / "out", quant_type="int8", layout=layout, method="qlora")
    assert outcome.total.error < 0.01


@pytest.mark.parametrize("layout", CONTAINERS)
def test_two_conversions_and_an_interrupted_one_give_the_same_bytes(
    layout: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**FAST, **combination("int4", "loftq", layout), "max_shard_size": "1MB"}
    written = []
    for folder, layers in (("first", 0), ("second", 0), ("third", 1), ("fourth", 5)):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)  # the output's name as typed is in some of its files
        if layers:
            with pytest.raises(KeyboardInterrupt):
                run_conversion(source, Path("out"), observer=StopAfter(layers), **recipe)
        observer = Silent()
        run_conversion(source, Path("out"), observer=observer, **recipe)
        assert [resumed for _, resumed in observer.done] == [True] * layers + [False] * (7 - layers)
        written.append(files_of(Path("out")))
    assert all(files == written[0] for files in written)
