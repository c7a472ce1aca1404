"""Conversions on a GPU: what is written is what a processor writes, up to the last digits of an adapter; the GPU is not
waited for, its memory is kept to, and nothing is lost where that is not enough. On a simulated GPU, whose streams,
copies and races are checked, unless there is a real one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.conversions import Silent, StopAfter, files_of, loftq, quick_recipe, run_conversion
from support.models import gpt2, llama, mixtral
from support.simulated_gpu import SimulatedGpu, simulated_gpu

from loftq_cli.conversion.gpu_jobs import DeviceRunner
from loftq_cli.conversion.prepare import is_conversion_done, prepare_conversion
from loftq_cli.errors import InputError, MemoryShortage, UsageError
from loftq_cli.planning.jobs import LayerJob
from loftq_cli.runtime.gpu import Device, open_device
from loftq_cli.runtime.schedule import StackSteps, in_stacks

pytest.importorskip("triton")

pytestmark = pytest.mark.interpreter

# What goes through the stacks, and what goes one by one: another method, number format, solver or dtype.
STACKED = {
    "qlora": {"method": "qlora"},
    "qlora, plain constants": {"method": "qlora", "double_quant": False},
    "qlora, fp4": {"method": "qlora", "quant_type": "fp4"},
    "loftq": {"method": "loftq", "iterations": 3},
    "loftq, plain constants": {"method": "loftq", "iterations": 2, "double_quant": False, "block_size": 32},
}
ALONE = {
    "loftq, exact": {"method": "loftq", "iterations": 2, "svd": "exact"},
    "loftq, faithful": {"method": "loftq", "iterations": 2, "svd": "faithful"},
    "loftq, base kept": {"method": "loftq", "iterations": 2, "keep_base": 0.5},
    "loftq in bfloat16": {"method": "loftq", "iterations": 2, "adapter_dtype": "bfloat16"},
    "loftq on integers": {"method": "loftq", "iterations": 2, "quant_type": "int4", "group_size": 32},
    "qalora": {"method": "qalora", "iterations": 2, "quant_type": "int3", "group_size": 32},
    "qlora, searched ranges": {
        "method": "qlora",
        "quant_type": "int2",
        "group_size": 32,
        "scales": "search",
        "include": ("q_proj", "down_proj"),  # a search is slow where kernels are interpreted
    },
    "loftq, joint fit": {"method": "loftq", "fit": "joint", "iterations": 3, "include": ("q_proj", "down_proj")},
    "loftq, joint fit of integers": {
        "method": "loftq",
        "quant_type": "int3",
        "group_size": 32,
        "fit": "joint",
        "iterations": 2,
        "rounds": 1,
        "include": ("q_proj",),
    },
    "qlora, gptq": {"method": "qlora", "quant_type": "int4", "group_size": 32, "layout": "gptq"},
    "qlora, dense": {"method": "qlora", "layout": "dense"},
}


@contextmanager
def a_gpu(memory_nbytes: int = 1 << 34) -> Iterator[SimulatedGpu | None]:
    if torch.cuda.is_available():
        yield None
    else:
        with simulated_gpu(memory_nbytes) as gpu:
            yield gpu


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Llama of one layer, with linears of 32 to 96 features: some are stacked, some are too narrow for it, and the
    rows of some are no whole blocks.
    """
    return llama(tmp_path / "model", hidden=64, layers=1)


def on_gpu(model: Path, output: Path, **options: Any) -> Any:
    return run_conversion(model, output, device="cuda", threads=2, **options)


