"""The text the built-in model is trained on and the text it is scored on, both from the running Python's own library.

Reads the interpreter's own files only: no download, no tokenizing, no shuffling.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import inspect
import pydoc_data.topics
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

DOCUMENT_END = "\0"
"""Stands between two documents of the training text; no Python source can hold it."""

PROSE_REPEATS = 5
"""How often each docstring occurs beside the source it came from: the held-out text is prose, most source is not."""

# Tests and IDLE are repetitive, the rest is tables (codecs, grammars, entities, build variables) or the held-out text.
_SKIPPED_DIRECTORIES = frozenset(
    {"__pycache__", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}
)
_SKIPPED_STEMS = ("_sysconfigdata", "entities", "stringprep", "python-config")
_SHORTEST_DOCSTRING = 40  # characters; below this a docstring says little more than the name it belongs to
_LONGEST_LINE = 200  # characters; hand-written code stays far below
_LEAST_LETTERS = 0.45  # share of letters and blanks; number tables lie below


def held_out_text() -> str:
    """The language reference that `help()` shows for keywords and operators, topic by topic in key order."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[key].strip() for key in sorted(topics)) + "\n"


def training_text() -> str:
    """Docstrings (`PROSE_REPEATS` times) and sources of the standard library, `DOCUMENT_END` after each document.

    Any line of 40 characters or more that the held-out text also has is taken out.
    """
    sources = list(_sources())
    documents = [*(_prose(sources) * PROSE_REPEATS), *_apart_from_held_out(sources)]
    return "".join(document + DOCUMENT_END for document in documents)


def training_prose() -> list[str]:
    """The docstrings in `training_text`, once: a document for each module that has any."""
    return _prose(list(_sources()))


def _prose(sources: list[str]) -> list[str]:
    seen: set[str] = set()
    prose = [text for source in sources if (text := _fresh(_docstrings(source), seen))]
    prose += [text for module in _extension_modules() if (text := _fresh(_live_docstrings(module), seen))]
    return _apart_from_held_out(prose)


def _apart_from_held_out(documents: list[str]) -> list[str]:
    held_out = {line.strip() for line in held_out_text().splitlines() if len(line.strip()) >= _SHORTEST_DOCSTRING}
    return [_without(text, held_out) for text in documents]


def _sources() -> Iterator[str]:
    """Each distinct, hand-written UTF-8 source of the standard library, in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_DIRECTORIES.intersection(path.relative_to(root).parts) or path.stem.startswith(_SKIPPED_STEMS):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text not in seen and _is_written_by_hand(text):
            seen.add(text)
            yield text


def _is_written_by_hand(text: str) -> bool:
    if not text.strip() or DOCUMENT_END in text or max(map(len, text.splitlines())) > _LONGEST_LINE:
        return False
    return sum(c.isalpha() or c.isspace() for c in text) / len(text) >= _LEAST_LETTERS


def _docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module, its classes and functions, dedented."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some sources hold invalid escapes on purpose
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _extension_modules() -> Iterator[ModuleType]:
    """Modules of the standard library written in C, whose docstrings no source file shows."""
    for name in sorted(sys.stdlib_module_names):
        try:
            spec = importlib.util.find_spec(name)
            extension = spec and isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)
            if extension or (spec and spec.origin == "built-in"):
                yield importlib.import_module(name)
        except (ImportError, ValueError):
            continue  # not built on this platform


def _live_docstrings(module: ModuleType) -> Iterator[str]:
    """The docstrings of a module, of what it defines and of its classes' members, in name order."""
    yield inspect.getdoc(module) or ""
    for _, value in sorted(vars(module).items()):
        if inspect.isclass(value):
            yield from (inspect.getdoc(member) or "" for _, member in sorted(vars(value).items()) if callable(member))
        if inspect.isclass(value) or inspect.isroutine(value):
            yield inspect.getdoc(value) or ""


def _fresh(texts: Iterator[str], seen: set[str]) -> str:
    """Those of `texts` that are long enough and not yet in `seen`, as one document; `seen` grows."""
    fresh = []
    for text in texts:
        if len(text) >= _SHORTEST_DOCSTRING and text not in seen and DOCUMENT_END not in text:
            seen.add(text)
            fresh.append(text)
    return "\n\n".join(fresh)


def _without(text: str, lines: set[str]) -> str:
    return "\n".join(line for line in text.splitlines() if line.strip() not in lines)
