"""Matrices that hold the rows of several modules, like the queries, keys and values of an attention.

A checkpoint may fuse what an adapter splits: the adapter was trained on another port of the model, or transformers
splits the matrix while loading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Last parts of names: fused matrices of three modules or two, and the modules in the order of the rows.
_FUSED = (
    (("qkv_proj", "qkv", "Wqkv", "wqkv", "query_key_value", "c_attn", "W_pack", "attn_qkv", "in_proj_qkv"), 3),
    (("gate_up_proj", "gate_up", "gate_up_linear", "dense_h_to_4h", "w12"), 2),
)
_PARTS = {
    3: (
        ("q_proj", "k_proj", "v_proj"),
        ("query", "key", "value"),
        ("q", "k", "v"),
        ("to_q", "to_k", "to_v"),
        ("wq", "wk", "wv"),
        ("q_lin", "k_lin", "v_lin"),
        ("query_proj", "key_proj", "value_proj"),
    ),
    2: (("gate_proj", "up_proj"), ("w1", "w3"), ("gate", "up")),
}
# Families whose fused matrix holds queries, keys and values of one head after another, by the number of such groups.
_BY_HEAD = {"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "fuyu"}
_BY_KEY_HEAD = {"internlm2"}
_UNKNOWN_ORDER = {"codegen"}  # rows in blocks for tensor parallelism, queries and values swapped


@dataclass(frozen=True, slots=True)
class FusedRows:
    """The rows of a module in a fused matrix.

    total    rows of the matrix
    groups   number of equal groups of rows, each with a share of every module
    start    first row of the module in a group
    rows     rows of the module in a group
    """

    total: int
    groups: int
    start: int
    rows: int

    @property
    def count(self) -> int:
        """Rows of the module."""
        return self.groups * self.rows

    def places(self) -> list[int]:
        """The numbers of the module's rows in the matrix, in the order of the module.

        >>> FusedRows(total=12, groups=2, start=2, rows=2).places()
        [2, 3, 8, 9]
        """
        width = self.total // self.groups
        return [group * width + self.start + row for group in range(self.groups) for row in range(self.rows)]


def fused_parts(module: str) -> Iterator[tuple[str, ...]]:
    """Yield the possible names of the modules in a matrix called `module`; nothing for a matrix of a single module.

    >>> next(fused_parts("h.0.attn.qkv_proj"))
    ('h.0.attn.q_proj', 'h.0.attn.k_proj', 'h.0.attn.v_proj')
    """
    parent, dot, leaf = module.rpartition(".")
    for leaves, count in _FUSED:
        if leaf in leaves:
            yield from (tuple(f"{parent}{dot}{part}" for part in parts) for parts in _PARTS[count])


def all_parts(modules: Iterable[str]) -> set[str]:
    """The names of all modules that fused matrices among `modules` may hold.

    >>> sorted(all_parts(["h.0.mlp.gate_up_proj", "h.0.mlp.down_proj"]))[:2]
    ['h.0.mlp.gate', 'h.0.mlp.gate_proj']
    """
    return {name for module in modules for names in fused_parts(module) for name in names}


def rows_of_parts(
    config: Mapping[str, Any], total: int, parts: tuple[str, ...], sizes: Mapping[str, int]
) -> dict[str, FusedRows] | None:
    """The rows of each module in a fused matrix; None where the rows are unknown or do not fit.

    config   the content of the model's config.json, for the order of the rows
    total    rows of the matrix
    parts    names of the modules, in the order of the rows
    sizes    rows of the modules in an adapter, at least one; keys and values have equally many

    >>> rows_of_parts({}, 8, ("q", "k", "v"), {"q": 4})["v"]
    FusedRows(total=8, groups=1, start=6, rows=2)
    """
    known = [sizes.get(part) for part in parts]
    if len(parts) == 2:
        counts = [total // 2, total // 2]
    else:
        query, keys = known[0], known[1] or known[2]
        keys = keys if keys is not None else (total - (query or 0)) // 2
        counts = [total - 2 * keys, keys, keys]
    groups = groups_of(config)
    fits = sum(counts) == total and all(size in (None, count) for size, count in zip(known, counts, strict=True))
    if groups is None or not fits or any(count <= 0 or count % groups for count in counts):
        return None
    starts = [sum(counts[:i]) // groups for i in range(len(counts))]
    return {
        part: FusedRows(total, groups, start, count // groups)
        for part, start, count in zip(parts, starts, counts, strict=True)
    }


def groups_of(config: Mapping[str, Any]) -> int | None:
    """The number of groups of rows in the fused attention of a family; 1 for all queries before all keys. None for an
    order that is not known.

    >>> groups_of({"model_type": "phi3"}), groups_of({"model_type": "bloom", "n_head": 8})
    (1, 8)
    """
    family = config.get("model_type")
    heads = _number(config, "num_attention_heads", "n_head", "n_heads")
    key_heads = _number(config, "num_key_value_heads", "num_kv_heads") or heads
    if family in _UNKNOWN_ORDER:
        return None
    if family == "gpt_bigcode":
        return 1 if config.get("multi_query", True) else heads
    if family == "falcon":
        if config.get("new_decoder_architecture"):
            return key_heads
        return 1 if config.get("multi_query", True) else heads
    return heads if family in _BY_HEAD else key_heads if family in _BY_KEY_HEAD else 1


def _number(config: Mapping[str, Any], *keys: str) -> int | None:
    values = (config.get(key) for key in keys)
    return next((value for value in values if type(value) is int and value > 0), None)
