"""How the work is divided changes nothing: not the number of threads, not whether a matrix is in memory or streamed,
not which kernels compute.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from support.adapters import edit_tensors
from support.conversions import Silent, StopAfter, files_of, run_conversion, run_merge

from loftq_cli.conversion import jobs as conversion_jobs
from loftq_cli.conversion.prepare import prepare_conversion
from loftq_cli.conversion.run import convert_checkpoint
from loftq_cli.errors import InputError
from loftq_cli.inspecting.converted import inspect_converted
from loftq_cli.inspecting.dense import inspect_checkpoint
from loftq_cli.merging import jobs as merging_jobs
from loftq_cli.model.stored import BaseModel
from loftq_cli.planning.settle import make_recipe
from loftq_cli.runtime import schedule
from loftq_cli.triton_kernels import backend

RECIPES: dict[str, dict[str, Any]] = {
    "loftq nf4": {"rank": 4, "fit": "loftq"},
    "loftq nf4, joint fit": {"rank": 4, "fit": "joint", "iterations": 3, "rounds": 1},
    "loftq nf4, exact": {"rank": 4, "svd": "exact", "fit": "loftq"},
    "loftq int3": {"rank": 4, "quant_type": "int3", "group_size": 32, "fit": "loftq"},
    "qlora nf4": {"method": "qlora"},
    "qlora nf4, single quant": {"method": "qlora", "double_quant": False},
    "qlora int4": {"method": "qlora", "quant_type": "int4", "group_size": 32},
    "qlora int4, metal": {"method": "qlora", "quant_type": "int4", "group_size": 32, "layout": "metal"},
    "qlora int4, gptq": {"method": "qlora", "quant_type": "int4", "group_size": 32, "layout": "gptq"},
    "qlora nf4, dense": {"method": "qlora", "layout": "dense"},
    "qalora int4": {"method": "qalora", "quant_type": "int4", "group_size": 32, "layout": "mlx", "fit": "loftq"},
}
STREAMED = ["qlora nf4", "qlora nf4, single quant", "qlora int4", "qlora int4, metal"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix counts as too large to have several of them, or all of one, in memory."""
    monkeypatch.setattr(schedule, "SMALL_NUMEL", 0)
    monkeypatch.setattr(conversion_jobs, "WHOLE_NUMEL", 0)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What one thread makes of each recipe, every matrix whole."""
    return {name: converted(model, tmp_path_factory.mktemp("expected"), 1, **RECIPES[name]) for name in RECIPES}


def converted(
    model: Path, directory: Path, threads: int, observer: Silent | None = None, **recipe: Any
) -> dict[str, bytes]:
    """The files of a conversion; the output, whose name they contain, is `out` in each directory."""
    with contextlib.chdir(directory):
        conversion = prepare_conversion(str(model), Path("out"), make_recipe(**recipe))
        convert_checkpoint(
            conversion, observer or Silent(), overwrite=False, restart=False, verify=True, threads=threads
        )
        return files_of(Path("out"))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("case", RECIPES)
def test_any_number_of_threads_writes_the_same_files(case, threads, model, expected, tmp_path):
    assert converted(model, tmp_path, threads, **RECIPES[case]) == expected[case]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", RECIPES)
def test_matrices_one_after_the_other_give_the_same_files(case, threads, model, expected, tmp_path, large):
    assert converted(model, tmp_path, threads, **RECIPES[case]) == expected[case]


@pytest.mark.parametrize("case", STREAMED)
def test_a_large_matrix_of_qlora_is_never_whole_in_memory(case, model, tmp_path, large, monkeypatch):
    for module in ("quant.codebook", "quant.affine", "tensors.metrics"):
        monkeypatch.setattr(f"loftq_cli.{module}.STREAMED_NUMEL", 1 << 12)
    loaded: list[str] = []

    def whole(checkpoint: Any, name: str) -> torch.Tensor:
        loaded.append(name)
        return original(checkpoint, name)

    from loftq_cli.checkpoint.source import Checkpoint

    original = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", whole)
    converted(model, tmp_path, 2, **RECIPES[case])
    assert not [name for name in loaded if "proj" in name]


@pytest.mark.parametrize("case", ["loftq nf4", "qlora nf4", "qlora int4", "qalora int4"])
def test_compiled_kernels_write_the_same_files(case, model, expected, tmp_path, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr("loftq_cli.runtime.kernel_choice.WORTH_COMPILING", 0)
    made = converted(model, tmp_path, 2, **RECIPES[case])
    assert backend.implementation("codebook", "cpu").__name__.endswith(".cpu")
    backend.use_reference_kernels()
    # Errors are the same up to the order of their additions; all that is loaded is the same to the bit.
    wanted = expected[case]
    assert {name for name in wanted if wanted[name] != made[name]} <= {"loftq_report.json", "checksums.json"}
    reports = [json.loads(files["loftq_report.json"]) for files in (made, wanted)]
    assert reports[0]["totals"]["error"] == pytest.approx(reports[1]["totals"]["error"], rel=1e-6)


@pytest.fixture
def trained(model: Path, tmp_path: Path) -> Iterator[Path]:
    """A converted model whose adapter has been trained: no factor of it is zero."""
    run_conversion(model, tmp_path / "base", rank=4, method="qlora")
    generator = torch.Generator().manual_seed(0)

    def train(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.02

    edit_tensors(tmp_path / "base" / "qlora_init" / "adapter_model.safetensors", train)
    yield tmp_path / "base"


@pytest.mark.parametrize("options", [{}, {"requantize": "int8"}], ids=["dense", "requantized"])
def test_merging_in_parts_and_threads_gives_the_same_files(options, trained, tmp_path, monkeypatch):
    from loftq_cli.merging.form import MergeOptions
    from loftq_cli.merging.plan import prepare_merge
    from loftq_cli.merging.run import merge_adapter

    whole = files_of(run_merge(trained, trained / "qlora_init", tmp_path / "whole", **options))
    monkeypatch.setattr(schedule, "SMALL_NUMEL", 0)
    monkeypatch.setattr(merging_jobs, "STREAMED_NUMEL", 1 << 12)
    prepared = prepare_merge(trained, trained / "qlora_init", tmp_path / "parts", MergeOptions(**options))
    merge_adapter(prepared, Silent(), overwrite=False, restart=False, threads=2)
    parts = files_of(tmp_path / "parts")
    assert parts.keys() == whole.keys()
    assert all(parts[name] == whole[name] for name in whole if name.endswith(".safetensors"))


def test_inspecting_in_threads_finds_the_same_errors(model, trained):
    with BaseModel.open(trained) as base:
        one, two = (inspect_converted(base, model, threads) for threads in (1, 2))
    assert one == two
    with BaseModel.open(model) as base:
        assert list(inspect_checkpoint(base, ["nf4", "int2"], 1)) == list(inspect_checkpoint(base, ["nf4", "int2"], 2))


@pytest.mark.parametrize("case", ["loftq nf4", "qlora nf4"])
def test_an_interrupted_run_of_large_matrices_is_continued(case, model, expected, tmp_path, large):
    with pytest.raises(KeyboardInterrupt):
        converted(model, tmp_path, 2, StopAfter(3), **RECIPES[case])
    assert not (tmp_path / "out").exists()
    observer = Silent()
    made = converted(model, tmp_path, 2, observer, **RECIPES[case])
    assert sum(resumed for _, resumed in observer.done) >= 3
    assert made == expected[case]


@pytest.mark.parametrize("case", ["loftq nf4", "qlora nf4", "qlora int4"])
def test_nan_in_a_large_matrix_is_refused_by_name(case, model, tmp_path, large):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.endswith("1.mlp.down_proj.weight"))
    tensors[name][-1, -1] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="NaN") as error:
        converted(broken, tmp_path, 2, **RECIPES[case])
    assert error.value.tensor == name
    assert not (tmp_path / "out").exists()
