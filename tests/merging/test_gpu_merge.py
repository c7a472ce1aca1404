"""`merge` and `inspect` on a GPU: what is written and said is what a processor writes and says, up to how sums round.
On a simulated GPU, unless there is a real one: see test_gpu_pipeline.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.conversions import Silent, run_conversion
from support.models import gpt2, llama
from test_gpu_pipeline import a_gpu

from loftq_cli.adapter.config import PREFIX
from loftq_cli.cli.main import _run
from loftq_cli.errors import InputError, LoftqError, UsageError
from loftq_cli.inspecting.converted import Inspection, inspect_converted
from loftq_cli.inspecting.dense import TensorRow, inspect_checkpoint
from loftq_cli.merging.form import MergeOptions
from loftq_cli.merging.plan import prepare_merge
from loftq_cli.merging.report import MergedLayer, MergeOutcome
from loftq_cli.merging.run import merge_adapter
from loftq_cli.model.stored import BaseModel
from loftq_cli.runtime.gpu import Device, SharedDevice
from loftq_cli.triton_kernels.error_stats import contract as error_stats
from loftq_cli.triton_kernels.merging import contract as merging

pytest.importorskip("triton")

pytestmark = pytest.mark.interpreter

BASES: dict[str, dict[str, Any]] = {
    "nf4": {"iterations": 1},
    "nf4, plain constants": {"iterations": 1, "double_quant": False, "block_size": 32},
    "nf4, rank-stabilized": {"iterations": 1, "alpha": 9.0, "rslora": True},
    "int4": {"iterations": 1, "quant_type": "int4", "group_size": 32},
    "int8, gptq": {"method": "loftq", "iterations": 1, "quant_type": "int8", "group_size": 32, "layout": "gptq"},
    "qalora": {"method": "qalora", "iterations": 1, "quant_type": "int3", "group_size": 32},
    "dense": {"iterations": 1, "layout": "dense"},
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


class Converted:
    """A model, and its conversions, each made once."""

    def __init__(self, folder: Path, make: Callable[..., Path] = llama, **sizes: Any) -> None:
        self.folder, self.model = folder, make(folder / "model", **sizes)

    def __call__(self, recipe: str) -> Path:
        output = self.folder / recipe.replace(" ", "-")
        if not output.exists():
            run_conversion(self.model, output, rank=4, **BASES[recipe])
        return output


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """A Llama of one layer, linears of 32 to 96 features."""
    return Converted(tmp_path_factory.mktemp("llama"), hidden=64, layers=1)


class Stopping(Silent):
    """Interrupts a merge at its third layer."""

    merged = 0

    def layer_merged(self, layer: MergedLayer) -> None:
        self.merged += 1
        if self.merged == 3:
            raise KeyboardInterrupt


def small_gpt2(folder: Path) -> Path:
    """Without its second layer."""
    model = gpt2(folder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".h.1." in name]:
            del tensors[name]

    edit_tensors(model / "model.safetensors", change)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "n_layer": 1}))
    return model


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    """A model whose files hold [in, out], and one that shares its head with its embedding."""
    tied = Converted(tmp_path_factory.mktemp("tied"), hidden=64, layers=1, tied=True)
    return {"transposed": Converted(tmp_path_factory.mktemp("gpt2"), small_gpt2), "tied": tied}


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def adapter_of(base: Path) -> Path:
    return next(base.glob("*_init"))


def merged(base: Path, output: Path, device: str, observer: Silent | None = None, **options: Any) -> MergeOutcome:
    choices = MergeOptions(**options)
    prepared = prepare_merge(base, adapter_of(base), output, choices)
    outcome = merge_adapter(prepared, observer or Silent(), overwrite=False, restart=False, threads=2, device=device)
    return outcome


def both_ways(base: Path, folder: Path, **options: Any) -> tuple[MergeOutcome, MergeOutcome]:
    """The merge on a processor, in `folder`/cpu, and on a GPU, in `folder`/gpu."""
    cpu = merged(base, folder / "cpu", "cpu", **options)
    with a_gpu():
        return cpu, merged(base, folder / "gpu", "cuda", **options)


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(output.glob("*.safetensors")) for name, t in load_file(file).items()}


def steps_between(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many numbers of their 16-bit dtype two tensors are apart at most."""
    places = []
    for tensor in (one, other):
        bits = tensor.view(torch.int16).int()
        places.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    return int((places[0] - places[1]).abs().max())


