"""Errors that a user can fix: a family of exceptions, each class with an exit status.

Any exception outside the family is a bug and shows a traceback.
"""

from __future__ import annotations

import errno
import os

EXIT_OK = 0
EXIT_INPUT = 2
EXIT_STORAGE = 3
EXIT_MISMATCH = 4
EXIT_QUALITY = 5
EXIT_MEMORY = 6
EXIT_INTERRUPTED = 130

# The remedy for weights in a format that is not read.
SOURCE_HINT = "start from the checkpoint in 16 bits, or from one in FP8 with its scales, which is decoded"

_NAME_LIMIT = 160  # a name longer than two terminal lines hides the message


def escape(text: str) -> str:
    """`text` with unprintable characters escaped: a terminal would obey them.

    >>> escape("\\x1b[2J")
    '\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def printable(text: object, limit: int = _NAME_LIMIT) -> str:
    """`text` on a single line, unprintable characters escaped, cut at `limit` characters.

    >>> printable("a\\nb")
    'a\\\\nb'
    """
    escaped = escape(str(text)[: limit + 1])  # escaping never shortens, and a hostile text may be as long as a file
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


class LoftqError(Exception):
    """A failure with a remedy.

    `message` names the fault (lower case, no full stop), `hint` the remedy, `file` and `tensor` the place. Names are
    escaped here, so names may come from an untrusted checkpoint.
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
        """A copy of the error with file and tensor."""
        return type(self)(self.message, file=file, tensor=tensor, hint=self.hint)

    def __str__(self) -> str:
        where = [part for part in (self.file, self.tensor and f"tensor {self.tensor}") if part]
        line = ": ".join([*where, self.message])
        return f"{line} ({self.hint})" if self.hint else line


class UsageError(LoftqError):
    """An option, a recipe or a path without meaning for the command."""


class InputError(LoftqError):
    """A checkpoint, an adapter or a config that is damaged, hostile or of an unsupported kind."""


class UnreadFormat(InputError):
    """A model in a format that the tool does not read. Nothing is damaged."""


class NumericError(InputError):
    """Numbers that cannot be quantized or stored: not finite, or too large for a dtype. Callers add the place."""


class StorageError(LoftqError):
    """Reading or writing failed: disk full, permission, a file that changed during a run."""

    exit_code = EXIT_STORAGE


class MismatchError(LoftqError):
    """An adapter and a base that do not belong together, or tensors without a place."""

    exit_code = EXIT_MISMATCH


class QualityError(LoftqError):
    """A result misses a quality gate, set by the user or by the command."""

    exit_code = EXIT_QUALITY


class MemoryShortage(LoftqError):
    """Memory is too small for the matrix at hand."""

    exit_code = EXIT_MEMORY


# How torch, the C++ library and the loader of libraries say that memory is short.
_SHORTAGES = (
    *("can't allocate memory", "Cannot allocate memory", "out of memory", "bad_alloc", "bad allocation"),
    *("failed to map segment", "cannot create shared object descriptor", "cannot allocate"),
)


def is_memory_shortage(error: BaseException) -> bool:
    """Whether Python, numpy, torch or the loader of libraries ran out of memory.

    >>> is_memory_shortage(MemoryError()), is_memory_shortage(RuntimeError("std::bad_alloc"))
    (True, True)
    >>> is_memory_shortage(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    True
    >>> is_memory_shortage(ImportError("No module named 'torch'"))
    False
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    if isinstance(error, (RuntimeError, ImportError, OSError)):
        return any(text in str(error) for text in _SHORTAGES)
    return isinstance(error, MemoryError)


def memory_shortage() -> MemoryShortage:
    """The error raised when memory runs out."""
    return MemoryShortage("not enough memory", hint="--threads 1 takes less; --dry-run says how much is needed")
