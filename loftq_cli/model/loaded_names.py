"""Names of tensors in a loaded model: the renamings that transformers applies while loading the class of a config, from
the table loaded_names.json. Needs neither torch nor transformers.

The table is generated from an installed transformers, whose version it names: for each class the attributes, the models
inside the class, and for each class or `model_type` the renamings and conversions. A test generates the table again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

_TABLE = Path(__file__).with_name("loaded_names.json")
_PARAMETER = (".weight", ".bias")


@dataclass(frozen=True, slots=True)
class Transform:
    """A renaming of names, or a conversion of tensors to tensors of other names or another form.

    sources      expressions; the longest expression that matches first counts
    targets      replacements; "\\1" stands for the group of the expression. A renaming has one replacement.
    prefixes     the starts of names that the transform applies to, the first that fits; the start is left alone
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    prefixes: tuple[str, ...]

    def apply(self, name: str) -> tuple[str, ...] | None:
        """The new names of the tensor called `name`, one for each target; None for a name without a match.

        >>> Transform(("fc1",), ("up_proj",), ("",)).apply("layers.0.fc1.weight")
        ('layers.0.up_proj.weight',)
        """
        found = self.find(name)
        return None if found is None else found[0]

    def find(self, name: str) -> tuple[tuple[str, ...], int] | None:
        """The new names as from `apply`, and the place of the matching expression in `sources`; None without a match.

        >>> Transform(("w1", "w3"), ("gate_up_proj",), ("",)).find("experts.w3")
        (('experts.gate_up_proj',), 1)
        """
        prefix = next((prefix for prefix in self.prefixes if name.startswith(prefix)), None)
        if prefix is None:
            return None
        rest = name[len(prefix) :]
        expression = _expression(self.sources)
        match = expression.search(rest)
        if match is None:
            return None
        group = next(key for key, value in match.groupdict().items() if value is not None)
        inner = expression.groupindex[group] + 1
        replacements = (t.replace(r"\1", match[inner]) if r"\1" in t else t for t in self.targets)
        names = tuple(prefix + rest.replace(match[0], replacement, 1) for replacement in replacements)
        return names, int(group[1:])


@cache
def _expression(sources: tuple[str, ...]) -> re.Pattern[str]:
    """The expression of the sources, as transformers builds it: a source ends where a part of a name ends."""
    branches = []
    for i, source in sorted(enumerate(sources), key=lambda item: -len(item[1])):
        pattern = source.replace("*.", r".*\.")
        end = r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else ""
        branches.append(f"(?P<g{i}>{pattern}{end})")
    return re.compile("|".join(branches))


