"""The table of block structures, blocks.toml, read and checked, and the blocks of a checkpoint by names alone. Needs
neither torch nor transformers.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

_TABLE = Path(__file__).with_name("blocks.toml")
_VALUE_ROWS = ("all", "last", "heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPart:
    """An attention or an MLP: x becomes last(x + after(output(inner(norm(x))))).

    norm         norm of the input; None for no norm
    reads        linears with norm(x) as input; `gate` and `up` of an MLP read norm(x) too
    value        attention: the linear of the values; inner is the value of the token, spread over the query heads
    value_rows   attention: the rows of `value` with the values: "all"; "last" in a fused q, k, v; "heads" for
                 [heads, 3, head size]
    gate, up     MLP: inner is act(gate)·up, or act(up) without a gate
    is_gated     MLP: `up` holds gate and up, one after the other
    output       the linear that reads inner
    after        norm of the output, before the addition; None for no norm
    last         norm after the addition; None for no norm
    """

    output: str
    norm: str | None = None
    reads: tuple[str, ...] = ()
    value: str | None = None
    value_rows: str = "all"
    gate: str | None = None
    up: str | None = None
    is_gated: bool = False
    after: str | None = None
    last: str | None = None

    @property
    def names(self) -> list[str]:
        """Names of all modules of the part."""
        single = (self.norm, self.value, self.gate, self.up, self.output, self.after, self.last)
        return [name for name in (*single, *self.reads) if name is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStructure:
    """The names and the order of the parts of a block.

    list               the list of the blocks, beside the embedding
    embedding          the embedding of the tokens
    positions          the embedding of the positions, added to the embedding; None for none
    first_position     the row of the first position
    types              the embedding of the token types, whose first row is added; None for none
    embedding_norm     norm of the embedded token; None for none
    families           values of model_type with the structure; empty for all families
    norm_offset        added to the weights of norms
    centers            whether norms without a bias subtract the mean too
    scales_embedding   whether the embedding is multiplied by the root of the hidden size
    is_parallel        whether attention and MLP read the same x
    activation         the activation of the MLP where the config names none
    """

    list: str
    embedding: str
    attention: BlockPart
    mlp: BlockPart
    positions: str | None = None
    first_position: int = 0
    types: str | None = None
    embedding_norm: str | None = None
    families: tuple[str, ...] = ()
    norm_offset: float = 0.0
    centers: bool = False
    scales_embedding: bool = False
    is_parallel: bool = False
    activation: str = "silu"


@dataclass(frozen=True, slots=True)
class BlockList:
    """The blocks of a model with a known structure.

    structure   the structure of the blocks
    root        prefix of the list and of the embedding: "model."; empty for no prefix
    count       number of blocks
    """

    structure: BlockStructure
    root: str
    count: int

    def block(self, number: int) -> str:
        """The prefix of the names of a block.

        >>> BlockList(structures()["llama"], "model.", 2).block(1)
        'model.layers.1.'
        """
        return f"{self.root}{self.structure.list}.{number}."


@cache
def structures() -> Mapping[str, BlockStructure]:
    """The rows of blocks.toml by name; the file is read once.

    >>> structures()["gpt2"].positions
    'wpe'
    """
    return parse_structures(_TABLE.read_text(encoding="utf-8"))


def parse_structures(text: str) -> Mapping[str, BlockStructure]:
    """Read the rows of a table in the format of blocks.toml. Raises ValueError, naming the row, for an unknown or a
    missing key, and for a value of a wrong type.

    >>> row = "list = 'h'\\nembedding = 'wte'\\nattention = { output = 'o' }\\nmlp = { output = 'd' }"
    >>> parse_structures(f"[mine]\\n{row}")["mine"].mlp.output
    'd'
    """
    rows = {}
    for name, values in tomllib.loads(text).items():
        parts = {key: _make(BlockPart, values.get(key, {}), f"{key} of {name}") for key in ("attention", "mlp")}
        rows[name] = _make(BlockStructure, {**values, **parts}, name)
        for part in (rows[name].attention, rows[name].mlp):
            if part.value_rows not in _VALUE_ROWS:
                raise ValueError(f"{name} has value_rows {part.value_rows!r}, not one of {', '.join(_VALUE_ROWS)}")
    return MappingProxyType(rows)


def _make(record: type, values: Mapping[str, Any], place: str) -> Any:
    unknown = sorted(values.keys() - {field.name for field in fields(record)})
    if unknown:
        raise ValueError(f"{place} has unknown keys: {', '.join(unknown)}")
    for key, value in values.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            continue
        if not isinstance(value, str | bool | int | float | BlockPart):
            raise ValueError(f"{place} has a {key} of a wrong type")
    converted = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        return record(**converted)
    except TypeError as error:
        raise ValueError(f"{place} is not complete: {error}") from None


def find_block_list(names: Collection[str], model_types: Collection[str]) -> BlockList | None:
    """Find blocks of a known structure in a checkpoint; None for none.

    names         names of all tensors
    model_types   values of model_type in the config, for the whole model and for the part with text

    >>> names = ["embed_tokens", "layers.0.input_layernorm", "layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj",
    ...          "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"]
    >>> find_block_list([f"model.{name}.weight" for name in names], ["llama"]).count
    1
    """
    for structure in structures().values():
        if structure.families and not set(structure.families) & set(model_types):
            continue
        for root in _find_roots(names, structure):
            count = _count_blocks(names, f"{root}{structure.list}.")
            blocks = BlockList(structure, root, count)
            if count and is_present(structure.attention, blocks.block(0), names):
                return blocks
    return None


def is_present(part: BlockPart, block: str, names: Collection[str]) -> bool:
    """Whether a checkpoint holds all weights of a part.

    block   prefix of the names of the block
    names   names of all tensors

    >>> is_present(BlockPart(output="o_proj"), "layers.0.", ["layers.0.o_proj.weight"])
    True
    """
    return all(f"{block}{name}.weight" in names for name in part.names)


def _find_roots(names: Collection[str], structure: BlockStructure) -> Iterator[str]:
    ending = f"{structure.embedding}.weight"
    for name in names:
        root = name.removesuffix(ending)
        if name.endswith(ending) and (not root or root.endswith(".")):
            yield root


def _count_blocks(names: Collection[str], prefix: str) -> int:
    numbers = {int(match[1]) for name in names if (match := re.match(rf"{re.escape(prefix)}(\d{{1,6}})\.", name))}
    return next((number for number in range(len(numbers) + 1) if number not in numbers), 0)
