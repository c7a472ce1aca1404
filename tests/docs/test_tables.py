"""Tables of the pages name everything that exists, and nothing else."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest
from support.pages import ROOT, pages

from loftq_cli import errors
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.methods.method import METHODS
from loftq_cli.planning.recipe_files import presets
from loftq_cli.triton_kernels.backend import BACKENDS

KERNELS = ROOT / "triton_kernels"
FIGURES = ROOT / "tests" / "benchmarks" / "figures"


def table(page: str, *heading: str) -> list[list[str]]:
    """The rows of the one table of a page with this heading."""
    (rows,) = [rows for rows in pages()[page].tables() if rows[0][: len(heading)] == list(heading)]
    return rows[1:]


def in_code(cells: list[str]) -> set[str]:
    """Words that cells have in backquotes."""
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize("page", ["README.md", "configs/README.md"])
def test_recipes_of_the_table_are_the_presets(page):
    assert in_code([row[0] for row in table(page, "recipe")]) == set(presets())


def test_bits_and_ranks_of_the_recipes_are_those_of_the_files():
    for name, _, base, container, adapter in table("configs/README.md", "recipe"):
        recipe = tomllib.loads((ROOT / "configs" / f"{name.split('`')[1]}.toml").read_text())
        kind, size = ("block", recipe["block_size"]) if "block_size" in recipe else ("group", recipe["group_size"])
        assert base == f"{recipe['quant_type'].upper()}, {kind} {size}"
        assert (container, adapter) == (recipe["layout"], f"rank {recipe['rank']}")


def test_containers_and_adapter_folders_of_the_table_are_those_of_the_tool():
    writers = in_code([row[0] for row in table("README.md", "written by")])
    assert {name.removeprefix("--layout ") for name in writers if name.startswith("--layout")} == set(LAYOUTS)
    folders = {name.removeprefix("OUT/") for name in writers if name.startswith("OUT/")}
    assert folders == {method.adapter_dir for method in METHODS.values()}


def test_exit_statuses_of_the_table_are_those_of_the_tool():
    statuses = {str(value) for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {row[0] for row in table("README.md", "exit status")} == statuses


def test_every_promise_names_tests_and_holes_that_exist():
    folders = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    folders |= {path.name for path in (ROOT / "tests").rglob("*") if path.is_dir()}
    text = pages()["SECURITY.md"].text
    described = re.findall(r"^- \*\*(\w)\*\* ", text, re.MULTILINE)
    rows = table("SECURITY.md", "", "promise")
    assert [row[0] for row in rows] == [str(number) for number in range(1, 17)]
    assert in_code([row[3] for row in rows]) <= folders
    assert {hole for row in rows for hole in re.findall(r"\w", row[2])} == set(described)
    assert len(described) == len(set(described))


def test_operations_of_the_kernel_table_are_the_folders_with_their_backends():
    rows = table("triton_kernels/README.md", "operation")
    folders = {path.parent.name for path in KERNELS.glob("*/contract.py")}
    assert in_code([row[0] for row in rows]) == folders
    for name, _, backends in rows:
        operation = name.split("`")[1]
        own = sorted(key for key, operations in BACKENDS["cpu"].items() if operation in operations)
        assert backends.split(", ") == own
        assert all((KERNELS / operation / f"{backend}.py").is_file() for backend in own)


def test_files_that_contributing_names_exist():
    text = re.sub(r"```.*?```", "", pages()["CONTRIBUTING.md"].text, flags=re.DOTALL)
    for name in set(re.findall(r"`([\w./]+\.(?:py|toml|md))`", text)):
        assert (ROOT / name).exists() or (ROOT / "loftq_cli" / name).exists(), name


def test_the_perplexity_tables_have_a_row_for_every_conversion_that_the_script_measures():
    script = ast.parse((ROOT / "tests" / "benchmarks" / "quality.py").read_text())
    constants = [node for node in script.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    values = {node.targets[0].id: node.value for node in constants}
    for name, heading in (("CONVERSIONS", "model"), ("FORMATS", "`builtin:tiny-llama`")):
        conversions = [key.value for key in values[name].keys]
        names = [row[0] for row in table("tests/benchmarks/README.md", heading)]
        assert [row for row in names if row != "original, bfloat16"] == conversions


@pytest.mark.parametrize(("rows", "heading"), [("rows", "model"), ("formats", "`builtin:tiny-llama`")])
def test_the_perplexity_tables_show_the_measured_numbers(rows, heading):
    measured = {row["model"]: row for row in json.loads((FIGURES / "quality.json").read_text())[rows]}
    original = measured["original, bfloat16"]["perplexity"]
    for name, *cells in table("tests/benchmarks/README.md", heading):
        row = measured[name]
        above = f"{row['perplexity'] / original - 1:+.2%}" if row["error"] else ""
        assert cells[-3:] == [f"{row['error']:.4f}", f"{row['perplexity']:.4f}", above]


def test_the_table_of_the_real_language_model_shows_the_measured_numbers_beside_qlora():
    measured = json.loads((FIGURES / "language_model.json").read_text())["rows"]
    (peer,) = [row["scores"] for row in measured if row["variant"] == "QLoRA, NF4"]
    cells = table("tests/benchmarks/README.md", "SmolLM2-135M")
    assert [name for name, *_ in cells] == [row["variant"] for row in measured]
    for row, (_, error, *kls, adapted_perplexity, base_perplexity) in zip(measured, cells, strict=True):
        scores = row["scores"]
        pairs = [(scores[text][key], peer[text]["base_kl"]) for text in "AB" for key in ("adapted_kl", "base_kl")]
        assert error == f"{row['error']:.4f}"
        assert kls == [f"{kl:.3f} ({kl / qlora:.2f})" for kl, qlora in pairs]
        perplexities = scores["A"]["adapted_perplexity"], scores["A"]["base_perplexity"]
        assert (adapted_perplexity, base_perplexity) == tuple(f"{value:.2f}" for value in perplexities)


def test_pages_name_no_path_of_a_machine():
    for page in pages().values():
        assert not re.search(r"(?<![\w.])/(?:home|root|work|Users|tmp)/", page.text), page.name
        assert str(Path.home()) not in page.text
