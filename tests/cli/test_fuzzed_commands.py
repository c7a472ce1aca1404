"""Commands on recipes, statistics, adapters, names, texts and reports of any content: exit status 0 with a right
result, or one line of our own with another status. Nothing that looks finished is left by a refusal.

GGUF files, answers of a hub and pages of HTML are not read or written by this version, so nothing here feeds them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loftq_cli.activations.text_windows import cut_ids, read_text
from loftq_cli.checkpoint import patterns
from loftq_cli.cli.main import _run
from loftq_cli.errors import LoftqError
from loftq_cli.output.checksums import file_sha256, files_in, read_checksums
from loftq_cli.planning.recipe import RecipeFields

LAYERS = {"model.layers.0.self_attn.q_proj": (32, 64), "model.layers.0.mlp.up_proj": (64, 64)}
STATUSES = {2, 3, 4, 5, 6}  # of an error of our own
QUICK, MANY = 20, 200

Property = Callable[..., None]


def fuzzed(quick: int, many: int, **strategies: Any) -> Callable[[Property], tuple[Property, Property]]:
    """Two tests of a property: with `quick` examples, and, slow, with `many`."""

    def tests(function: Property) -> tuple[Property, Property]:
        made = []
        for count in (quick, many):
            options = settings(
                max_examples=count,
                deadline=None,
                derandomize=count == quick,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            made.append(options(given(**strategies)(function)))
        return made[0], pytest.mark.slow(made[1])

    return tests


def run(*arguments: object) -> tuple[int, str, str]:
    """A command in this process: (status, stdout, stderr). What escapes but our own errors is a bug."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = _run([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def check_said(status: int, out: str, err: str) -> None:
    """One line of an error beside a status of ours, and nothing that a terminal would take for a command."""
    assert status == 0 or status in STATUSES
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (status != 0), err
    for line in (out + err).split("\n"):
        assert line.isprintable(), line


def check_result(output: Path, status: int, model: Path) -> None:
    """A whole result with status 0, whose errors are those of its files; nothing with another status."""
    if status != 0:
        assert not output.exists()
        return
    assert sorted(os.listdir(output.parent)) == ["given", "out"]
    mark = read_checksums(output)
    assert mark is not None
    assert set(files_in(output)) == {*mark.files, "checksums.json"}
    assert all(file_sha256(output / name) == sha256 for name, sha256 in mark.files.items())
    reported, found = (
        json.loads(run("inspect", output, *against, "--json")[1]) for against in ((), ("--against", model))
    )
    for known, computed in zip(reported["layers"], found["layers"], strict=True):
        assert known["name"] == computed["name"]
        for key in ("base_error", "error"):
            expected, error = known["error"][key], computed["error"][key]
            assert (expected is None) == (error is None)
            assert expected is None or error == pytest.approx(expected, rel=1e-3, abs=1e-6)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """An empty folder with a folder `given` for inputs, in memory where there is room; it is the working directory."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as made, contextlib.chdir(made):
        (Path(made) / "given").mkdir()
        yield Path(made)


def save_model(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    """Hostile expressions run for a fiftieth of a second, so that many can be tried."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "_SECONDS", 0.02)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {f"{name}.weight": weight(*shape) for name, shape in LAYERS.items()}
    return save_model(tmp_path_factory.mktemp("model") / "model", {**tensors, "model.norm.weight": torch.ones(64)})