@dataclass(frozen=True, slots=True)
class LoadedNames:
    """The names that a class of transformers gives to the tensors of a checkpoint.

    prefix       attribute of a class with a head that holds the model without the head; "" for no attribute
    children     names of the attributes of the class
    inner        names of the attributes of the model without the head
    renamings    applied in order
    conversions  the first match counts
    """

    prefix: str
    children: frozenset[str]
    inner: frozenset[str]
    renamings: tuple[Transform, ...]
    conversions: tuple[Transform, ...]

    def find(self, name: str) -> tuple[str, ...]:
        """The names of a module or tensor in the loaded model: several names for a matrix that is split while loading.

        name   name in the files
        """
        return tuple(map(self._place, self._convert(name)[0]))

    def is_converted(self, name: str) -> bool:
        """Whether the tensor is split, merged, or changed in form while loading.

        name   name in the files
        """
        return self._convert(name)[1]

    def merged_place(self, name: str) -> tuple[str, int, int] | None:
        """The parameter in the loaded model that a tensor becomes a part of, the place of the part, and the number of
        parts; None for a tensor that stands alone or is split.

        name   name in the files

        >>> names = loaded_names({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]})
        >>> names.merged_place("model.layers.0.block_sparse_moe.experts.5.w3.weight")
        ('model.layers.0.mlp.experts.gate_up_proj', 1, 2)
        """
        renamed = self._rename(name)
        for conversion in self.conversions:
            found = conversion.find(renamed)
            if found is not None:
                names, place = found
                return (self._place(names[0]), place, len(conversion.sources)) if len(names) == 1 else None
        return None

    def _rename(self, name: str) -> str:
        for renaming in self.renamings:
            name = (renaming.apply(name) or (name,))[0]
        return name

    def _convert(self, name: str) -> tuple[tuple[str, ...], bool]:
        end = "" if name.endswith(_PARAMETER) else ".weight"
        renamed = self._rename(name + end)
        found = next((names for names in (c.apply(renamed) for c in self.conversions) if names), None)
        return tuple(new.removesuffix(end) for new in found or (renamed,)), found is not None

    def _place(self, name: str) -> str:
        """Add or remove the prefix, so that the name is one of the class."""
        first, _, rest = name.partition(".")
        second, has_attribute = rest.partition(".")[0], self.prefix in self.children
        is_prefixed = bool(self.prefix) and first == self.prefix
        if is_prefixed and second in self.children and not (has_attribute and second in self.inner):
            return rest
        is_inside = first in self.inner and (first not in self.children or (is_prefixed and second not in self.inner))
        return f"{self.prefix}.{name}" if has_attribute and is_inside else name


@dataclass(frozen=True, slots=True)
class _ClassRow:
    """The row of a class in the table.

    model_type   of the config of the class
    prefix       as in `LoadedNames`
    children     as in `LoadedNames`, separated by spaces
    inner        as in `LoadedNames`, separated by spaces
    submodels    path, class, `model_type`, and path of the part of the config, "" without a part
    """

    model_type: str
    prefix: str
    children: str
    inner: str
    submodels: Sequence[tuple[str, str, str, str]]


@cache
def _table() -> Mapping[str, Any]:
    return MappingProxyType(json.loads(_TABLE.read_text(encoding="utf-8")))


def _row_of(name: str) -> _ClassRow | None:
    """The row of the class called `name`; None for a class outside the table."""
    row = _table()["classes"].get(name)
    return None if row is None else _ClassRow(*row)


def class_for_task(model_type: str, architecture: str, ending: str) -> str | None:
    """The class of a family whose name ends with `ending`; None for a family without such a class.

    model_type     of the config
    architecture   the class in the config, "" without one; the class of an equal stem wins
    ending         "ForSequenceClassification", "ForTokenClassification", ...

    >>> class_for_task("llama", "LlamaForCausalLM", "ForSequenceClassification")
    'LlamaForSequenceClassification'
    """
    rows = _table()["classes"].items()
    names = [name for name, row in rows if name.endswith(ending) and row[0] == model_type]
    if architecture in names:
        return architecture
    stem = architecture.partition("For")[0]
    return max(names, key=lambda name: (name.removesuffix(ending) == stem, -len(name)), default=None)


def base_class(config: Mapping[str, Any]) -> str | None:
    """The class of the model without a head; None for a family outside the table.

    >>> base_class({"model_type": "llama"})
    'LlamaModel'
    """
    return _table()["base_classes"].get(str(config.get("model_type", "")))  # type: ignore[no-any-return]


def head_rows(architecture: str) -> list[list[Any]] | None:
    """The tensors of the head of a class for a task, as [name, side, ...]: a side is "labels", a key of the config, or
    a number. None for a class without a known head.

    >>> head_rows("LlamaForSequenceClassification")
    [['score.weight', 'labels', 'hidden_size']]
    """
    return _table()["heads"].get(architecture)  # type: ignore[no-any-return]


