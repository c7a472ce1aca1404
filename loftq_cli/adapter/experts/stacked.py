"""Merging into a tensor of all experts, [experts, rows, columns] as stored, one expert at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from loftq_cli.errors import NumericError
from loftq_cli.model.stored import BaseModel
from loftq_cli.runtime.workers import Workers
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.metrics import MergeSums, adapter_delta, merge_sums

if TYPE_CHECKING:
    import torch


def merged_experts(
    base: BaseModel,
    name: str,
    count: int,
    pairs: Callable[[int], Sequence[LoraPair]],
    cast: Callable[[torch.Tensor], torch.Tensor],
    sums: list[MergeSums],
    workers: Workers,
) -> Iterator[torch.Tensor]:
    """Yield the merged matrix of each expert, in the orientation of the files; append each expert's sums to `sums`.

    name    the tensor of all experts, [experts, rows, columns]; [rows, columns] for a `count` of 1
    count   the number of experts
    pairs   reads the factors to add to an expert
    cast    converts a float32 matrix to the dtype of the output

    Memory holds the matrices of a few experts. Raises NumericError for NaN and infinite values in the base.
    """
    is_stack = len(base.tensors[name].shape) == 3

    def merge(expert: int) -> tuple[torch.Tensor, MergeSums]:
        checkpoint = base.checkpoint
        stored = checkpoint.load_rows(name, expert, expert + 1)[0] if is_stack else checkpoint.load(name)
        weight = stored.float()
        delta = None
        for pair in pairs(expert):
            added = adapter_delta(pair)
            delta = added if delta is None else delta.add_(added)
        merged = cast(weight if delta is None else weight + delta)
        expert_sums = merge_sums(weight, merged, delta)
        if not math.isfinite(expert_sums.squared_weight):
            raise NumericError("holds NaN or infinite values")
        return merged, expert_sums

    for merged, expert_sums in workers.map(merge, range(count)):
        sums.append(expert_sums)
        yield merged


def expert_retentions(sums: Sequence[MergeSums]) -> tuple[float | None, ...]:
    """The surviving share of the update of each expert; None for an expert without an update.

    >>> expert_retentions([MergeSums(1.0, 2.0, 1.0, 0.0), MergeSums(1.0, 0.0, 0.0, 0.0)])
    (0.5, None)
    """
    return tuple(part.retained / part.squared_delta if part.squared_delta else None for part in sums)
