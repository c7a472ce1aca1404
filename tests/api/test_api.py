"""The Python API: the command line's options as keywords, typed results, errors of ours, and progress."""

from __future__ import annotations

import doctest
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support.conversions import files_of
from typer.main import get_command

import loftq_cli as loftq
from loftq_cli.cli.main import app

ONE_LAYER = {"rank": 4, "iterations": 1, "include": r"layers\.0\.self_attn\.q_proj", "threads": 1}
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
COMMANDS = ("quantize", "merge", "inspect", "calibrate")
PRINTING = {"as_json", "quiet", "verbose", "help"}  # what a command prints is no matter of the function


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> loftq.QuantizeResult:
    """A conversion of one layer, in the working directory."""
    monkeypatch.chdir(tmp_path)
    result = loftq.quantize("builtin:tiny-llama", "base", **ONE_LAYER)
    assert isinstance(result, loftq.QuantizeResult)
    return result


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return path


def options_of(command: str) -> dict[str, Any]:
    """The options and arguments of a command by name, with their defaults, but for those of printing."""
    parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.name not in PRINTING}
    if "no_verify" in defaults:
        defaults["verify"] = not defaults.pop("no_verify")
    if "no_remote_code" in defaults:
        defaults["remote_code"] = not defaults.pop("no_remote_code")
    return defaults


@pytest.mark.parametrize("command", COMMANDS)
def test_the_keywords_of_a_function_are_the_options_of_its_command(command):
    parameters = dict(inspect.signature(getattr(loftq, command)).parameters)
    del parameters["observer"]
    assert parameters.keys() == options_of(command).keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_keyword_has_the_default_of_its_option(command):
    defaults = options_of(command)
    for name, parameter in inspect.signature(getattr(loftq, command)).parameters.items():
        if parameter.default is not parameter.empty and name != "observer":
            assert parameter.default == defaults[name], name


@pytest.mark.parametrize("command", COMMANDS)
def test_the_docstring_of_a_function_names_every_keyword(command):
    doc = inspect.getdoc(getattr(loftq, command)) or ""
    arguments = doc[doc.index("Args:") : doc.index("Returns:")]
    for name in inspect.signature(getattr(loftq, command)).parameters:
        assert f"{name}:" in arguments or f"{name}," in arguments, name


