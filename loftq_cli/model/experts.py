"""The experts of a model by names and shapes: which tensors, or parts of tensors, are the matrices of the experts of a
layer. Needs no torch.

transformers 5 holds the experts of a layer as two parameters: gate and up of all experts, and down of all experts.
Files hold a matrix for each expert and projection, or a tensor for each parameter.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType

from loftq_cli.model.family import Family
from loftq_cli.tensors.headers import WEIGHT_DTYPES, TensorRef

_TABLE = Path(__file__).with_name("experts.toml")
_EXPERT = re.compile(r"(.*\.experts)\.(\d{1,6})\.([^.]+)\.weight")
_MODULES = ("gate_proj", "up_proj", "down_proj")  # of the list of experts that transformers makes


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedRow:
    """A row of experts.toml: where a family holds the experts of a layer in one tensor; the file says what each key
    means.
    """

    gate_up: str
    down: str
    transposed: bool = False
    interleaved: bool = False
    is_transposed: bool = False
    modules: bool = False


@cache
def stacked_rows() -> Mapping[str, StackedRow]:
    """The rows of experts.toml by `model_type`; the file is read once.

    >>> stacked_rows()["gpt_oss"].interleaved
    True
    """
    table = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    known = {field.name for field in fields(StackedRow)}
    for family, values in table.items():
        if not values.keys() <= known:
            raise ValueError(f"family {family} of {_TABLE.name} has unknown keys: {', '.join(values.keys() - known)}")
    return MappingProxyType({family: StackedRow(**values) for family, values in table.items()})


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """Rows of an expert's matrix [out, in], as a tensor of the original holds the rows.

    tensor       name of the tensor
    index        place of the expert in a tensor of all experts; None for a tensor of the expert alone
    rows         [start, stop) among the outputs that the tensor holds for the expert; None for all
    transposed   the tensor holds [in, out]
    stored       name of the part as a weight of its own in a container, "....weight"; None for a container that keeps
                 the tensors of the original
    """

    tensor: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False
    stored: str | None = None


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """The matrices of all experts of a layer that become one parameter of the loaded model, or equal modules.

    name        name of the parameter in the loaded model, "....experts.gate_up_proj"; for modules, the list of the
                experts and the last part of each module
    shape       [out, in] of an expert's matrix
    experts     for each expert the parts of the matrix, one below the other
    modules     for each expert the name of the module in the loaded model; empty for one parameter
    is_turned   PEFT reads the matrices of the parameter as [in, out]
    """

    name: str
    shape: tuple[int, int]
    experts: tuple[tuple[ExpertPart, ...], ...]
    modules: tuple[str, ...] = ()
    is_turned: bool = False

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors of the original with parts of the group."""
        return list(dict.fromkeys(part.tensor for parts in self.experts for part in parts))


def find_experts(tensors: Mapping[str, TensorRef], family: Family, *, packed: bool) -> list[ExpertGroup]:
    """Find the experts of a model whose class is known; experts of other models are not found.

    tensors   the headers of the checkpoint
    family    the config and the facts about the family
    packed    whether the container stores codes: some models then load experts as modules

    A group is complete: experts from 0 on, each with all parts of equal shape.

    >>> find_experts({}, Family({}), packed=True)
    []
    """
    row = stacked_rows().get(_text_type(family))
    if row is not None:
        return list(_find_stacked(tensors, family, row, packed=packed))
    return list(_find_separate(tensors, family))


def _text_type(family: Family) -> str:
    """The `model_type` of the text model, which names the row."""
    nested = family.config.get("text_config")
    inner = nested.get("model_type") if isinstance(nested, Mapping) else None
    return str(inner) if isinstance(inner, str) else family.model_type


def _find_separate(tensors: Mapping[str, TensorRef], family: Family) -> Iterator[ExpertGroup]:
    """Yield the groups of families with a matrix for each expert and projection."""
    loader = family.loader
    found: dict[str, dict[int, dict[int, TensorRef]]] = {}
    counts: dict[str, int] = {}
    for name, ref in tensors.items():
        match = _EXPERT.fullmatch(name)
        place = None if loader is None or match is None or len(ref.shape) != 2 else loader.merged_place(name)
        if match is None or place is None or ref.dtype not in WEIGHT_DTYPES:
            continue
        parameter, part, counts[parameter] = place
        found.setdefault(parameter, {}).setdefault(int(match[2]), {})[part] = ref
    for parameter, experts in found.items():
        whole = [[parts.get(i) for i in range(counts[parameter])] for _, parts in sorted(experts.items())]
        refs = [[ref for ref in parts if ref is not None] for parts in whole]
        shapes = {tuple(ref.shape for ref in parts) for parts in refs}
        if sorted(experts) != list(range(len(experts))) or len(shapes) != 1 or not _are_stackable(next(iter(shapes))):
            continue
        if len(refs[0]) < counts[parameter]:
            continue
        shape = (sum(ref.shape[0] for ref in refs[0]), refs[0][0].shape[1])
        parts = tuple(tuple(ExpertPart(ref.name, stored=ref.name) for ref in expert) for expert in refs)
        yield ExpertGroup(parameter, shape, parts)


def _are_stackable(shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether matrices of the shapes are equal halves of a matrix."""
    listed = list(shapes)
    return len(set(listed)) == 1 and 0 not in listed[0]


def _find_stacked(
    tensors: Mapping[str, TensorRef], family: Family, row: StackedRow, *, packed: bool
) -> Iterator[ExpertGroup]:
    """Yield the groups of families with a tensor for all experts."""
    for name, ref in tensors.items():
        ending = next((end for end in (row.gate_up, row.down) if name.endswith(f".{end}")), None)
        if ending is None or len(ref.shape) != 3 or 0 in ref.shape or ref.dtype not in WEIGHT_DTYPES:
            continue
        shape = (ref.shape[2], ref.shape[1]) if row.transposed else (ref.shape[1], ref.shape[2])
        loaded = name if family.loader is None else family.loader.find(name)[0]
        if row.modules and packed:
            yield from _list_modules(name, loaded, ref.shape[0], shape, row, is_gate_up=ending == row.gate_up)
        else:
            experts = tuple((ExpertPart(name, i, transposed=row.transposed),) for i in range(ref.shape[0]))
            yield ExpertGroup(loaded, shape, experts, is_turned=row.transposed and not row.is_transposed)


def _list_modules(
    name: str, loaded: str, count: int, shape: tuple[int, int], row: StackedRow, *, is_gate_up: bool
) -> Iterator[ExpertGroup]:
    """Yield a group for each projection of experts that are loaded as modules."""
    stored, listed, half = name.rpartition(".")[0], loaded.rpartition(".")[0], shape[0] // 2
    parts = ((0, half), (half, shape[0])) if is_gate_up else ((0, shape[0]),)
    for module, (start, stop) in zip(_MODULES[:2] if is_gate_up else _MODULES[2:], parts, strict=True):
        experts = tuple(
            (ExpertPart(name, i, (start, stop), row.transposed, f"{stored}.{i}.{module}.weight"),) for i in range(count)
        )
        modules = tuple(f"{listed}.{i}.{module}" for i in range(count))
        yield ExpertGroup(f"{listed}.{module}", (stop - start, shape[1]), experts, modules)
