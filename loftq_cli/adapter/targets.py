"""Which modules PEFT puts adapters on when it loads an adapter_config.json. It drops the tensors of every other one.

Follows `check_target_module_exists` of PEFT 0.21; names are those of the loaded model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loftq_cli.checkpoint.patterns import first_matches

_ALL = "all-linear"
_MAX_DIGITS = 18


@dataclass(frozen=True, slots=True)
class TargetModules:
    """The entries of a config that choose modules.

    targets         names or their ends; an expression for the whole name; None where PEFT chooses by the model's family
    excluded        the same for modules that are left out
    layers          numbers of the layers that are adapted; None for all
    layer_patterns  expressions for what stands before a layer's number; empty for any name
    """

    targets: frozenset[str] | str | None
    excluded: frozenset[str] | str
    layers: frozenset[int] | None
    layer_patterns: tuple[str, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TargetModules:
        """Raises ValueError naming the key whose value is of another type."""
        targets, excluded = _names("target_modules", config), _names("exclude_modules", config) or ()
        layers = config.get("layers_to_transform")
        numbers = [layers] if type(layers) is int else ([] if layers is None else layers)
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ValueError("layers_to_transform is not a list of whole numbers")
        patterns = _names("layers_pattern", config) or ()
        return cls(
            targets=frozenset(targets) if isinstance(targets, tuple) else targets,
            excluded=excluded if isinstance(excluded, str) else frozenset(excluded),
            layers=frozenset(numbers) if numbers else None,
            layer_patterns=(patterns,) if isinstance(patterns, str) else patterns,
        )

    def named(self, modules: Sequence[str]) -> set[str]:
        """Those of `modules` that PEFT adapts. Raises ValueError for an expression that is none, or takes too long."""
        if self.targets is None or self.targets == _ALL:
            chosen = set(modules)
        elif isinstance(self.targets, str):
            chosen = _fully_matched("target_modules", self.targets, modules)
        else:
            exact = self.targets.intersection(modules)  # in any layer
            chosen = self._in_layers(_ending_with_one(modules, self.targets)).union(exact)
        return chosen - self._excluded(modules)

    def _excluded(self, modules: Sequence[str]) -> set[str]:
        if isinstance(self.excluded, str):
            return _fully_matched("exclude_modules", self.excluded, modules)
        return _ending_with_one(modules, self.excluded)

    def _in_layers(self, modules: set[str]) -> set[str]:
        """Those of `modules` whose first number is one of the layers; a pattern must match what stands before it."""
        if self.layers is None:
            return modules
        numbered = {module: _numbered_parts(module) for module in modules}
        if not self.layer_patterns:  # PEFT wants two names before the number then
            firsts = {
                module: next((n for prefix, n in found if "." in prefix), None) for module, found in numbered.items()
            }
            return {module for module, number in firsts.items() if number in self.layers}
        prefixes = sorted({prefix for found in numbered.values() for prefix, _ in found})
        kept, left = set(), numbered
        for pattern in self.layer_patterns:
            fitting = first_matches({pattern: rf"(?:^|.*?\.){pattern}"}, prefixes, whole=True)
            here = {
                m: n
                for m, found in left.items()
                if (n := next((n for p, n in found if p in fitting), None)) is not None
            }
            kept |= {module for module, number in here.items() if number in self.layers}
            left = {module: found for module, found in left.items() if module not in here}
        return kept


def _names(key: str, config: Mapping[str, Any]) -> tuple[str, ...] | str | None:
    value = config.get(key)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} is neither a list of names nor an expression")
    return tuple(value)


def _ending_with_one(modules: Sequence[str], names: frozenset[str]) -> set[str]:
    """Those of `modules` that are one of `names`, or end in one after a dot. There are few lengths, and may be many
    names: a converted model's config has one for each of its modules.
    """
    lengths = sorted({len(name) for name in names})

    def ends(module: str) -> bool:
        places = (len(module) - length for length in lengths if length < len(module))
        return any(module[at - 1] == "." and module[at:] in names for at in places)

    return {module for module in modules if module in names or ends(module)}


def _fully_matched(key: str, expression: str, modules: Sequence[str]) -> set[str]:
    try:
        return set(first_matches({expression: expression}, modules, whole=True))
    except ValueError as error:
        raise ValueError(f"{key} has {error}") from None


def _numbered_parts(module: str) -> list[tuple[str, int]]:
    """What stands before each part that is a number and not the last one, and that number."""
    parts, found, at = module.split("."), [], 0
    for part in parts[:-1]:
        if at and part.isdecimal() and len(part) <= _MAX_DIGITS:
            found.append((module[: at - 1], int(part)))
        at += len(part) + 1
    return found
