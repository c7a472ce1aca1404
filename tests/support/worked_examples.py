"""The worked examples of a page, pasted into a copy of the repository as a newcomer would paste them.

A block below `<!-- file: PATH -->` is a whole new file. A `diff` block begins with `--- PATH`; the other lines are text
of the file, with lines added (+) and removed (-).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from support.pages import ROOT, Block, Page

_COPIED = ("loftq_cli", "triton_kernels", "configs", "tests", "pyproject.toml")


def paste(page: Page, directory: Path) -> list[Path]:
    """Copy the repository to `directory`, apply every example of `page`, and return the new test files."""
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__", "benchmarks"))
        else:
            shutil.copy(ROOT / name, directory / name)
    tests = []
    for block in page.blocks():
        if block.note.startswith("file: "):
            path = directory / block.note.removeprefix("file: ")
            assert not path.exists(), f"{page.name} writes {path.name}, which exists"
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            tests += [path] if path.name.startswith("test_") else []
    for block in page.blocks("diff"):
        _apply(block, directory)
    return tests


def _apply(block: Block, directory: Path) -> None:
    """Change one file. Raises AssertionError unless the old lines are in the file exactly once."""
    first, *lines = block.text.splitlines(keepends=True)
    assert first.startswith("--- "), f"a diff begins with {first!r}"
    path = directory / first.removeprefix("--- ").strip()
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} has these lines {text.count(old)} times:\n{old}"
    path.write_text(text.replace(old, new), encoding="utf-8")
