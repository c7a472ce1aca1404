"""`quantize --text`: the model reads the text while the model is converted, block by block. References are
`--calibration` with statistics of the same text, and transformers' own model with the written weights in place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import models
from support.conversions import Silent, StopAfter, converted_files, files_of, quick_recipe, run_conversion

from loftq_cli.activations.calibration import CalibrationOptions, prepare_calibration, run_calibration
from loftq_cli.activations.text_pass import TextBlock
from loftq_cli.adapter.source import open_adapter
from loftq_cli.allocation.candidates import Budget
from loftq_cli.conversion.block_by_block import WrittenLayers
from loftq_cli.conversion.prepare import prepare_conversion, prepare_within_target
from loftq_cli.errors import InputError, UsageError
from loftq_cli.model.stored import BaseModel

TEXT = "".join(f"Row {i} of the table has {i * i} squares, and {i % 7} of them are blue.\n" for i in range(200))
READING = {"tokens": 1024, "context": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.with_tokenizer(models.llama(tmp_path_factory.mktemp("text") / "llama", layers=3))


@pytest.fixture(scope="module")
def text(model: Path) -> str:
    path = model.parent / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def reading(source: str, **recipe: Any) -> dict[str, Any]:
    return {"text": (source,), **READING, "fit": "joint", "rank": 4, **recipe}


def weights_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def test_blocks_that_read_the_original_give_the_bytes_of_a_calibration(model, text, tmp_path):
    options = CalibrationOptions(**READING)
    run_calibration(prepare_calibration(model, [Path(text)], tmp_path / "stats", options), Silent())
    run_conversion(model, tmp_path / "two", calibration=str(tmp_path / "stats"), fit="joint", rank=4)
    run_conversion(model, tmp_path / "one", **reading(text, sequential=False))
    assert weights_of(files_of(tmp_path / "one")) == weights_of(files_of(tmp_path / "two"))


def loaded_with(model: Path, output: Path, count: int) -> Any:
    """The original in transformers, with base + adapter of the result in the first `count` blocks."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapter = load_file(output / "loftq_init" / "adapter_model.safetensors")
    with BaseModel.open(output) as base, torch.no_grad():
        for name in (name for name in base.tensors if "_proj" in name):
            if int(name.split(".")[2]) < count:
                module = f"base_model.model.{name.removesuffix('.weight')}"
                update = adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
                loaded.get_parameter(name).copy_(base.matrix(name) + update)
    return loaded


@pytest.mark.parametrize("layout", ["bitsandbytes", "dense"])
def test_a_block_reads_the_outputs_of_the_converted_blocks_before(model, text, tmp_path, monkeypatch, layout):
    measured: dict[str, torch.Tensor] = {}
    measure = TextBlock.measure
    monkeypatch.setattr(TextBlock, "measure", lambda block: measured.update(found := measure(block)) or found)
    run_conversion(model, tmp_path / "out", **reading(text, layout=layout))
    name = "model.layers.2.mlp.gate_proj.weight"
    data = TEXT.encode()
    starts = [number * (len(data) - 64) // 15 for number in range(16)]
    ids = torch.tensor([list(data[start : start + 64]) for start in starts])
    for count, is_same in ((2, True), (0, False)):
        loaded, inputs = loaded_with(model, tmp_path / "out", count), []
        hook = loaded.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, args, inputs=inputs: inputs.append(args[0].double().flatten(0, 1))
        )
        with torch.no_grad():
            loaded(ids)
        hook.remove()
        expected = inputs[0].T @ inputs[0] / len(inputs[0])
        difference = float((measured[name].double() - expected).norm() / expected.norm())
        assert (difference < 1e-5) == is_same, difference


def test_bytes_do_not_depend_on_the_number_of_threads(model, text, tmp_path):
    for threads in (1, 3):
        (tmp_path / str(threads)).mkdir()
    one, three = (converted_files(model, tmp_path / str(n), **reading(text), threads=n) for n in (1, 3))
    assert one == three


