"""The choice between compiled kernels and the reference: compiled kernels are worth loading for much work only."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from functools import partial, wraps
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")

# Weights times passes. Loading the compiler takes half a second, and the first run on a machine takes more to compile.
# A pass over a weight takes 20 ns in the reference and 2 ns in compiled code.
WORTH_COMPILING = 1 << 26

COMPILER_NBYTES = 120_000_000  # memory that numba and LLVM take, measured on Linux


def is_worth_compiling(work: int) -> bool:
    """True when `work`, the number of weights times passes, takes longer than loading the compiler.

    >>> is_worth_compiling(4096 * 4096), is_worth_compiling(4096 * 4096 * 5)
    (False, True)
    """
    return work >= WORTH_COMPILING


def choose_kernels(work: int) -> str | None:
    """Choose compiled kernels for `work` weights times passes if `is_worth_compiling(work)`, else the reference. Both
    give equal bytes. The choice belongs to the current context: see `with_own_kernels`.

    Returns a sentence for the user when compiled kernels are worth loading and cannot run, else None.

    >>> choose_kernels(work=1000) is None
    True
    """
    from loftq_cli.triton_kernels.backend import use_compiled_kernels, use_reference_kernels

    use_reference_kernels()
    obstacle = use_compiled_kernels() if is_worth_compiling(work) else None
    return f"compiled kernels would be several times faster, and cannot be used: {obstacle}" if obstacle else None


def with_own_kernels(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """`function`, which runs in a copy of the caller's context (contextvars): a choice of kernels ends with the call.

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
