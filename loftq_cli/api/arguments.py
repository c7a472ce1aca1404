"""The arguments of a call: paths, sizes and numbers are checked. `api_call` is the frame of every call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from loftq_cli.errors import UsageError, is_memory_shortage, memory_shortage
from loftq_cli.planning.sizes import parse_size
from loftq_cli.runtime.gpu import check_device_name
from loftq_cli.runtime.kernel_choice import with_own_kernels
from loftq_cli.runtime.workers import available_threads

Given = ParamSpec("Given")
Result = TypeVar("Result")

AnyPath = str | os.PathLike[str]
AnySize = str | int


def api_call(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """`function` for callers in any thread: the choice of kernels ends with the call, and a shortage of memory raises
    MemoryShortage.

    >>> api_call(len)("abc")
    3
    """

    @wraps(function)
    def call(*arguments: Given.args, **options: Given.kwargs) -> Result:
        try:
            return with_own_kernels(function)(*arguments, **options)
        except (MemoryError, RuntimeError, ImportError, OSError) as error:
            if not is_memory_shortage(error):
                raise
            raise memory_shortage() from error

    return call


def path_text(value: AnyPath) -> str:
    """A path as text, `~` and `~user` expanded: a shell does not expand the words of a configuration or of `--o=~/x`.

    >>> path_text("~/model") == os.path.join(os.path.expanduser("~"), "model"), path_text(Path("model"))
    (True, 'model')
    """
    return os.path.expanduser(os.fspath(value))


def path_of(value: AnyPath) -> Path:
    """A path, `~` and `~user` expanded.

    >>> path_of("model").name
    'model'
    """
    return Path(path_text(value))


def paths_of(value: AnyPath | Iterable[AnyPath] | None) -> tuple[Path, ...]:
    """A tuple of paths from a path, several paths, or None.

    >>> [path.name for path in paths_of("a.txt")], paths_of(None)
    (['a.txt'], ())
    """
    if value is None:
        return ()
    several: Iterable[AnyPath] = (value,) if isinstance(value, (str, os.PathLike)) else value
    return tuple(map(path_of, several))


def texts_of(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """A tuple of strings from a string, several strings, or None.

    >>> texts_of("mlp"), texts_of(["mlp", "attn"])
    (('mlp',), ('mlp', 'attn'))
    """
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def nbytes_of(value: AnySize | None, name: str, least: int = 10**6) -> int | None:
    """The size `value` of the option `name` in bytes; None stays None. Raises UsageError for text without a size, and
    for a size below `least` bytes.

    >>> nbytes_of("5MB", "max_memory"), nbytes_of(2_000_000, "max_memory")
    (5000000, 2000000)
    """
    return None if value is None else parse_size(str(value), name, least)


def size_text(value: AnySize | None) -> str | None:
    """A size in the form of recipes: text. None stays None.

    >>> size_text(5_000_000), size_text("5MB")
    ('5000000', '5MB')
    """
    return None if value is None else str(value)


def is_done(look: Callable[[], bool], *, dry_run: bool, note: Callable[[str], None]) -> bool:
    """Whether the output holds the result already, by the function `look`. A dry run writes nothing: where the output
    is taken, the function `note` hears of the error of a real run.

    >>> is_done(lambda: True, dry_run=False, note=print)
    True
    """
    try:
        return look()
    except UsageError as error:
        if not dry_run:
            raise
        note(str(error))
        return False


def thread_count(threads: int | None) -> int:
    """`threads`, or the number of processors for None. Raises UsageError below 1.

    >>> thread_count(2), thread_count(None) >= 1
    (2, True)
    """
    check_least("threads", threads, 1)
    return threads or available_threads()


def check_least(name: str, value: float | None, least: int) -> None:
    """Raises UsageError for a number of the option `name` below `least`; None is no number.

    >>> check_least("tokens", 1, 2)
    Traceback (most recent call last):
    loftq_cli.errors.UsageError: --tokens 1 is too small (2 or more)
    """
    if value is not None and not value >= least:
        raise UsageError(f"--{name.replace('_', '-')} {value} is too small", hint=f"{least} or more")


def check_gpu_memory(device: str, max_memory: AnySize | None) -> int | None:
    """The bound on a GPU's memory in bytes; None is no bound. Raises UsageError for an unknown device, and for a bound
    beside --device cpu.

    >>> check_gpu_memory("cuda", "8GB")
    8000000000
    """
    check_device_name(device)
    nbytes = nbytes_of(max_memory, "max_memory")
    if nbytes is not None and device == "cpu":
        message = "--max-memory bounds the memory of a GPU, and --device cpu uses none"
        raise UsageError(message, hint="--device cuda, or leave --max-memory out")
    return nbytes
