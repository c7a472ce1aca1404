"""Weights that no container of integers holds are refused by name before anything is written, with a working remedy."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from support.adapters import tensors_of
from support.conversions import run_conversion
from support.integer_files import CONTAINERS, Converter, bfloat16_llama, combination, decoded, int4

from loftq_cli.cli.main import _run
from loftq_cli.conversion.prepare import prepare_conversion
from loftq_cli.errors import InputError, UsageError
from loftq_cli.planning.settle import make_recipe


@dataclass(frozen=True)
class Refusal:
    """A recipe for a model that is refused, and the one line that says it."""

    says: str
    recipe: dict[str, Any]
    build: Callable[[Path], Path] = bfloat16_llama


TITLES = {"gptq": "GPTQ", "mlx": "MLX"}  # what a container is called in prose
TRANSPOSED = r"no weight to quantize: {} holds no layers that are stored \[in, out\] \(.*--layout dense.*\)"
REFUSALS = {
    **{
        f"[in, out] weights in {layout}": Refusal(
            TRANSPOSED.format(TITLES.get(layout, layout)),
            int4(layout),
            models.gpt2,
        )
        for layout in CONTAINERS
    },
    **{
        f"experts of {family} in compressed-tensors with zero points": Refusal(
            r"transformers decodes experts of compressed-tensors without zero points \(--symmetric\)",
            int4("compressed-tensors", symmetric=False),
            build,
        )
        for family, build in (("mixtral", models.mixtral), ("qwen2_moe", models.qwen2_moe))
    },
    "an expert in 16 bits in compressed-tensors": Refusal(
        r"transformers loads no experts in full precision from compressed-tensors \(--layout metal, or dense\)",
        int4("compressed-tensors", symmetric=True, exclude=(r"experts\.1\.",)),
        models.mixtral,
    ),
    "two stacks of blocks of t5 in gptq": Refusal(
        r"GPTQ loaders .* one stack of blocks, .* decoder\.block, encoder\.block \(--layout compressed-tensors, .*\)",
        int4("gptq", group_size=32),
        models.t5,
    ),
    "whisper in gptq": Refusal("GPTQ loaders read models of one stack of blocks", int4("gptq"), models.whisper),
    "whisper's decoder in gptq": Refusal(
        "GPTQ loaders .*--layout compressed-tensors", int4("gptq", exclude=("encoder",)), models.whisper
    ),
    "no rows that are whole groups": Refusal(
        r"no weight to quantize: rows of \d+ are not whole groups of 256", int4("compressed-tensors", group_size=256)
    ),
    "int3 in metal": Refusal(
        r"layout metal does not hold int3 \(one of compressed-tensors, gptq, mlx, dense\)",
        {"quant_type": "int3", "layout": "metal"},
    ),
    "int4 in bitsandbytes": Refusal(
        r"layout bitsandbytes does not hold int4 \(one of compressed-", int4("bitsandbytes")
    ),
    **{
        f"nf4 in {layout}": Refusal(
            rf"layout {layout} does not hold nf4 \(one of bitsandbytes, dense\)", {"layout": layout}
        )
        for layout in CONTAINERS
    },
    **{
        f"groups of {size} in mlx": Refusal(
            rf"layout mlx does not hold groups of {size} \(one of 32, 64, 128\)", int4("mlx", group_size=size)
        )
        for size in (16, 256, 512, 1024)
    },
    "groups of 48": Refusal(
        r"group_size 48 does not exist for int4 \(one of 16, 32, 64, .*\)", int4("compressed-tensors", group_size=48)
    ),
    **{
        f"symmetric in {layout}": Refusal(
            rf"layout {layout} stores an offset for every group \(--asymmetric\)", int4(layout, symmetric=True)
        )
        for layout in ("metal", "mlx")
    },
    "float32 scales in gptq": Refusal(
        r"layout gptq has no float32 scales \(one of float16\)", int4("gptq", scale_dtype="float32")
    ),
    **{
        f"{name} with integers": Refusal(
            rf"{name} means nothing with quant_type int4 \(leave {name} out\)", {"quant_type": "int4", name: value}
        )
        for name, value in (("block_size", 64), ("double_quant", True), ("double_quant", False))
    },
    **{
        f"{name} with nf4": Refusal(rf"{name} means nothing with quant_type nf4 \(leave {name} out\)", {name: value})
        for name, value in (("group_size", 64), ("symmetric", True), ("scale_dtype", "float32"))
    },
    **{
        f"{name} with loftq": Refusal(
            rf"{name} means nothing with method loftq \(leave {name} out\)", {"quant_type": "int4", name: value}
        )
        for name, value in (("pooling", "peft"), ("init", "residual"))
    },
    "qalora with nf4": Refusal(
        r"method qalora does not work with nf4 \(--quant-type int2, int3, int4, int8\)", {"method": "qalora"}
    ),
    "qalora without zero points": Refusal(
        r"method qalora merges into zero points, and a symmetric base has none \(--asymmetric\)",
        {"method": "qalora", "quant_type": "int4", "symmetric": True},
    ),
    "scales that do not exist": Refusal(
        r"scales 'best' does not exist \(one of absmax, search\)", {"quant_type": "int4", "scales": "best"}
    ),
}


def flags_of(recipe: dict[str, Any]) -> Iterator[str]:
    """The options of the command line for a recipe."""
    switches = {"symmetric": ("symmetric", "asymmetric"), "double_quant": ("double-quant", "no-double-quant")}
    for name, value in recipe.items():
        if name in switches:
            yield f"--{switches[name][not value]}"
            continue
        for each in value if isinstance(value, tuple) else (value,):
            yield from (f"--{name.replace('_', '-')}", str(each))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], Path]], Path]:
    return functools.cache(lambda build: build(tmp_path_factory.mktemp("built") / "source"))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_container_does_not_hold_is_refused_before_anything_is_written(
    name: str, built: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    refusal, output = REFUSALS[name], tmp_path / "out"
    model = built(refusal.build)
    with pytest.raises(UsageError, match=refusal.says):
        prepare_conversion(str(model), output, make_recipe(**refusal.recipe))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    assert _run(["quantize", str(model), str(output), *flags_of(refusal.recipe)]) == 2

    said = capsys.readouterr()
    as_flag = re.sub(r"leave (\w+) out", lambda match: f"leave --{match[1].replace('_', '-')} out", refusal.says)
    assert re.fullmatch(rf"error: .*(?:{refusal.says}|{as_flag}).*\n", said.err)
    assert not said.out
    assert not list(tmp_path.iterdir())


def test_the_remedy_for_rows_that_are_no_whole_groups_is_one(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        prepare_conversion(str(source), tmp_path / "out", make_recipe(quant_type="int4", group_size=256))
    # The same recipe with --layout dense is refused too: a group has to end with its row.
    assert "group" in str(caught.value.hint)


@pytest.mark.parametrize("layout", [*CONTAINERS, "dense"])
def test_a_matrix_whose_rows_are_no_whole_groups_stays_in_full_precision_and_is_named(
    layout: str, convert_once: Converter
) -> None:
    converted = convert_once(**combination("int4", "loftq", layout), group_size=128)
    name = "model.layers.0.mlp.down_proj.weight"  # 192 columns
    assert len(decoded(converted.output)) == 6
    assert torch.equal(tensors_of(converted.output)[name], converted.originals[name])
    reason = "rows of 192 are not whole groups of 128"
    assert f"{name}: kept in full precision: {reason}" in converted.report["notes"]
    assert {"name": name, "reason": reason} in converted.report["copied"]


def test_a_partly_quantized_checkpoint_is_no_source(tmp_path):
    models.llama(tmp_path / "model", layers=1)
    run_conversion(tmp_path / "model", tmp_path / "base", quant_type="int4", layout="mlx", include=("q_proj",), rank=4)
    with pytest.raises(InputError, match=r"the model is quantized already \(mlx\)"):
        run_conversion(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
