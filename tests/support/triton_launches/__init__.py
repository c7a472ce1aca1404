"""Calls of the contracts that together launch every kernel in the forms that conversions use. For triton_builds.py.

Each module has a list CALLS of functions without arguments; what they compute with is uninitialized and means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pkgutil import iter_modules

from loftq_cli.triton_kernels.backend import use_backend


def calls() -> Iterator[Callable[[], object]]:
    """Those of all modules here."""
    use_backend("cpu", "triton")
    for module in iter_modules(__path__):
        yield from import_module(f"{__name__}.{module.name}").CALLS
