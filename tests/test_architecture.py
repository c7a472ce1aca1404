"""The house stands as it was drawn: imports go down, torch stays out of planning, tables match what exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.methods.method import METHODS
from loftq_cli.quant.formats import FORMATS
from loftq_cli.recipe import presets, resolve_recipe

ROOT = Path(__file__).parent.parent

# Higher imports from lower, and from its own floor only inside one package.
FLOORS = [
    ("errors", "knapsack"),
    ("tensors", "workers", "rows", "device", "hf"),
    ("triton_kernels", "findings"),
    ("checkpoint", "quant", "lowrank", "metrics", "kernels"),
    ("methods", "layouts", "schedule", "device_matrix", "text_windows", "streamed_model"),
    ("recipe", "family"),
    ("targets",),
    ("plan", "base_model"),
    ("report",),
    ("jobs", "model_files", "inspection", "adapter_source", "provenance"),
    ("device_jobs", "calibration", "reference", "error_curves"),
    ("candidates",),
    ("allocation",),
    ("convert", "merge_form", "nn"),
    ("merge_plan",),
    ("merge_report",),
    ("merge", "consistency"),
    ("verification",),
    ("cli",),
    ("__main__",),
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules() -> list[tuple[str, Path]]:
    files = [p for p in (ROOT / "loftq_cli").rglob("*.py") if "triton_kernels" not in p.parts]
    tool = [(p.relative_to(ROOT).with_suffix("").as_posix(), p) for p in files]
    kernels = [(f"loftq_cli/triton_kernels/{p.stem}", p) for p in (ROOT / "triton_kernels").glob("*.py")]
    return [(name.replace("/", "."), path) for name, path in tool + kernels]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor_name(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_go_down_only(module, path):
    own = floor_name(module)
    if own in ("", "__init__"):
        return
    for name in imported(path):
        other = floor_name(name) if name.startswith("loftq_cli.") else None
        if other is None or other == "__version__" or other == own:
            continue
        if other not in FLOOR_OF:  # `from loftq_cli import convert`
            continue
        assert FLOOR_OF[other] < FLOOR_OF[own], f"{module} imports {name}"


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_outside_packages_stay_in_their_place(module, path):
    top = {name.split(".")[0] for name in imported(path)}
    if not module.startswith("loftq_cli.cli"):
        assert not top & {"typer", "rich"}
    if not module.endswith("_triton"):
        assert "triton" not in top
    if module != "loftq_cli.triton_kernels.cpu_kernels":
        assert not top & {"numba", "llvmlite"}
    if module != "loftq_cli.hf":
        assert not top & {"transformers", "accelerate"}
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
            if not isinstance(node, ast.Call) or module.endswith("checkpoint.disk"):
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
