"""What a verification finds: problems and notes with the place where they are, each once. Looks at nothing itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from loftq_cli.errors import LoftqError, printable

Given = ParamSpec("Given")
Value = TypeVar("Value")

_FILE_LIMIT = 400  # as errors cut it


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding. `file` is relative to the directory, None for the whole of it; all names are escaped."""

    file: str | None
    tensor: str | None
    what: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What was looked at, and what is wrong with it.

    path            the directory or weight file
    notes           what is worth knowing and no damage
    has_checksums   whether there was a list of checksums to compare with
    nbytes          of all files that were looked at
    not_finite      how many tensors hold NaN or infinite values
    """

    path: Path
    problems: tuple[Problem, ...]
    notes: tuple[Problem, ...]
    has_checksums: bool
    files: int
    tensors: int
    nbytes: int
    not_finite: int


class Findings:
    """What was found in `directory` so far; `tell` hears of each problem at once."""

    def __init__(self, directory: Path, tell: Callable[[Problem], None]) -> None:
        self.directory, self._tell = directory, tell
        self.files: set[str] = set()
        self.tensors = self.not_finite = 0
        self._problems: dict[Problem, None] = {}
        self._notes: dict[Problem, None] = {}
        self._named: set[str | None] = set()

    def problem(self, what: str, file: str | None = None, tensor: str | None = None) -> None:
        """Damage."""
        problem = _escaped(what, file, tensor)
        if problem not in self._problems:
            self._problems[problem] = None
            self._named.add(problem.file)
            self._tell(problem)

    def note(self, what: str, file: str, tensor: str | None = None) -> None:
        """Something that is no damage."""
        self._notes[_escaped(what, file, tensor)] = None

    def error(self, error: LoftqError, file: str | None = None) -> None:
        """An error as a problem, of `file` where it names none."""
        self.problem(error.message, file if error.file is None else self._relative(error.file), error.tensor)

    def noted(self, error: LoftqError, file: str) -> None:
        """An error as a note."""
        self.note(error.message, (error.file and self._relative(error.file)) or file, error.tensor)

    def attempt(
        self, function: Callable[Given, Value], *arguments: Given.args, **options: Given.kwargs
    ) -> Value | None:
        """What `function` gives; None where it raises a LoftqError, which becomes a problem."""
        try:
            return function(*arguments, **options)
        except LoftqError as error:
            self.error(error)
            return None

    def has_named(self, file: str) -> bool:
        """Whether there is a problem with `file`."""
        return printable(file, _FILE_LIMIT) in self._named

    @property
    def is_clean(self) -> bool:
        """Whether there is no problem yet."""
        return not self._problems

    def verification(self, *, has_checksums: bool) -> Verification:
        """All of it."""
        return Verification(
            path=self.directory,
            problems=tuple(self._problems),
            notes=tuple(self._notes),
            has_checksums=has_checksums,
            files=len(self.files),
            tensors=self.tensors,
            nbytes=sum(_nbytes_of(self.directory / name) for name in self.files),
            not_finite=self.not_finite,
        )

    def _relative(self, file: str) -> str | None:
        """`file` of an error, which is escaped already."""
        if file == printable(os.fspath(self.directory), _FILE_LIMIT):
            return None
        return file.removeprefix(printable(os.fspath(self.directory / "x"), _FILE_LIMIT)[:-1])


def _escaped(what: str, file: str | None, tensor: str | None) -> Problem:
    return Problem(
        None if file is None else printable(file, _FILE_LIMIT),
        None if tensor is None else printable(tensor),
        printable(what, 1000),
    )


def _nbytes_of(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # a name that cannot be one is a problem of its own
        return 0