@pytest.fixture(scope="module")
def base(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("base") / "base"
    assert run("quantize", model, output, "--rank", 2, "--method", "qlora", "-q")[0] == 0
    return output


# Recipes

words = st.sampled_from(
    [
        *("loftq", "qlora", "qalora", "pissa", "nf4", "fp4", "int2", "int3", "int4", "int8", "float16", "bfloat16"),
        *("float32", "absmax", "search", "joint", "none", "weights", "random", "self", "principal", "zero", "exact"),
        *("fast", "bitsandbytes", "dense", "gptq", "mlx", "compressed-tensors", "metal", "5GB", "1MB", "0", "-1GB"),
        *("q_proj", "mlp", ".*", "(", "(a+)+!", "(([a-z._0-9]+)+)+!", "a{99999}", "[[a]", "../x", "/dev/zero"),
        *("\x7f", "\x1b[2J", "[bold]", "é\u202e", "\u2028", "%s{0}", ""),
    ]
)
numbers = st.sampled_from(
    [0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 256, -1, 10**9, 2**63, 10**30, 0.0, 0.3, 1.0, -1.5, 1e308]
)
scalars = words | numbers | st.booleans() | st.text(max_size=5)
values = scalars | st.lists(scalars, max_size=3)
keys = st.sampled_from([*RecipeFields.__dataclass_fields__, "max-shard-size", "Rank", "x"])
overrides = st.lists(
    st.dictionaries(
        st.sampled_from(
            ["match", "quantize", "quant_type", "group_size", "block_size", "double_quant", "rank", "alpha"]
        ),
        values,
        max_size=4,
    ),
    max_size=2,
)
LIKELY = {
    "method": st.sampled_from(["loftq", "qlora", "qalora", "pissa"]),
    "quant_type": st.sampled_from(["nf4", "fp4", "int4", "int8"]),
    "rank": st.sampled_from([1, 2, 8]),
    "fit": st.sampled_from(["loftq", "joint"]),
    "iterations": st.sampled_from([0, 1, 2]),
    "group_size": st.sampled_from([16, 32, 64]),
    "layout": st.sampled_from(["dense", "bitsandbytes", "gptq"]),
    "symmetric": st.booleans(),
    "calibration": st.sampled_from(["weights", "none"]),
}
recipes = st.tuples(
    st.fixed_dictionaries({}, optional=LIKELY), st.dictionaries(keys, values, max_size=2), overrides | st.just([])
)


def toml(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value, ensure_ascii=True) if isinstance(value, str) else repr(value).lower()


def recipe_text(recipe: tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]) -> str:
    lines = [f"{key} = {toml(value)}" for key, value in {**recipe[0], **recipe[1]}.items() if key != "override"]
    for override in recipe[2]:
        lines += ["[[override]]", *(f"{key} = {toml(value)}" for key, value in override.items())]
    return "\n".join(lines)


@fuzzed(QUICK, MANY, recipe=recipes)
def recipe_tests(model: Path, recipe: tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]) -> None:
    with folder() as place:
        (place / "given" / "r.toml").write_text(recipe_text(recipe), encoding="utf-8")
        said = run("quantize", model, "out", "--recipe", "given/r.toml", "-q")
        check_said(*said)
        check_result(place / "out", said[0], model)


test_a_recipe_of_any_content_makes_a_whole_result_or_one_line, test_many_recipes = recipe_tests


# Statistics

bad_numbers = st.sampled_from([0.0, -1.0, 1e-45, 1e38, 3.4e38, float("inf"), float("nan"), -0.0])
statistics_changes = st.fixed_dictionaries(
    {},
    optional={
        "format": st.sampled_from([0, 1, 2, 3, True, "2", None, 2.0]),
        "kind": st.sampled_from(["full", "diagonal", "", None, 1]),
        "tokens": st.sampled_from([0, 1, -1, 10**30, "1", None]),
        "inputs": st.sampled_from(
            [{}, [], {"a": "b"}, {f"{next(iter(LAYERS))}.weight": "h"}, {"model.norm.weight": "h"}, {"\x1b": "h"}]
        ),
        "statistics_sha256": st.sampled_from(["0" * 64, "", None]),
        "tool": st.sampled_from(["", "gptq", None]),
    },
)


