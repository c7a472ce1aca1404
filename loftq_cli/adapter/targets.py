"""The modules on which PEFT puts adapters when PEFT loads an adapter_config.json; PEFT drops all other tensors.

Follows `check_target_module_exists` of PEFT 0.21; names are those of the loaded model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loftq_cli.checkpoint.patterns import first_matches

_ALL = "all-linear"
_MAX_DIGITS = 18


@dataclass(frozen=True, slots=True)
class TargetModules:
    """The entries of a config that choose modules.

    targets         names or ends of names; an expression for the whole name; None where PEFT chooses by model family
    excluded        names, ends of names or an expression, of modules without an adapter
    layers          numbers of the adapted layers; None for all layers
    layer_patterns  expressions for the name before a layer's number; empty for any name
    """

    targets: frozenset[str] | str | None
    excluded: frozenset[str] | str
    layers: frozenset[int] | None
    layer_patterns: tuple[str, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TargetModules:
        """The entries of an adapter_config.json. Raises ValueError naming the key whose value is of another type."""
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
        """The modules among `modules` that PEFT adapts.

        Raises ValueError for a text that is no regular expression, and for an expression that takes too long.

        >>> sorted(TargetModules.of({"target_modules": ["q_proj"]}).named(["layers.0.q_proj", "layers.0.k_proj"]))
        ['layers.0.q_proj']
        """
        if self.targets is None or self.targets == _ALL:
            targeted = set(modules)
        elif isinstance(self.targets, str):
            targeted = _fully_matched("target_modules", self.targets, modules)
        else:
            exact = self.targets.intersection(modules)  # in any layer
            targeted = self._in_layers(_with_an_end(modules, self.targets)).union(exact)
        return targeted - self._excluded(modules)

    def _excluded(self, modules: Sequence[str]) -> set[str]:
        if isinstance(self.excluded, str):
            return _fully_matched("exclude_modules", self.excluded, modules)
        return _with_an_end(modules, self.excluded)

    def _in_layers(self, modules: set[str]) -> set[str]:
        """The modules whose layer number is among the layers.

        The layer number is the first number in a module's name for which a pattern matches the name before the number.
        """
        if self.layers is None:
            return modules
        numbered = {module: _numbered_parts(module) for module in modules}
        if not self.layer_patterns:  # without patterns, PEFT wants two names before the number
            return {module for module, parts in numbered.items() if _first_number(parts) in self.layers}
        prefixes = sorted({prefix for parts in numbered.values() for prefix, _ in parts})
        in_layers, unmatched = set(), numbered
        for pattern in self.layer_patterns:
            fitting = first_matches({pattern: rf"(?:^|.*?\.){pattern}"}, prefixes, whole=True)
            numbers = {
                module: number
                for module, parts in unmatched.items()
                if (number := next((n for prefix, n in parts if prefix in fitting), None)) is not None
            }
            in_layers |= {module for module, number in numbers.items() if number in self.layers}
            unmatched = {module: parts for module, parts in unmatched.items() if module not in numbers}
        return in_layers


def _names(key: str, config: Mapping[str, Any]) -> tuple[str, ...] | str | None:
    value = config.get(key)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} is neither a list of names nor an expression")
    return tuple(value)


def _first_number(parts: Sequence[tuple[str, int]]) -> int | None:
    """The first number with two names or more before the number."""
    return next((number for prefix, number in parts if "." in prefix), None)


def _with_an_end(modules: Collection[str], names: frozenset[str]) -> set[str]:
    """The modules among `modules` that equal a name of `names`, or end in a name after a dot.

    Names have few lengths, and may be many: a converted model's config has a name for each module.
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
    """Each number in a module's name, but for a last part, with the name before the number.

    >>> _numbered_parts("model.layers.3.experts.0.up_proj")
    [('model.layers', 3), ('model.layers.3.experts', 0)]
    """
    numbered, start = list[tuple[str, int]](), 0
    for part in module.split(".")[:-1]:
        if start and part.isdecimal() and len(part) <= _MAX_DIGITS:
            numbered.append((module[: start - 1], int(part)))
        start += len(part) + 1
    return numbered
