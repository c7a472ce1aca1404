"""Layers of other bits and other group sizes in one model: what is planned, stored, loaded by others and read back, and
what is refused.

Expected values are those of transformers, compressed-tensors and PEFT, or float64 arithmetic on the bits of the files.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import models
from support.adapters import edit_json, tensors_of
from support.conversions import Silent, StopAfter, files_of, run_conversion, run_merge
from support.integer_files import PREFIX, codes_in, config_of, report_of, wide
from support.loading import matrix, matrix_of_lora, relative_error
from torch import nn

from loftq_cli.cli.main import _run
from loftq_cli.conversion.prepare import prepare_conversion
from loftq_cli.errors import InputError, LoftqError, MismatchError, UsageError
from loftq_cli.model.stored import BaseModel
from loftq_cli.nn import load_adapted
from loftq_cli.planning.recipe import Override
from loftq_cli.planning.recipe_files import recipe_toml, resolve_recipe
from loftq_cli.planning.settle import make_recipe

FAST = {"rank": 4, "alpha": 8.0, "iterations": 2}
MIX = (
    Override(match="down_proj", quant_type="int2", group_size=32),
    Override(match=r"layers\.0\.self_attn\.(?:q|k)_proj", quant_type="int8"),
    Override(match="v_proj", group_size=32, rank=2),
)
# What MIX makes of a model of int4 in groups of 64, as (bits, group size).
EXPECTED = {"down_proj": (2, 32), "v_proj": (4, 32), "0.self_attn.q_proj": (8, 64), "0.self_attn.k_proj": (8, 64)}
Converter = Callable[..., Path]


def expected_format(module: str) -> tuple[int, int]:
    return next((found for ending, found in EXPECTED.items() if module.endswith(ending)), (4, 64))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def convert_once(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Converter:
    """The small llama in int4 with the overrides of MIX and a recipe, each recipe once."""

    @functools.cache
    def convert_by(**recipe: Any) -> Path:
        output = tmp_path_factory.mktemp("case") / "converted"
        run_conversion(source, output, **{**FAST, "quant_type": "int4", "override": MIX, **recipe})
        return output

    return convert_by


@pytest.fixture(scope="module")
def mixed(convert_once: Converter) -> Path:
    return convert_once(layout="compressed-tensors")


def layer_of(output: Path, module: str) -> dict[str, Any]:
    return next(layer for layer in report_of(output)["layers"] if layer["module"] == module)


def read_back(output: Path) -> dict[str, torch.Tensor]:
    """Every layer that the report names, float32 [out, in] by module, as this project reads it."""
    with BaseModel.open(output) as base:
        return {layer["module"]: base.matrix(layer["name"]) for layer in report_of(output)["layers"]}


# What is stored.


@pytest.mark.parametrize("layout", ["compressed-tensors", "mlx", "dense"])
def test_each_layer_has_the_format_that_its_override_asks_for(layout: str, convert_once: Converter) -> None:
    for layer in report_of(convert_once(layout=layout))["layers"]:
        bits, group_size = expected_format(layer["module"])
        assert (layer["quant_type"], layer["group_size"]) == (f"int{bits}", group_size)
        assert layer["rank"] == (2 if layer["module"].endswith("v_proj") else 4)


@pytest.mark.parametrize("layout", ["compressed-tensors", "mlx", "dense"])
def test_the_reported_error_is_that_of_what_is_read_back(layout: str, source: Path, convert_once: Converter) -> None:
    output, originals = convert_once(layout=layout), tensors_of(source)
    weights = read_back(output)
    for layer in report_of(output)["layers"]:
        found = relative_error(originals[layer["name"]], weights[layer["module"]])
        assert layer["error"]["base_error"] == pytest.approx(found, rel=1e-5)


def test_bits_of_a_weight_by_hand(mixed: Path) -> None:
    # Symmetric: codes, a bfloat16 scale a group, and 128 bits of weight_shape.
    assert layer_of(mixed, "model.layers.0.mlp.down_proj")["bits_per_weight"] == round(
        2 + 16 / 32 + 128 / (128 * 192), 4
    )
    assert layer_of(mixed, "model.layers.0.self_attn.q_proj")["bits_per_weight"] == round(8 + 16 / 64 + 128 / 128**2, 4)


def test_mlx_entries_name_the_modules_that_differ_and_decode_them(convert_once: Converter) -> None:
    output = convert_once(layout="mlx")
    settings, tensors, weights = config_of(output)["quantization"], tensors_of(output), read_back(output)
    assert (settings["bits"], settings["group_size"], settings["mode"]) == (4, 64, "affine")
    for module, weight in weights.items():
        own = settings.get(module, settings)
        assert (own["bits"], own["group_size"]) == expected_format(module)
        scales, offsets = tensors[f"{module}.scales"], tensors[f"{module}.biases"]
        codes = codes_in(tensors[f"{module}.weight"], own["bits"], weight.shape[1])
        columns = weight.shape[1]
        decoded = (codes * wide(scales.float(), columns) + wide(offsets.float(), columns)).to(scales.dtype)
        assert torch.equal(weight, decoded.float())
    assert set(settings) - {"bits", "group_size", "mode"} == {m for m in weights if expected_format(m) != (4, 64)}


@pytest.mark.parametrize("layout", ["compressed-tensors", "mlx"])
def test_overrides_that_leave_the_format_alone_leave_the_config_alone(
    layout: str, source: Path, tmp_path: Path
) -> None:
    same = (Override(match="q_proj", quant_type="int4", group_size=64), Override(match="k_proj", rank=2))
    recipe: dict[str, Any] = {**FAST, "quant_type": "int4", "layout": layout, "symmetric": layout != "mlx"}
    configs = []
    for override in ((), same):
        prepared = prepare_conversion(str(source), tmp_path / "out", make_recipe(**recipe, override=override))
        configs.append(prepared.plan.model_config(prepared.config))
    assert configs[0] == configs[1]


def test_a_resumed_run_gives_the_same_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: dict[str, Any] = {**FAST, "quant_type": "int4", "override": MIX}
    written = []
    for folder in ("whole", "in two"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        if folder == "in two":
            with pytest.raises(KeyboardInterrupt):
                run_conversion(source, Path("out"), observer=StopAfter(5), **recipe)
        observer = Silent()
        run_conversion(source, Path("out"), observer=observer, **recipe)
        written.append(files_of(Path("out")))
    assert sum(resumed for _, resumed in observer.done) == 5
    assert written[0] == written[1]


# What transformers, compressed-tensors and PEFT make of it.


def load(output: Path) -> nn.Module:
    """transformers' model, with its weights decoded as its first forward pass decodes them."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    model(torch.arange(8).view(1, 8))
    return model


