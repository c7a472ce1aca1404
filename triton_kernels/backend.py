"""Which implementation of an operation runs on which device. A table, what was chosen, and the function that reads it.

A backend is a module `<op>_<backend>.py` beside the contract `<op>.py`, with the same function names.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

# device type -> backend -> the operations that it has. The reference is plain torch, has all of them, and runs
# wherever torch does.
BACKENDS: dict[str, dict[str, frozenset[str]]] = {
    "cpu": {"cpu": frozenset({"affine", "codebook", "double_quant", "error_stats"})},
    "cuda": {},
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
    _chosen["cpu"] = "cpu"
    return None


def use_reference_kernels() -> None:
    """Undo `use_compiled_kernels`."""
    _chosen.clear()


def implementation(op: str, device_type: str) -> ModuleType:
    """The module that implements `op` ("codebook", ...) for tensors on `device_type`.

    Raises ValueError for a device type that no backend serves.
    """
    if device_type not in BACKENDS:
        raise ValueError(f"no backend for device type {device_type!r}; known: {', '.join(BACKENDS)}")
    backend = _chosen.get(device_type, "reference")
    if op not in BACKENDS[device_type].get(backend, ()):
        backend = "reference"
    return import_module(f"{__package__}.{op}_{backend}")
