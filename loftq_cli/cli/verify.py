"""The --verify of `loftq inspect`: each problem as it is found, then what was looked at."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from loftq_cli.cli.console import megabytes, result, say
from loftq_cli.errors import InputError
from loftq_cli.inspecting.findings import Problem, Verification
from loftq_cli.inspecting.verification import verify

_MAX_LINES = 20  # of problems, and of notes; --json has all


def verified(path: Path, threads: int, *, as_json: bool) -> None:
    """Verify `path` and say what is wrong. Raises InputError when anything is."""
    shown = 0

    def show(problem: Problem) -> None:
        nonlocal shown
        shown += 1
        if not as_json and shown <= _MAX_LINES:
            result(_line(problem, path))

    found = verify(path, threads, show)
    for note in found.notes[:_MAX_LINES]:
        say(f"note: {_line(note, path)}")
    if len(found.notes) > _MAX_LINES:
        say(f"note: and {len(found.notes) - _MAX_LINES} more")
    if not found.has_checksums:
        say("no checksums to compare with: only headers, index, config and numbers were checked")
    if as_json:
        result(_json(found, path))
    else:
        if shown > _MAX_LINES:
            result(f"and {shown - _MAX_LINES} more")
        result(_total(found))
    if found.problems:
        raise InputError(f"{_count(shown, 'problem')} found", file=path, hint="download or convert it again")


def _line(problem: Problem, path: Path) -> str:
    tensor = None if problem.tensor is None else f"tensor {problem.tensor}"
    return ": ".join(part for part in (problem.file or str(path), tensor, problem.what) if part)


def _total(found: Verification) -> str:
    rest = f"{_count(found.tensors, 'tensor')}, {{}}{megabytes(found.nbytes)}"
    if found.problems:
        return f"damaged: {_count(len(found.problems), 'problem')} in {_count(found.files, 'file')}, {rest.format('')}"
    finite = f"{found.not_finite} of them not finite, " if found.not_finite else "all finite, "
    how = "with their checksums" if found.has_checksums else "without checksums"
    return f"verified: {_count(found.files, 'file')} {how}, {rest.format(finite)}"


def _json(found: Verification, path: Path) -> str:
    values = {
        "path": str(path),
        "verified": not found.problems,
        "checksums": found.has_checksums,
        "files": found.files,
        "tensors": found.tensors,
        "nbytes": found.nbytes,
        "problems": [asdict(problem) for problem in found.problems],
        "notes": [_line(note, path) for note in found.notes],
    }
    return json.dumps(values, indent=2)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