def loaded_names(config: Mapping[str, Any]) -> LoadedNames | None:
    """The names that the class of a config gives to tensors; None for a class that the table does not have.

    config   the content of config.json

    >>> names = loaded_names({"model_type": "vit", "architectures": ["ViTForImageClassification"]})
    >>> names.find("vit.encoder.layer.0.attention.attention.query")
    ('vit.layers.0.attention.q_proj',)
    """
    architectures = config.get("architectures") or ()
    name = architectures[0] if architectures else ""
    row = _row_of(name)
    if row is None or row.model_type != config.get("model_type"):
        return None
    keys = {key for *_, key in row.submodels if key}
    return _build(name, tuple((key, model_type) for key in sorted(keys) if (model_type := _type_at(config, key))))


def _type_at(config: Mapping[str, Any], key: str) -> str | None:
    """The `model_type` of a part of a config; None without one."""
    part: Any = config
    for step in key.split("."):
        part = part.get(step) if isinstance(part, Mapping) else None
    model_type = part.get("model_type") if isinstance(part, Mapping) else None
    return model_type if isinstance(model_type, str) else None


@cache
def _build(name: str, parts: tuple[tuple[str, str], ...]) -> LoadedNames:
    """The names of the class called `name`, with the `model_type` of each part of the config."""
    row = _ClassRow(*_table()["classes"][name])
    prefix, found, seen = row.prefix, list[tuple[str, str, Transform]](), dict[str, list[str]]()
    for path, class_name, model_type in [("", name, row.model_type), *_submodels(row, dict(parts))]:
        rows = _claim(path, class_name, model_type, seen)
        found += [(kind, path, _transform(path, prefix, sources, targets)) for kind, sources, targets in rows]
    found += [(k, "", _transform("", prefix, s, t)) for k, s, t in _table()["transforms"].get("legacy", ())]
    kinds = {kind: tuple(transform for k, _, transform in found if k == kind) for kind in ("rename", "convert")}
    return LoadedNames(
        prefix, frozenset(row.children.split()), frozenset(row.inner.split()), kinds["rename"], kinds["convert"]
    )


def _submodels(row: _ClassRow, types: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield path, class and `model_type` of each model inside a class. A part of another `model_type` than the default
    of the class has the base class of the other `model_type`.
    """
    replaced: list[str] = []
    for path, class_name, model_type, key in row.submodels:
        if any(path.startswith(f"{outer}.") for outer in replaced):
            continue
        actual = types.get(key, model_type)
        if actual == model_type:
            yield path, class_name, model_type
            continue
        replaced.append(path)
        other = _table()["base_classes"].get(actual, "")
        yield path, other, actual
        other_row = _row_of(other)
        for inner, inner_class, inner_type, _ in other_row.submodels if other_row else ():
            yield f"{path}.{inner}", inner_class, inner_type


def _claim(path: str, class_name: str, model_type: str, seen: dict[str, list[str]]) -> Sequence[Any]:
    """The rows of transforms of a model at `path`. The name of the class wins over the `model_type`, and a model inside
    another model with the same rows has none. `seen` keeps the paths of each name.
    """
    transforms = _table()["transforms"]

    def is_covered(identifier: str) -> bool:
        return any(outer == "" or path.startswith(f"{outer}.") for outer in seen.get(identifier, ()))

    if is_covered(class_name):
        return ()
    by_class = class_name in transforms
    if not by_class and (is_covered(model_type) or model_type not in transforms):
        return ()
    seen.setdefault(class_name, []).append(path)
    if not by_class:
        seen.setdefault(model_type, []).append(path)
    return list(transforms[class_name if by_class else model_type])


def _transform(path: str, prefix: str, sources: Sequence[str], targets: Sequence[str]) -> Transform:
    """A transform of the model at `path`, of a class with the attribute `prefix`. The path counts with the attribute
    and without, because a checkpoint may be one of the model without its head.
    """
    if not path:
        return Transform(tuple(sources), tuple(targets), ("",))
    scope = path.removeprefix(prefix).removeprefix(".")
    scope, base = f"{scope}." if scope else "", f"{prefix}." if prefix else ""
    return Transform(tuple(sources), tuple(targets), (base + scope, scope))
