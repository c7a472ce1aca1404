"""The problems and the summary of `loftq inspect --verify`, as lines and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from loftq_cli.cli.render.console import format_nbytes, say, write_result
from loftq_cli.errors import InputError
from loftq_cli.inspecting.findings import Problem, Verification

MAX_LINES = 20  # most problems and most notes to print; --json has all


def print_verification(verification: Verification, *, as_json: bool) -> None:
    """Print notes on stderr, and the summary or the JSON on stdout.

    `InspectionProgress` has printed the problems already, except with JSON.

    Raises InputError when the verification has a problem.
    """
    path, problems, notes = verification.path, verification.problems, verification.notes
    for note in notes[:MAX_LINES]:
        say(f"note: {problem_line(note, path)}")
    if len(notes) > MAX_LINES:
        say(f"note: and {len(notes) - MAX_LINES} more")
    if not verification.has_checksums:
        say("no checksums to compare with: only headers, index, config and numbers were checked")
    if as_json:
        write_result(_json(verification))
    else:
        if len(problems) > MAX_LINES:
            write_result(f"and {len(problems) - MAX_LINES} more")
        write_result(_summary(verification))
    if problems:
        raise InputError(f"{_count(len(problems), 'problem')} found", file=path, hint="download or convert it again")


def problem_line(problem: Problem, path: Path) -> str:
    """A problem or a note as a line; `path` stands in for the name of the file when there is none.

    >>> problem_line(Problem("model.safetensors", "lm_head.weight", "is missing"), Path("model"))
    'model.safetensors: tensor lm_head.weight: is missing'
    """
    tensor = None if problem.tensor is None else f"tensor {problem.tensor}"
    return ": ".join(part for part in (problem.file or str(path), tensor, problem.what) if part)


def _summary(verification: Verification) -> str:
    files = _count(verification.files, "file")
    sizes = f"{_count(verification.tensors, 'tensor')}, {{}}{format_nbytes(verification.nbytes)}"
    if verification.problems:
        return f"damaged: {_count(len(verification.problems), 'problem')} in {files}, {sizes.format('')}"
    finite = f"{verification.not_finite} of them not finite, " if verification.not_finite else "all finite, "
    check = "with their checksums" if verification.has_checksums else "without checksums"
    return f"verified: {files} {check}, {sizes.format(finite)}"


def _json(verification: Verification) -> str:
    values = {
        "path": str(verification.path),
        "verified": not verification.problems,
        "checksums": verification.has_checksums,
        "files": verification.files,
        "tensors": verification.tensors,
        "nbytes": verification.nbytes,
        "problems": [asdict(problem) for problem in verification.problems],
        "notes": [problem_line(note, verification.path) for note in verification.notes],
    }
    return json.dumps(values, indent=2)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