@fuzzed(
    QUICK,
    MANY,
    changes=statistics_changes,
    edits=st.lists(st.tuples(st.integers(0, 2079), bad_numbers), max_size=3),
    numel=st.sampled_from([2080, 2080, 2080, 2080, 64, 64 * 64, 2079, 1, 0]),
    scale=st.sampled_from([1.0, 1.0, 0.0, 1e-30, 1e30, -1.0]),
    cut=st.sampled_from([0, 0, 0, 0, 1, 100]),
)
def statistics_tests(
    model: Path, changes: dict[str, Any], edits: list[tuple[int, float]], numel: int, scale: float, cut: int
) -> None:
    square = weight(256, 64, seed=1)
    matrix = square.T @ square * scale
    triangle = torch.cat([row[place:] for place, row in enumerate(matrix)])  # as numpy's triu_indices orders it
    assert np.array_equal(triangle, matrix.numpy()[np.triu_indices(64)])
    triangle = torch.cat([triangle, triangle])[:numel].clone()
    for at, number in edits:
        if at < numel:
            triangle[at] = number
    with folder() as place:
        directory = place / "given" / "statistics"
        directory.mkdir()
        path = directory / "statistics.safetensors"
        save_file({"h": triangle}, path)
        if cut:
            path.write_bytes(path.read_bytes()[:-cut])
        values = {
            "tool": "loftq-cli",
            "format": 2,
            "kind": "full",
            "tokens": 256,
            "inputs": {f"{name}.weight": "h" for name in LAYERS},
            "statistics_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            **changes,
        }
        (directory / "calibration.json").write_text(json.dumps(values))
        said = run("quantize", model, "out", "--calibration", directory, "--rank", 2, "--rounds", 1, "-q")
        check_said(*said)
        check_result(place / "out", said[0], model)
        if not changes and not edits and (numel, cut) == (2080, 0) and scale == 1.0:
            assert said[0] == 0, said[2]


test_statistics_of_any_content_make_a_whole_result_or_one_line, test_many_statistics = statistics_tests


# Adapters

