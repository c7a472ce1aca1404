"""`--target-bpw`, `--target-size` and `--lora-budget`: the measured curves against float64 decompositions, and that
what is chosen keeps its bounds, explains itself and can be made again from its recipe.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import models
from support.adapters import tensors_of
from support.conversions import files_of, run_conversion

from loftq_cli.allocation.allocation import Allocation, allocate, build_pattern
from loftq_cli.allocation.candidates import Budget
from loftq_cli.allocation.error_curves import measure_error_curves
from loftq_cli.conversion.prepare import Conversion, prepare_conversion, prepare_within_target
from loftq_cli.conversion.report import bits_per_weight
from loftq_cli.errors import InputError, UsageError
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.planning.planner import build_plan
from loftq_cli.planning.recipe import Override
from loftq_cli.planning.settle import fields_of, make_recipe
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.tensors.rows import TensorRows

Run = Callable[..., tuple[int, str, str]]

# The curves.


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("source") / "llama", layers=1)


@functools.cache
def allocation_of(source: Path, target: Budget, threads: int = 1, **recipe: Any) -> tuple[Allocation, Conversion]:
    values = {"quant_type": "int4", "layout": "compressed-tensors", "symmetric": True, "rank": 8, **recipe}
    done = prepare_within_target(
        str(source), source.parent / "never", make_recipe(**values), target, threads=threads, observe=lambda *said: None
    )
    assert done.allocation is not None
    return done.allocation, done


@pytest.mark.parametrize("method", ["loftq", "qalora"])
def test_curves_are_what_the_best_adapter_leaves(method: str, source: Path) -> None:
    layout = "mlx" if method == "qalora" else "compressed-tensors"
    recipe = make_recipe(quant_type="int3", method=method, layout=layout, group_size=32, fit="loftq")
    prepared = prepare_conversion(str(source), source.parent / "never", recipe)
    layers, ranks = prepared.plan.layers, (0, 1, 4, 64)
    curves = measure_error_curves(
        prepared.checkpoint,
        layers,
        {job.name: [job.matrix] for job in layers},
        {job.name: ranks for job in layers},
    )
    originals = tensors_of(source)
    for job in layers:
        weight = originals[job.name]
        quantizer = make_quantizer(job.matrix.spec, job.matrix.dtype)
        residual = weight.double() - quantizer.dequantize(quantizer.quantize(TensorRows(weight))).double()
        size = 32 if method == "qalora" else 1
        # What is equal within each group of inputs has this decomposition, and the rest is out of reach.
        means = residual.view(len(residual), -1, size).mean(dim=2)
        held = size * torch.linalg.svdvals(means).square().cumsum(0)
        (found,) = curves[job.name].squared_errors.values()
        assert curves[job.name].squared_weight == pytest.approx(float(weight.double().square().sum()), rel=1e-6)
        for rank, squared in zip(ranks, found, strict=True):
            absorbed = 0.0 if rank == 0 else float(held[min(rank, len(held)) - 1])
            total = float(residual.square().sum())
            # The difference of two float32 sums, where the adapter holds nearly all.
            assert squared == pytest.approx(total - absorbed, rel=1e-4, abs=1e-6 * total)


@pytest.mark.parametrize(("side", "tolerance"), [(1024, 1e-6), (1056, 0.01)], ids=["exactly", "nearly"])
def test_the_larger_a_matrix_the_less_exact_its_decomposition_needs_to_be(
    side: int, tolerance: float, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(side, 40, generator=generator) @ torch.randn(40, side, generator=generator) * 1e-3
    weight += torch.randn(side, side, generator=generator) * 1e-3
    save_file({"layers.0.proj.weight": weight}, tmp_path / "w.safetensors")
    recipe = make_recipe(quant_type="int2", group_size=32, fit="loftq")
    prepared = prepare_conversion(str(tmp_path / "w.safetensors"), tmp_path / "never", recipe)
    (job,) = prepared.plan.layers
    curves = measure_error_curves(prepared.checkpoint, [job], {job.name: [job.matrix]}, {job.name: (16,)})

    quantizer = make_quantizer(job.matrix.spec, job.matrix.dtype)
    residual = weight.double() - quantizer.dequantize(quantizer.quantize(TensorRows(weight))).double()
    exact = float(torch.linalg.eigvalsh(residual @ residual.T)[:-16].sum())
    (((squared,),),) = (curve.squared_errors.values() for curve in curves.values())
    assert squared == pytest.approx(exact, rel=tolerance)
    assert tolerance < 1e-3 or squared != pytest.approx(exact, rel=1e-6)


def test_statistics_change_what_is_measured(source: Path) -> None:
    """Of a layer whose inputs have one channel, only the errors of that column count: relative to the column."""
    prepared = prepare_conversion(str(source), source.parent / "never", make_recipe(quant_type="int4", symmetric=True))
    jobs = prepared.plan.layers
    name = next(job.name for job in jobs if job.name.endswith("down_proj.weight"))
    columns = {job.name: job.matrix.shape[1] for job in jobs}

    class OneChannel:
        names = frozenset({name})

        def load(self, name: str) -> torch.Tensor:
            diagonal = torch.zeros(columns[name])
            diagonal[3] = 7.0
            return diagonal

    matrices, ranks = {job.name: [job.matrix] for job in jobs}, {job.name: (0,) for job in jobs}
    statistics: Any = OneChannel()
    plain, weighted = (
        measure_error_curves(prepared.checkpoint, jobs, matrices, ranks, statistics=s) for s in (None, statistics)
    )
    for job in jobs:
        curve, other = plain[job.name], weighted[job.name]
        if job.name != name:
            assert other == curve
    weight = prepared.checkpoint.load(name).float()
    squared = float(weight[:, 3].double().square().sum()) * columns[name]
    # A tenth of the mean is added to all channels.
    expected = squared * 1.0 + 0.1 * float(weight.double().square().sum())
    assert weighted[name].squared_weight == pytest.approx(expected, rel=1e-4)
    assert all(
        error < plain[name].squared_errors[spec][0] * columns[name]
        for spec, (error,) in weighted[name].squared_errors.items()
    )


def test_a_weight_that_cannot_be_quantized_is_named(tmp_path: Path) -> None:
    from support.adapters import edit_tensors

    source, name = models.llama(tmp_path / "llama", layers=1), "model.layers.0.mlp.up_proj.weight"
    edit_tensors(source / "model.safetensors", lambda tensors: tensors[name].fill_(math.nan))
    with pytest.raises(InputError, match="holds NaN") as caught:
        allocation_of(source, Budget(bits_per_weight=4.0))
    assert caught.value.tensor == name


# What is chosen.

TARGETS = {
    "bits": Budget(bits_per_weight=3.1),
    "size": Budget(total_nbytes=330_000),
    "bits and adapter": Budget(bits_per_weight=3.6, adapter_nbytes=60_000),
    "size and adapter": Budget(total_nbytes=350_000, adapter_nbytes=60_000),
    "adapter": Budget(adapter_nbytes=90_000),
}


@pytest.mark.parametrize("method", ["loftq", "qlora"])
@pytest.mark.parametrize("name", TARGETS)
def test_what_is_planned_is_what_was_chosen_and_keeps_its_bounds(name: str, method: str, source: Path) -> None:
    target = TARGETS[name]
    allocation, conversion = allocation_of(source, target, method=method)
    plan = conversion.plan
    assert bits_per_weight(plan) == allocation.bits_per_weight
    assert (plan.base_nbytes, plan.adapter_nbytes) == (allocation.base_nbytes, allocation.adapter_nbytes)
    for job, layer in zip(plan.layers, allocation.layers, strict=True):
        assert (job.matrix.spec, job.lora.rank) == (layer.candidate.spec, layer.candidate.rank)
        assert job.lora.scaling == 1.0
    if target.bits_per_weight is not None:
        assert 0.97 * target.bits_per_weight < bits_per_weight(plan) <= target.bits_per_weight
    if target.total_nbytes is not None:
        assert plan.base_nbytes + plan.adapter_nbytes <= target.total_nbytes
    if target.adapter_nbytes is not None:
        assert plan.adapter_nbytes <= target.adapter_nbytes
        assert {job.lora.rank for job in plan.layers} <= {4, 8, 16, 32, 64}
    else:
        assert {job.lora.rank for job in plan.layers} == {8}
    if not target.chooses_formats:
        assert {job.matrix.spec for job in plan.layers} == {plan.layers[0].matrix.spec}
    assert all(allocation.objective <= other.objective + 1e-12 for other in allocation.uniform)


FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # by vLLM, for which compressed-tensors is


def fused_with(module: str, other: str) -> bool:
    (parent, name), (other_parent, other_name) = (m.rsplit(".", 1) for m in (module, other))
    return module == other or (parent == other_parent and any({name, other_name} <= names for names in FUSED))


def test_no_other_choice_would_have_been_better(source: Path) -> None:
    # Every exchange of the format of one layer, and of those that need the same one, tried from the measured curves.
    recipe = make_recipe(quant_type="int4", symmetric=True, rank=8, group_size=32)
    prepared = prepare_conversion(str(source), source.parent / "never", recipe)
    allocation, _ = allocation_of(source, Budget(bits_per_weight=3.1))
    left = 3.1 * sum(layer.numel for layer in allocation.layers) / 8
    left -= sum(layer.candidate.base_nbytes for layer in allocation.layers)
    pairs = list(zip(prepared.plan.layers, allocation.layers, strict=True))
    for first in prepared.plan.layers:
        fused = [(job, layer) for job, layer in pairs if fused_with(job.module, first.module)]
        for bits, size in itertools.product((2, 3, 4, 8), (32, 64, 128)):
            if any(job.matrix.shape[1] % size for job, _ in fused):
                continue
            cost, more = 0.0, 0
            for job, layer in fused:
                spec = dataclasses.replace(job.matrix.spec, bits=bits, group_size=size)
                matrix = dataclasses.replace(job.matrix, spec=spec)
                more += sum(t.nbytes for t in convert_layout().planned(matrix)) - layer.candidate.base_nbytes
                curves = measure_error_curves(prepared.checkpoint, [job], {job.name: [matrix]}, {job.name: (8,)})
                relative = curves[job.name].squared_errors[spec][0] / curves[job.name].squared_weight
                cost += math.sqrt(layer.numel) * (relative - layer.candidate.relative_error)
            assert more > left or cost >= -1e-9


@pytest.mark.parametrize("name", TARGETS)
def test_what_vllm_makes_one_matrix_of_has_one_format(name: str, source: Path) -> None:
    _, conversion = allocation_of(source, TARGETS[name])
    specs = {job.module: job.matrix.spec for job in conversion.plan.layers}
    for module, other in itertools.combinations(specs, 2):
        assert specs[module] == specs[other] or not fused_with(module, other)
    assert not [note for note in conversion.plan.notes if "vLLM" in note]


def test_what_mlx_holds_may_differ(source: Path) -> None:
    _, conversion = allocation_of(source, Budget(bits_per_weight=3.6), layout="mlx", symmetric=None)
    specs = {job.module: job.matrix.spec for job in conversion.plan.layers}
    pairs = itertools.combinations(specs, 2)
    assert any(specs[module] != specs[other] for module, other in pairs if fused_with(module, other))


@pytest.mark.parametrize(
    "override",
    [Override(match=r"layers\.\d+\.self_attn\.k_proj", quant_type="int8"), Override(match="k_proj", quantize=False)],
)
def test_an_override_that_vllm_cannot_load_is_said(override: Override, source: Path) -> None:
    recipe = make_recipe(quant_type="int4", symmetric=True, rank=8, group_size=32, override=(override,))
    (note,) = (n for n in prepare_conversion(str(source), source.parent / "never", recipe).plan.notes if "vLLM" in n)
    assert "q_proj, k_proj, v_proj of model.layers.0.self_attn" in note


def convert_layout() -> Any:
    from loftq_cli.layouts.layout import load_layout

    return load_layout("compressed-tensors")


def test_codebooks_choose_their_block_size(source: Path) -> None:
    allocation, conversion = allocation_of(
        source, Budget(bits_per_weight=4.8), quant_type="nf4", layout="bitsandbytes", symmetric=None
    )
    sizes = {job.matrix.spec.block_size for job in conversion.plan.layers}
    assert len(sizes) > 1
    assert bits_per_weight(conversion.plan) <= 4.8
    assert allocation.recipe.quant_type == "nf4"


def test_a_pooled_adapter_keeps_its_group_size(source: Path) -> None:
    _, conversion = allocation_of(
        source, Budget(bits_per_weight=4.6), method="qalora", layout="mlx", symmetric=None, group_size=32
    )
    specs = {job.matrix.spec for job in conversion.plan.layers}
    assert {spec.group_size for spec in specs} == {32}
    assert len({spec.bits for spec in specs}) > 1


def test_what_overrides_say_of_a_layer_stays(source: Path) -> None:
    override = (
        Override(match="q_proj", quant_type="int8"),
        Override(match="k_proj", rank=2),
        Override(match="o_proj", quantize=False),
    )
    allocation, conversion = allocation_of(
        source, Budget(bits_per_weight=4.0, adapter_nbytes=60_000), override=override
    )
    jobs = {job.module.rpartition(".")[2]: job for job in conversion.plan.layers}
    assert (jobs["q_proj"].matrix.spec.bits, jobs["k_proj"].lora.rank) == (8, 2)
    assert "o_proj" not in jobs
    assert allocation.recipe.override[:3] == override
    assert bits_per_weight(conversion.plan) <= 4.0


@pytest.mark.parametrize(
    ("bits", "override", "recipe"),
    [
        (4.8, {"block_size": 128}, {"quant_type": "nf4", "layout": "bitsandbytes", "symmetric": None}),
        (4.8, {"block_size": 32}, {"quant_type": "nf4", "layout": "bitsandbytes", "symmetric": None}),
        (3.6, {"group_size": 16}, {}),
        (3.6, {"group_size": 128}, {}),
        (3.6, {"quant_type": "int8"}, {}),
        (3.6, {"quant_type": "int2"}, {}),
    ],
    ids=str,
)
def test_a_format_that_an_override_gives_a_layer_is_not_chosen_again(
    bits: float, override: dict[str, Any], recipe: dict[str, Any], source: Path
) -> None:
    _, conversion = allocation_of(
        source, Budget(bits_per_weight=bits), override=(Override(match="q_proj", **override),), **recipe
    )

    (spec,) = (job.matrix.spec for job in conversion.plan.layers if job.module.endswith("q_proj"))
    assert {name: getattr(spec, name) for name in override} == override
    assert bits_per_weight(conversion.plan) <= bits


def test_a_given_scaling_is_kept_whatever_the_rank(source: Path) -> None:
    for values, scaling in (({"alpha": 16.0}, 2.0), ({"rslora": True}, math.sqrt(8))):
        _, conversion = allocation_of(source, Budget(adapter_nbytes=60_000), **values)
        assert {round(job.lora.scaling, 9) for job in conversion.plan.layers} == {round(scaling, 9)}
        assert len({job.lora.rank for job in conversion.plan.layers}) > 1


def test_layers_that_only_small_groups_fit_are_quantized_too(source: Path) -> None:
    # down_proj has 192 columns: no whole groups of 128.
    _, conversion = allocation_of(source, Budget(bits_per_weight=3.1), group_size=128)
    assert any(job.module.endswith("down_proj") for job in conversion.plan.layers)


def test_threads_do_not_change_the_choice(source: Path) -> None:
    target = TARGETS["bits and adapter"]
    assert allocation_of(source, target)[0] == allocation_of(source, target, threads=3)[0]


def test_patterns_find_exactly_the_names() -> None:
    names = [f"model.layers.{i}.mlp.{part}" for i in (0, 3, 11) for part in ("up_proj", "down_proj")] + ["lm.head"]
    others = [*(f"model.layers.{i}.mlp.up_proj" for i in (1, 30, 111)), "model.layers.0.mlp.gate_proj", "lmxhead"]
    others += ["x.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj.x"]
    assert [name for name in names + others if re.search(build_pattern(names), name)] == names


# What is refused.


@pytest.mark.parametrize(
    ("target", "recipe", "message"),
    [
        ({"bits_per_weight": 2.0}, {}, r"smaller than .* \(the smallest possible is --target-bpw 2\.1\d+\)"),
        (
            {"bits_per_weight": 3.0},
            {"quant_type": "nf4", "layout": "bitsandbytes", "symmetric": None},
            r"target-bpw 4\.\d+\)",
        ),
        ({"total_nbytes": 1000}, {}, r"the smallest possible is --target-size \d{6}\)"),
        ({"adapter_nbytes": 1000}, {}, r"the smallest possible is --lora-budget \d{5}\)"),
        (
            {"bits_per_weight": 2.0, "adapter_nbytes": 1000},
            {},
            r"the smallest possible is --target-bpw 2\.1\d+ and --lora-budget \d{5}\)",
        ),
        ({"bits_per_weight": 3.0}, {"layout": "dense"}, "layout dense stores decoded values"),
        ({"total_nbytes": 10**6}, {"layout": "gptq"}, "layout gptq has one quant_type and group size"),
        ({"bits_per_weight": 3.0}, {"symmetric": False}, "without zero points only"),
    ],
)
def test_a_target_that_nothing_fits_is_refused(
    target: dict[str, Any], recipe: dict[str, Any], message: str, source: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        allocation_of(source, Budget(**target), **recipe)
    assert caught.value.exit_code == 2


def test_a_target_that_nothing_fits_is_refused_before_anything_is_measured(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loftq_cli.checkpoint.source.Checkpoint.load", None)
    with pytest.raises(UsageError, match="smallest possible"):
        allocation_of(source, Budget(bits_per_weight=2.0))


def test_without_scipy_a_target_is_refused_before_anything_is_measured(
    run: Run, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loftq_cli.checkpoint.source.Checkpoint.load", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)

    status, shown, message = run("quantize", source, "out", *INT4, "--target-bpw", 3.1, "--dry-run")

    assert (status, shown) == (2, "")
    assert "need scipy, which is not installed (pip install scipy)" in message


def test_the_rank_of_the_recipe_is_no_matter_where_ranks_are_chosen(source: Path) -> None:
    # k_proj has 64 rows.
    _, conversion = allocation_of(source, Budget(adapter_nbytes=60_000), rank=1000)
    assert max(job.lora.rank for job in conversion.plan.layers) <= 64


def test_the_smallest_possible_target_is_possible(source: Path) -> None:
    for bounds, option in (({"bits_per_weight": 2.0}, "--target-bpw"), ({"total_nbytes": 1000}, "--target-size")):
        with pytest.raises(UsageError) as caught:
            allocation_of(source, Budget(**bounds))
        said = re.search(rf"{option} ([\d.]+)", str(caught.value))
        assert said is not None
        (name,) = bounds
        least = float(said[1]) if name == "bits_per_weight" else int(said[1])
        allocation_of(source, Budget(**{name: least}))


@pytest.mark.parametrize("bits", [0.0, -1.0, math.nan, math.inf])
def test_bits_are_a_positive_number(bits: float) -> None:
    with pytest.raises(UsageError, match="--target-bpw must be a positive number"):
        Budget(bits_per_weight=bits)


@pytest.mark.parametrize("layout", [name for name, row in LAYOUTS.items() if "int4" in row.quant_types])
def test_ranks_are_chosen_in_every_layout(layout: str, source: Path) -> None:
    recipe = {"layout": layout, "symmetric": None}
    _, conversion = allocation_of(source, Budget(adapter_nbytes=60_000), **recipe)
    assert conversion.plan.adapter_nbytes <= 60_000
    build_plan(conversion.checkpoint.tensors, conversion.config, conversion.plan.recipe)


# The command line.

INT4 = ("--quant-type", "int4", "--rank", 4, "--iterations", 2)


def test_the_saved_recipe_makes_the_same_bytes_without_measuring(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    status, _, said = run("quantize", source, "out", *INT4, "--target-bpw", 3.1, "--lora-budget", "60kB")
    assert status == 0
    assert "measured [7/7]" in said
    first = files_of(Path("out"))
    report = json.loads(first.pop("loftq_report.json"))
    monkeypatch.chdir(tmp_path / "b")
    status, _, said = run("quantize", source, "out", "--recipe", tmp_path / "a" / "out" / "loftq_recipe.toml")
    assert (status, "measured" in said) == (0, False)
    second = files_of(Path("out"))
    repeated = json.loads(second.pop("loftq_report.json"))
    # The list of checksums has the reports', which differ by the account of the choice.
    differing = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    assert differing <= {"checksums.json"}
    allocation = report.pop("allocation")
    assert report == repeated
    totals = report["totals"]
    assert allocation["bits_per_weight"] == totals["bits_per_weight"] <= 3.1
    assert allocation["adapter_nbytes"] == totals["adapter_nbytes"] <= 60_000
    assert allocation["base_nbytes"] == totals["base_nbytes"]
    assert allocation["target"] == {"bits_per_weight": 3.1, "adapter_nbytes": 60_000}
    assert run("inspect", "out", "--verify")[0] == 0


def test_the_same_command_again_finds_its_result(run: Run, source: Path) -> None:
    command = ("quantize", source, "out", *INT4, "--target-bpw", 3.1, "--quiet")
    assert run(*command)[0] == 0
    status, _, said = run(*command)
    assert (status, "already done" in said) == (0, True)


def test_a_dry_run_explains_the_choice_and_writes_nothing(run: Run, source: Path, tmp_path: Path) -> None:
    command = ("quantize", source, "out", *INT4, "--target-bpw", 3.6, "--dry-run")
    status, shown, said = run(*command)
    assert status == 0
    assert "bits a weight, base" in said
    assert "the same for all layers: int" in said
    assert re.search(r"layers\.0\.mlp\.down_proj\.weight +int\d +group +\d+ +4 +0\.\d{4} +[\d.]+ kB", shown)
    values = json.loads(run(*command, "--json", "--quiet")[1])
    assert values["allocation"]["bits_per_weight"] == values["bits_per_weight"] <= 3.6
    assert len(values["allocation"]["layers"]) == len(values["layers"]) == 7
    best = values["allocation"]["uniform"][0]
    assert best["objective"] >= values["allocation"]["objective"] == values["allocation"]["objective_bound"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target-bpw", 3, "--target-size", "1MB"), "--target-bpw and --target-size both bound the base"),
        (("--target-bpw", 3, "--asymmetric"), "without zero points only (--symmetric, or --layout mlx)"),
        (("--lora-budget", "much"), "'much' is not a size"),
        (("--target-bpw", "nan"), "--target-bpw must be a positive number"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(
    flags: tuple[object, ...], message: str, run: Run, source: Path
) -> None:
    status, _, said = run("quantize", source, "out", *INT4, *flags)
    assert status == 2
    assert message in said


def test_a_bound_that_no_codebook_meets_means_integers(run: Run, source: Path) -> None:
    """Four bits are the fewest of a codebook; a format that the user names is not changed."""
    status, shown, said = run("quantize", source, "out", "--target-bpw", 3.9, "--dry-run", "--json")
    assert status == 0, said
    assert "note: no codebook takes 3.9 bits a weight: integers, as --quant-type int4" in said
    implied, typed = (
        json.loads(run("quantize", source, "out", *options, "--target-bpw", 3.9, "--dry-run", "--json")[1])
        for options in ((), ("--quant-type", "int4"))
    )
    assert implied == typed
    for options in (("--quant-type", "nf4"), ("--block-size", "64"), ("--layout", "bitsandbytes")):
        status, _, said = run("quantize", source, "out", *options, "--target-bpw", 3.9, "--dry-run")
        assert (status, "is smaller than" in said, "no codebook" in said) == (2, True, False), said
    status, shown, said = run("quantize", source, "out", "--target-bpw", 4.9, "--dry-run", "--json")
    assert (status, {layer["quant_type"] for layer in json.loads(shown)["layers"]}) == (0, {"nf4"}), said


def test_the_built_in_model_loses_less_at_no_more_bytes(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"quant_type": "int3", "rank": 16, "layout": "mlx"}
    recipe |= {"fit": "loftq", "iterations": 1, "svd": "exact"}
    errors = []
    uniform = prepare_conversion("builtin:tiny-llama", tmp_path / "uniform", make_recipe(**recipe))
    bits = bits_per_weight(uniform.plan)
    found = allocate(uniform.checkpoint, uniform.plan.recipe, Budget(bits_per_weight=bits))
    assert found.bits_per_weight <= bits
    for name, values in (("uniform", make_recipe(**recipe)), ("chosen", found.recipe)):
        fields = dataclasses.asdict(fields_of(values)) | {"override": values.override}
        outcome = run_conversion("builtin:tiny-llama", tmp_path / name, **fields)
        layers = [(math.prod(layer.shape), layer.error.error) for layer in outcome.layers]
        errors.append(sum(math.sqrt(numel) * error**2 for numel, error in layers))
    # One exact iteration is what was measured.
    assert errors[1] == pytest.approx(found.objective, rel=1e-3)
    assert errors[1] < 0.99 * errors[0]
