"""Every option of `loftq quantize` means something or is refused: two values give two results, or an error that names
the remedy. The options are those that the command line has, so that an option without a row here fails.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from support.conversions import StopAfter

from loftq_cli.cli.main import app
from loftq_cli.conversion.prepare import prepare_conversion
from loftq_cli.conversion.run import convert_checkpoint
from loftq_cli.errors import UsageError
from loftq_cli.methods.method import METHODS
from loftq_cli.planning.recipe_files import recipe_toml, resolve_recipe
from loftq_cli.planning.settle import make_recipe

Run = Callable[..., tuple[int, str, str]]

NAMES = ("layers.0.q.weight", "layers.0.k.weight", "layers.1.q.weight")
SHAPE = (64, 64)  # more than four times the rank and the solver's margin: iteration is not exact
INT4 = ("--quant-type", "int4", "--group-size", "32")
QALORA = ("--method", "qalora", *INT4)


@dataclass(frozen=True)
class Row:
    """Two ways to give an option, beside `beside`, and where the two results differ.

    seen_in   "files": bytes of weights, adapter and configs; "plan": what a dry run plans, without its recipe;
              "refused": the second way ends with status 2 and `remedy`; else a test of its own below
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    beside: tuple[str, ...] = ()
    seen_in: str = "files"
    remedy: str = ""


def values(name: str, first: object, second: object, *beside: str, seen_in: str = "files") -> Row:
    return Row((name, str(first)), (name, str(second)), beside, seen_in)


ROWS = {
    "recipe": values("--recipe", "loftq-nf4", "loftq-paper"),
    "method": values("--method", "loftq", "qlora"),
    "rank": values("--rank", 2, 3),
    "alpha": values("--alpha", 2, 4),
    "rslora": Row(("--rslora",), ("--no-rslora",)),
    "fit": values("--fit", "joint", "loftq"),
    "start": values("--start", "zero", "principal"),
    "iterations": values("--iterations", 1, 3),
    "rounds": values("--rounds", 0, 1),
    "keep_base": values("--keep-base", 0, 0.5, "--iterations", "2"),
    "svd": values("--svd", "fast", "exact", "--iterations", "2"),
    "pooling": values("--pooling", "peft", "paper", *QALORA),
    "init": values("--init", "residual", "standard", *QALORA),
    "adapter_dtype": values("--adapter-dtype", "float32", "bfloat16"),
    "seed": values("--seed", 0, 1),
    "quant_type": values("--quant-type", "nf4", "fp4"),
    "block_size": values("--block-size", 32, 64),
    "double_quant": Row(("--double-quant",), ("--no-double-quant",)),
    "group_size": values("--group-size", 32, 64, "--quant-type", "int4"),
    "symmetric": Row(("--symmetric",), ("--asymmetric",), INT4),
    "scale_dtype": values("--scale-dtype", "bfloat16", "float32", *INT4, "--layout", "dense"),
    "scales": values("--scales", "absmax", "search"),
    "calibration": Row((), ("--calibration", "STATS")),
    **dict.fromkeys(
        ("text", "tokens", "context", "lines", "sequential"), Row((), (), seen_in="test_text_during_conversion")
    ),
    "task": values("--task", "CAUSAL_LM", "SEQ_2_SEQ_LM"),
    "num_labels": Row((), ("--num-labels", "3"), seen_in="refused", remedy="(leave --num-labels out)"),
    "layout": values("--layout", "bitsandbytes", "dense"),
    "max_shard_size": values("--max-shard-size", "1MB", "5GB", seen_in="plan"),
    "include": values("--include", r"\.q$", r"\.k$"),
    "exclude": values("--exclude", r"\.q$", r"\.k$"),
    "target_bpw": values("--target-bpw", 3.5, 6, "--quant-type", "int4", "--layout", "mlx", seen_in="plan"),
    "target_size": values("--target-size", "1208000", "1218000", *INT4, "--layout", "mlx", seen_in="plan"),
    "lora_budget": values("--lora-budget", "8000", "24000", seen_in="plan"),
    "device": Row(("--device", "cpu"), ("--device", "cuda:99"), seen_in="refused", remedy="(--device c"),
    "max_memory": Row(
        (), ("--max-memory", "1GB"), seen_in="refused", remedy="(--device cuda, or leave --max-memory out)"
    ),
    "threads": Row(("--threads", "1"), ("--threads", "3"), seen_in="threads"),
    "dry_run": Row((), ("--dry-run",), seen_in="dry run"),
    "overwrite": Row((), ("--overwrite",), seen_in="overwriting"),
    "restart": Row((), ("--restart",), seen_in="restarting"),
    "no_remote_code": Row((), ("--no-remote-code",), seen_in="test_side_files"),
    "base_name": values("--base-name", "first", "you/second"),
    "no_verify": Row((), ("--no-verify",), seen_in="said"),
    "as_json": Row((), ("--json",), seen_in="said"),
    "quiet": Row((), ("--quiet",), seen_in="said"),
    "verbose": Row((), ("--verbose",), seen_in="said"),
}
FEW = ("--iterations", "1")  # where the row itself says nothing of alternations


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three matrices beside what is copied: large enough for two shards, in columns that count differently."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(*SHAPE, generator=generator) for name in NAMES}
    tensors["embed.weight"] = torch.randn(300_000, 1, generator=generator)
    save_file(tensors, tmp_path / "source.safetensors", metadata={"format": "pt"})
    statistics = tmp_path / "STATS"
    statistics.mkdir()
    save_file({"q": torch.linspace(0.1, 5.0, SHAPE[1])}, statistics / "statistics.safetensors")
    record = {"tool": "loftq-cli", "format": 1, "kind": "diagonal", "tokens": 8, "inputs": dict.fromkeys(NAMES, "q")}
    sha256 = hashlib.sha256((statistics / "statistics.safetensors").read_bytes()).hexdigest()
    (statistics / "calibration.json").write_text(json.dumps({**record, "statistics_sha256": sha256}))
    return tmp_path / "source.safetensors"