adapter_changes = st.dictionaries(
    st.sampled_from(
        [
            *("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "peft_type", "bias", "use_dora"),
            *("use_rslora", "fan_in_fan_out", "modules_to_save", "layers_to_transform", "layers_pattern"),
            *("init_lora_weights", "exclude_modules", "base_model_name_or_path", "lora_bias", "task_type"),
        ]
    ),
    values | st.dictionaries(words, scalars, max_size=2) | st.none(),
    max_size=2,
)


@fuzzed(QUICK, MANY, changes=adapter_changes)
def adapter_tests(base: Path, changes: dict[str, Any]) -> None:
    with folder() as place:
        adapter = place / "given" / "adapter"
        shutil.copytree(base / "qlora_init", adapter)
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        said = run("merge", base, adapter, "out", "-q")
        check_said(*said)
        if said[0] != 0:
            assert not (place / "out").exists()
            return
        # The adapter of QLoRA starts at zero: whatever the config says, the merged weights are those of the base.
        merged = load_file(place / "out" / "model.safetensors")
        status, out, _ = run("inspect", "out", "--verify")
        assert (status, out.startswith("verified: ")) == (0, True)
        assert all(bool(torch.isfinite(merged[f"{name}.weight"]).all()) for name in LAYERS)
        expected = merged_base(base)
        assert all(torch.equal(merged[f"{name}.weight"], expected[f"{name}.weight"]) for name in LAYERS)


_MERGED: dict[Path, dict[str, torch.Tensor]] = {}


def merged_base(base: Path) -> dict[str, torch.Tensor]:
    """The weights of a merge of the untouched adapter."""
    if base not in _MERGED:
        with folder() as place:
            assert run("merge", base, base / "qlora_init", "out", "-q")[0] == 0
            _MERGED[base] = load_file(place / "out" / "model.safetensors")
    return _MERGED[base]


test_an_adapter_config_of_any_content_merges_rightly_or_is_one_line, test_many_adapter_configs = adapter_tests


# Names of tensors, which choose the blocks, the layers to quantize and the family

pieces = st.sampled_from(
    [
        *(
            "model",
            "layers",
            "h",
            "0",
            "1",
            "00",
            "-1",
            "²",
            "٣",
            "9" * 30,
            "1e5",
            "self_attn",
            "q_proj",
            "mlp",
            "experts",
        ),
        *(
            "up_proj",
            "attn",
            "c_attn",
            "encoder",
            "block",
            "lm_head",
            "embed_tokens",
            "",
            " ",
            "\x1b[31m",
            "[red]",
            "[/]",
        ),
        *("a\nb", "\u202e", "\ud7ff", "\x00", "..", "/", "x" * 300, "weight", "lora_A", "absmax", "qweight", "%s{}"),
    ]
)
names = st.lists(pieces, min_size=1, max_size=6).map(".".join)


@fuzzed(
    QUICK, MANY, stems=st.lists(names, min_size=1, max_size=4, unique=True), ending=st.sampled_from([".weight", ""])
)
def name_tests(stems: list[str], ending: str) -> None:
    with folder() as place:
        tensors = {f"{stem}{ending}": weight(32, 64, seed=i) for i, stem in enumerate(stems)}
        model = save_model(place / "given" / "model", {**tensors, "model.layers.0.mlp.up_proj.weight": weight(64, 64)})
        for arguments in (("inspect", model), ("inspect", model, "--json"), ("inspect", model, "--verify")):
            said = run(*arguments)
            check_said(*said)
        said = run("quantize", model, "out", "--rank", 2, "--method", "qlora")
        check_said(*said)
        check_result(place / "out", said[0], model)


test_names_of_any_kind_are_converted_or_one_line, test_many_names = name_tests


# Texts


class Letters:
    """A tokenizer that gives the UTF-8 bytes of a text, and a chat template that joins the contents."""

    def __call__(self, text: str | list[str], **options: object) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [list(part.encode()) for part in text]}
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: object) -> str:
        return "".join(message["role"] + message["content"] for message in messages)


letters = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
records = st.one_of(
    letters.map(lambda text: {"text": text}),
    st.tuples(letters, letters).map(lambda pair: {"prompt": pair[0], "completion": pair[1]}),
    st.lists(letters.map(lambda text: {"role": "user", "content": text}), max_size=3).map(lambda m: {"messages": m}),
    st.recursive(
        st.none() | st.booleans() | st.integers() | letters | st.just("\ud800"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "messages"]), inner),
        max_leaves=6,
    ),
)
ends = st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"])


@fuzzed(
    150,
    5_000,
    lines=st.lists(records, max_size=6),
    end=ends,
    escaped=st.booleans(),
    raw=st.binary(max_size=12),
    by_line=st.booleans(),
)
def text_tests(lines: list[Any], end: str, escaped: bool, raw: bytes, by_line: bool) -> None:
    encoded = [json.dumps(line, ensure_ascii=escaped).encode("utf-8", "surrogatepass") for line in lines]
    with folder() as place:
        path = place / "given" / "text.jsonl"
        path.write_bytes(end.encode().join(encoded) + (end.encode() + raw if len(raw) > 9 else b""))
        try:
            windows = cut_ids(
                [read_text(path)], Letters(), tokens=1000, context=100, lines=by_line, longest=None, vocabulary=None
            )
        except LoftqError as error:
            assert str(error).isprintable() and "text.jsonl" in str(error)
            texts = [line.get("text") if isinstance(line, dict) else None for line in lines]
            plain = all(isinstance(text, str) and text.isascii() and len(text) > 2 for text in texts)
            assert not (lines and plain and len(raw) <= 9), f"a plain text was refused: {error}"
            return
        assert all(len(window) == length <= 100 for length, group in windows.items() for window in group)
        if not by_line and len(raw) <= 9 and all(isinstance(line, dict) and len(line) == 1 for line in lines):
            whole = b"".join(line["text"].encode() for line in lines if isinstance(line.get("text"), str))
            read = b"".join(bytes(window) for group in windows.values() for window in group)
            only_texts = all(isinstance(line.get("text"), str) for line in lines)
            assert not only_texts or (whole.startswith(read) and len(read) > len(whole) - 100)


