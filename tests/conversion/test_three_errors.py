"""A conversion says three errors, each of a model that exists: plain rounding of the same format, the written base
alone, and base and adapter together. A base that is no model without its adapter is named, with a remedy.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from support.conversions import run_conversion

import loftq_cli as loftq
from loftq_cli.checkpoint.statistics import open_statistics
from loftq_cli.conversion.jobs import WHOLE_NUMEL
from loftq_cli.conversion.report import (
    WORST_BASE,
    WORST_PRINCIPAL_BASE,
    LayerResult,
    ModelErrors,
    base_note,
    read_report,
)
from loftq_cli.errors import NumericError
from loftq_cli.methods.method import METHODS
from loftq_cli.model.stored import BaseModel
from loftq_cli.planning.settle import make_recipe
from loftq_cli.quant.plain import round_plainly
from loftq_cli.tensors.metrics import LayerError
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec

functional = pytest.importorskip("bitsandbytes.functional")

PRINCIPAL = {"fit": "joint", "start": "principal"}
# Name -> options of a conversion to NF4.
NF4: dict[str, dict[str, Any]] = {
    "principal": PRINCIPAL,
    "the paper's fit": {"fit": "loftq"},
    "a base that counts": {"fit": "joint", "keep_base": 0.25},
    "QLoRA": {"method": "qlora"},
    "QLoRA, searched": {"method": "qlora", "scales": "search"},
    "QPiSSA": {"method": "pissa"},
    "statistics": {"fit": "joint", "calibrated": True},
    "statistics, QLoRA": {"method": "qlora", "calibrated": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.with_tokenizer(models.llama(tmp_path_factory.mktemp("errors") / "llama"))


@pytest.fixture(scope="module")
def statistics(model: Path) -> Path:
    text = model.parent / "text.txt"
    text.write_text("".join(f"Row {i} has {i * i} squares, {i % 7} of them blue.\n" for i in range(200)))
    loftq.calibrate(model, text, model.parent / "statistics", tokens=1024, context=64)
    return model.parent / "statistics"


def converted(model: Path, statistics: Path, output: Path, options: dict[str, Any]) -> Any:
    given = {"rank": 4, "iterations": 2, **options}
    if given.pop("calibrated", False):
        given["calibration"] = str(statistics)
    return run_conversion(model, output, **given)


def norm_of(matrix: torch.Tensor, h: torch.Tensor | None) -> torch.Tensor:
    """√tr(M·H·Mᵀ) in float64; the Frobenius norm without H."""
    if h is None:
        return matrix.norm()
    h = h.double()
    return ((matrix @ h) * matrix).sum().sqrt()


def three_errors(weight: torch.Tensor, outcome: Any, layer: LayerResult, h: torch.Tensor | None) -> list[float]:
    """The errors of bitsandbytes' own quantizer, of the written base, and of base and adapter, in float64."""
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    plain = functional.dequantize_4bit(codes, state).double()
    factors = load_file(outcome.adapter / "adapter_model.safetensors")
    lora_A, lora_B = (factors[f"base_model.model.{layer.module}.lora_{side}.weight"].double() for side in "AB")
    with BaseModel.open(outcome.output) as base:
        decoded = base.matrix(layer.name).double()
    matrices = (plain, decoded, decoded + layer.scaling * lora_B @ lora_A)
    return [float(norm_of(weight.double() - matrix, h) / norm_of(weight.double(), h)) for matrix in matrices]


