"""Which implementation of an operation runs on which device. A table, and the function that reads it.

A backend is a module `<op>_<backend>.py` beside the contract `<op>.py`, with the same function names.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

# device type -> backend. The reference is plain torch and runs wherever torch does.
BACKENDS: dict[str, str] = {
    "cpu": "reference",
    "cuda": "reference",
}


def implementation(op: str, device_type: str) -> ModuleType:
    """The module that implements `op` ("codebook", ...) for tensors on `device_type`.

    Raises ValueError for a device type that no backend serves.
    """
    try:
        backend = BACKENDS[device_type]
    except KeyError:
        raise ValueError(f"no backend for device type {device_type!r}; known: {', '.join(BACKENDS)}") from None
    return import_module(f"{__package__}.{op}_{backend}")