test_a_file_of_conversations_of_any_content_is_read_or_refused, test_many_conversations = text_tests


def test_a_line_of_conversations_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    """JSON texts may hold separators that Python counts as ends of lines."""
    text = "one\u2028two\x85three\u2029four"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    windows = cut_ids(
        [read_text(tmp_path / "a.jsonl")], Letters(), tokens=64, context=64, lines=True, longest=None, vocabulary=None
    )
    assert [bytes(window).decode() for group in windows.values() for window in group] == [text]


# Reports as they are shown

report_values = scalars | st.none() | st.lists(scalars, max_size=2) | st.dictionaries(words, scalars, max_size=2)


@fuzzed(
    QUICK, MANY, key=st.sampled_from(["layers", "recipe", "adapter_dir", "notes"]), value=report_values, data=st.data()
)
def report_tests(base: Path, key: str, value: Any, data: st.DataObject) -> None:
    report = json.loads((base / "loftq_report.json").read_text())
    layer = report["layers"][0]
    if key == "layers":
        inner = data.draw(st.sampled_from([*layer]))
        layer[inner] = value
        if isinstance(value, str) and inner == "name":
            layer["module"] = value
    else:
        report[key] = value
    with folder() as place:
        shutil.copytree(base, place / "out")
        (place / "out" / "loftq_report.json").write_text(json.dumps(report))
        said = run("inspect", "out")
        check_said(*said)
        status, out, err = run("inspect", "out", "--json")
        check_said(status, out, err)
        assert status == said[0]
        assert status != 0 or json.loads(out)["layers"]
        check_said(*run("inspect", "out", "--verify"))


test_a_report_of_any_content_is_shown_or_one_line, test_many_reports = report_tests


# A terminal

TERMINAL = """
import sys
from loftq_cli.cli.start import main
main()
"""
HOSTILE_NAMES = (
    *(
        "\x1b]0;owned\x07",
        "\x1b[2J\x1b[31m",
        "[red]red[/red]",
        "[/]",
        "[link=http://x]x[/link]",
        "[bold",
        "\r\nerror: ",
    ),
    *("\u202etxt", "\x9b31m", "\x00", "{task.fields[peak]}", "%s%n", ":skull:"),
)


def test_names_reach_a_terminal_as_text(tmp_path: Path) -> None:
    """Bars and tables of rich, on a pseudo-terminal: no control character and no markup of a name takes effect."""
    tensors = {f"model.layers.{n}.{name}.q_proj.weight": weight(32, 64, seed=n) for n, name in enumerate(HOSTILE_NAMES)}
    model = save_model(tmp_path / "model", tensors)
    shown = ""
    for arguments in (["quantize", model, tmp_path / "out", "--rank", "2", "-v"], ["inspect", model]):
        master, terminal = os.openpty()
        command = [sys.executable, "-c", TERMINAL, *map(str, arguments)]
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
        process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
        os.close(terminal)
        with contextlib.suppress(OSError):  # the end of a terminal is an error on Linux
            while part := os.read(master, 1 << 16):
                shown += part.decode("utf-8", "replace")
        os.close(master)
        assert process.wait() == 0, shown
    for obeyed in ("\x1b]0;owned", "\x1b[2J", "\x9b", "\u202e", "\x00", "\x07", "💀", "\r\nerror: "):
        assert obeyed not in shown
    for text in ("[red]red[/red]", "[/]", "[bold", "\\x1b]0;owned\\x07", "{task.fields[peak]}", ":skull:"):
        assert text in shown
