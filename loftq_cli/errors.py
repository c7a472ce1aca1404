"""What a user can put right: one exception family, each class with the exit status it ends the program with.

Anything raised outside this family is a bug and shows a traceback.
"""

from __future__ import annotations

import os

EXIT_OK = 0
EXIT_INPUT = 2
EXIT_STORAGE = 3
EXIT_MISMATCH = 4
EXIT_QUALITY = 5
EXIT_MEMORY = 6
EXIT_INTERRUPTED = 130

_NAME_LIMIT = 160  # a name longer than two terminal lines hides the message around it


def printable(text: object, limit: int = _NAME_LIMIT) -> str:
    """`text` on one line, with control and other unprintable characters escaped, cut at `limit` characters."""
    shown = str(text)[: limit + 1]  # escaping makes nothing shorter, and a hostile text may be as long as its file
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in shown)
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


class LoftqError(Exception):
    """A failure with a remedy.

    `message` says what is wrong (lower case, no full stop), `hint` what to do next; `file` and `tensor` say where.
    Names are escaped here, so they may come from an untrusted checkpoint.
    """

    exit_code = EXIT_INPUT

    def __init__(
        self,
        message: str,
        *,
        file: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = printable(message, 1000)
        self.file = None if file is None else printable(os.fspath(file), 400)
        self.tensor = None if tensor is None else printable(tensor)
        self.hint = None if hint is None else printable(hint, 1000)
        super().__init__(str(self))

    def at(self, *, file: str | os.PathLike[str], tensor: str) -> LoftqError:
        """The same error, with the place where it happened."""
        return type(self)(self.message, file=file, tensor=tensor, hint=self.hint)

    def __str__(self) -> str:
        where = [part for part in (self.file, self.tensor and f"tensor {self.tensor}") if part]
        line = ": ".join([*where, self.message])
        return f"{line} ({self.hint})" if self.hint else line


class UsageError(LoftqError):
    """An option, a recipe or a path that cannot mean anything here."""


class InputError(LoftqError):
    """A checkpoint, an adapter or a config that is damaged, hostile or not of a kind we read."""


class NumericError(InputError):
    """Numbers that cannot be quantized or stored: not finite, or too large for a dtype. Raised without a place."""


class StorageError(LoftqError):
    """Reading or writing failed: disk full, permission, a file that changed while it was read."""

    exit_code = EXIT_STORAGE


class MismatchError(LoftqError):
    """An adapter and a base that do not belong together, or tensors that would be left over."""

    exit_code = EXIT_MISMATCH


class QualityError(LoftqError):
    """A quality gate the user asked for, or that protects the result, was not met."""

    exit_code = EXIT_QUALITY


class MemoryShortage(LoftqError):
    """There is not enough memory for the matrix at hand."""

    exit_code = EXIT_MEMORY


def is_memory_shortage(error: BaseException) -> bool:
    """Whether Python, numpy or torch could not get memory; torch says so by a RuntimeError, of which only the text
    tells.
    """
    if isinstance(error, RuntimeError):
        return "can't allocate memory" in str(error) or "out of memory" in str(error)
    return isinstance(error, MemoryError)


def memory_shortage() -> MemoryShortage:
    """What is said about it."""
    return MemoryShortage("not enough memory", hint="--threads 1 takes less; --dry-run says how much is needed")
