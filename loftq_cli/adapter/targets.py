"""The modules that PEFT adapts under an adapter_config.json; PEFT drops tensors of all remaining modules.

Follows `check_target_module_exists` of PEFT 0.21, with names of the loaded model.
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

    targets         names or ends of names; or an expression for the complete name; None: PEFT chooses by model family
    excluded        modules without an adapter: names, ends of names or an expression
    layers          numbers of the adapted layers; None for all layers
    layer_patterns  expressions for the name before a layer's number; empty for any name
    """

    targets: frozenset[str] | str | None
    excluded: frozenset[str] | str
    layers: frozenset[int] | None
    layer_patterns: tuple[str, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TargetModules:
        """Read the entries of an adapter_config.json. Raises ValueError, naming the key, for a wrong type."""
        targets, excluded = _read_names("target_modules", config), _read_names("exclude_modules", config) or ()
        layers = config.get("layers_to_transform")
        numbers = [layers] if type(layers) is int else ([] if layers is None else layers)
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ValueError("layers_to_transform is not a list of whole numbers")
        patterns = _read_names("layers_pattern", config) or ()
        return cls(
            targets=frozenset(targets) if isinstance(targets, tuple) else targets,
            excluded=excluded if isinstance(excluded, str) else frozenset(excluded),
            layers=frozenset(numbers) if numbers else None,
            layer_patterns=(patterns,) if isinstance(patterns, str) else patterns,
        )

    def select(self, modules: Sequence[str]) -> set[str]:
        """Choose the modules that PEFT adapts, among `modules`.

        Raises ValueError for an invalid regular expression, and for an expression over the time limit.

        >>> sorted(TargetModules.of({"target_modules": ["q_proj"]}).select(["layers.0.q_proj", "layers.0.k_proj"]))
        ['layers.0.q_proj']
        """
        if self.targets is None or self.targets == _ALL:
            targeted = set(modules)
        elif isinstance(self.targets, str):
            targeted = _match_fully("target_modules", self.targets, modules)
        else:
            exact = self.targets.intersection(modules)  # in any layer
            targeted = self._filter_by_layer(_match_ends(modules, self.targets)).union(exact)
        return targeted - self._match_excluded(modules)

    def _match_excluded(self, modules: Sequence[str]) -> set[str]:
        if isinstance(self.excluded, str):
            return _match_fully("exclude_modules", self.excluded, modules)
        return _match_ends(modules, self.excluded)

    def _filter_by_layer(self, modules: set[str]) -> set[str]:
        """Choose the modules in the adapted layers.

        A module's layer number is the first number in the name after a prefix that matches a pattern.
        """
        if self.layers is None:
            return modules
        numbered = {module: _split_at_numbers(module) for module in modules}
        if not self.layer_patterns:  # no pattern: PEFT wants two names before the number
            return {module for module, parts in numbered.items() if _find_first_number(parts) in self.layers}
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


def _read_names(key: str, config: Mapping[str, Any]) -> tuple[str, ...] | str | None:
    value = config.get(key)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} is neither a list of names nor an expression")
    return tuple(value)


def _find_first_number(parts: Sequence[tuple[str, int]]) -> int | None:
    """Find the first number with two names or more before the number."""
    return next((number for prefix, number in parts if "." in prefix), None)


def _match_ends(modules: Collection[str], names: frozenset[str]) -> set[str]:
    """Choose the modules that equal a name of `names`, or end in a name after a dot.

    The search tries each length of a name: a converted model's config has a name for each module, and few lengths.
    """
    lengths = sorted({len(name) for name in names})

    def ends(module: str) -> bool:
        starts = (len(module) - length for length in lengths if length < len(module))
        return any(module[start - 1] == "." and module[start:] in names for start in starts)

    return {module for module in modules if module in names or ends(module)}


def _match_fully(key: str, expression: str, modules: Sequence[str]) -> set[str]:
    try:
        return set(first_matches({expression: expression}, modules, whole=True))
    except ValueError as error:
        raise ValueError(f"{key} has {error}") from None


def _split_at_numbers(module: str) -> list[tuple[str, int]]:
    """List each number in a module's name with the prefix before the number; the last part of the name does not count.

    >>> _split_at_numbers("model.layers.3.experts.0.up_proj")
    [('model.layers', 3), ('model.layers.3.experts', 0)]
    """
    numbered, start = list[tuple[str, int]](), 0
    for part in module.split(".")[:-1]:
        if start and part.isdecimal() and len(part) <= _MAX_DIGITS:
            numbered.append((module[: start - 1], int(part)))
        start += len(part) + 1
    return numbered