def quantize(run: Run, source: Path, output: str, *options: str) -> tuple[int, str, str]:
    rank = () if "--rank" in options else ("--rank", "2")
    return run("quantize", source, output, *rank, *options)


def cheaply(row: Row) -> tuple[str, ...]:
    """The options beside a row, and one alternation where that means something and the row does not count any."""
    words = {*row.first, *row.second, *row.beside}
    has_own = words & {"--iterations", "--recipe", "qlora", "standard", "--calibration", "--start", "--fit"}
    return row.beside if has_own else (*row.beside, *FEW)


def weights_of(directory: Path) -> dict[str, bytes]:
    """What loaders read; records that repeat the options are left out."""
    names = ("*.safetensors", "config.json", "adapter_config.json")
    return {p.relative_to(directory).as_posix(): p.read_bytes() for name in names for p in directory.rglob(name)}


def options_of_quantize() -> set[str]:
    command = typer.main.get_command(app).commands["quantize"]
    return {p.name for p in command.params if p.param_type_name == "option" and p.name != "help"}


def rows_seen_in(*places: str) -> list[str]:
    return [name for name, row in ROWS.items() if row.seen_in in places]


def test_every_option_of_the_command_line_has_a_row() -> None:
    assert options_of_quantize() == set(ROWS)


@pytest.mark.parametrize("name", rows_seen_in("files"))
def test_two_values_give_two_results(name: str, run: Run, source: Path, tmp_path: Path) -> None:
    row = ROWS[name]
    results = []
    for output, option in (("one", row.first), ("two", row.second)):
        status, _, err = quantize(run, source, output, *cheaply(row), *option, "-q", "--no-verify")
        assert status == 0, err
        results.append(weights_of(tmp_path / output))
    # The adapter's config names the base by its path.
    results[1] = {n: data.replace(b'"two"', b'"one"') for n, data in results[1].items()}
    assert results[0] != results[1]


@pytest.mark.parametrize("name", rows_seen_in("plan"))
def test_two_values_give_two_plans(name: str, run: Run, source: Path) -> None:
    row = ROWS[name]
    plans = []
    for option in (row.first, row.second):
        status, out, err = quantize(run, source, "out", *cheaply(row), *option, "--dry-run", "--json")
        assert status == 0, err
        plans.append({key: value for key, value in json.loads(out).items() if key not in ("recipe", "allocation")})
    assert plans[0] != plans[1]


@pytest.mark.parametrize("name", rows_seen_in("refused"))
def test_what_cannot_be_done_is_refused_with_the_remedy(name: str, run: Run, source: Path, tmp_path: Path) -> None:
    row = ROWS[name]
    assert quantize(run, source, "one", *FEW, *row.first, "-q")[0] == 0
    status, out, err = quantize(run, source, "two", *FEW, *row.second, "-q")
    assert (status, out) == (2, "")
    assert row.remedy in err
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("name", rows_seen_in("said"))
def test_two_ways_to_report_say_two_things(name: str, run: Run, source: Path) -> None:
    row = ROWS[name]
    said = [
        quantize(run, source, "out", *FEW, *option, "--overwrite", "--restart") for option in (row.first, row.second)
    ]
    assert [status for status, _, _ in said] == [0, 0]
    shown = [(out, [line for line in err.splitlines() if "peak memory" not in line]) for _, out, err in said]
    assert shown[0] != shown[1]


