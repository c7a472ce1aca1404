"""Which implementation of an operation runs on which device. A table, what was chosen, and the function that reads it.

A backend is a module `<op>/<backend>.py` beside the contract `<op>/contract.py`, with the same function names.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

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

_chosen: dict[str, str] = {}


def use_compiled_kernels() -> str | None:
    """Run the compiled kernels on the CPU from now on, where they exist. Says what is missing when they cannot be.

    Loading the compiler takes half a second, and the first run of each kernel on a machine one more: that is the
    caller's to weigh. The bytes are the same either way.
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
    """Undo `use_compiled_kernels`."""
    _chosen.pop("cpu", None)


def use_backend(device_type: str, backend: str | None) -> None:
    """Run `backend` on devices of this type from now on, where it has an operation; None for what runs by default.

    Raises ValueError for one that the table does not have.
    """
    if backend is None:
        _chosen.pop(device_type, None)
    elif backend != "reference" and backend not in BACKENDS.get(device_type, ()):
        raise ValueError(f"no backend {backend!r} for device type {device_type!r}")
    else:
        _chosen[device_type] = backend


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
    backend = _chosen.get(device_type, default)
    return backend if op in BACKENDS[device_type].get(backend, ()) else "reference"
