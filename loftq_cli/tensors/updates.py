"""The change of a weight by trained adapters: a sum of products s·B·A, of which DoRA rescales rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.metrics import delta_rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Term:
    """The change of a weight W [out, in] by one adapter.

    pair        the factors of Δ = s·B·A
    magnitude   DoRA's length of each row, floating point [out], NaN for a row without a length; None without DoRA. A
                row with a length m becomes m·(W + Δ) / ||W + Δ|| (arXiv 2402.09353, equation 5).
    weight      factor of the whole change
    """

    pair: LoraPair
    magnitude: torch.Tensor | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Update:
    """The change of a weight by several adapters, the sum of the changes by each adapter alone; at least one term.

    >>> import torch
    >>> update = Update((Term(LoraPair(torch.ones(1, 2), torch.ones(1, 1), scaling=2.0), torch.tensor([10.0])),))
    >>> update.rows(slice(0, 1), torch.tensor([[1.0, 2.0]]))  # (3, 4) has the length 5
    tensor([[5., 6.]])
    """

    terms: tuple[Term, ...]

    @property
    def rank(self) -> int:
        """Sum of the ranks."""
        return sum(term.pair.lora_A.shape[0] for term in self.terms)

    @property
    def scaling(self) -> float:
        """The scaling of a single pair; 1.0 for several terms, each with a scaling of its own."""
        return self.terms[0].pair.scaling * self.terms[0].weight if len(self.terms) == 1 else 1.0

    @property
    def plain(self) -> LoraPair | None:
        """The change as one pair of factors; None with DoRA, and for terms of different poolings.

        Factors of several terms lie side by side: the rank is the sum of the ranks.
        """
        first, *others = self.terms
        if any(term.magnitude is not None or term.pair.group_size != first.pair.group_size for term in self.terms):
            return None
        if not others and first.weight == 1.0:
            return first.pair
        import torch

        lora_A = torch.cat([term.pair.lora_A.float() for term in self.terms])
        lora_B = torch.cat([term.pair.lora_B.float() * (term.pair.scaling * term.weight) for term in self.terms], dim=1)
        return LoraPair(lora_A, lora_B, 1.0, first.pair.group_size)

    def rows(self, part: slice, weight: torch.Tensor) -> torch.Tensor:
        """The change of the rows `part`, float32 [rows, in]; `weight` is W in the same rows, float32."""
        return self.reader()(part, weight)

    def reader(self) -> Callable[[slice, torch.Tensor], torch.Tensor]:
        """`rows` as a function, with the factors converted once."""
        plain = self.plain
        if plain is not None:
            delta = delta_rows(plain)
            return lambda part, weight: delta(part)
        return _sum([_term_reader(term) for term in self.terms])


def _sum(
    readers: Sequence[Callable[[slice, torch.Tensor], torch.Tensor]],
) -> Callable[[slice, torch.Tensor], torch.Tensor]:
    def rows(part: slice, weight: torch.Tensor) -> torch.Tensor:
        total = readers[0](part, weight)
        for reader in readers[1:]:
            total += reader(part, weight)
        return total

    return rows


def _term_reader(term: Term) -> Callable[[slice, torch.Tensor], torch.Tensor]:
    """The rows of one term, a new tensor at each call."""
    import torch

    delta, magnitude = delta_rows(term.pair), term.magnitude

    def rows(part: slice, weight: torch.Tensor) -> torch.Tensor:
        change = delta(part)
        if magnitude is not None:
            lengths = magnitude[part].float()[:, None]
            exact = weight + change
            # Squares of 1e20 or of 1e-23 leave the range of float32, so norms accumulate in float64.
            norms = torch.linalg.vector_norm(exact, dim=1, dtype=torch.float64)[:, None]
            scaled = exact * (lengths / norms).float() - weight
            change = torch.where(lengths.isnan(), change, scaled)
        return change if term.weight == 1.0 else change * term.weight

    return rows


def spread_rows(tensor: torch.Tensor, rows: int, places: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """A tensor of `rows` rows, with the rows of `tensor` at `places` and `fill` elsewhere.

    >>> import torch
    >>> spread_rows(torch.tensor([1.0, 2.0]), 3, torch.tensor([2, 0]))
    tensor([2., 0., 1.])
    """
    return tensor.new_full((rows, *tensor.shape[1:]), fill).index_copy_(0, places, tensor)
