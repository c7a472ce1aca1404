"""Whether the compiled kernels are worth loading for a piece of work. The one place that decides it."""

from __future__ import annotations

# Weights times the passes over them. The compiler takes half a second to load, and on its first run on a machine some
# more to compile; the reference takes 20 ns for each of these, compiled code 2.
_WORTH_COMPILING = 1 << 26


COMPILER_NBYTES = 120_000_000  # memory of numba and LLVM, measured on Linux


def is_worth_compiling(work: int) -> bool:
    """Whether `work` weights times passes take longer than loading the compiler."""
    return work >= _WORTH_COMPILING


def choose_kernels(work: int) -> str | None:
    """Use compiled kernels for `work` weights times passes if that is worth it, and the reference if not: the bytes are
    the same. What has to be said where they would be worth it and cannot be had.
    """
    from loftq_cli.triton_kernels.backend import use_compiled_kernels, use_reference_kernels

    use_reference_kernels()
    missing = use_compiled_kernels() if is_worth_compiling(work) else None
    return f"compiled kernels would be several times faster, and cannot be used: {missing}" if missing else None