def test_threads_are_those_that_compute(run: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()
    start = threading.Thread.start

    def remember(thread: threading.Thread) -> None:
        names.add(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", remember)
    counts = []
    for option in (ROWS["threads"].first, ROWS["threads"].second):
        names.clear()
        assert quantize(run, source, f"out{option[1]}", *FEW, *option, "-q")[0] == 0
        counts.append(sum(name.startswith("loftq") for name in names))
    assert counts[0] < counts[1]


def test_a_dry_run_writes_nothing_and_a_run_does(run: Run, source: Path, tmp_path: Path) -> None:
    assert quantize(run, source, "out", *FEW, "--dry-run")[0] == 0
    assert not (tmp_path / "out").exists()
    assert quantize(run, source, "out", *FEW)[0] == 0
    assert (tmp_path / "out").is_dir()


def test_another_result_stays_unless_it_is_to_be_overwritten(run: Run, source: Path) -> None:
    assert quantize(run, source, "out", *FEW, "-q")[0] == 0
    status, _, err = quantize(run, source, "out", *FEW, "-q", "--layout", "dense")
    assert status == 2 and "--overwrite" in err
    assert quantize(run, source, "out", *FEW, "-q", "--layout", "dense", "--overwrite")[0] == 0


def test_an_interrupted_run_goes_on_unless_it_is_to_restart(run: Run, source: Path) -> None:
    for option, is_continued in (((), True), (("--restart",), False)):
        output = Path("restarted" if option else "continued")
        with pytest.raises(KeyboardInterrupt):
            conversion = prepare_conversion(str(source), output, make_recipe(rank=2, iterations=1))
            convert_checkpoint(conversion, StopAfter(1), overwrite=False, restart=False, verify=True)
        status, _, err = quantize(run, source, str(output), *FEW, *option)
        assert status == 0
        assert ("continuing: " in err) is is_continued


@dataclass(frozen=True)
class Meaningless:
    """Options that mean nothing beside others, as the user types them, and what is said of each."""

    beside: tuple[str, ...]
    where: str
    options: dict[str, str] = field(default_factory=dict)


FIT_OPTIONS = {
    "--iterations": "8",
    "--svd": "fast",
    "--start": "zero",
    "--fit": "loftq",
    "--rounds": "0",
    "--keep-base": "0",
}
MEANINGLESS = [
    Meaningless(("--method", "qlora"), "method qlora", {**FIT_OPTIONS, "--pooling": "peft", "--init": "residual"}),
    Meaningless((*QALORA, "--init", "standard"), "method qalora and init standard", FIT_OPTIONS),
    Meaningless(("--fit", "loftq"), "fit loftq", {"--rounds": "1"}),
    Meaningless(("--keep-base", "1"), "keep_base 1", {"--start": "zero", "--iterations": "1"}),
    Meaningless(("--svd", "exact"), "svd exact", {"--seed": "0"}),
    Meaningless(INT4, "quant_type int4", {"--block-size": "64"}),
    Meaningless((), "quant_type nf4", {"--group-size": "64", "--scale-dtype": "float32"}),
    Meaningless((), "method loftq", {"--pooling": "peft", "--init": "residual"}),
]
CASES = [(case, name, value) for case in MEANINGLESS for name, value in case.options.items()]


@pytest.mark.parametrize(("case", "name", "value"), CASES, ids=[f"{c.where}, {name}" for c, name, _ in CASES])
def test_a_flag_that_means_nothing_is_refused_even_with_the_usual_value(
    case: Meaningless, name: str, value: str, run: Run, tmp_path: Path
) -> None:
    status, out, err = run("quantize", "builtin:tiny-llama", "out", *case.beside, name, value)
    assert (status, out) == (2, "")
    assert f"{name[2:].replace('-', '_')} means nothing with {case.where}" in err
    assert f"(leave {name} out)" in err
    assert not (tmp_path / "out").exists()
    # The printed remedy works.
    assert run("quantize", "builtin:tiny-llama", "out", *case.beside, "--dry-run", "--json")[0] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('method = "qlora"\niterations = 50', r"iterations means nothing with method qlora \(leave iterations out\)"),
        ('method = "qlora"\nsvd = "faithful"', r"svd means nothing with method qlora \(leave svd out\)"),
        ('svd = "exact"\nseed = 3', r"seed means nothing with svd exact, where nothing is drawn \(leave seed out\)"),
        ('method = "qalora"\nquant_type = "int4"\ninit = "standard"\nscales = "search"\nstart = "zero"', "start means"),
    ],
)
def test_a_file_that_says_what_means_nothing_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        resolve_recipe(str(tmp_path / "recipe.toml"), {})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("init", ["residual", "standard", None])
def test_what_the_tool_itself_records_is_read_back(method: str, init: str | None, tmp_path: Path) -> None:
    if (init is None) != (None in METHODS[method].inits):
        return
    recipe = make_recipe(method=method, init=init, quant_type="int4")
    (tmp_path / "recipe.toml").write_text(recipe_toml(recipe))
    assert resolve_recipe(str(tmp_path / "recipe.toml"), {}) == recipe


@pytest.mark.parametrize("svd", ["exact", "fast"])
def test_a_solver_typed_over_a_file_takes_the_files_seed_along_only_where_it_draws(svd: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("seed = 3\n")
    assert resolve_recipe(str(tmp_path / "recipe.toml"), {"svd": svd}).seed == (0 if svd == "exact" else 3)
