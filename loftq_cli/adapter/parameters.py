"""The parameters that an adapter file adapts as a whole: PEFT's `target_parameters`, read back from names of tensors.

PEFT wraps the module that holds the parameters, so the names in the file say the module and a number of ".base_layer",
and the name of the parameter stands in the config alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

_BASE_LAYER = ".base_layer"
_WEIGHT = "weight"

# The order of the parameters in every class of experts of transformers 5.24. PEFT wraps the first one first.
_ORDER = (
    *("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "up_proj_bias"),
    *("down_proj", "down_proj_bias", _WEIGHT, "bias"),
)


def holder_of(module: str) -> str:
    """The module that holds the adapted parameters, without PEFT's wrappers around the module.

    >>> holder_of("layers.0.mlp.experts.base_layer")
    'layers.0.mlp.experts'
    """
    while module.endswith(_BASE_LAYER):
        module = module.removesuffix(_BASE_LAYER)
    return module


def wrapped_parameters(config: Mapping[str, Any], modules: Collection[str]) -> dict[str, str]:
    """Find the parameter behind each module name of an adapter file that PEFT's wrappers have written.

    config    the content of adapter_config.json
    modules   the names before ".lora_A.weight", without the modules that target_modules adapts

    Returns name in the file -> complete name of the parameter. A module that no entry of target_parameters fits is left
    out. Raises ValueError, naming the module, where entries and wrappers do not agree in number or in a known order.

    >>> config = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    >>> wrapped_parameters(config, ["h.0.mlp.experts", "h.0.mlp.experts.base_layer"])["h.0.mlp.experts"]
    'h.0.mlp.experts.down_proj'
    """
    targets = read_targets(config)
    if not targets:
        return {}
    wrappers: dict[str, list[str]] = {}
    for module in modules:
        wrappers.setdefault(holder_of(module), []).append(module)
    found = dict[str, str]()
    for holder, names in wrappers.items():
        named, anywhere = _leaves_of(holder, targets)
        if named or anywhere:
            ordered = _in_order(holder, named, anywhere, len(names))
            # The innermost wrapper, with the longest name, is around the first parameter.
            found |= {
                name: f"{holder}.{leaf}" for name, leaf in zip(sorted(names, key=len)[::-1], ordered, strict=True)
            }
    return found


def read_targets(config: Mapping[str, Any]) -> list[str]:
    """The entries of target_parameters; empty for a config without. Raises ValueError for another value than a list.

    >>> read_targets({"target_parameters": ["experts.down_proj"]})
    ['experts.down_proj']
    """
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError("target_parameters is not a list of names")
    return targets


def _leaves_of(holder: str, targets: Sequence[str]) -> tuple[set[str], set[str]]:
    """Last parts of the targets that PEFT may find in the module called `holder`: of targets that end in the name of
    the module, and of targets without any module's name.
    """
    parents = [target.rpartition(".")[::2] for target in targets]
    named = {leaf for parent, leaf in parents if parent and f".{holder}".endswith(f".{parent}")}
    return named, {leaf for parent, leaf in parents if not parent}


def _in_order(holder: str, named: set[str], anywhere: set[str], n_wrappers: int) -> list[str]:
    """The parameters of the wrappers around `holder`, innermost first.

    PEFT's "all-linear" writes gate_up_proj, down_proj and gate.weight: a router has one wrapper, and the experts two.
    """
    for leaves in (named | anywhere, named, anywhere):
        if len(leaves) == n_wrappers and (n_wrappers == 1 or leaves <= set(_ORDER)):
            return sorted(leaves, key=lambda leaf: _ORDER.index(leaf) if leaf in _ORDER else len(_ORDER))
    listed = ", ".join(sorted(named | anywhere))
    raise ValueError(f"target_parameters names {listed} for {holder}, and the file holds {n_wrappers} adapters of it")
