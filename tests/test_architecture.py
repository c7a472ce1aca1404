"""The house stands as it was drawn: imports go down, torch stays out of planning, tables match what exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import loftq_cli
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.methods.method import METHODS
from loftq_cli.planning.recipe_files import presets, resolve_recipe
from loftq_cli.quant.formats import FORMATS

ROOT = Path(__file__).parent.parent

PACKAGE = ROOT / "loftq_cli"
KERNELS = ROOT / "triton_kernels"


def modules() -> list[tuple[str, Path]]:
    """Dotted name and file of every module of the tool."""
    files = [p for p in PACKAGE.rglob("*.py") if "triton_kernels" not in p.parts]
    tool = [(p.relative_to(ROOT), p) for p in files]
    kernels = [(Path("loftq_cli") / p.relative_to(ROOT), p) for p in KERNELS.rglob("*.py")]
    return [(".".join(name.with_suffix("").parts).removesuffix(".__init__"), path) for name, path in tool + kernels]


def packages() -> list[tuple[str, Path]]:
    """Dotted name and folder of every package."""
    return [(name, path.parent) for name, path in modules() if path.name == "__init__.py"]


def imported(path: Path) -> set[str]:
    """Dotted names that a module imports: of modules, and of what is in them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def entries_of_map(folder: Path) -> list[str]:
    """The files and folders that the map in a package's `__init__.py` lists, in its order: lines of a name, two spaces
    or more, and a description.
    """
    head = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    return re.findall(r"^(\w+)(?:\.py|/)? {2,}\S", head, re.MULTILINE)


def rooms_in(folder: Path) -> set[str]:
    """The modules and packages of a folder, by name."""
    rooms = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/__init__.py")}
    return rooms - {"__init__", "__main__"} | ({"triton_kernels"} if folder == PACKAGE else set())


@pytest.mark.parametrize(("package", "folder"), packages(), ids=[name for name, _ in packages()])
def test_a_map_names_everything_in_its_folder(package, folder):
    assert sorted(entries_of_map(folder)) == sorted(rooms_in(folder))


@pytest.mark.parametrize(("package", "folder"), packages(), ids=[name for name, _ in packages()])
def test_a_room_imports_only_from_rooms_above_it_in_the_map(package, folder):
    order = {name: place for place, name in enumerate(entries_of_map(folder))}
    for module, path in modules():
        own = module.removeprefix(f"{package}.").split(".")[0]
        if not module.startswith(f"{package}.") or own == "__main__":
            continue
        for name in imported(path):
            other = name.removeprefix(f"{package}.").split(".")[0]
            if name.startswith(f"{package}.") and other in order and other != own:
                assert order[other] < order[own], f"{module} imports {name}"


def test_packages_of_the_project_file_are_those_on_disk():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted([*(name for name, _ in packages()), "loftq_cli.configs"])


@pytest.mark.parametrize("command", ["quantize", "merge", "inspect", "calibrate"])
def test_command_files_only_parse_call_and_print(command):
    path = PACKAGE / "cli" / f"{command}.py"
    assert len(path.read_text().splitlines()) < 100
    packages = {name.split(".")[1] for name in imported(path) if name.startswith("loftq_cli.")}
    assert packages <= {"api", "cli", "errors", "inspecting", "activations"}, packages


def test_the_version_is_that_of_the_project_file():
    assert loftq_cli.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_files_are_short_enough_to_read_at_once():
    for module, path in modules():
        lines = len(path.read_text().splitlines())
        assert lines <= 400 or module.startswith("loftq_cli.triton_kernels"), f"{module} has {lines} lines"


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_outside_packages_stay_in_their_place(module, path):
    top = {name.split(".")[0] for name in imported(path)}
    if not module.startswith("loftq_cli.cli"):
        assert not top & {"typer", "rich"}
    if not module.endswith("triton"):
        assert "triton" not in top
    if module != "loftq_cli.triton_kernels.cpu_kernels":
        assert not top & {"numba", "llvmlite"}
    if module not in ("loftq_cli.activations.transformers_models", "loftq_cli.activations.loader_question"):
        assert not top & {"transformers", "accelerate"}
    if module != "loftq_cli.checkpoint.patterns":
        assert "regex" not in top
    if module != "loftq_cli.allocation.integer_program":
        assert "scipy" not in top
    assert not top & {"peft", "bitsandbytes", "safetensors", "pickle"}
    if not module.startswith("loftq_cli.triton_kernels"):
        return
    assert all(n.startswith("loftq_cli.triton_kernels") for n in imported(path) if n.startswith("loftq_cli"))


def test_one_module_changes_the_disk() -> None:
    """So that a crash can be tried at each change. (Numba's cache of machine code is numba's.)"""
    changes = {"rename", "replace", "unlink", "rmdir", "mkdir", "makedirs", "rmtree", "copyfile", "truncate", "symlink"}
    changes |= {"write_text", "write_bytes", "ftruncate", "pwrite", "fsync", "removedirs", "touch", "link", "move"}
    for module, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or module.endswith("output.disk"):
                continue
            called = node.func
            if isinstance(called, ast.Attribute) and called.attr in changes:
                owner = called.value.id if isinstance(called.value, ast.Name) else ""
                is_text = called.attr == "replace" and owner not in ("os", "path")
                assert owner in ("disk", "dataclasses") or is_text, f"{path}:{node.lineno}"
            assert not (isinstance(called, ast.Name) and called.id == "open"), f"{path}:{node.lineno}"


def test_every_row_of_every_table_names_a_module_that_exists():
    rows = [*LAYOUTS.values(), *METHODS.values(), *FORMATS.values()]
    assert all(find_spec(row.module) for row in rows)


def test_every_method_names_a_class_that_trains_its_adapters():
    from loftq_cli import nn

    for entry in METHODS.values():
        assert getattr(nn, entry.linear_class)._is_pooled is entry.is_pooled


def test_every_preset_is_a_complete_recipe_with_a_summary():
    assert presets()
    for name, summary in presets().items():
        assert summary and not summary.endswith(".")
        assert resolve_recipe(name, {}).method in METHODS


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["quantize", "--help"],
        ["merge", "--help"],
        ["inspect", "--help"],
        ["calibrate", "--help"],
        ["--version"],
        ["quantize", "builtin:tiny-llama", "never-written", "--dry-run"],
        ["quantize", "builtin:tiny-llama", "never-written", "--dry-run", "--json", "-v"],
        ["quantize", "builtin:tiny-llama", "never-written", "--rank", "1000"],
        ["inspect", "builtin:tiny-llama"],
    ],
    ids=" ".join,
)
def test_helping_and_planning_do_not_import_torch(arguments, tmp_path):
    code = (
        "import sys; from loftq_cli.cli.main import _run; status = _run(sys.argv[1:]); "
        "sys.exit(99 if 'torch' in sys.modules else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.iterdir())


def test_the_first_lines_of_every_module_say_what_it_is_for():
    for module, path in modules():
        assert ast.get_docstring(ast.parse(path.read_text())), module


def test_nothing_is_left_to_do_in_the_code():
    for _, path in modules():
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text()), path
