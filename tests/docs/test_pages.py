"""The pages tell the truth: commands run and print what the pages show, Python runs, links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import ROOT, pages
from support.reader import Reader, Shelf, Step, steps
from support.worked_examples import paste

NUMBER = re.compile(r"\d+(?:\.\d+)?")

# Pages without commands and Python have nothing to run.
FOLLOWED = [name for name, page in pages().items() if steps(page)]

# Line that loads a model for training -> what a reader looks at after the line.
LOADS = 'model = PeftModel.from_pretrained(model, "tiny-nf4", subfolder="loftq_init", is_trainable=True)\n'
LOOK_AT_PARAMETERS = """
assert any(parameter.requires_grad for parameter in model.parameters())
model.print_trainable_parameters()
"""

# Line that saves a trained adapter -> what a reader does before the line.
SAVES = 'save_adapter(model, "tiny-trained")\n'
TRAIN = """
import torch
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
assert len(trained) == 56
model(input_ids=torch.arange(64)[None], labels=torch.arange(64)[None]).loss.backward()
torch.optim.SGD(trained, lr=1e-3).step()
"""


def with_checks(code: str) -> str:
    """Python of a page with what a reader does between the lines."""
    return code.replace(LOADS, LOADS + LOOK_AT_PARAMETERS).replace(SAVES, TRAIN + SAVES)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="session")
def repository_with_examples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A copy of the repository with the worked examples of CONTRIBUTING.md, and the tests of the examples."""
    directory = tmp_path_factory.mktemp("contributor")
    return directory, paste(pages()["CONTRIBUTING.md"], directory)


@pytest.fixture(scope="session")
def followed(shelf, tmp_path_factory, request):
    """Page name -> (directory of the reader, steps with the printed text); each page is followed once."""
    done: dict[str, tuple[Path, list[tuple[Step, str]]]] = {}

    def follow(name: str) -> tuple[Path, list[tuple[Step, str]]]:
        if name not in done:
            pytest.importorskip("peft")
            directory = tmp_path_factory.mktemp("reader")
            environment = {}
            if name == "CONTRIBUTING.md":
                environment["PYTHONPATH"] = str(request.getfixturevalue("repository_with_examples")[0])
            reader = Reader(directory, shelf, with_checks, environment)
            done[name] = (directory, reader.follow(pages()[name]))
        return done[name]

    return follow


@pytest.mark.parametrize("name", FOLLOWED)
def test_every_shown_line_is_printed_with_numbers_that_agree(name, followed):
    for step, printed in followed(name)[1]:
        actual = {NUMBER.sub("#", " ".join(line.split())): line for line in printed.splitlines()}
        for line in step.shown:
            shape = NUMBER.sub("#", " ".join(line.split()))
            assert shape in actual, f"$ {step.command}\nnever prints: {line}\nbut:\n{printed}"
            numbers = [float(n) for n in NUMBER.findall(line)]
            # Another CPU adds in another order: the third digit of an error may move, its first two may not.
            assert numbers == pytest.approx([float(n) for n in NUMBER.findall(actual[shape])], rel=0.02, abs=0.002)


def test_the_front_page_begins_with_the_two_commands_that_machines_call():
    lines = [line for block in pages()["README.md"].blocks("sh") for line in block.text.splitlines()]
    first = "pip install '.[hf]' && loftq quantize builtin:tiny-llama tiny-nf4 --text self"
    assert lines == [first, "pip install '.[test]' && pytest"]


def test_pages_show_enough_to_be_worth_running():
    commands = {step.command for page in pages().values() for step in steps(page)}
    assert {"README.md", "configs/README.md", "CONTRIBUTING.md"} <= set(FOLLOWED)
    assert {command.split()[1] for command in commands if command} == {"quantize", "merge", "inspect", "calibrate"}


def test_four_lines_load_the_result_for_training(followed):
    code = pages()["README.md"].blocks("python")[0].text
    assert len([line for line in code.splitlines() if line]) == 4
    assert code.endswith(LOADS)
    assert any("trainable params: 221,184" in printed for _, printed in followed("README.md")[1])


def test_an_adapter_is_trained_before_a_page_merges_it():
    page = pages()["loftq_cli/merging/README.md"]
    codes = [step.code or "" for step in steps(page)]
    assert sum(TRAIN in with_checks(code) for code in codes) == 1


def test_the_worked_examples_of_contributing_pass_their_tests(repository_with_examples):
    directory, tests = repository_with_examples
    assert len(tests) == 4
    architecture = directory / "tests" / "test_architecture.py"
    maps = [
        "test_a_map_names_everything_in_its_folder",
        "test_a_room_imports_only_from_rooms_above_it_in_the_map",
        "test_files_are_short_enough_to_read_at_once",
    ]
    command = [sys.executable, "-m", "pytest", "-q", *map(str, tests), *(f"{architecture}::{name}" for name in maps)]
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    run = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:]


def test_the_worked_examples_of_contributing_change_no_default(repository_with_examples, tmp_path):
    command = [sys.executable, "-m", "loftq_cli", "quantize", "builtin:tiny-llama", "base", "--dry-run"]
    plans = [
        subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        for tree in (ROOT, repository_with_examples[0])
    ]
    assert plans[0].stdout
    assert (plans[0].stdout, plans[0].stderr) == (plans[1].stdout, plans[1].stderr)


@pytest.mark.parametrize("name", pages())
def test_every_link_between_pages_leads_to_a_file_and_a_heading(name):
    page = pages()[name]
    for link in page.links():
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.path.parent / path).resolve() if path else page.path
        assert target.exists(), f"{name}: {link}"
        assert target.is_relative_to(ROOT), f"{name}: {link} leads out of the repository"
        if anchor:
            assert anchor in pages()[target.relative_to(ROOT).as_posix()].anchors(), f"{name}: {link}"


@pytest.mark.parametrize("name", pages())
def test_a_page_is_reached_from_the_front_page(name):
    reached, waiting = {"README.md"}, ["README.md"]
    while waiting:
        page = pages()[waiting.pop()]
        for link in page.links():
            path = (page.path.parent / link.partition("#")[0]).resolve()
            target = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
            if target in pages() and target not in reached:
                reached.add(target)
                waiting.append(target)
    assert name in reached