def test_transformers_decodes_what_we_read(mixed: Path) -> None:
    model, weights = load(mixed), read_back(mixed)
    for module, weight in weights.items():
        assert torch.equal(matrix(model.get_submodule(module)).float(), weight), module
    linears = {name for name, part in model.named_modules() if type(part) is nn.Linear}
    assert linears - weights.keys() == {"lm_head"}


@pytest.mark.parametrize("layout", ["compressed-tensors", "mlx", "dense"])
def test_the_lines_of_the_model_card_load_base_and_adapter(layout: str, source: Path, convert_once: Converter) -> None:
    output, originals = convert_once(layout=layout), tensors_of(source)
    lines = (output / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    namespace: dict[str, Any] = {}
    with contextlib.chdir(output):
        exec(lines, namespace)
    model = namespace["model"]
    stored = load_file(next(output.glob("*_init")) / "adapter_model.safetensors")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == len(stored) == 2 * len(report_of(output)["layers"])
    if layout == "mlx":  # our modules, of which test_training_modules.py knows more
        return
    for layer in report_of(output)["layers"]:
        part = model.get_submodule(PREFIX + layer["module"])
        effective = matrix(part.base_layer).double() + matrix_of_lora(part)
        assert layer["error"]["error"] == pytest.approx(relative_error(originals[layer["name"]], effective), rel=1e-5)


def test_our_modules_train_on_it(source: Path, mixed: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(source), dtype=torch.float32
    )
    weights, model = read_back(mixed), load_adapted(model, mixed)
    for module, weight in weights.items():
        assert torch.equal(model.get_submodule(module).base_layer.weight.float(), weight)
    model(torch.arange(8).view(1, 8)).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


FOREIGN = {
    "an expression": (["re:.*down_proj"], ["re:.*(q|k)_proj$"], ["re:.*v_proj"], ["Linear"]),
    "a name before an expression": (
        ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
        ["re:.*q_proj", "re:.*k_proj"],
        ["re:.*v_proj"],
        ["Linear", "re:nothing"],
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_schemes_are_found_as_compressed_tensors_finds_them(name: str, source: Path, tmp_path: Path) -> None:
    match_targets = pytest.importorskip("compressed_tensors.utils.match").match_targets
    everywhere = (MIX[0], Override(match="(?:q|k)_proj", quant_type="int8"), MIX[2])
    output = tmp_path / "out"
    run_conversion(source, output, **FAST, quant_type="int4", override=everywhere)
    config = config_of(output)["quantization_config"]
    groups = sorted(
        config["config_groups"].values(),
        key=lambda group: [(2, 32), (8, 64), (4, 32), (4, 64)].index(
            (group["weights"]["num_bits"], group["weights"]["group_size"])
        ),
    )
    weights = read_back(output)
    targets = {
        f"group_{i}": {**g, "targets": list(t)} for i, (g, t) in enumerate(zip(groups, FOREIGN[name], strict=True))
    }
    edit_json(output / "config.json", quantization_config={**config, "config_groups": targets})
    by_target = {target: group for group in targets.values() for target in group["targets"]}
    with BaseModel.open(output) as base:
        for module, weight in weights.items():
            # Theirs, which is not told in what order expressions are looked at.
            first = match_targets(module, nn.Linear(1, 1), by_target)[0]
            assert by_target[first]["weights"]["num_bits"] == base.quantized[f"{module}.weight"].spec.bits
            assert torch.equal(base.matrix(f"{module}.weight"), weight)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("Linear", "the targets of a scheme of its config are no list of names"),
        (["re:("], r"among the targets of its config is the key 're:\(', no regular expression"),
        (["re:.*q_proj"], "its config has no scheme of the weights of model.layers.0.mlp"),
    ],
)
def test_schemes_that_fit_no_module_are_refused(
    targets: Any, message: str, convert_once: Converter, tmp_path: Path
) -> None:
    mixed = convert_once(layout="compressed-tensors")
    config = config_of(mixed)["quantization_config"]
    groups = {
        name: {**group, "targets": targets if name == "group_0" else [f"model.{name}"]}
        for name, group in config["config_groups"].items()
    }
    for path in (mixed / "model.safetensors", mixed / "config.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit_json(tmp_path / "config.json", quantization_config={**config, "config_groups": groups})
    with pytest.raises(InputError, match=message):
        BaseModel.open(tmp_path)


# The other commands.


@pytest.mark.parametrize("layout", ["compressed-tensors", "mlx", "dense"])
def test_inspect_shows_and_verifies_every_layer(
    layout: str, source: Path, convert_once: Converter, capsys: pytest.CaptureFixture[str]
) -> None:
    output = convert_once(layout=layout)
    assert _run(["inspect", str(output), "--verify"]) == 0
    capsys.readouterr()
    assert _run(["inspect", str(output), "--against", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for layer, known in zip(found["layers"], report_of(output)["layers"], strict=True):
        assert (layer["quant_type"], layer["group_size"]) == (known["quant_type"], known["group_size"])
        assert layer["error"]["error"] == pytest.approx(known["error"]["error"], rel=1e-6)


def test_a_scheme_that_is_exchanged_is_found(mixed: Path, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    output.mkdir()
    for name, data in files_of(mixed).items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_bytes(data)
    config = config_of(output)["quantization_config"]
    groups = config["config_groups"]
    groups["group_0"]["targets"], groups["group_1"]["targets"] = (
        groups["group_1"]["targets"],
        groups["group_0"]["targets"],
    )
    edit_json(output / "config.json", quantization_config=config)
    assert _run(["inspect", str(output), "--verify"]) != 0


@pytest.mark.parametrize("layout", ["compressed-tensors", "mlx", "dense"])
def test_merged_weights_are_base_plus_adapter(layout: str, convert_once: Converter, tmp_path: Path) -> None:
    output = convert_once(layout=layout)
    weights = read_back(output)
    merged = tensors_of(run_merge(output, output / "loftq_init", tmp_path / "merged"))
    stored = load_file(output / "loftq_init" / "adapter_model.safetensors")
    for layer in report_of(output)["layers"]:
        factors = (stored[f"{PREFIX}{layer['module']}.lora_{x}.weight"].double() for x in "BA")
        expected = weights[layer["module"]].double() + layer["scaling"] * torch.linalg.multi_dot(list(factors))
        # One rounding to bfloat16, of a float32 sum.
        torch.testing.assert_close(merged[layer["name"]].double(), expected, rtol=2**-8, atol=1e-7)


def test_an_adapter_of_another_mix_is_refused(source: Path, mixed: Path, tmp_path: Path) -> None:
    run_conversion(source, tmp_path / "other", **FAST, quant_type="int4", override=MIX[:1])
    with pytest.raises(MismatchError, match="another quantized base"):
        run_merge(mixed, tmp_path / "other" / "loftq_init", tmp_path / "merged")


def test_qalora_merges_into_layers_of_several_bits(source: Path, tmp_path: Path) -> None:
    override = (Override(match="down_proj", quant_type="int2"), Override(match="q_proj", quant_type="int8"))
    output = tmp_path / "out"
    run_conversion(source, output, **FAST, quant_type="int4", method="qalora", layout="mlx", override=override)
    settings = config_of(output)["quantization"]
    merged = run_merge(output, output / "qalora_init", tmp_path / "merged")
    assert config_of(merged)["quantization"] == settings
    dense = tensors_of(run_merge(output, output / "qalora_init", tmp_path / "dense", layout="dense", dtype="float32"))
    with BaseModel.open(merged) as base:
        assert {spec.spec.bits for spec in base.quantized.values()} == {2, 4, 8}
        for name in base.quantized:
            # Offsets are moved in float32; a dense merge decodes the base to bfloat16 first, and these are up to 0.25.
            torch.testing.assert_close(base.matrix(name), dense[name], rtol=0, atol=2**-10)
    for layout, hint in (("metal", "several quant types"), ("compressed-tensors", "integer zero points")):
        with pytest.raises(UsageError, match=hint):
            run_merge(output, output / "qalora_init", tmp_path / "refused", layout=layout)
    with pytest.raises(UsageError, match="several quant types"):
        run_merge(output, output / "qalora_init", tmp_path / "refused", layout="compressed-tensors", round_zeros=True)


# Recipes, and what is refused before any number is read.


def test_a_mixed_recipe_reads_back_to_an_equal_one(tmp_path: Path) -> None:
    recipe = make_recipe(quant_type="int4", override=MIX)
    (tmp_path / "recipe.toml").write_text(recipe_toml(recipe))
    assert resolve_recipe(str(tmp_path / "recipe.toml"), {}) == recipe


@pytest.mark.parametrize(
    ("layout", "override", "symmetric"),
    [
        ("compressed-tensors", MIX, True),
        ("compressed-tensors", (Override(match="q_proj", rank=2),), False),
        ("mlx", MIX, False),
        ("dense", MIX, False),
    ],
)
def test_integers_are_symmetric_by_default_where_loaders_mix_no_others(
    layout: str, override: tuple[Override, ...], symmetric: bool
) -> None:
    assert make_recipe(quant_type="int4", layout=layout, override=override).quant.symmetric is symmetric


def test_a_flag_of_the_other_kind_of_format_takes_the_formats_of_overrides_along(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_toml(make_recipe(quant_type="int4", symmetric=True, override=MIX)))
    recipe = resolve_recipe(str(tmp_path / "recipe.toml"), {"quant_type": "nf4"})
    assert [(override.quant_type, override.group_size, override.rank) for override in recipe.override] == [
        (None, None, None),
        (None, None, None),
        (None, None, 2),
    ]
    same = resolve_recipe(str(tmp_path / "recipe.toml"), {"quant_type": "int3"})
    assert same.override == MIX


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ({}, {"quant_type": "int5"}, "quant_type 'int5' does not exist"),
        ({}, {"quant_type": "nf4"}, "quant_type nf4 in a model of int4"),
        ({"quant_type": "nf4"}, {"quant_type": "int4"}, "quant_type int4 in a model of nf4"),
        ({"quant_type": "nf4"}, {"group_size": 64}, "group_size 64 does not exist for nf4"),
        ({}, {"group_size": 48}, "group_size 48 does not exist for int4"),
        ({}, {"block_size": 64}, "block_size 64 does not exist for int4"),
        ({"layout": "mlx"}, {"group_size": 256}, "layout mlx does not hold groups of 256, which an override asks for"),
        ({"layout": "metal"}, {"quant_type": "int3"}, "layout metal does not hold int3, which an override asks for"),
        ({"layout": "mlx", "method": "qalora"}, {"group_size": 32}, "method qalora pools inputs by one group size"),
    ],
)
def test_an_override_that_no_layer_can_have_is_refused(
    recipe: dict[str, Any], override: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        make_recipe(**{"quant_type": "int4", "override": (Override(match="q_proj", **override),), **recipe})


FIRST = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("recipe", "override", "tensor", "message"),
    [
        ({"layout": "gptq"}, MIX[1], FIRST, "layout gptq has one quant_type and group size for all layers"),
        ({"layout": "metal"}, MIX[1], FIRST, "layout metal has one quant_type and group size for all layers"),
        ({"symmetric": False}, MIX[1], FIRST, "mix formats without zero points only"),
        (
            {},
            Override(match="down_proj", group_size=128),
            "model.layers.0.mlp.down_proj.weight",
            "an override does not fit it: rows of 192 are not whole groups of 128",
        ),
    ],
)
def test_what_the_container_does_not_mix_is_refused_by_name(
    recipe: dict[str, Any], override: Override, tensor: str, message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(LoftqError, match=re.escape(message)) as caught:
        prepare_conversion(
            str(source), tmp_path / "out", make_recipe(quant_type="int4", override=(override,), **recipe)
        )
    assert caught.value.tensor == tensor
    assert caught.value.exit_code == 2
