"""Which implementation of an operation runs on which device: a table, the choice, and the function that reads both.

The choice belongs to a context (contextvars), not to the process: two threads may run different backends, and a choice
that a function makes inside `contextvars.copy_context().run` ends with the function.

A backend is a module `<op>/<backend>.py` beside the contract `<op>/contract.py`, with the same function names.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType, ModuleType

_TRITON = frozenset(
    {
        "affine",
        "codebook",
        "dequant_matmul",
        "double_quant",
        "error_stats",
        "merging",
        "packing",
        "refinement",
        "residual",
    }
)

# device type -> backend -> the operations that it has. The reference is plain torch, has all of them, and runs
# wherever torch does. On a processor Triton only interprets, which is for tests. (AMD's cards are "cuda" to torch.)
BACKENDS: dict[str, dict[str, frozenset[str]]] = {
    "cpu": {"cpu": frozenset({"affine", "codebook", "double_quant", "error_stats", "refinement"}), "triton": _TRITON},
    "cuda": {"triton": _TRITON},
}

# device type -> backend. A mapping is replaced as a whole and never changed: contexts share it.
_CHOICE: ContextVar[Mapping[str, str]] = ContextVar("loftq_backends", default=MappingProxyType({}))


def use_compiled_kernels() -> str | None:
    """Choose the compiled kernels for the CPU in the current context. Gives None, or the reason why they cannot run.

    Loading the compiler takes half a second, and the first run of each kernel on a machine takes one second more: the
    caller weighs that. The reference gives the same bytes.
    """
    try:
        import_module(f"{__package__}.cpu_kernels")
    except ImportError as error:
        return f"numba is not there ({error})" if error.name == "numba" else str(error)
    except OSError as error:  # its compiler is a library, which does not load where memory is short
        return str(error)
    use_backend("cpu", "cpu")
    return None


def use_reference_kernels() -> None:
    """Undo `use_compiled_kernels` in the current context."""
    use_backend("cpu", None)


def use_backend(device_type: str, backend: str | None) -> None:
    """Choose `backend` for devices of this type in the current context; None chooses the default. An operation that
    the backend lacks runs as the reference.

    Raises ValueError for a backend that the table does not have.

    >>> use_backend("cpu", "reference")
    >>> has_kernels("codebook", "cpu")
    False
    >>> use_backend("cpu", None)
    """
    choice = {kind: name for kind, name in _CHOICE.get().items() if kind != device_type}
    if backend is None:
        _CHOICE.set(choice)
    elif backend != "reference" and backend not in BACKENDS.get(device_type, ()):
        raise ValueError(f"no backend {backend!r} for device type {device_type!r}")
    else:
        _CHOICE.set({**choice, device_type: backend})


@cache
def has_triton() -> bool:
    """Whether Triton is installed: without it a GPU runs the plain torch definitions."""
    return find_spec("triton") is not None


def implementation(op: str, device_type: str) -> ModuleType:
    """The module that implements `op` ("codebook", ...) for tensors on `device_type`.

    Raises ValueError for a device type that no backend serves.
    """
    return import_module(f"{__package__}.{op}.{_backend_of(op, device_type)}")


def has_kernels(op: str, device_type: str) -> bool:
    """Whether something other than the definition implements `op` there. Raises as `implementation` does."""
    return _backend_of(op, device_type) != "reference"


def _backend_of(op: str, device_type: str) -> str:
    if device_type not in BACKENDS:
        raise ValueError(f"no backend for device type {device_type!r}; known: {', '.join(BACKENDS)}")
    default = "triton" if device_type == "cuda" and has_triton() else "reference"
    backend = _CHOICE.get().get(device_type, default)
    return backend if op in BACKENDS[device_type].get(backend, ()) else "reference"