@pytest.mark.parametrize(
    "module",
    [
        "loftq_cli",
        "loftq_cli.api.arguments",
        "loftq_cli.api.calibrate",
        "loftq_cli.api.inspect",
        "loftq_cli.api.merge",
        "loftq_cli.api.observer",
        "loftq_cli.api.quantize",
        "loftq_cli.runtime.kernel_choice",
        "loftq_cli.triton_kernels.backend",
    ],
)
def test_examples_in_docstrings_do_what_they_say(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = doctest.testmod(import_module(module))
    assert outcome.attempted and not outcome.failed


@pytest.mark.parametrize(
    "program",
    [
        "import loftq_cli",
        "import loftq_cli as loftq; loftq.LoftqError; dir(loftq)",
        "import loftq_cli as loftq; assert loftq.quantize('builtin:tiny-llama', 'out', dry_run=True).layers",
    ],
)
def test_importing_and_planning_load_no_torch_and_no_command_line(program, tmp_path):
    check = (
        "; import sys; sys.exit(next((n for n in ('torch', 'typer', 'rich', 'transformers') if n in sys.modules), 0))"
    )
    done = subprocess.run([sys.executable, "-c", program + check], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())


def test_a_name_that_the_package_does_not_export_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        loftq.quantise  # noqa: B018


def test_every_exported_name_is_there():
    assert {name for name in loftq.__all__ if getattr(loftq, name, None) is None} == set()
    assert set(loftq.__all__) <= set(dir(loftq))


def test_quantize_writes_the_bytes_of_the_command_and_gives_its_figures(base, tmp_path):
    (tmp_path / "command").mkdir()
    options = [word for name, value in ONE_LAYER.items() for word in (f"--{name}", str(value))]
    line = [sys.executable, "-m", "loftq_cli", "quantize", "builtin:tiny-llama", "base", "--json", *options]
    done = subprocess.run(line, cwd=tmp_path / "command", capture_output=True, text=True, check=True)
    values = json.loads(done.stdout)
    assert files_of(tmp_path / "command" / "base") == files_of(tmp_path / "base")
    assert values["error"] == base.total.error
    assert values["plain_error"] == base.plain_error
    assert values["bits_per_weight"] == round(base.plan.bits_per_weight, 4)
    assert (values["layers"], values["verified"]) == (len(base.layers), base.verified)


def test_a_dry_run_plans_what_the_run_does(base):
    plan = loftq.quantize("builtin:tiny-llama", "other", dry_run=True, **ONE_LAYER)
    assert isinstance(plan, loftq.QuantizePlan)
    assert (plan.base_nbytes, plan.adapter_nbytes) == (base.plan.base_nbytes, base.plan.adapter_nbytes)
    assert [job.name for job in plan.layers] == [layer.name for layer in base.layers] == [WEIGHT]
    assert len(plan.jobs) == len(plan.layers) + len(plan.copies)
    assert sum(file.nbytes for file in plan.files) == plan.base_nbytes
    assert not plan.already_done and not Path("other").exists()


def test_the_same_call_again_gives_the_figures_of_the_first(base):
    again = loftq.quantize("builtin:tiny-llama", "base", **ONE_LAYER)
    assert isinstance(again, loftq.QuantizeResult)
    assert (again.already_done, base.already_done) == (True, False)
    assert (again.layers, again.total, again.adapter) == (base.layers, base.total, base.adapter)


def test_paths_and_sizes_are_taken_as_text_paths_and_numbers(base):
    sizes: list[str | int] = ["2MB", 2_000_000]
    plans = [
        loftq.quantize("builtin:tiny-llama", output, dry_run=True, max_shard_size=size, exclude=exclude, **ONE_LAYER)
        for output, size, exclude in zip(("out", Path("out")), sizes, ("mlp", ["mlp"]), strict=True)
    ]
    assert plans[0].files == plans[1].files
    assert len(plans[0].files) > 1
    assert plans[0].recipe.exclude == plans[1].recipe.exclude == ("mlp",)


def test_merge_gives_every_layer_and_nothing_is_done_twice(base):
    plan = loftq.merge("base", base.adapter, "merged", requantize="int8", group_size=32, dry_run=True)
    assert isinstance(plan, loftq.MergePlan)
    assert (plan.form, plan.layers, Path("merged").exists()) == ("int8", 1, False)
    result = loftq.merge("base", base.adapter, "merged", requantize="int8", group_size=32)
    assert isinstance(result, loftq.MergeResult)
    assert [layer.name for layer in result.layers] == [WEIGHT]
    assert result.retention is not None and result.retention > 0.9
    report = json.loads(Path("merged/loftq_merge_report.json").read_text())
    assert (report["retention"], tuple(report["notes"])) == (result.retention, result.notes)
    again = loftq.merge("base", base.adapter, "merged", requantize="int8", group_size=32)
    assert isinstance(again, loftq.MergeResult)
    assert (again.already_done, again.plan.nbytes, again.layers) == (True, result.plan.nbytes, ())


def test_inspect_gives_a_converted_directory_its_errors(base):
    reported = loftq.inspect("base")
    recomputed = loftq.inspect(Path("base"), against="builtin:tiny-llama")
    assert isinstance(reported, loftq.ConvertedInspection) and isinstance(recomputed, loftq.ConvertedInspection)
    assert (reported.recomputed, recomputed.recomputed) == (False, True)
    assert reported.total == base.total
    assert recomputed.total is not None and recomputed.total.error == pytest.approx(base.total.error, rel=1e-6)
    assert reported.worst is not None and reported.worst.tensor == WEIGHT


def test_inspect_tries_formats_on_a_full_precision_checkpoint():
    inspection = loftq.inspect("builtin:tiny-llama", try_="nf4", sort="error", top=2)
    assert isinstance(inspection, loftq.CheckpointInspection)
    assert len(inspection.tensors) == 2 < inspection.tensor_count
    worst = inspection.worst
    assert worst is not None and worst.error == inspection.tensors[0].errors["nf4"].error


def test_verifying_tells_the_observer_of_each_problem(base):
    class Problems(loftq.Observer):
        def __init__(self) -> None:
            self.names: list[str | None] = []

        def problem_found(self, problem, path):
            self.names.append(problem.file)

    assert loftq.inspect("base", verify=True).problems == ()
    Path("base/generation_config.json").write_text("{}")
    observer = Problems()
    verification = loftq.inspect("base", verify=True, observer=observer)
    assert observer.names == [problem.file for problem in verification.problems] == ["generation_config.json"]


def test_an_error_above_the_limit_is_a_quality_error(base):
    worst = base.layers[0].error.error
    loftq.inspect("base", fail_above=worst * 1.001)
    with pytest.raises(loftq.QualityError, match="is above"):
        loftq.inspect("base", fail_above=worst * 0.999)


def test_calibrate_tells_what_it_wrote(text, tmp_path):
    result = loftq.calibrate("builtin:tiny-llama", [text], tmp_path / "out", tokens=64, context=32, diagonal=True)
    values = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert (result.kind, result.tokens, result.context) == ("diagonal", 64, 32)
    assert (values["kind"], values["tokens"], len(values["inputs"])) == ("diagonal", 64, result.layers)


def test_an_observer_hears_of_a_conversion_in_order(tmp_path, monkeypatch):
    class Listening(loftq.Observer):
        def __init__(self) -> None:
            self.events: list[str] = []

        def started(self, plan):
            self.events.append(f"started {len(plan.layers)}")

        def layer_measured(self, name, done, total):
            self.events.append(f"measured {done} of {total}")

        def layer_started(self, name):
            self.events.append(f"layer {name}")

        def layer_converted(self, layer, *, resumed):
            self.events.append(f"converted {layer.name}")

    monkeypatch.chdir(tmp_path)
    observer = Listening()
    loftq.quantize("builtin:tiny-llama", "out", observer=observer, lora_budget="8kB", method="qlora",
                   include=ONE_LAYER["include"], threads=1)  # fmt: skip
    assert observer.events == ["measured 1 of 1", "started 1", f"layer {WEIGHT}", f"converted {WEIGHT}"]


REFUSED: list[tuple[Callable[[], object], str, str]] = [
    (lambda: loftq.quantize("builtin:tiny-llama", "out", max_memory="1GB"), "--max-memory bounds the memory of a GPU",
     "--device cuda"),
    (lambda: loftq.quantize("builtin:tiny-llama", "out", max_memory="1"), "less than 1 MB", "whole tensor"),
    (lambda: loftq.quantize("builtin:tiny-llama", "out", threads=0), "--threads 0 is too small", "1 or more"),
    (lambda: loftq.merge("base", "base/loftq_init", "out", threads=-1), "--threads -1 is too small", "1 or more"),
    (lambda: loftq.merge("base", "base/loftq_init", "out", device="tpu"), "--device 'tpu' does not exist", "auto|cpu"),
    (lambda: loftq.calibrate("builtin:tiny-llama", "base/config.json", "out", tokens=1), "--tokens 1 is too small",
     "2 or more"),
    (lambda: loftq.inspect("base", device="cuda:7"), "--device cuda:7 has nothing to compute", "--against ORIGINAL"),
    (lambda: loftq.inspect("base", threads=2), "--threads 2 has nothing to compute", "leave --threads out"),
    (lambda: loftq.inspect("builtin:tiny-llama", device="cuda"), "nothing to compute", "--try TYPE"),
    (lambda: loftq.inspect("builtin:tiny-llama", threads=2), "nothing to compute", "--try TYPE"),
    (lambda: loftq.inspect("base", reference="builtin:tiny-llama", text="base/config.json", device="cuda:7"),
     "--reference runs the models on the processor", "leave --device out"),
    (lambda: loftq.inspect("base", verify=True, fail_above=0.1), "--verify computes no errors for", "once"),
    (lambda: loftq.inspect("base", top=0), "--top 0 is too small", "1 or more"),
    (lambda: loftq.inspect("base", fail_above=float("nan")), "--fail-above nan is too small", "0 or more"),
    (lambda: loftq.inspect("base", context=64), "--context is for --reference", "--reference ORIGINAL"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message", "hint"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_an_option_that_means_nothing_is_refused_with_a_remedy(call, message, hint, base):
    with pytest.raises(loftq.UsageError) as caught:
        call()
    assert message in caught.value.message and hint in str(caught.value.hint)
    assert not Path("out").exists()


def test_the_command_line_refuses_the_same(base, run):
    for arguments, message in (
        (("quantize", "builtin:tiny-llama", "out", "--max-memory", "1GB"), "--max-memory bounds the memory of a GPU"),
        (("quantize", "builtin:tiny-llama", "out", "-q", "-v"), "--quiet and --verbose contradict each other"),
        (("inspect", "base", "--device", "cuda:7"), "--device cuda:7 has nothing to compute"),
        (("inspect", "base", "--threads", 2), "--threads 2 has nothing to compute"),
    ):
        status, out, err = run(*arguments)
        assert (status, out, message in err, len(err.splitlines())) == (2, "", True, 1), err


def test_remedies_that_are_named_work(base):
    loftq.quantize("builtin:tiny-llama", "out", max_memory="1GB", device="auto", **ONE_LAYER)
    loftq.inspect("base", against="builtin:tiny-llama", threads=2)
    loftq.inspect("builtin:tiny-llama", try_="nf4", threads=2, device="auto")


def test_too_little_memory_is_an_error_of_ours(monkeypatch):
    def short(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("loftq_cli.api.inspect.resolve_model", short)
    with pytest.raises(loftq.MemoryShortage):
        loftq.inspect("builtin:tiny-llama")
