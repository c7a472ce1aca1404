"""What the page of the training modules and their docstrings show runs as it stands there."""

from __future__ import annotations

import doctest
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import loftq_cli.nn

PAGE = (Path(loftq_cli.nn.__file__).parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^\$ (loftq .*)$", PAGE, re.MULTILINE)
MODULES = sorted(path.stem for path in Path(loftq_cli.nn.__file__).parent.glob("*.py") if path.stem != "__init__")
WITH_EXAMPLES = {
    *("attach", "fake_quantized_linear", "loftq_linear", "lora_weights", "option_types", "qalora_linear"),
    "quantized_linear",
}


def test_the_programs_of_the_page_run_one_after_the_other(run, tmp_path):
    assert len(BLOCKS) == 5 and len(COMMANDS) == 1
    for command in COMMANDS:
        status, _, printed = run(*shlex.split(command)[1:], "--quiet")
        assert status == 0, printed

    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), {})

    saved = {path.name for path in tmp_path.iterdir()}
    assert {"converted", "attached-adapter", "trained-adapter"} <= saved


def test_the_page_names_everything_that_the_package_exports():
    assert [name for name in loftq_cli.nn.__all__ if name.endswith("Linear") and name.startswith(("LoftQ", "Q"))]
    for name in ("LoftQLinear", "QLoRALinear", "QALoRALinear", "attach", "load_adapted", "replace_lora_weights"):
        assert name in loftq_cli.nn.__all__
        assert f"`{name}`" in PAGE, name


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_give_what_they_show(name):
    found = doctest.testmod(import_module(f"loftq_cli.nn.{name}"))

    assert found.failed == 0
    assert (found.attempted > 0) == (name in WITH_EXAMPLES)
