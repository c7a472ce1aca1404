"""Mutants: a file with one changed function each. mutmut makes the changes, mypy refuses some."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".mutants"  # hidden: tests read every page of the other folders
TREE = WORK / "tree"
PACKAGES = ("output", "checkpoint", "merging")
_COPIED = ("loftq_cli", "triton_kernels", "configs", "tests", "README.md", "CHANGELOG.md", "pyproject.toml")


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change in one function."""

    file: str  # "loftq_cli/output/disk.py"
    function: str  # "resize", or "Writer.write"
    key: str  # "loftq_cli/output/disk.py resize: a + b → a - b", with " #2" where a function has several such
    line: int  # of the change in the file
    text: str  # the file's function with the change
    generated: str  # mutmut's name, for mypy

    @property
    def is_wording(self) -> bool:
        """Whether only the letters of a sentence changed: texts of messages are compared in parts only."""
        before, after = self.key.partition(": ")[2].removesuffix(" #2").split(" → ", 1)
        return before.lower() == after.replace("XX", "").lower() and any(
            " " in piece for quote in ('"', "'") for piece in before.split(quote)[1::2]
        )


def copy_tree() -> None:
    """Copy what the tests need to TREE, afresh: mutants are written there, and tests run there."""
    shutil.rmtree(TREE, ignore_errors=True)
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, TREE / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            TREE.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, TREE / name)


def all_mutants() -> list[Mutant]:
    """The mutants of all packages in PACKAGES, in the order of the files. Cached by the bytes of the files."""
    cache = WORK / f"made-{_hash()}.json"
    if not cache.is_file():
        found = [mutant for path in _files() for mutant in _mutants_of(path)]
        cache.write_text(json.dumps([asdict(mutant) for mutant in found]))
    return [Mutant(**record) for record in json.loads(cache.read_text())]


def refused_by_mypy(mutants: list[Mutant]) -> set[str]:
    """Keys among `mutants` that mypy refuses. All mutants of a file stand beside each other in one file for mypy."""
    cache = WORK / f"refused-{_hash()}.json"
    if not cache.is_file():
        cache.write_text(json.dumps(sorted(_run_mypy(all_mutants()))))
    return set(json.loads(cache.read_text())) & {mutant.key for mutant in mutants}


def _files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / "loftq_cli" / package).glob("*.py"))]


def _hash() -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in [*_files(), Path(__file__)])).hexdigest()[:12]


def _generate(path: Path) -> Any:
    """mutmut's answer: `code`, every function and its mutants beside each other, and where each mutant lies."""
    from mutmut.mutation.file_mutation import mutate_file_contents

    return mutate_file_contents(str(path.relative_to(ROOT)), path.read_text())


def _mutants_of(path: Path) -> Iterator[Mutant]:
    made, source = _generate(path), path.read_text()
    lines, spans = made.code.splitlines(), made.line_span_by_function_name
    starts = {name: node.lineno for name, node in functions(ast.parse(source))}
    seen: Counter[str] = Counter()
    for name in made.mutant_names:
        mangled = name.partition("__mutmut_")[0]
        function = mangled.removeprefix("x_") if mangled.startswith("x_") else ".".join(mangled.split("ǁ")[1:])
        bare = function.rpartition(".")[2]
        original, changed = (
            [line.replace(f"def {found}(", f"def {bare}(") for line in _span(lines, spans[found])]
            for found in (f"{mangled}__mutmut_orig", name)
        )
        place, before, after = _difference(original, changed)
        key = f"{path.relative_to(ROOT)} {function}: {before} → {after}"
        seen[key] += 1
        key += f" #{seen[key]}" if seen[key] > 1 else ""
        line = starts[function] + place
        yield Mutant(str(path.relative_to(ROOT)), function, key, line, "\n".join(changed) + "\n", name)


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions of a module, and the methods of its classes, with the name."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


def _span(lines: list[str], span: Any) -> list[str]:
    """The lines of a function, without decorators and comments above."""
    found = lines[span.start - 1 : span.end]
    while not found[0].lstrip().startswith("def "):
        found = found[1:]
    return found


def _difference(original: list[str], changed: list[str]) -> tuple[int, str, str]:
    """The place of the first changed line, and the changed lines before and after, as one line each."""
    matcher = SequenceMatcher(None, original, changed, autojunk=False)
    blocks = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    first, last = blocks[0], blocks[-1]
    parts = original[first[1] : last[2]], changed[first[3] : last[4]]
    before, after = (" ".join(line.strip() for line in part) for part in parts)
    return first[1], before, after


def _run_mypy(mutants: list[Mutant]) -> set[str]:
    """mypy over a tree where every function has its mutants beside it. An error that the unchanged function has there
    as well does not count.
    """
    tree = WORK / "types"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT / "loftq_cli", tree / "loftq_cli", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "triton_kernels", tree / "loftq_cli" / "triton_kernels")
    made = {str(path.relative_to(ROOT)): _generate(path) for path in _files()}
    for name, file in made.items():
        (tree / name).write_text(file.code)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--output", "json"]
    run = subprocess.run(command, cwd=tree, env={**os.environ, "MYPYPATH": str(tree)}, capture_output=True, text=True)
    keys = {(mutant.file, mutant.generated): mutant.key for mutant in mutants}
    errors: dict[tuple[str, str], set[str]] = {}
    for line in run.stdout.splitlines():
        report = json.loads(line)
        for name, span in made[report["file"]].line_span_by_function_name.items() if report["file"] in made else ():
            if report["severity"] == "error" and span.start <= report["line"] <= span.end:
                errors.setdefault((report["file"], name), set()).add(report["message"])
    unchanged = {
        (file, name): errors.get((file, f"{name.partition('__mutmut_')[0]}__mutmut_orig"), set())
        for file, name in errors
    }
    return {keys[place] for place, found in errors.items() if place in keys and found - unchanged[place]}