@pytest.mark.parametrize("layers", [1, 7, 12])
def test_a_run_continues_in_the_middle_of_the_model_with_the_same_bytes(model, text, tmp_path, monkeypatch, layers):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = converted_files(model, tmp_path / "whole", **reading(text))
    monkeypatch.chdir(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        run_conversion(model, Path("out"), observer=StopAfter(layers), **reading(text))
    measured = []
    measure = TextBlock.measure
    monkeypatch.setattr(TextBlock, "measure", lambda block: measured.append(block.name) or measure(block))
    outcome = run_conversion(model, Path("out"), **reading(text))
    assert outcome.resumed_layers == layers
    assert files_of(Path("out")) == whole
    assert measured == [f"model.layers.{block}" for block in range(layers // 7, 3)]  # a block has seven layers


CONTAINERS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4 without double quantization": {"double_quant": False},
    "dense": {"layout": "dense"},
    "int3": {"quant_type": "int3", "group_size": 32},
    "gptq": {"quant_type": "int4", "group_size": 32, "layout": "gptq"},
    "mlx": {"quant_type": "int2", "group_size": 32, "layout": "mlx"},
    "metal": {"quant_type": "int8", "group_size": 32, "layout": "metal"},
    "qalora": {"method": "qalora", "quant_type": "int4", "group_size": 32},
}


@pytest.mark.parametrize(
    ("case", "builder"), [*((case, "llama") for case in CONTAINERS), ("nf4", "gpt2"), ("dense", "gpt2")]
)
def test_what_a_block_leaves_through_is_what_loaders_read(tmp_path, monkeypatch, case, builder):
    model = models.with_tokenizer(models.BUILDERS[builder](tmp_path / "model"))
    (tmp_path / "text.txt").write_text(TEXT)
    seen: dict[str, torch.Tensor] = {}
    effective = WrittenLayers.effective

    def remember(layers: WrittenLayers, job: Any) -> torch.Tensor:
        seen[job.name] = effective(layers, job)
        return seen[job.name]

    monkeypatch.setattr(WrittenLayers, "effective", remember)
    outcome = run_conversion(model, tmp_path / "out", **reading(str(tmp_path / "text.txt"), **CONTAINERS[case]))
    assert len(seen) == len(outcome.layers) // 2  # nothing reads the outputs of the last block
    adapter = open_adapter(outcome.adapter)
    with BaseModel.open(tmp_path / "out") as base:
        for layer in outcome.layers:
            if layer.name in seen:
                pair = adapter.pair(layer.module, layer.shape)
                lora_A = pair.lora_A.double().repeat_interleave(pair.group_size, dim=1)
                expected = base.matrix(layer.name).double() + pair.scaling * pair.lora_B.double() @ lora_A
                torch.testing.assert_close(seen[layer.name].double(), expected, rtol=1e-5, atol=1e-6)


def test_random_tokens_and_the_own_text_of_a_model_serve_as_text(model, tmp_path):
    for name in ("random", "self"):
        outcome = run_conversion(model, tmp_path / name, **reading(name, tokens=256, context=32))
        assert all(layer.output_error is not None for layer in outcome.layers)
        read = json.loads((tmp_path / name / "loftq_report.json").read_text())["text"]
        assert (read["kind"], read["tokens"], read["windows"], read["files"]) == (name, 256, 8, [])


def test_layers_that_no_text_reaches_are_converted_and_named(tmp_path):
    model = models.with_tokenizer(models.qwen2_vl(tmp_path / "model"))
    (tmp_path / "text.txt").write_text(TEXT)
    outcome = run_conversion(model, tmp_path / "out", **reading(str(tmp_path / "text.txt")))
    read = [layer.output_error is not None for layer in outcome.layers]
    assert any(read) and not all(read)
    notes = json.loads((tmp_path / "out" / "loftq_report.json").read_text())["notes"]
    assert any(f"{read.count(False)} layers read no text" in note for note in notes), notes


def test_a_changed_text_or_tokenizer_is_another_conversion(model, text, tmp_path):
    def fingerprint(**recipe: Any) -> str:
        return prepare_conversion(str(model), tmp_path / "out", quick_recipe(**reading(text, **recipe))).fingerprint

    first, tokenizer = fingerprint(), model / "tokenizer_config.json"
    settings = tokenizer.read_text()
    assert fingerprint() == first
    assert fingerprint(context=32) != first and fingerprint(sequential=False) != first
    try:
        tokenizer.write_text(settings + "\n")
        assert fingerprint() != first
    finally:
        tokenizer.write_text(settings)
    other = tmp_path / "other.txt"
    other.write_text(TEXT + "more")
    assert fingerprint(text=(str(other),)) != first
    other.write_text(TEXT)
    assert fingerprint(text=(str(other),)) == first  # the name of the file does not count


def test_text_beside_statistics_or_a_bound_on_the_size_is_refused(model, text, tmp_path):
    with pytest.raises(UsageError, match="one of --calibration and --text"):
        quick_recipe(**reading(text), calibration="stats")
    with pytest.raises(UsageError, match="--calibration in place of --text"):
        budget = Budget(bits_per_weight=4.0)
        recipe = quick_recipe(**reading(text, quant_type="int4"))
        prepare_within_target(str(model), tmp_path / "out", recipe, budget, observe=lambda *_: None)
    with pytest.raises(UsageError, match="leave tokens out"):
        quick_recipe(tokens=100)
    with pytest.raises(UsageError, match="means nothing"):
        quick_recipe(method="pissa", text=("random",))


def test_a_weight_file_alone_reads_no_text(model, text, tmp_path):
    alone = tmp_path / "model.safetensors"
    alone.write_bytes((model / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"config\.json"):
        run_conversion(alone, tmp_path / "out", **reading(text))
    assert not (tmp_path / "out").exists()
