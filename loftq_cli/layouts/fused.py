"""Modules that servers fuse into a matrix with a single format."""

from __future__ import annotations

from collections.abc import Iterable

from loftq_cli.layouts.layout import LAYOUTS


def fused_modules(layout: str, modules: Iterable[str]) -> list[tuple[str, ...]]:
    """List groups of two or more modules that servers of the container called `layout` fuse into a matrix.

    >>> fused_modules("compressed-tensors", ["mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"])
    [('mlp.gate_proj', 'mlp.up_proj')]
    """
    siblings = {name: names for names in LAYOUTS[layout].fused for name in names}
    groups: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for module in modules:
        parent, _, name = module.rpartition(".")
        if name in siblings:
            groups.setdefault((parent, siblings[name]), set()).add(name)
    return [
        tuple(f"{parent}.{name}" if parent else name for name in names if name in present)
        for (parent, names), present in groups.items()
        if len(present) > 1
    ]