def on_cpu(model: Path, output: Path, **options: Any) -> Any:
    return run_conversion(model, output, **options)


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the base."""
    return {name: t for file in sorted(output.glob("*.safetensors")) for name, t in load_file(file).items()}


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(next(output.glob("*_init/adapter_model.safetensors")))


def products_of(output: Path) -> dict[str, torch.Tensor]:
    """lora_B @ lora_A of each module."""
    tensors = adapter_of(output)
    stems = {name.partition(".lora_")[0] for name in tensors}
    return {s: tensors[f"{s}.lora_B.weight"].float() @ tensors[f"{s}.lora_A.weight"].float() for s in stems}


@pytest.mark.parametrize("recipe", [*STACKED.values(), *ALONE.values()], ids=[*STACKED, *ALONE])
def test_a_gpu_makes_what_a_processor_makes(recipe, model, tmp_path):
    cpu = on_cpu(model, tmp_path / "cpu", rank=4, **recipe)
    with a_gpu():
        gpu = on_gpu(model, tmp_path / "gpu", rank=4, **recipe)
    assert gpu.verified
    assert gpu.total.error == pytest.approx(cpu.total.error, rel=1e-3)
    rel = 1e-4 if "scales" in recipe or recipe.get("fit") == "joint" else 1e-5
    assert gpu.plain_error == pytest.approx(cpu.plain_error, rel=rel)
    expected, made = weights_of(tmp_path / "cpu"), weights_of(tmp_path / "gpu")
    assert {name: (t.dtype, t.shape) for name, t in made.items()} == {
        name: (t.dtype, t.shape) for name, t in expected.items()
    }
    # Sums that a search decides by are taken in another order, and two constants may be as good.
    if (
        recipe["method"] == "qlora" and "scales" not in recipe
    ):  # codes are decided by the same arithmetic; an offset may have another last digit
        for name, tensor in made.items():
            if tensor.dtype == torch.uint8 and "quant_state" in name:
                continue
            if tensor.is_floating_point():
                assert torch.allclose(tensor.float(), expected[name].float(), rtol=1e-6), name
            else:
                assert torch.equal(tensor, expected[name]), name
        assert all(torch.equal(t, adapter_of(tmp_path / "cpu")[n]) for n, t in adapter_of(tmp_path / "gpu").items())


@pytest.mark.parametrize("recipe", [STACKED["loftq"], ALONE["qalora"]], ids=["together", "alone"])
def test_what_is_reported_of_a_gpu_is_what_lies_in_its_files(recipe, model, tmp_path):
    """`inspect` takes the errors from the files, on the processor."""
    with a_gpu():
        on_gpu(model, tmp_path / "out", rank=4, **recipe)
    run = loftq("inspect", tmp_path / "out", "--against", model, "--json")
    assert run.returncode == 0, run.stderr
    found = {layer["name"]: layer["error"] for layer in json.loads(run.stdout)["layers"]}
    reported = json.loads((tmp_path / "out/loftq_report.json").read_text())["layers"]
    assert len(reported) == len(found) == 7
    for layer in reported:
        for key in ("error", "base_error", "max_error", "delta_norm"):
            assert found[layer["name"]][key] == pytest.approx(layer["error"][key], rel=1e-5), (layer["name"], key)


@pytest.mark.parametrize("recipe", [STACKED["loftq"], ALONE["qalora"]], ids=["together", "alone"])
def test_equal_runs_on_a_gpu_write_equal_bytes(recipe, model, tmp_path, monkeypatch):
    written = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with a_gpu():
            on_gpu(model, Path("out"), rank=4, **recipe)
        written.append(files_of(Path("out")))
    assert written[0] == written[1]


@pytest.mark.parametrize("recipe", [STACKED["qlora"], {**STACKED["loftq"], "iterations": 2}], ids=["qlora", "loftq"])
def test_the_gpu_is_not_waited_for_but_where_a_result_is_written(recipe, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("waits are counted on the simulated GPU")
    model = llama(tmp_path / "model", layers=1)
    with a_gpu() as gpu:
        on_gpu(model, tmp_path / "warm", method="qlora", rank=4)  # tables are copied once
        gpu.syncs.clear()
        on_gpu(model, tmp_path / "out", rank=4, **recipe)
        waits = {(sync.kind, sync.place.partition(":")[0]) for sync in gpu.syncs}
    assert waits == {("event.synchronize", "gpu.py")}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_of_a_checkpoint_is_taken(dtype, tmp_path):
    model = llama(tmp_path / "model", hidden=64, layers=1, dtype=torch.bfloat16 if dtype == torch.float64 else dtype)
    if dtype == torch.float64:
        file = model / "model.safetensors"
        save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    recipe = {"method": "loftq", "iterations": 2, "rank": 4}
    cpu = on_cpu(model, tmp_path / "cpu", **recipe)
    with a_gpu():
        gpu = on_gpu(model, tmp_path / "gpu", **recipe)
    assert gpu.total.error == pytest.approx(cpu.total.error, rel=1e-3)


def test_transposed_matrices_are_turned_on_the_gpu(tmp_path):
    model = gpt2(tmp_path / "model")
    recipe = {"method": "loftq", "iterations": 1, "rank": 2, "include": (r"h\.0\.",)}
    cpu = on_cpu(model, tmp_path / "cpu", **recipe)
    with a_gpu():
        gpu = on_gpu(model, tmp_path / "gpu", **recipe)
    assert gpu.total.error == pytest.approx(cpu.total.error, rel=1e-3)


def layers_in(jobs: Any) -> list[int]:
    return [i for i, job in enumerate(jobs) if isinstance(job, LayerJob)]


class TestStacks:
    """Which matrices are made together."""

    def stacks(self, model: Path, max_nbytes: int | None = None, **recipe: Any) -> tuple[Any, list[list[int]]]:
        plan = prepare_conversion(str(model), model.parent / "out", quick_recipe(**recipe)).plan
        with a_gpu():
            device = Device(torch.device("cuda", 0), max_nbytes)
            return plan.jobs, DeviceRunner(None, device).stacks(plan.jobs)

    def test_equal_matrices_are_made_together_wherever_they_stand(self, tmp_path):
        jobs, stacks = self.stacks(llama(tmp_path / "model"), method="loftq", rank=4)
        assert sorted(place for stack in stacks for place in stack) == layers_in(jobs)
        layers = [[jobs[i] for i in stack] for stack in stacks]
        assert {len(stack) for stack in layers} > {2}
        shapes = [{job.matrix.shape for job in stack} for stack in layers]
        assert all(len(shape) == 1 for shape in shapes)
        assert len({next(iter(shape)) for shape in shapes}) == len(shapes)  # one stack a shape

    @pytest.mark.parametrize("option", [{"svd": "exact"}, {"keep_base": 0.5}], ids=str)
    def test_what_has_to_be_made_alone_is_a_stack_of_one(self, model, option):
        jobs, stacks = self.stacks(model, method="loftq", rank=4, **option)
        assert stacks == [[i] for i in layers_in(jobs)]

    def test_a_stack_fits_its_share_of_the_memory(self, model):
        jobs, stacks = self.stacks(model, 3 * 8 * 64 * 64 * 2, method="qlora", rank=4)  # two of 64 x 64
        numels = [sum(jobs[i].numel for i in stack) for stack in stacks]
        assert max(numels) == 64 * 64 * 2

    def test_experts_are_stacked(self, tmp_path):
        jobs, stacks = self.stacks(mixtral(tmp_path / "model"), method="qlora", rank=2)
        assert sorted(place for stack in stacks for place in stack) == layers_in(jobs)


def test_experts_of_packed_integers_are_converted_on_the_device(tmp_path):
    source = mixtral(tmp_path / "model")
    recipe = {"method": "qlora", "quant_type": "int4", "symmetric": True, "rank": 2}
    cpu = on_cpu(source, tmp_path / "cpu", **recipe)
    with a_gpu():
        gpu = on_gpu(source, tmp_path / "gpu", **recipe)
    experts = [layer for layer in gpu.layers if layer.experts]
    assert len(experts) == 4
    assert gpu.total.error == pytest.approx(cpu.total.error, rel=1e-5)


class TestMemory:
    RECIPE = MappingProxyType({"method": "loftq", "iterations": 2, "rank": 4})

    def test_with_little_memory_the_result_is_the_same(self, model, tmp_path):
        """As little as makes each matrix go by itself, and as makes it pass a few rows at a time."""
        errors = []
        for i, max_memory in enumerate((None, 400_000, 1)):
            with a_gpu():
                outcome = on_gpu(model, tmp_path / str(i), max_memory=max_memory, **self.RECIPE)
            errors.append(outcome.total.error)
        assert errors[1:] == pytest.approx(errors[:1] * 2, rel=1e-3)

    @pytest.mark.parametrize("method", ["qlora", "loftq"])
    def test_memory_that_is_taken_by_others_is_done_without(self, method, model, tmp_path, monkeypatch):
        """The GPU says that more is free than a stack then gets."""
        if torch.cuda.is_available():
            pytest.skip("memory is short on the simulated GPU only")
        recipe = {**self.RECIPE, "method": method}
        cpu = on_cpu(model, tmp_path / "cpu", **recipe)
        for memory_nbytes in (600_000, 300_000):
            with a_gpu(memory_nbytes):
                monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 34, 1 << 34))
                gpu = on_gpu(model, tmp_path / f"{memory_nbytes}", **recipe)
            assert gpu.total.error == pytest.approx(cpu.total.error, rel=1e-3)

    def test_where_no_part_fits_the_tensor_is_named_and_nothing_is_published(self, model, tmp_path):
        if torch.cuda.is_available():
            pytest.skip("memory is short on the simulated GPU only")
        with a_gpu(5_000), pytest.raises(MemoryShortage, match=r"tensor model\.layers\.0\..*GPU.*--device cpu"):
            on_gpu(model, tmp_path / "out", **self.RECIPE)
        assert not (tmp_path / "out").exists()

    def test_few_stacks_are_in_memory_at_once(self, tmp_path):
        """With four times as many layers, the GPU holds no more."""
        if torch.cuda.is_available():
            pytest.skip("counted on the simulated GPU only")
        peaks = []
        for layers in (4, 12):
            model = llama(tmp_path / f"model{layers}", hidden=64, layers=layers)
            with a_gpu():
                torch.cuda.reset_peak_memory_stats()
                on_gpu(model, tmp_path / f"out{layers}", method="qlora", rank=2, max_memory=300_000)
                peaks.append(torch.cuda.max_memory_allocated())
        assert peaks[1] <= 1.25 * peaks[0]


class TestTrouble:
    def with_weight(self, model: Path, change: Callable[[torch.Tensor], None]) -> str:
        """The model with one weight changed; that weight's name."""
        file = model / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.0.mlp.up_proj.weight"
        change(tensors[name])
        save_file(tensors, file, {"format": "pt"})
        return name

    @pytest.mark.parametrize("recipe", [*STACKED.values(), ALONE["loftq on integers"]])
    def test_a_weight_that_is_not_finite_is_named(self, recipe, model, tmp_path):
        def spoil(weight: torch.Tensor) -> None:
            weight[3, 5] = float("nan")

        name = self.with_weight(model, spoil)
        with a_gpu(), pytest.raises(InputError, match=re.escape(f"tensor {name}: holds NaN")):
            on_gpu(model, tmp_path / "out", rank=4, **recipe)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("recipe", STACKED.values(), ids=STACKED)
    def test_rows_of_zeros_are_made_as_on_a_processor(self, recipe, model, tmp_path):
        def spoil(weight: torch.Tensor) -> None:
            weight[:7] = 0.0

        self.with_weight(model, spoil)
        cpu = on_cpu(model, tmp_path / "cpu", rank=4, **recipe)
        with a_gpu():
            gpu = on_gpu(model, tmp_path / "gpu", rank=4, **recipe)
        assert gpu.total.error == pytest.approx(cpu.total.error, rel=1e-3)

    def test_constants_that_double_quantization_ruins_are_refused_as_on_a_processor(self, model, tmp_path):
        def spoil(weight: torch.Tensor) -> None:
            weight[0, 0] = 1e6

        name = self.with_weight(model, spoil)
        messages = []
        for run in (on_cpu, on_gpu):
            with a_gpu(), pytest.raises(InputError, match=re.escape(name)) as refused:
                run(model, tmp_path / run.__name__, method="qlora", rank=4)
            messages.append(str(refused.value))
        assert messages[0] == messages[1]

    def test_an_interrupted_run_is_continued_on_a_gpu(self, model, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        recipe = {"method": "qlora", "rank": 4, "seed": 3}
        with a_gpu():
            on_gpu(model, Path("out"), **recipe)
        expected = files_of(Path("out"))
        (tmp_path / "again").mkdir()
        monkeypatch.chdir(tmp_path / "again")
        with a_gpu():
            with pytest.raises(KeyboardInterrupt):
                on_gpu(model, Path("out"), observer=StopAfter(5), **recipe)
            observer = Silent()
            outcome = on_gpu(model, Path("out"), observer=observer, **recipe)
        assert outcome.resumed_layers >= 5
        assert files_of(Path("out")) == expected

    def test_a_run_on_another_device_is_not_continued_but_a_finished_result_is_one(self, model, tmp_path):
        """Sums are taken in another order there: one result would be made of two."""
        out, recipe = tmp_path / "out", {"method": "qlora", "rank": 4}
        with pytest.raises(KeyboardInterrupt):
            on_cpu(model, out, observer=StopAfter(3), **recipe)
        with a_gpu(), pytest.raises(UsageError, match=r"another version or device .*--restart"):
            on_gpu(model, out, **recipe)
        with a_gpu():
            assert on_gpu(model, out, restart=True, **recipe).resumed_layers == 0
        assert is_conversion_done(prepare_conversion(str(model), out, quick_recipe(**recipe)), overwrite=False)

    def test_layers_are_told_of_in_the_order_of_the_plan(self, model, tmp_path):
        """Although equal ones are made together."""
        observers = [Silent(), Silent()]
        on_cpu(model, tmp_path / "cpu", observer=observers[0], method="qlora", rank=4)
        with a_gpu():
            on_gpu(model, tmp_path / "gpu", observer=observers[1], method="qlora", rank=4)
        names = [[result.name for result, _ in observer.done] for observer in observers]
        assert names[0] == names[1]


class TestChoosing:
    def test_the_processor_is_taken_where_no_gpu_is(self):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        assert open_device("auto", 1 << 40) is None
        assert open_device("cpu", 1 << 40) is None

    def test_a_gpu_is_taken_where_the_work_is_worth_starting_it(self):
        with a_gpu():
            assert open_device("auto", 1 << 20) is None
            assert str(open_device("auto", 1 << 40)).startswith("cuda:0")
            assert str(open_device("cuda", 1)).startswith("cuda:0")
            assert open_device("cpu", 1 << 40) is None

    def test_a_gpu_that_is_not_there_is_refused(self):
        if not torch.cuda.is_available():
            with pytest.raises(UsageError, match=r"--device cuda cannot be used: .*--device cpu"):
                open_device("cuda", 1)
        with a_gpu(), pytest.raises(UsageError, match=r"--device cuda:100 is not there"):
            open_device("cuda:100", 1)

    @pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "mps", "CPU", ""])
    def test_a_device_of_another_name_is_a_usage_error_before_anything_is_read(self, name, tmp_path):
        run = loftq("quantize", "builtin:tiny-llama", tmp_path / "out", "--device", name)
        assert run.returncode == 2
        assert "Traceback" not in run.stderr and "--device" in run.stderr
        assert not (tmp_path / "out").exists()

    def test_a_command_says_that_it_cannot_use_a_gpu_that_is_not_there(self, tmp_path):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        run = loftq("quantize", "builtin:tiny-llama", tmp_path / "out", "--device", "cuda", "--rank", "2")
        assert run.returncode == 2
        assert run.stderr.strip().splitlines()[-1].startswith("error: --device cuda cannot be used")
        assert not (tmp_path / "out").exists()

    def test_the_size_of_its_memory_is_checked_like_other_sizes(self, tmp_path):
        run = loftq("quantize", "builtin:tiny-llama", tmp_path / "out", "--max-memory", "lots")
        assert run.returncode == 2 and "is not a size" in run.stderr


