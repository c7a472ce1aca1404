"""The tensors of adapters by the names of the base: what is added to a weight, and what replaces a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from loftq_cli.adapter.fused import FusedRows
from loftq_cli.adapter.sorting import LoraTensors, TokenRows
from loftq_cli.adapter.source import AdapterSource
from loftq_cli.errors import MismatchError

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Addition:
    """The factors, or the trained bias, of one adapter for one tensor of the base.

    source   the adapter
    lora     the tensors of the adapted module
    weight   factor of the adapter's change
    part     rows of the module in a fused matrix; None for a matrix of the module alone
    """

    source: AdapterSource
    lora: LoraTensors
    weight: float = 1.0
    part: FusedRows | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """Trained rows of one adapter for a matrix over the vocabulary.

    source   the adapter
    tokens   the rows
    weight   factor of the difference from the rows of the base
    """

    source: AdapterSource
    tokens: TokenRows
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Replacement:
    """A tensor of one adapter in place of a tensor of the base, or beside the tensors of the base."""

    source: AdapterSource
    tensor: str


@dataclass(slots=True)
class Placed:
    """The places of all tensors of adapters. Keys are names of tensors in the base, but for `new`.

    lora     weight -> additions
    biases   bias -> additions
    whole    tensor -> the replacement
    tokens   matrix over the vocabulary -> trained rows
    experts  tensor of all experts -> for each expert the additions
    new      name in the loaded model -> a tensor that the base does not have
    copies   new weight -> weight of the base with the same numbers: a head that shared the weight of the embedding
    unused   tensor of an adapter without a place -> the reason
    left     tensors of the base without a place in the merged model
    notes    remarks about names
    """

    lora: dict[str, tuple[Addition, ...]] = field(default_factory=dict)
    biases: dict[str, tuple[Addition, ...]] = field(default_factory=dict)
    whole: dict[str, Replacement] = field(default_factory=dict)
    tokens: dict[str, tuple[Rows, ...]] = field(default_factory=dict)
    experts: dict[str, tuple[tuple[Addition, ...], ...]] = field(default_factory=dict)
    new: dict[str, Replacement] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    left: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def touches(self, name: str) -> bool:
        """Whether an adapter changes the tensor called `name`."""
        return any(name in table for table in (self.lora, self.biases, self.whole, self.tokens, self.experts))

    def drop(self, name: str) -> None:
        """Forget the changes of the tensor `name`."""
        for table in (self.lora, self.biases, self.whole, self.tokens, self.experts):
            table.pop(name, None)

    def replaced(self) -> dict[str, str]:
        """Tensor of the base -> tensor of an adapter in its place."""
        return {name: replacement.tensor for name, replacement in self.whole.items()}


def join(all_placed: Sequence[Placed]) -> Placed:
    """The places of the tensors of several adapters. Additions and trained rows add up.

    Raises MismatchError for a tensor that two adapters save in full, which no sum can combine, as in PEFT.
    """
    joined = Placed()
    for placed in all_placed:
        _add(joined.lora, placed.lora)
        _add(joined.biases, placed.biases)
        _add(joined.tokens, placed.tokens)
        for name, experts in placed.experts.items():
            earlier = joined.experts.get(name, ((),) * len(experts))
            joined.experts[name] = tuple((*one, *other) for one, other in zip(earlier, experts, strict=True))
        for table, further in ((joined.whole, placed.whole), (joined.new, placed.new)):
            for name, replacement in further.items():
                if name in table and not _is_same(table[name], replacement):
                    other = table[name].source.path.name
                    message = f"is saved in full by two adapters, here and in {other}: no sum combines them"
                    file = replacement.source.weights.path
                    hint = "merge one adapter, and the other into the result"
                    raise MismatchError(message, file=file, tensor=replacement.tensor, hint=hint)
                table.setdefault(name, replacement)
        joined.unused.update(placed.unused)
        joined.notes = tuple(dict.fromkeys((*joined.notes, *placed.notes)))
    return joined


def weighted(placed: Placed, weight: float) -> Placed:
    """The places with a factor for additions and trained rows."""

    def scale(items: tuple[Addition, ...]) -> tuple[Addition, ...]:
        return tuple(replace(item, weight=weight) for item in items)

    def scaled(table: Mapping[str, tuple[Addition, ...]]) -> dict[str, tuple[Addition, ...]]:
        return {name: scale(items) for name, items in table.items()}

    tokens = {name: tuple(replace(rows, weight=weight) for rows in items) for name, items in placed.tokens.items()}
    experts = {name: tuple(map(scale, items)) for name, items in placed.experts.items()}
    lora, biases = scaled(placed.lora), scaled(placed.biases)
    return replace(placed, lora=lora, biases=biases, tokens=tokens, experts=experts)


def additions(placed: Placed) -> Iterator[tuple[str, Addition]]:
    """Yield each weight of the base with each addition."""
    for name, items in placed.lora.items():
        yield from ((name, item) for item in items)


def _add(table: dict[str, tuple[Item, ...]], further: Mapping[str, tuple[Item, ...]]) -> None:
    for name, items in further.items():
        table[name] = (*table.get(name, ()), *items)


def _is_same(one: Replacement, other: Replacement) -> bool:
    tensors = one.source.weights, other.source.weights
    return tensors[0].sha256(one.tensor) == tensors[1].sha256(other.tensor)
