"""The README tells the truth: its commands run and print what it shows, its Python runs, its tables match the tool."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.conversions import loftq

from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.methods.method import METHODS
from loftq_cli.planning.recipe_files import presets

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def sessions() -> list[tuple[str, list[str]]]:
    """Every `$ command` of the console blocks with the lines shown below it, in order."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(blocks("console")).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line.strip():
            found[-1][1].append(line)
    return found


@pytest.fixture(scope="module")
def readers_directory(tmp_path_factory):
    """A directory in which the first command and then every shown command has been run, with what they printed."""
    directory = tmp_path_factory.mktemp("reader")
    shutil.copy(ROOT / "LICENSE", directory)  # the text that it calibrates with
    first = re.search(r"pip install \. && (loftq .*)", README)
    assert first is not None
    printed = {}
    for command in [first[1], *(command for command, _ in sessions())]:
        program, *arguments = shlex.split(command)
        assert program == "loftq"
        run = loftq(*arguments, cwd=directory)
        assert "Traceback" not in run.stderr
        printed[command] = run.stdout + run.stderr
    return directory, printed


def test_every_shown_line_is_printed_with_numbers_that_agree(readers_directory):
    _, printed = readers_directory
    assert len(sessions()) >= 8
    for command, shown in sessions():
        actual = {NUMBER.sub("#", " ".join(line.split())): line for line in printed[command].splitlines()}
        for line in shown:
            shape = NUMBER.sub("#", " ".join(line.split()))
            assert shape in actual, f"$ {command}\nnever prints: {line}\nbut:\n{printed[command]}"
            numbers = [float(n) for n in NUMBER.findall(line)]
            # Another CPU adds in another order: the third digit of an error may move, its first two may not.
            assert numbers == pytest.approx([float(n) for n in NUMBER.findall(actual[shape])], rel=0.02, abs=0.002)


def python(code: str, directory: Path) -> str:
    """What a Python program prints that a reader runs in their directory."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=directory, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_python_loads_the_result_for_training(readers_directory):
    directory, _ = readers_directory
    pytest.importorskip("peft")
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line]) == 4
    check = "\nassert any(p.requires_grad for p in model.parameters())\nmodel.print_trainable_parameters()"
    assert "trainable params: 221,184" in python(code + check, directory)


def test_what_our_modules_save_after_training_merges(readers_directory):
    directory, _ = readers_directory
    pytest.importorskip("transformers")
    loading, last = blocks("python")[1].rsplit("\n", 2)[0], blocks("python")[1].splitlines()[-1]
    train = """
import torch
trained = [p for p in model.parameters() if p.requires_grad]
assert len(trained) == 56
model(input_ids=torch.arange(64)[None], labels=torch.arange(64)[None]).loss.backward()
torch.optim.SGD(trained, lr=1e-3).step()
"""
    python(loading + train + last, directory)
    run = loftq("merge", "tiny-qalora", "tiny-trained", "tiny-merged-again", "--quiet", cwd=directory)
    assert run.returncode == 0, run.stderr
    assert "lost     0.00% of the update" in run.stdout


def test_the_tables_name_everything_that_exists():
    for name in (*presets(), *LAYOUTS, *(f"OUT/{method.adapter_dir}" for method in METHODS.values())):
        assert f"`{name}`" in README or f" {name}`" in README, name


def test_every_exit_status_is_documented():
    from loftq_cli import errors

    for name, status in vars(errors).items():
        if name.startswith("EXIT_"):
            assert re.search(rf"^\| {status} \|", README, re.MULTILINE), name


def test_the_perplexity_table_has_a_row_for_every_conversion_that_its_script_measures():
    script = (Path(__file__).parent / "benchmarks" / "quality.py").read_text()
    conversions = re.findall(r'^    "([^"]+)": \("--recipe"', script, re.MULTILINE)
    assert conversions
    for name in ("original, bfloat16", *conversions):
        assert re.search(rf"^\| {re.escape(name)} \| 0\.\d+ \| \d+\.\d+ \|", README, re.MULTILINE), name