@pytest.mark.parametrize("name", NF4)
def test_the_three_errors_are_those_of_bitsandbytes_and_of_the_files(name, model, statistics, tmp_path):
    outcome = converted(model, statistics, tmp_path / "out", NF4[name])
    weights = load_file(model / "model.safetensors")
    assert len(outcome.layers) == 14
    for layer in outcome.layers:
        found = [layer.plain_error, layer.error.base_error, layer.error.error]
        assert found == pytest.approx(three_errors(weights[layer.name], outcome, layer, None), rel=1e-5)
        outputs = [layer.plain_output_error, layer.base_output_error, layer.output_error]
        if "calibrated" not in NF4[name]:
            assert outputs == [None, None, None]
            continue
        h = open_statistics(statistics).load(layer.name)
        assert outputs == pytest.approx(three_errors(weights[layer.name], outcome, layer, h), rel=1e-3)
    totals = json.loads((outcome.output / "loftq_report.json").read_text())["totals"]
    squares = [(layer.plain_error**2, float(weights[layer.name].double().norm() ** 2)) for layer in outcome.layers]
    total = (sum(square * size for square, size in squares) / sum(size for _, size in squares)) ** 0.5
    assert totals["plain_error"] == outcome.plain_error == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"quant_type": "int4", "group_size": 32},
        {"quant_type": "int2", "group_size": 32, "layout": "mlx"},
        {"quant_type": "int8", "group_size": 32, "layout": "gptq"},
        {"quant_type": "fp4", "double_quant": False},
        {"quant_type": "nf4", "layout": "dense"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_plain_rounding_is_the_base_of_qlora_in_every_format(options, model, tmp_path):
    plain = run_conversion(model, tmp_path / "plain", method="qlora", rank=4, **options)
    fitted = run_conversion(model, tmp_path / "fitted", rank=4, iterations=1, **PRINCIPAL, **options)
    for expected, found in zip(plain.layers, fitted.layers, strict=True):
        assert expected.plain_error == expected.error.base_error
        assert found.plain_error == pytest.approx(expected.error.base_error, rel=1e-6)


def test_a_pooled_adapter_has_the_three_errors_too(model, statistics, tmp_path):
    options = {"method": "qalora", "quant_type": "int4", "group_size": 32, "calibrated": True}
    outcome = converted(model, statistics, tmp_path / "out", options)
    layer = outcome.layers[0]
    weight = load_file(model / "model.safetensors")[layer.name].double()
    factors = load_file(outcome.adapter / "adapter_model.safetensors")
    lora_A, lora_B = (factors[f"base_model.model.{layer.module}.lora_{side}.weight"].double() for side in "AB")
    # PEFT's pooling: the mean of a group's inputs, times the number of groups.
    config = json.loads((outcome.adapter / "adapter_config.json").read_text())
    groups = weight.shape[1] // config["qalora_group_size"]
    delta = (lora_B @ lora_A).repeat_interleave(config["qalora_group_size"], dim=1) * layer.scaling
    delta *= groups / config["qalora_group_size"]
    with BaseModel.open(outcome.output) as base:
        error = weight - base.matrix(layer.name).double()
    h = open_statistics(statistics).load(layer.name)
    expected = [float(norm_of(e, h) / norm_of(weight, h)) for e in (error, error - delta)]
    assert [layer.base_output_error, layer.output_error] == pytest.approx(expected, rel=1e-3)
    assert layer.base_output_error < layer.plain_output_error


# Rows of 96 weights: blocks of 64 cross from one row to the next.
STREAMED = [CodebookSpec("nf4", 64), CodebookSpec("fp4", 128, double_quant=False), AffineSpec(4, 32, symmetric=False)]


@pytest.mark.parametrize("spec", STREAMED, ids=lambda spec: spec.quant_type)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_computed_again_are_the_codes_in_memory(spec, dtype):
    weight = TensorRows(torch.randn(75, 96, generator=torch.Generator().manual_seed(0)))
    held, again = (round_plainly(weight, spec, dtype, holds_codes=holds) for holds in (True, False))
    for part in (slice(0, 75), slice(0, 32), slice(64, 75)):
        assert torch.equal(held.rows(part), again.rows(part))


def test_a_layer_read_a_few_rows_at_a_time_has_its_plain_error(tmp_path):
    weight = torch.randn(1024, WHOLE_NUMEL // 1024 + 64, generator=torch.Generator().manual_seed(0))
    (tmp_path / "model").mkdir()
    save_file({"layers.0.fc.weight": weight}, tmp_path / "model" / "model.safetensors")
    outcome = run_conversion(tmp_path / "model", tmp_path / "out", method="qlora", scales="search", include=["fc"])
    layer = outcome.layers[0]
    found = [layer.plain_error, layer.error.base_error, layer.error.error]
    assert found == pytest.approx(three_errors(weight, outcome, layer, None), rel=1e-5)
    assert layer.plain_error > layer.error.base_error


def test_a_weight_that_plain_rounding_refuses_is_converted_without_the_number(model, statistics, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise NumericError("its scales are too large for float16")

    monkeypatch.setattr("loftq_cli.quant.plain.round_plainly", refuse)
    outcome = converted(model, statistics, tmp_path / "out", {**PRINCIPAL, "scales": "search", "calibrated": True})
    assert {(layer.plain_error, layer.plain_output_error) for layer in outcome.layers} == {(None, None)}
    assert all(layer.base_output_error and layer.output_error for layer in outcome.layers)
    card = (outcome.output / "README.md").read_text()
    assert "| weights | - | " in card
    assert outcome.plain_error is None


# A base that needs its adapter


def layer_with(plain: float | None, base: float, outputs: tuple[float, float] | None = None) -> LayerResult:
    """A layer with the given errors of plain rounding and of the base alone, of weights and of outputs."""
    plain_output, base_output = outputs or (None, None)
    return LayerResult(
        *("a.weight", "a", (64, 64), False, CodebookSpec("nf4", 64), 4.5, 4, 4.0, 1.0, (), 0),
        error=LayerError(1.0, base**2, 0.001, 0.1, 0.5),
        plain_error=plain,
        plain_output_error=plain_output,
        base_output_error=base_output,
        output_error=None if outputs is None else 0.01,
    )


ZERO, FIRST = make_recipe(start="zero"), make_recipe(start="principal")


@pytest.mark.parametrize(
    ("recipe", "layer", "needs"),
    [
        (ZERO, layer_with(0.08, 0.08 * WORST_BASE * 0.999), False),
        (ZERO, layer_with(0.08, 0.08 * WORST_BASE * 1.001), True),
        (make_recipe(method="pissa"), layer_with(0.5, 0.5 * WORST_PRINCIPAL_BASE * 1.001), True),
        (FIRST, layer_with(0.5, 0.5 * WORST_PRINCIPAL_BASE * 1.001), True),
        (FIRST, layer_with(0.5, 0.5 * WORST_PRINCIPAL_BASE * 0.999), False),
        # Outputs decide where they are known: a calibrated base is farther from the weights on purpose.
        (ZERO, layer_with(0.08, 0.3, (0.05, 0.05 * WORST_BASE * 0.999)), False),
        (ZERO, layer_with(0.08, 0.08, (0.05, 0.05 * WORST_BASE * 1.001)), True),
        (FIRST, layer_with(0.08, 0.3, (0.05, 0.05 * WORST_BASE * 0.999)), False),
        (FIRST, layer_with(0.08, 0.3, (0.05, 0.05 * WORST_BASE * 1.001)), True),
        (FIRST, layer_with(None, 0.9), False),
    ],
)
def test_a_base_far_worse_than_plain_rounding_needs_its_adapter(recipe, layer, needs):
    assert ModelErrors.of([layer]).base_needs_adapter(is_principal=recipe.is_principal) is needs
    assert (base_note(recipe, [layer]) is None) is not needs


def test_the_errors_of_a_model_are_those_of_one_long_vector_or_unknown():
    heavy, light, old = layer_with(0.3, 0.1), layer_with(0.1, 0.1), layer_with(None, 0.1)
    assert ModelErrors.of([heavy, light]).plain_error == pytest.approx((0.05) ** 0.5)
    assert ModelErrors.of([heavy, old]).plain_error is None
    known = ModelErrors.of([layer_with(0.1, 0.1, (0.3, 0.6)), layer_with(0.1, 0.1, (0.4, 0.8)), light])
    assert known.plain_output_error == pytest.approx((0.125) ** 0.5)  # over the two layers with statistics
    assert known.base_output_error == pytest.approx(0.5**0.5)
    assert ModelErrors.of([]).plain_error is None


@pytest.mark.parametrize(
    "options",
    [PRINCIPAL, {**PRINCIPAL, "keep_base": 0.5}, {"method": "pissa"}],
    ids=["principal", "principal with a share", "pissa"],
)
def test_the_note_names_a_remedy_that_works(options, run, tmp_path):
    typed = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = ["quantize", "builtin:tiny-llama", "out", "--iterations", 2, "--include", "layers.0.self_attn"]
    status, _, err = run(*command, *typed, "--quiet")
    assert status == 0
    note = err.strip()
    assert note.startswith("warning: this base is no model without its adapter: ")
    for use in ("Serving the base alone", "disable_adapter()", "a fresh LoRA", "lora_dropout"):
        assert use in note
    remedy = shlex.split(note.partition("Converted with ")[2].partition(", the base")[0])
    status, _, err = run(*command, *typed, *remedy, "--quiet", "--overwrite")
    assert (status, err) == (0, "")


def test_the_note_stands_in_json_report_and_at_the_head_of_both_cards(run, tmp_path):
    options = ("--include", "layers.0.self_attn", "--iterations", 1, "--start", "principal", "--json", "--quiet")
    status, out, err = run("quantize", "builtin:tiny-llama", "out", *options)
    values, report = json.loads(out), json.loads(Path("out/loftq_report.json").read_text())
    assert (status, err) == (0, f"warning: {report['notes'][-1]}\n")
    assert values["notes"] == report["notes"][-1:]
    assert values["plain_error"] < values["base_error"] > values["error"]
    for card in ("out/README.md", "out/loftq_init/README.md"):
        body = Path(card).read_text().split("---\n")[2].strip()
        assert body.startswith("**This base is no model without its adapter**: the error of the weights is 0.")


@pytest.mark.parametrize("options", [{"start": "zero"}, {"keep_base": 0.25}, {"method": "qlora"}, {"fit": "loftq"}])
def test_a_base_that_is_a_model_has_no_note(options, run, tmp_path):
    typed = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    status, out, err = run("quantize", "builtin:tiny-llama", "out", "--include", "layers.0", *typed, "--quiet")
    assert (status, err) == (0, "")
    assert Path("out/README.md").read_text().split("---\n")[2].strip().startswith("# ")
    words = out.splitlines()[2].split()
    assert (words[0], words[2:4], words[5:8], words[9:12]) == (
        "error",
        ["plain", "NF4,"],
        ["this", "base", "alone,"],
        ["base", "+", "adapter"],
    )


# README.md of the adapter


def cards(output: Path, method: str) -> tuple[str, dict[str, Any]]:
    folder = output / METHODS[method].adapter_dir
    return (folder / "README.md").read_text(), json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("options", "says", "says_not"),
    [
        (PRINCIPAL, ("**No new start.**", "are large", "swallows", "pass a reference"), ("Pooled",)),
        ({"fit": "loftq"}, ("**No new start.**", "small values cost little"), ("are large", "swallows")),
        ({"method": "qlora"}, ("B is zero", "adds nothing"), ("**No new start.**", "are large", "no model")),
        ({"method": "pissa"}, ("**No new start.**", "are large"), ("small values",)),
        (
            {"method": "qalora", "quant_type": "int4", "group_size": 32},
            ("**Pooled inputs.**", "group of 32 inputs", "save_adapter(model"),
            ("is_trainable=True` makes",),
        ),
        (
            {"method": "qalora", "quant_type": "int4", "group_size": 32, "layout": "gptq"},
            ("**Pooled inputs.**", "`use_qalora`", "is_trainable=True` makes"),
            ("load_adapted",),
        ),
    ],
    ids=["principal", "loftq", "qlora", "pissa", "qalora", "qalora gptq"],
)
def test_the_adapters_card_says_what_its_trainer_must_know(options, says, says_not, model, tmp_path):
    outcome = run_conversion(model, tmp_path / "my base", rank=4, alpha=6.0, iterations=1, **options)
    card, _ = cards(outcome.output, options.get("method", "loftq"))
    body = card.split("---\n")[2]
    assert "my base" not in card  # the card moves with the folder
    assert 'folder = ".."' in body and "loftq merge .. trained merged\n" in body
    assert "Rank 4, alpha 6: loaders multiply B·A by 1.5" in body
    for text in says:
        assert text in body
    for text in says_not:
        assert text not in body
    for block in body.split("```python\n")[1:]:
        compile(block.partition("```")[0], "card", "exec")
    checksums = json.loads((outcome.output / "checksums.json").read_text())
    assert f"{outcome.adapter.name}/README.md" in checksums["files"]


# Reports of old versions


def test_a_report_without_the_new_numbers_is_read_and_shown(run, model, tmp_path):
    outcome = run_conversion(model, tmp_path / "out", rank=4, iterations=1)
    path = outcome.output / "loftq_report.json"
    values = json.loads(path.read_text())
    for layer in values["layers"]:
        layer["quantization_error"] = layer.pop("plain_error")
    path.write_text(json.dumps(values))

    _, layers = read_report(outcome.output)
    assert {layer.plain_error for layer in layers} == {None}
    status, out, _ = run("inspect", outcome.output)
    assert (status, "plain" in out, "base error" in out) == (0, False, True)
    status, out, _ = run("inspect", outcome.output, "--json")
    shown = json.loads(out)
    assert "plain_error" not in shown["totals"]
    assert {row["plain_error"] for row in shown["layers"]} == {None}


# inspect


def test_inspect_shows_the_three_errors_of_weights_and_outputs(run, model, statistics, tmp_path):
    outcome = converted(model, statistics, tmp_path / "out", {"fit": "joint", "calibrated": True})
    errors = ModelErrors.of(outcome.layers)
    shown = json.loads(run("inspect", outcome.output, "--json", "--top", 3)[1])
    names = ("plain_error", "plain_output_error", "base_output_error", "output_error")
    assert {name: shown["totals"][name] for name in names} == {name: getattr(errors, name) for name in names}
    layers = {layer.name: layer for layer in outcome.layers}
    for row in shown["layers"]:
        assert [row[name] for name in names] == [getattr(layers[row["name"]], name) for name in names]
    _, out, _ = run("inspect", outcome.output, "--top", 3)
    heading = " ".join(out.splitlines()[0].split())
    assert " plain error base error error " in heading
    assert heading.endswith(" plain output base output output")
    assert f"plain error {errors.plain_error:.4f}, base error {errors.error.base_error:.4f}, " in out
    assert f"inputs: {errors.plain_output_error:.4f} plain, {errors.base_output_error:.4f} this base alone, " in out


@pytest.mark.parametrize("layout", ["bitsandbytes", "dense"])
def test_inspect_computes_the_error_of_plain_rounding_again(layout, run, model, tmp_path):
    outcome = run_conversion(model, tmp_path / "out", rank=4, iterations=1, layout=layout, **PRINCIPAL)
    shown = json.loads(run("inspect", outcome.output, "--against", model, "--json")[1])
    reported = {layer.name: layer.plain_error for layer in outcome.layers}
    assert {row["name"]: row["plain_error"] for row in shown["layers"]} == pytest.approx(reported, rel=1e-6)
    assert shown["totals"]["plain_error"] == pytest.approx(outcome.plain_error, rel=1e-6)
