"""`quantize --calibration`: what errors do to the layers' outputs is what counts, for every method and format; and
what is written is read by stock loaders as ever.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import models
from support.conversions import Silent as Remembering
from support.conversions import StopAfter, run_conversion
from support.loading import load, matrix, matrix_of_lora

from loftq_cli.activations.calibration import CalibrationOptions, prepare_calibration, run_calibration
from loftq_cli.allocation.candidates import Budget
from loftq_cli.checkpoint.safetensors_file import SafetensorsFile
from loftq_cli.checkpoint.statistics import open_statistics
from loftq_cli.conversion.prepare import prepare_conversion, prepare_within_target
from loftq_cli.errors import InputError, LoftqError, MismatchError, StorageError, UsageError
from loftq_cli.model.stored import BaseModel
from loftq_cli.planning.settle import make_recipe

TEXT = "".join(f"Row {i} of the table has {i * i} squares, and {i % 7} of them are blue.\n" for i in range(200))


class Silent:
    def calibration_started(self, inputs: int, windows: int, context: int, *, lines: bool, nbytes: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def block_calibrated(self, block: str, inputs: int) -> None:
        pass


def calibrated(model: Path, directory: Path, **options: Any) -> Path:
    text = directory / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    given = CalibrationOptions(tokens=1024, context=64, **options)
    run_calibration(prepare_calibration(model, [text], directory / "STATS", given), Silent())
    return directory / "STATS"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.with_tokenizer(models.llama(tmp_path_factory.mktemp("calibrated") / "llama"))


@pytest.fixture(scope="module")
def statistics(model: Path) -> Path:
    return calibrated(model, model.parent)


FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4"},
    "int4": {"quant_type": "int4", "group_size": 32},
    "int2": {"quant_type": "int2", "group_size": 32},
    "int4 for mlx": {"quant_type": "int4", "group_size": 32, "layout": "mlx"},
    "int8 for gptq": {"quant_type": "int8", "group_size": 32, "layout": "gptq"},
}


def lost_outputs(model: Path, output: Path, adapter: Path, statistics: Path, name: str) -> float:
    """√(tr(E·H·Eᵀ) / tr(W·H·Wᵀ)) of what the files hold, in float64."""
    weight = load_file(model / "model.safetensors")[name].double()
    h = open_statistics(statistics).load(name).double()
    with BaseModel.open(output) as base:
        error = weight - base.matrix(name).double()
    factors = load_file(adapter / "adapter_model.safetensors")
    prefix = f"base_model.model.{name.removesuffix('.weight')}"
    lora_A, lora_B = (factors[f"{prefix}.lora_{side}.weight"].double() for side in "AB")
    error -= lora_B @ lora_A.repeat_interleave(error.shape[1] // lora_A.shape[1], dim=1)
    return float((((error @ h) * error).sum() / ((weight @ h) * weight).sum()).sqrt())


@pytest.mark.parametrize("method", ["loftq", "qlora", "qalora"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_method_and_format_loses_less_of_the_outputs(name, method, model, statistics, tmp_path):
    recipe = {**FORMATS[name], "method": method, "rank": 4}
    if method == "qalora":
        if name == "nf4":
            pytest.skip("integers only")
        recipe["pooling"] = "paper"
    tensor, lost = "model.layers.0.mlp.down_proj.weight", {}
    for label, given in (("plain", {}), ("calibrated", {"calibration": str(statistics)})):
        fit = {} if method == "qlora" else {"fit": "joint"}
        outcome = run_conversion(model, tmp_path / label, **recipe, **fit, **given)
        lost[label] = lost_outputs(model, outcome.output, outcome.adapter, statistics, tensor)
        reported = {layer.name: layer.output_error for layer in outcome.layers}[tensor]
        assert reported == (pytest.approx(lost[label], rel=1e-3) if given else None)
    # Random weights and little text: real models gain far more.
    assert lost["calibrated"] < 0.9 * lost["plain"]


@pytest.mark.parametrize("name", ["nf4", "int4", "int2"])
def test_stock_loaders_compute_with_the_weights_that_were_fitted(name, model, statistics, tmp_path):
    recipe = {**FORMATS[name], "rank": 4, "calibration": str(statistics)}
    outcome = run_conversion(model, tmp_path / "out", **recipe)
    loaded = load(outcome, "AutoModelForCausalLM")
    files = load_file(outcome.adapter / "adapter_model.safetensors")
    with BaseModel.open(outcome.output) as base:
        for layer in outcome.layers:
            module = loaded.modules[layer.module]
            assert torch.equal(matrix(module.base_layer).float(), base.matrix(layer.name).float())
            lora_A, lora_B = (files[f"base_model.model.{layer.module}.lora_{s}.weight"].double() for s in "AB")
            assert torch.equal(matrix_of_lora(module), layer.scaling * (lora_B @ lora_A))


def test_the_diagonal_alone_does_too(model, tmp_path):
    directory = tmp_path / "diagonal"
    directory.mkdir()
    outcome = run_conversion(
        model, tmp_path / "out", rank=4, calibration=str(calibrated(model, directory, diagonal=True))
    )
    assert all(layer.output_error is not None and 0 < layer.output_error < 0.2 for layer in outcome.layers)
    report = json.loads((outcome.output / "loftq_report.json").read_text())
    assert 0 < report["totals"]["output_error"] < 0.2


def test_statistics_of_another_model_are_refused_before_anything_is_written(statistics, tmp_path):
    other = models.gpt2(tmp_path / "gpt2")
    with pytest.raises(MismatchError, match="has no statistics there") as caught:
        prepare_conversion(str(other), tmp_path / "out", make_recipe(calibration=str(statistics)))
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_so_are_those_of_a_model_of_another_width_before_formats_are_chosen(statistics, tmp_path):
    other = models.llama(tmp_path / "narrow", hidden=64)
    recipe = make_recipe(quant_type="int4", group_size=32, layout="mlx", calibration=str(statistics))
    told: list[str] = []
    with pytest.raises(MismatchError, match="has 96 inputs, and statistics of 192"):
        prepare_within_target(
            str(other),
            tmp_path / "out",
            recipe,
            Budget(bits_per_weight=4.5),
            observe=lambda name, done, of: told.append(name),
        )
    assert not told


def test_layers_that_text_does_not_reach_are_said_and_converted(model, statistics, tmp_path):
    values = json.loads((statistics / "calibration.json").read_text())
    gone = "model.layers.1.mlp.up_proj.weight"
    del values["inputs"][gone]
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    (fewer / "calibration.json").write_text(json.dumps(values))
    (fewer / "statistics.safetensors").write_bytes((statistics / "statistics.safetensors").read_bytes())
    prepared = prepare_conversion(str(model), tmp_path / "out", make_recipe(calibration=str(fewer), rank=4))
    assert "1 layers have no statistics, and all of their weights count the same" in prepared.plan.notes
    outcome = run_conversion(model, tmp_path / "out", rank=4, calibration=str(fewer))
    assert [layer.name for layer in outcome.layers if layer.output_error is None] == [gone]


def test_where_the_statistics_lie_changes_nothing_and_what_they_say_does(model, statistics, tmp_path):
    moved = tmp_path / "moved"
    statistics_files = {path.name: path.read_bytes() for path in statistics.iterdir()}
    moved.mkdir()
    for name, data in statistics_files.items():
        (moved / name).write_bytes(data)
    first, second = (
        prepare_conversion(str(model), tmp_path / "out", make_recipe(calibration=str(path)))
        for path in (statistics, moved)
    )
    assert first.fingerprint == second.fingerprint
    values = json.loads((moved / "calibration.json").read_text())
    (moved / "calibration.json").write_text(json.dumps({**values, "tokens": 7}))
    third = prepare_conversion(str(model), tmp_path / "out", make_recipe(calibration=str(moved)))
    assert third.fingerprint != first.fingerprint


def test_a_run_is_not_continued_with_numbers_that_replaced_the_ones_of_its_beginning(model, statistics, tmp_path):
    """The recorded sha256 stays, as after a copy that went wrong: no run takes the numbers."""
    moved, output = tmp_path / "moved", tmp_path / "out"
    shutil.copytree(statistics, moved)
    recipe = {"method": "loftq", "rank": 4, "iterations": 1, "calibration": str(moved)}
    with pytest.raises(KeyboardInterrupt):
        run_conversion(model, output, observer=StopAfter(2), **recipe)
    numbers = moved / "statistics.safetensors"
    right = numbers.read_bytes()
    numbers.write_bytes(right[:-4096] + bytes(4096))
    for place in (output, tmp_path / "another"):
        with pytest.raises(InputError, match=r"statistics.safetensors: does not hold the numbers of calibration.json"):
            run_conversion(model, place, **recipe)
    numbers.write_bytes(right)
    observer = Remembering()
    run_conversion(model, output, observer=observer, **recipe)
    assert [resumed for _, resumed in observer.done].count(True) == 2


def test_a_run_is_not_continued_with_other_statistics(model, statistics, tmp_path):
    recipe = {"method": "loftq", "rank": 4, "iterations": 1}
    with pytest.raises(KeyboardInterrupt):
        run_conversion(model, tmp_path / "out", observer=StopAfter(2), calibration=str(statistics), **recipe)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UsageError, match="unfinished run"):
        run_conversion(model, tmp_path / "out", calibration=str(calibrated(model, other, diagonal=True)), **recipe)


def test_statistics_replaced_during_a_run_are_refused_before_the_result_is_published(model, statistics, tmp_path):
    """The last layer is done and every statistic read: the numbers are under watch until the end."""
    moved = tmp_path / "moved"
    shutil.copytree(statistics, moved)

    class Replacing(Remembering):
        def phase(self, text: str) -> None:
            if text == "publishing":
                (moved / "statistics.safetensors").touch()

    with pytest.raises(StorageError, match=r"statistics.safetensors: changed while it was being read"):
        run_conversion(model, tmp_path / "out", observer=Replacing(), rank=4, iterations=1, calibration=str(moved))
    assert not (tmp_path / "out").exists()


def test_statistics_are_hashed_once_even_under_a_target(model, statistics, tmp_path, monkeypatch):
    hashed: list[Path] = []
    real = SafetensorsFile.file_sha256

    def counted(file: SafetensorsFile) -> str:
        hashed.append(file.path)
        return real(file)

    monkeypatch.setattr(SafetensorsFile, "file_sha256", counted)
    recipe = make_recipe(quant_type="int4", group_size=32, layout="mlx", fit="loftq", calibration=str(statistics))
    bound = Budget(bits_per_weight=5.0)
    prepare_within_target(str(model), tmp_path / "out", recipe, bound, observe=lambda name, done, of: None)
    assert hashed == [statistics / "statistics.safetensors"]


def test_a_calibration_that_is_none_is_named(model, tmp_path):
    with pytest.raises(LoftqError, match="STATS"):
        prepare_conversion(str(model), tmp_path / "out", make_recipe(calibration=str(tmp_path / "STATS")))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"method": "qlora", "fit": "joint"}, "fit means nothing with method qlora"),
        ({"method": "qlora", "start": "zero"}, "start means nothing with method qlora"),
        ({"method": "qlora", "rounds": 2}, "rounds means nothing with method qlora without calibration"),
        ({"fit": "loftq", "rounds": 2}, "rounds means nothing with fit loftq"),
        ({"method": "qalora", "quant_type": "int4", "init": "standard", "fit": "joint"}, "fit means nothing"),
        ({"fit": "best"}, r"fit 'best' does not exist \(one of loftq, joint\)"),
        ({"start": "one"}, r"start 'one' does not exist \(one of zero, principal\)"),
        ({"scales": "mse"}, r"scales 'mse' does not exist \(one of absmax, search\)"),
        ({"rounds": -1}, "rounds must be at least 0"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(recipe, message):
    with pytest.raises(UsageError, match=message):
        make_recipe(**recipe)