def assert_equal_weights(folder: Path) -> None:
    expected, made = weights_of(folder / "cpu"), weights_of(folder / "gpu")
    assert {n: (t.dtype, t.shape) for n, t in made.items()} == {n: (t.dtype, t.shape) for n, t in expected.items()}
    for name, weight in expected.items():
        if weight.dim() != 2 or not weight.is_floating_point():
            assert torch.equal(made[name], weight), name
            continue
        if weight.dtype != torch.float32:
            assert steps_between(made[name], weight) <= 1, name
        assert float((made[name].double() - weight.double()).norm()) <= 1e-4 * float(weight.double().norm()), name


def assert_equal_reports(cpu: MergeOutcome, gpu: MergeOutcome, within: float = 1e-6) -> None:
    assert len(cpu.layers) == len(gpu.layers) > 0
    for expected, layer in zip(cpu.layers, gpu.layers, strict=True):
        assert (layer.name, layer.rank, layer.scaling) == (expected.name, expected.rank, expected.scaling)
        assert layer.squared_weight == pytest.approx(expected.squared_weight, rel=1e-6)
        assert layer.squared_delta == pytest.approx(expected.squared_delta, rel=1e-6)
        assert layer.retained == (None if expected.retained is None else pytest.approx(expected.retained, rel=within))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fused operations that were used, on tensors of which device."""
    used: list[str] = []

    def spied(module: Any, name: str) -> None:
        operation = getattr(module, name)

        def spy(first: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            used.append(f"{name} on {first.device.type}")
            return operation(first, *arguments, **options)

        monkeypatch.setattr(module, name, spy)

    for name in ("merge_codebook", "retention_sums"):
        spied(merging, name)
    for name in ("codebook_error_sums", "error_stats"):
        spied(error_stats, name)
    return used


class TestMerge:
    @pytest.mark.parametrize("recipe", BASES)
    def test_a_gpu_merges_as_a_processor_does(self, recipe, converted, tmp_path):
        cpu, gpu = both_ways(converted(recipe), tmp_path, layout="dense")
        assert_equal_weights(tmp_path)
        assert_equal_reports(cpu, gpu)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_every_dtype_can_be_merged_to(self, dtype, converted, tmp_path):
        cpu, gpu = both_ways(converted("nf4"), tmp_path, dtype=dtype)
        assert_equal_weights(tmp_path)
        assert_equal_reports(cpu, gpu)

    @pytest.mark.parametrize(("model", "recipe"), [("transposed", "nf4"), ("transposed", "dense"), ("tied", "nf4")])
    def test_files_that_hold_matrices_otherwise_are_merged_to_the_same(self, recipe, model, others, tmp_path):
        cpu, gpu = both_ways(others[model](recipe), tmp_path)
        assert_equal_weights(tmp_path)
        assert_equal_reports(cpu, gpu)

    @pytest.mark.parametrize("recipe", ["nf4", "int4", "dense"])
    @pytest.mark.parametrize("requantize", ["nf4", "int8"])
    def test_a_gpu_quantizes_again_as_a_processor_does(self, requantize, recipe, converted, tmp_path):
        options = {"requantize": requantize, "force": True, "group_size": 32 if requantize == "int8" else None}
        cpu, gpu = both_ways(converted(recipe), tmp_path, **options)
        assert_equal_reports(cpu, gpu, within=1e-3)  # a weight on the border of two codes may take the other
        models = [BaseModel.open(tmp_path / device) for device in ("cpu", "gpu")]
        assert len(models[0].quantized) == 7
        for name in models[0].quantized:
            expected, made = (model.matrix(name) for model in models)
            assert float((made != expected).double().mean()) <= 1e-3, name

    def test_a_qalora_adapter_goes_into_offsets_on_the_processor(self, converted, tmp_path):
        """And nobody says that a GPU was used."""

        class Noting(Silent):
            notes = ""

            def note(self, text: str) -> None:
                self.notes += text

        merged(converted("qalora"), tmp_path / "cpu", "cpu")
        with a_gpu():
            observer = Noting()
            merged(converted("qalora"), tmp_path / "gpu", "cuda", observer)
        assert "nothing here is for a GPU" in observer.notes and "computing on" not in observer.notes
        expected, made = weights_of(tmp_path / "cpu"), weights_of(tmp_path / "gpu")
        assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())

    def test_codes_become_weights_in_one_pass(self, converted, tmp_path, calls):
        base = converted("nf4")
        with a_gpu():
            merged(base, tmp_path / "out", "cuda")
        assert calls.count("merge_codebook on cuda") == 7
        assert "error_stats on cpu" not in calls

    def test_what_survives_is_summed_on_the_gpu(self, converted, tmp_path, calls):
        base = converted("nf4")
        with a_gpu():
            merged(base, tmp_path / "out", "cuda", requantize="int8", group_size=32, force=True)
        assert calls == ["retention_sums on cuda"] * 7

    def test_an_interrupted_merge_is_continued_on_a_gpu(self, converted, tmp_path, monkeypatch):
        base, output = converted("nf4"), tmp_path / "out"
        with a_gpu():
            merged(base, tmp_path / "expected", "cuda")
            with pytest.raises(KeyboardInterrupt):
                merged(base, output, "cuda", Stopping())
            merged(base, output, "cuda")
        expected, made = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("expected", "out"))
        assert made == expected

    @pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")])
    def test_an_interrupted_merge_is_not_continued_on_another_device(self, devices, converted, tmp_path):
        """Sums are taken in another order there: one result would be made of two."""
        base, output = converted("nf4"), tmp_path / "out"
        with a_gpu(), pytest.raises(KeyboardInterrupt):
            merged(base, output, devices[0], Stopping())
        with a_gpu(), pytest.raises(UsageError, match=r"another version or device .*--restart"):
            merged(base, output, devices[1])


class TestRefusals:
    """What a processor refuses, a GPU refuses in the same words."""

    def messages(self, base: Path, folder: Path, **options: Any) -> list[str]:
        found = []
        for device in ("cpu", "cuda"):
            with a_gpu(), pytest.raises(LoftqError) as refused:
                merged(base, folder / device, device, **options)
            assert not (folder / device).exists()
            found.append(str(refused.value))
        assert found[0] == found[1]
        return found

    def spoiled_adapter(self, converted: Converted, folder: Path, value: float) -> Path:
        base = Converted(folder / "model", hidden=64, layers=1)("nf4")

        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[f"{PREFIX}{Q_PROJ}.lora_B.weight"][3, 1] = value

        edit_tensors(adapter_of(base) / "adapter_model.safetensors", change)
        return base

    def test_an_adapter_that_is_not_finite(self, converted, tmp_path):
        base = self.spoiled_adapter(converted, tmp_path, float("nan"))
        message = self.messages(base, tmp_path)[0]
        assert re.search(rf"{re.escape(Q_PROJ)}\.lora_B\.weight: holds NaN or infinite values", message)

    @pytest.mark.parametrize("requantize", [None, "nf4"])
    def test_what_is_too_large_for_the_dtype_it_is_written_in(self, requantize, converted, tmp_path):
        base = self.spoiled_adapter(converted, tmp_path, 1e38)
        form = {"dtype": "float16"} if requantize is None else {"requantize": requantize}
        message = self.messages(base, tmp_path, **form)[0]
        assert Q_PROJ in message

    @pytest.mark.parametrize("recipe", ["nf4, plain constants", "dense"])
    def test_a_base_that_is_not_finite(self, recipe, tmp_path):
        base = Converted(tmp_path / "model", hidden=64, layers=1)(recipe)
        name = f"{Q_PROJ}.weight" + (".absmax" if "nf4" in recipe else "")

        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name].view(-1)[5] = float("inf")

        edit_tensors(base / "model.safetensors", change)
        message = self.messages(base, tmp_path, force=True)[0]
        assert f"{Q_PROJ}.weight: holds NaN or infinite values" in message


class TestMemory:
    def test_what_does_not_fit_is_merged_on_the_processor(self, converted, tmp_path):
        if torch.cuda.is_available():
            pytest.skip("memory is short on the simulated GPU only")
        merged(converted("nf4"), tmp_path / "cpu", "cpu")
        with a_gpu(100_000):
            merged(converted("nf4"), tmp_path / "gpu", "cuda")
            assert torch.cuda.max_memory_allocated() == 0
        expected, made = weights_of(tmp_path / "cpu"), weights_of(tmp_path / "gpu")
        assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())

    def test_what_does_not_fit_is_not_even_read(self):
        def read() -> torch.Tensor:
            raise AssertionError

        with a_gpu():
            gpu = SharedDevice(Device(torch.device("cuda", 0), max_nbytes=1_000))
            assert gpu.run(torch.neg, read, 1_001) is None
            assert torch.equal(gpu.run(torch.neg, lambda: torch.ones(3), 1_000), -torch.ones(3))

    @pytest.mark.parametrize("memory_nbytes", [1_500, 30_000])
    @pytest.mark.parametrize("options", [{}, {"requantize": "nf4", "force": True}], ids=["merged", "quantized again"])
    def test_memory_that_is_taken_by_others_is_done_without(
        self, options, memory_nbytes, converted, tmp_path, monkeypatch
    ):
        """The GPU says that more is free than a matrix then gets: none of them, or none but the small ones."""
        if torch.cuda.is_available():
            pytest.skip("memory is short on the simulated GPU only")
        cpu = merged(converted("nf4"), tmp_path / "cpu", "cpu", **options)
        with a_gpu(memory_nbytes):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 34, 1 << 34))
            gpu = merged(converted("nf4"), tmp_path / "gpu", "cuda", **options)
        assert_equal_weights(tmp_path)
        assert_equal_reports(cpu, gpu)

    def test_an_inspection_goes_on_without_it(self, converted, monkeypatch):
        if torch.cuda.is_available():
            pytest.skip("memory is short on the simulated GPU only")
        expected = inspected(converted("int4"), converted.model, "cpu")
        tried = tries(converted.model, "cpu")
        with a_gpu(1_500):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 34, 1 << 34))
            assert inspected(converted("int4"), converted.model, "cuda") == expected
            assert tries(converted.model, "cuda") == tried


def inspected(base: Path, against: Path, device: str) -> Inspection:
    with BaseModel.open(base) as model:
        return inspect_converted(model, against, 2, device)


def tries(model: Path, device: str) -> list[TensorRow]:
    with BaseModel.open(model) as base:
        return list(inspect_checkpoint(base, ["nf4", "int3"], 2, device))


def assert_equal_errors(found: Any, expected: Any) -> None:
    for field in ("squared_weight", "squared_base_error", "squared_error", "max_error", "squared_delta"):
        assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=1e-6), field


class TestInspect:
    def compare(self, base: Path, model: Path) -> None:
        cpu = inspected(base, model, "cpu")
        with a_gpu():
            gpu = inspected(base, model, "cuda")
        assert len(gpu.rows) == len(cpu.rows) > 0 and gpu.recomputed
        for row, expected in zip(gpu.rows, cpu.rows, strict=True):
            assert (row.name, row.spec, row.rank) == (expected.name, expected.spec, expected.rank)
            assert_equal_errors(row.error, expected.error)
            assert (row.groups is None) == (expected.groups is None)
            if row.groups is not None and expected.groups is not None:
                assert row.groups.groups == expected.groups.groups
                assert row.groups.mean_error == pytest.approx(expected.groups.mean_error, rel=1e-6)
                assert row.groups.max_error == pytest.approx(expected.groups.max_error, rel=1e-6)

    @pytest.mark.parametrize("recipe", BASES)
    def test_a_gpu_finds_the_errors_that_a_processor_finds(self, recipe, converted):
        self.compare(converted(recipe), converted.model)

    @pytest.mark.parametrize("model", ["transposed", "tied"])
    def test_files_that_hold_matrices_otherwise_have_the_same_errors(self, model, others):
        self.compare(others[model]("nf4"), others[model].model)

    def test_codes_are_compared_in_one_pass(self, converted, calls):
        base = converted("nf4")
        with a_gpu():
            inspected(base, converted.model, "cuda")
        assert calls == ["codebook_error_sums on cuda"] * 14  # of the base, and of plain rounding

    def test_what_is_tried_on_a_gpu_has_the_errors_of_a_processor(self, converted):
        cpu = tries(converted.model, "cpu")
        with a_gpu():
            gpu = tries(converted.model, "cuda")
        assert [row.name for row in gpu] == [row.name for row in cpu]
        assert sum(bool(row.errors) for row in gpu) > 0
        for row, expected in zip(gpu, cpu, strict=True):
            assert row.errors.keys() == expected.errors.keys()
            for quant_type, error in row.errors.items():
                assert_equal_errors(error, expected.errors[quant_type])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_every_dtype_of_an_original_is_taken(self, dtype, converted, tmp_path):
        model = llama(tmp_path / "model", hidden=64, layers=1)
        edit_tensors(
            model / "model.safetensors", lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()})
        )
        self.compare(converted("nf4"), model)

    def test_an_original_that_is_not_finite_is_refused_in_the_same_words(self, converted, tmp_path):
        model = llama(tmp_path / "model", hidden=64, layers=1)

        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[f"{Q_PROJ}.weight"][1, 1] = float("nan")

        edit_tensors(model / "model.safetensors", change)
        for look in (lambda device: inspected(converted("nf4"), model, device), lambda device: tries(model, device)):
            messages = []
            for device in ("cpu", "cuda"):
                with a_gpu(), pytest.raises(InputError, match=re.escape(f"{Q_PROJ}.weight: holds NaN")) as refused:
                    look(device)
                messages.append(str(refused.value))
            assert messages[0] == messages[1]


class TestChoosing:
    def test_auto_leaves_small_models_to_the_processor(self, converted, tmp_path, calls):
        base = converted("nf4")
        with a_gpu():
            merged(base, tmp_path / "out", "auto")
            inspected(base, converted.model, "auto")
        assert calls and not any("cuda" in call for call in calls)

    def test_a_gpu_that_is_not_there_is_a_usage_error(self, converted, tmp_path, capsys):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        base = converted("nf4")
        for command in (
            ("merge", base, adapter_of(base), tmp_path / "out"),
            ("inspect", base, "--against", converted.model),
            ("inspect", converted.model, "--try", "nf4"),
        ):
            assert self.run(*command, "--device", "cuda") == 2
            said = capsys.readouterr().err.strip().splitlines()
            assert said[-1].startswith("error: --device cuda cannot be used") and "Traceback" not in "".join(said)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("command", [("merge", "no-base", "no-adapter", "out"), ("inspect", "no-model")])
    def test_a_device_of_another_name_is_a_usage_error_before_anything_is_read(self, command, capsys):
        assert self.run(*command, "--device", "gpu") == 2
        assert "--device 'gpu' does not exist" in capsys.readouterr().err

    def test_what_computes_no_errors_takes_no_device(self, converted, capsys):
        assert self.run("inspect", converted.model, "--verify", "--device", "cuda") == 2
        assert "--verify computes no errors for --device" in capsys.readouterr().err

    def test_a_command_says_that_it_computes_on_a_gpu(self, converted, tmp_path, capsys):
        base = converted("nf4")
        with a_gpu():
            assert self.run("merge", base, adapter_of(base), tmp_path / "out", "--device", "cuda:0") == 0
        assert "note: computing on cuda:0 (" in capsys.readouterr().err

    def run(self, *arguments: object) -> int:
        return _run([str(argument) for argument in arguments])
