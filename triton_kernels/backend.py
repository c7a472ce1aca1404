"""The implementation of an operation on a device: a table of backends, the choice of a backend, and the lookup.

The choice belongs to a context (contextvars), not to the process: two threads may run different backends, and a choice
inside `contextvars.copy_context().run` ends with the function.

A backend is a module `<op>/<backend>.py` beside the contract `<op>/contract.py`, with equal function names.
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

# device type -> backend -> the operations of the backend. The reference is plain torch, has all operations, and runs on
# every device of torch. Triton only interprets on a processor, for tests. (AMD's cards are "cuda" to torch.)
BACKENDS: dict[str, dict[str, frozenset[str]]] = {
    "cpu": {"cpu": frozenset({"affine", "codebook", "double_quant", "error_stats", "refinement"}), "triton": _TRITON},
    "cuda": {"triton": _TRITON},
}

# device type -> backend. A new mapping replaces a mapping, and no mapping changes: contexts share mappings.
_CHOICE: ContextVar[Mapping[str, str]] = ContextVar("loftq_backends", default=MappingProxyType({}))


def use_compiled_kernels() -> str | None:
    """Choose the compiled kernels for the CPU in the current context. Returns None, or the reason why the kernels
    cannot run.

    Loading the compiler takes half a second, and the first run of each kernel on a machine takes a second more: the
    caller weighs the cost. The reference gives equal bytes.
    """
    try:
        import_module(f"{__package__}.cpu_kernels")
    except ImportError as error:
        return f"numba is not there ({error})" if error.name == "numba" else str(error)
    except OSError as error:  # numba's compiler is a library: loading fails when memory is short
        return str(error)
    use_backend("cpu", "cpu")
    return None


def use_reference_kernels() -> None:
    """Choose the reference on the CPU in the current context, as before `use_compiled_kernels`.

    >>> use_reference_kernels()
    >>> has_kernels("codebook", "cpu")
    False
    """
    use_backend("cpu", None)


def use_backend(device_type: str, backend: str | None) -> None:
    """Choose a backend for a device type in the current context. An operation outside of the backend runs as the
    reference.

    device_type   "cpu" or "cuda"
    backend       a backend of the table BACKENDS, or "reference"; None chooses the default: Triton on "cuda" when
                  Triton is installed, else the reference

    Raises ValueError for a backend outside of the table.

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
    """True when Triton is installed: a GPU runs the reference without Triton."""
    return find_spec("triton") is not None


def implementation(op: str, device_type: str) -> ModuleType:
    """The module that implements the operation `op` for tensors on `device_type`.

    op            folder of the operation: "codebook", "affine", ...
    device_type   "cpu" or "cuda"

    Raises ValueError for a device type without a backend.

    >>> implementation("codebook", "cpu").__name__.rpartition(".")[2]
    'reference'
    """
    return import_module(f"{__package__}.{op}.{_backend_of(op, device_type)}")


def has_kernels(op: str, device_type: str) -> bool:
    """True when a backend implements `op` on `device_type`, and not the reference.

    Raises ValueError for a device type without a backend.

    >>> has_kernels("codebook", "cpu")
    False
    """
    return _backend_of(op, device_type) != "reference"


def _backend_of(op: str, device_type: str) -> str:
    if device_type not in BACKENDS:
        raise ValueError(f"no backend for device type {device_type!r}; known: {', '.join(BACKENDS)}")
    default = "triton" if device_type == "cuda" and has_triton() else "reference"
    backend = _CHOICE.get().get(device_type, default)
    return backend if op in BACKENDS[device_type].get(backend, ()) else "reference"