class TestSchedule:
    """`in_stacks`, with numbers for jobs."""

    def test_results_come_stack_by_stack_whatever_finishes_first(self):
        steps = StackSteps(
            load=lambda job: job * 10,
            compute=lambda jobs, found: [value + 1 for value in found],
            write=lambda job, found, made, place: (job, found, made, place),
        )
        results = list(in_stacks([[3, 1], [2], [], [4, 5, 6]], steps, lambda job: 1, threads=3))
        assert results == [
            (3, 30, 31, 0),
            (1, 10, 11, 1),
            (2, 20, 21, 0),
            (4, 40, 41, 0),
            (5, 50, 51, 1),
            (6, 60, 61, 2),
        ]

    @pytest.mark.parametrize(("numel", "ahead"), [(1, 4), (1 << 27, 4), (1 << 30, 3)])
    def test_few_stacks_are_read_ahead(self, numel, ahead):
        """Twice as many small ones as there are threads; two beside the one that computes, however large they are."""
        loaded: list[int] = []
        open_stacks = 0

        def compute(jobs: list[int], found: list[int]) -> list[int]:
            nonlocal open_stacks
            open_stacks = max(open_stacks, len(loaded) - jobs[0])
            return found

        def load(job: int) -> int:
            loaded.append(job)
            return job

        steps = StackSteps(load=load, compute=compute, write=lambda job, found, made, place: job)
        assert list(in_stacks([[i] for i in range(20)], steps, lambda job: numel, threads=2)) == list(range(20))
        assert open_stacks <= ahead

    def test_what_was_done_before_a_failure_counts(self):
        def compute(jobs: list[int], found: list[int]) -> list[int]:
            if jobs[0] == 3:
                raise InputError("no more")
            return found

        steps = StackSteps(load=lambda job: job, compute=compute, write=lambda job, found, made, place: job)
        done = []
        with pytest.raises(InputError):
            for result in in_stacks([[i] for i in range(10)], steps, lambda job: 1, threads=2):
                done.append(result)
        assert done == [0, 1, 2]
