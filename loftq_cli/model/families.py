"""The table of model families, families.toml, read and checked. Needs neither torch nor transformers."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loftq_cli.layouts.layout import LAYOUTS

_TABLE = Path(__file__).with_name("families.toml")
_TABLE_KEYS = {"fused_expert_projections", "renamings", "families"}
_LISTS = ("transposed", "full_precision", "no_adapter", "shared", "refused_by")
_EXPERTS = ("fused",)  # PEFT moves adapters of experts to the parameters of a fused layout


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """Facts about the models of one `model_type`; the defaults are the facts about a family without a row.

    prefix          attribute of a head class that holds the model without the head; None for no attribute
    transposed      last parts of the names of linears stored [in, out]
    full_precision  endings of names of modules that transformers keeps in float32
    no_adapter      endings, of complete parts, of the names of linears without a PEFT adapter
    moved           last parts of the names of linears whose adapters PEFT moves to the experts
    shared          parts of the names of linears whose weights several modules share
    loads_in_4_bit  whether transformers loads linears from 4-bit tensors
    renamings       (expression, replacement) pairs that a head class applies to module names, in order
    refused_by      keys of LAYOUTS: containers whose loaders do not read the family
    """

    prefix: str | None = None
    transposed: tuple[str, ...] = ()
    full_precision: tuple[str, ...] = ()
    no_adapter: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    loads_in_4_bit: bool = True
    renamings: tuple[tuple[str, str], ...] = ()
    refused_by: tuple[str, ...] = ()


_NO_FACTS = FamilyRow()


@cache
def families() -> Mapping[str, FamilyRow]:
    """The rows of families.toml by `model_type`; the file is read once.

    >>> families()["gpt2"].prefix
    'transformer'
    """
    return parse_families(_TABLE.read_text(encoding="utf-8"))


def family_row(model_type: str) -> FamilyRow:
    """The row of `model_type`; the defaults for a family without a row.

    >>> family_row("no such family").loads_in_4_bit
    True
    """
    return families().get(model_type, _NO_FACTS)


def parse_families(text: str) -> Mapping[str, FamilyRow]:
    """Read the rows of a table in the format of families.toml: `model_type` -> facts.

    Raises ValueError, naming the family, for an unknown key, for a value of a wrong type, and for an unknown list of
    renamings, layout of experts or container.

    >>> text = "fused_expert_projections = []\\n[renamings]\\n[families.mine]\\nprefix = 'model'"
    >>> parse_families(text)["mine"].prefix
    'model'
    """
    table = tomllib.loads(text)
    unknown = sorted(table.keys() ^ _TABLE_KEYS)
    if unknown:
        raise ValueError(f"the table of families has or lacks {', '.join(unknown)}")
    renamings = {name: tuple((old, new) for old, new in pairs) for name, pairs in table["renamings"].items()}
    projections = _check_names(table["fused_expert_projections"], "fused_expert_projections")
    rows = {name: _make_row(name, dict(values), renamings, projections) for name, values in table["families"].items()}
    return MappingProxyType(rows)


def _make_row(
    family: str,
    values: dict[str, Any],
    renamings: Mapping[str, tuple[tuple[str, str], ...]],
    projections: tuple[str, ...],
) -> FamilyRow:
    experts, renaming = values.pop("experts", None), values.pop("renamings", None)
    unknown = sorted(values.keys() - {field.name for field in fields(FamilyRow) if field.name != "moved"})
    if unknown:
        raise ValueError(f"family {family} has unknown keys: {', '.join(unknown)}")
    if experts not in (None, *_EXPERTS):
        raise ValueError(f"family {family} has experts {experts!r}, not one of {', '.join(_EXPERTS)}")
    if renaming not in (None, *renamings):
        raise ValueError(f"family {family} has renamings {renaming!r}, which are not listed")
    lists = {key: _check_names(values.get(key, []), f"{key} of family {family}") for key in _LISTS}
    strangers = [name for name in lists["refused_by"] if name not in LAYOUTS]
    if strangers:
        raise ValueError(f"family {family} is refused by {', '.join(strangers)}, and there is no such container")
    prefix, loads_in_4_bit = values.get("prefix"), values.get("loads_in_4_bit", True)
    if not isinstance(prefix, str | None) or not isinstance(loads_in_4_bit, bool):
        raise ValueError(f"family {family} has a prefix that is no text, or loads_in_4_bit other than true and false")
    pairs = renamings[renaming] if renaming else ()
    moved = projections if experts == "fused" else ()
    return FamilyRow(prefix=prefix, moved=moved, loads_in_4_bit=loads_in_4_bit, renamings=pairs, **lists)


def _check_names(value: object, place: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{place} is no list of names")
    return tuple(value)
