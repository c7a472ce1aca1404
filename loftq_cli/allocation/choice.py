"""A choice for each of many items, of least total cost within limits: the multiple-choice knapsack problem.

The module knows no layers and no bits, only numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loftq_cli.allocation.integer_program import IntegerProgram

_SECONDS = 600.0  # 224 layers with five ranks and twelve formats each take 20 s on two cores
_COST_RANGE = 1e6  # range of scaled costs: the solver's gap of 1e-6 is 1e-12 of the range
_TIED = 1e-6  # scaled costs that differ by less are equal for the solver
_MAX_UNITS = 1 << 30  # a larger amount is counted in coarser units, rounded up: beyond 1e9 the solver makes mistakes


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to serve an item.

    cost    a finite number
    takes   for each limit, a whole number of 0 or more
    """

    cost: float
    takes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """A choice for each item.

    picks   the index of each item's choice
    cost    the sum of the choices' costs
    """

    picks: tuple[int, ...]
    cost: float


def select(items: Sequence[Sequence[Choice]], limits: Sequence[int], *, seconds: float = _SECONDS) -> Selection | None:
    """Return the cheapest selection within `limits`, or None when no selection is within the limits.

    items     the choices of each item, at least one
    limits    the largest sum of `takes` over all items, for each limit
    seconds   time for a proof

    The cost is the proven minimum, up to 1e-12 of the range of possible costs. Rules
    tell selections of equal cost apart, so that the version of the solver does not decide: the selection that takes
    less in sum wins; among equal choices of an item the first wins; items with equal choices have ascending picks.

    Raises UsageError when scipy is not installed, or when `seconds` pass before the minimum is proven.

    >>> layer = [Choice(4.0, (2,)), Choice(1.0, (3,))]
    >>> select([layer, layer], limits=[5])
    Selection(picks=(0, 1), cost=5.0)
    >>> select([layer, layer], limits=[3]) is None
    True
    """
    least = [sum(min(choice.takes[k] for choice in item) for item in items) for k in range(len(limits))]
    if any(amount > limit for amount, limit in zip(least, limits, strict=True)):
        return None
    if not items:
        return Selection((), 0.0)
    picks = _find_cheapest_picks([_drop_dominated(choices) for choices in items], limits, seconds)
    if picks is None:
        return None
    ordered = _sort_equal_items(items, picks)
    return Selection(ordered, math.fsum(item[pick].cost for item, pick in zip(items, ordered, strict=True)))


def _drop_dominated(choices: Sequence[Choice]) -> list[tuple[int, Choice]]:
    """Return the undominated choices with indices, by ascending cost.

    A choice is dominated when a choice of an equal or smaller cost takes no more of every limit.
    """
    front: list[tuple[int, Choice]] = []
    for i, choice in sorted(enumerate(choices), key=lambda pair: (pair[1].cost, pair[1].takes)):
        if not any(all(a <= b for a, b in zip(better.takes, choice.takes, strict=True)) for _, better in front):
            front.append((i, choice))
    return front


def _find_cheapest_picks(
    fronts: Sequence[Sequence[tuple[int, Choice]]], limits: Sequence[int], seconds: float
) -> list[int] | None:
    """Return the indices of the cheapest selection. Among equally cheap selections, the selection of the least sum of
    `takes` wins.
    """
    import numpy as np

    item_of = np.repeat(np.arange(len(fronts)), [len(front) for front in fronts])
    costs = np.array([choice.cost - front[0][1].cost for front in fronts for _, choice in front])
    costs *= _COST_RANGE / (math.fsum(front[-1][1].cost - front[0][1].cost for front in fronts) or 1.0)
    rows = [_convert_to_units(fronts, k, limit) for k, limit in enumerate(limits)]
    takes, room = np.array([amounts for amounts, _ in rows]), np.array([limit for _, limit in rows])
    program = IntegerProgram(item_of, costs, takes, room)
    cheapest = program.minimize(costs, seconds)
    if cheapest is None:
        return None
    sums, _ = _convert_to_units([[(i, Choice(0.0, (sum(c.takes),))) for i, c in front] for front in fronts], 0, 0)
    smallest = program.minimize(np.array(sums, dtype=float), seconds, most=float(costs[cheapest].sum()) + _TIED)
    # Rounding can make so narrow a program look impossible; `cheapest` is still a solution.
    selected = cheapest if smallest is None else smallest
    indices = [i for front in fronts for i, _ in front]
    return [indices[position] for position in selected]


def _convert_to_units(fronts: Sequence[Sequence[tuple[int, Choice]]], k: int, limit: int) -> tuple[list[int], int]:
    """Return the amounts of limit `k` above each item's least amount, and the limit less all least amounts.

    The results are in units: the greatest common divisor of the amounts, or a coarser unit for amounts over _MAX_UNITS.
    Amounts are rounded up and the limit is rounded down, so a selection within the units is within the limit.
    """
    amounts = [[choice.takes[k] for _, choice in front] for front in fronts]
    above = [amount - min(front) for front in amounts for amount in front]
    unit = max(math.gcd(*above), -(-max(above) // _MAX_UNITS), 1)
    return [-(-amount // unit) for amount in above], (limit - sum(map(min, amounts))) // unit


def _sort_equal_items(items: Sequence[Sequence[Choice]], picks: Sequence[int]) -> tuple[int, ...]:
    """Return `picks` with the picks of items that have equal choices in ascending order."""
    places: dict[tuple[Choice, ...], list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(tuple(item), []).append(place)
    ordered = list(picks)
    for equal in places.values():
        for place, pick in zip(equal, sorted(picks[place] for place in equal), strict=True):
            ordered[place] = pick
    return tuple(ordered)
