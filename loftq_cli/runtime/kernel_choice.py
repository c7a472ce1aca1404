"""Whether the compiled kernels are worth loading for a piece of work. The one place that decides it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from functools import partial, wraps
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")

# Weights times the passes over them. The compiler takes half a second to load, and on its first run on a machine some
# more to compile; the reference takes 20 ns for each of these, compiled code 2.
_WORTH_COMPILING = 1 << 26


COMPILER_NBYTES = 120_000_000  # memory of numba and LLVM, measured on Linux


def is_worth_compiling(work: int) -> bool:
    """Whether `work` weights times passes take longer than loading the compiler."""
    return work >= _WORTH_COMPILING


def choose_kernels(work: int) -> str | None:
    """Choose compiled kernels for `work` weights times passes if loading the compiler is worth it, else the reference:
    the bytes are the same. Gives a sentence for the user where compiled kernels are worth it and cannot be had.

    The choice is one of the current context: see `with_own_kernels`.
    """
    from loftq_cli.triton_kernels.backend import use_compiled_kernels, use_reference_kernels

    use_reference_kernels()
    missing = use_compiled_kernels() if is_worth_compiling(work) else None
    return f"compiled kernels would be several times faster, and cannot be used: {missing}" if missing else None


def with_own_kernels(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """`function`, run in a copy of the caller's context: a choice of kernels ends with the call.

    >>> from loftq_cli.triton_kernels.backend import has_kernels, use_backend
    >>> choose = with_own_kernels(lambda: use_backend("cpu", "triton"))
    >>> choose()
    >>> has_kernels("codebook", "cpu")
    False
    """

    @wraps(function)
    def call(*arguments: Given.args, **options: Given.kwargs) -> Result:
        return copy_context().run(partial(function, *arguments, **options))

    return call
