"""The findings of a verification: problems and notes with file and tensor, without duplicates. Reads nothing
but file sizes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from loftq_cli.errors import LoftqError, printable

Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")

_FILE_LIMIT = 400  # errors cut file names to as many characters


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem or a note.

    file     relative name, escaped; None for the whole directory
    tensor   tensor name, escaped; None for the whole file
    what     the finding in words, without the names
    """

    file: str | None
    tensor: str | None
    what: str


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of a verification.

    path            the directory or weight file
    problems        every damage
    notes           facts for the user without damage
    has_checksums   whether a list of checksums was compared
    files           number of checked files
    tensors         number of checked tensors
    nbytes          bytes of all checked files
    not_finite      number of tensors with NaN or infinite values
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
    """Collects problems and notes about `directory`; `tell` hears of each problem at once.

    files        names of the checked files
    tensors      number of checked tensors
    not_finite   number of tensors with NaN or infinite values

    >>> findings = Findings(Path("model"), lambda problem: print(problem.file, problem.what))
    >>> findings.add_problem("is missing", "config.json")
    config.json is missing
    >>> findings.add_problem("is missing", "config.json")  # no duplicates
    >>> findings.is_clean, findings.has_problem_with("config.json")
    (False, True)
    """

    def __init__(self, directory: Path, tell: Callable[[Problem], None]) -> None:
        self.directory, self._tell = directory, tell
        self.files: set[str] = set()
        self.tensors = self.not_finite = 0
        self._problems: dict[Problem, None] = {}
        self._notes: dict[Problem, None] = {}
        self._files_with_problems: set[str | None] = set()

    def add_problem(self, what: str, file: str | None = None, tensor: str | None = None) -> None:
        """Add damage, and tell the caller unless the problem is known."""
        problem = _escape_problem(what, file, tensor)
        if problem not in self._problems:
            self._problems[problem] = None
            self._files_with_problems.add(problem.file)
            self._tell(problem)

    def add_note(self, what: str, file: str, tensor: str | None = None) -> None:
        """Add a fact without damage."""
        self._notes[_escape_problem(what, file, tensor)] = None

    def add_error(self, error: LoftqError, file: str | None = None) -> None:
        """Add an error as a problem; `file` is the place of an error without a file name."""
        self.add_problem(error.message, file if error.file is None else self._relative(error.file), error.tensor)

    def add_error_note(self, error: LoftqError, file: str) -> None:
        """Add an error as a note; `file` is the place of an error without a file name."""
        self.add_note(error.message, (error.file and self._relative(error.file)) or file, error.tensor)

    def attempt(
        self, function: Callable[Parameters, Value], *arguments: Parameters.args, **options: Parameters.kwargs
    ) -> Value | None:
        """The result of `function`. A LoftqError becomes a problem, and the result is None."""
        try:
            return function(*arguments, **options)
        except LoftqError as error:
            self.add_error(error)
            return None

    def has_problem_with(self, file: str) -> bool:
        """True when a problem names `file`."""
        return printable(file, _FILE_LIMIT) in self._files_with_problems

    @property
    def is_clean(self) -> bool:
        """True without a problem so far."""
        return not self._problems

    def summarize(self, *, has_checksums: bool) -> Verification:
        """All findings as a result; `has_checksums` as in `Verification`."""
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
        """The name of `file` inside the directory; errors carry escaped names."""
        if file == printable(os.fspath(self.directory), _FILE_LIMIT):
            return None
        return file.removeprefix(printable(os.fspath(self.directory / "x"), _FILE_LIMIT)[:-1])


def _escape_problem(what: str, file: str | None, tensor: str | None) -> Problem:
    return Problem(
        None if file is None else printable(file, _FILE_LIMIT),
        None if tensor is None else printable(tensor),
        printable(what, 1000),
    )


def _nbytes_of(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # an impossible name is a separate problem
        return 0
