"""One choice for each of many items, of least total cost within limits on what they take: the multiple-choice knapsack
problem. Knows no layers and no bits; whole numbers and floats only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from operator import itemgetter

_OUTER_STEPS = 40  # bisections of the second price, which halve what is missing of the bound
_NARROW = 64  # partial selections that are kept while a first whole one is sought
_MAX_EXPANSIONS = 300_000  # of partial selections, a second; small problems end far below, and exactly
_MAX_MOVES = 200  # to other choices of one item that are tried in pairs, and how often a better pair is sought
_MAX_ROUNDS = 100
_RAISES = (0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)  # of prices, relative
_ROUNDING = 1e-12  # of a bound: sums of the same numbers in another order

_Picks = tuple[int, int, "_Picks | None"]  # an item, the index of its choice, and those before
_State = tuple[float, tuple[int, ...], _Picks | None]  # what a partial selection rises above the bound, takes, and is


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to serve an item: what it costs, and what it takes of each limited resource, not negative."""

    cost: float
    takes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """The index of a choice for each item, their total cost, and what no selection within the limits falls below."""

    picks: tuple[int, ...]
    cost: float
    bound: float


def select(items: Sequence[Sequence[Choice]], limits: Sequence[int]) -> Selection | None:
    """The cheapest selection of one choice for each item that takes at most `limits`, one or two of them; None where
    there is none. Each item has at least one choice.

    Prices of the resources are sought that raise the Lagrangian bound; then a search over partial selections drops
    those that the bound, the limits or a better one rule out. It is exact unless it had to drop others, too, as with
    hundreds of items; `bound` then says how much could have been lost.
    Raises ValueError for other than one or two limits.
    """
    if len(limits) not in (1, 2):
        raise ValueError("there are one or two limits")
    kept = [_undominated(choices) for choices in items]
    if any(sum(min(choice.takes[k] for _, choice in item) for item in kept) > limits[k] for k in range(len(limits))):
        return None
    prices = _prices([[choice for _, choice in item] for item in kept], limits)
    problem = _Problem.of(kept, tuple(limits), prices)
    found, is_exact = problem.search(_NARROW, math.inf)
    if found is None:
        return None
    if not is_exact:
        found = min((problem.exchanged(start) for start in (found, problem.rounded()) if start), key=itemgetter(0))
        best, is_exact = problem.search(problem.width, found[0])
        found = found if best is None else problem.exchanged(best)
    cost = math.fsum(items[i][pick].cost for i, pick in enumerate(found[1]))
    return Selection(found[1], cost, cost if is_exact else min(cost, problem.bound))


def _undominated(choices: Sequence[Choice]) -> list[tuple[int, Choice]]:
    """The choices, with their indices, that no other one beats or equals in everything; cheapest first."""
    kept: list[tuple[int, Choice]] = []
    for i, choice in sorted(enumerate(choices), key=lambda pair: (pair[1].cost, pair[1].takes)):
        if not any(all(a <= b for a, b in zip(other.takes, choice.takes, strict=True)) for _, other in kept):
            kept.append((i, choice))
    return kept


def _prices(items: list[list[Choice]], limits: Sequence[int]) -> tuple[float, ...]:
    """Of a unit of each resource: about those that give the highest bound."""
    if len(limits) == 1:
        return (_first_price(items, limits[0], 0.0)[0],)
    low, high = 0.0, 0.0
    price, taken = _first_price(items, limits[0], 0.0)
    if taken <= limits[1]:
        return price, 0.0
    # At this price each item takes its least of the second resource, whatever it costs.
    for item in items:
        least = min(choice.takes[1] for choice in item)
        spread = item[-1].cost - item[0].cost
        high = max(high, *(spread / (choice.takes[1] - least) for choice in item if choice.takes[1] > least), 0.0)
    high *= 2.0
    for _ in range(_OUTER_STEPS):
        middle = (low + high) / 2
        price, taken = _first_price(items, limits[0], middle)
        low, high = (middle, high) if taken > limits[1] else (low, middle)
    return price, middle


def _first_price(items: list[list[Choice]], limit: int, second: float) -> tuple[float, float]:
    """The price of the first resource that gives the highest bound at the price `second` of the other one; and what the
    fractional selection behind that bound takes of the second resource.

    The lower convex hulls of the items, walked from what takes most by the least rise in cost for what is saved.
    """
    steps: list[tuple[float, int, int]] = []
    taken, taken_second = 0, 0.0
    for item in items:
        points = [
            (choice.takes[0], choice.cost + second * choice.takes[-1], choice.takes[-1] if len(choice.takes) > 1 else 0)
            for choice in item
        ]
        hull = _hull(points)
        taken += hull[0][0]
        taken_second += hull[0][2]
        for (more, cheap, a), (less, dear, b) in pairwise(hull):
            steps.append(((dear - cheap) / (more - less), more - less, a - b))
    if taken <= limit:
        return 0.0, taken_second
    for rise, saved, saved_second in sorted(steps, key=itemgetter(0)):
        share = min(1.0, (taken - limit) / saved)
        taken_second -= share * saved_second
        taken -= saved
        if taken <= limit:
            return rise, taken_second
    return steps[-1][0] if steps else 0.0, taken_second


def _hull(points: list[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """The lower convex hull of (takes, cost, ...), from the cheapest to the one that takes least."""
    hull: list[tuple[int, float, int]] = []
    for point in sorted(points, key=lambda p: (p[1], p[0])):
        if hull and point[0] >= hull[-1][0]:
            continue
        while len(hull) > 1:
            (x0, y0, _), (x1, y1, _) = hull[-2], hull[-1]
            if (y1 - y0) * (x0 - point[0]) < (point[1] - y0) * (x0 - x1):
                break
            hull.pop()
        hull.append(point)
    return hull


@dataclass(frozen=True, slots=True)
class _Item:
    """An item in the search: its place among all, its choices with what they cost above its cheapest at the prices,
    and the least that those after it take.
    """

    place: int
    choices: tuple[tuple[float, int, tuple[int, ...]], ...]  # rise above the bound, index, takes
    least_after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Move:
    """Another choice for one item: what it costs and takes more than the present one."""

    cost: float
    takes: tuple[int, ...]
    place: int
    index: int


@dataclass(frozen=True, slots=True)
class _Problem:
    """Items, those that matter most first, with the prices that bound every selection.

    A selection costs the bound, what its choices rise above it, and what it leaves of the limits, at their prices.
    """

    items: tuple[_Item, ...]
    limits: tuple[int, ...]
    prices: tuple[float, ...]
    bound: float

    @classmethod
    def of(cls, kept: list[list[tuple[int, Choice]]], limits: tuple[int, ...], prices: tuple[float, ...]) -> _Problem:
        def priced(choice: Choice) -> float:
            return choice.cost + sum(p * t for p, t in zip(prices, choice.takes, strict=True))

        cheapest = [min(priced(choice) for _, choice in item) for item in kept]
        bound = math.fsum(cheapest) - math.fsum(p * limit for p, limit in zip(prices, limits, strict=True))
        order = sorted(range(len(kept)), key=lambda i: -max(max(choice.takes) for _, choice in kept[i]))
        least, items = tuple(0 for _ in limits), list[_Item]()
        for i in reversed(order):
            rises = sorted((priced(choice) - cheapest[i], at, choice.takes) for at, choice in kept[i])
            items.append(_Item(i, tuple(rises), least))
            least = tuple(total + min(choice.takes[k] for _, choice in kept[i]) for k, total in enumerate(least))
        return cls(tuple(reversed(items)), limits, prices, bound)

    @property
    def width(self) -> int:
        """How many partial selections may be kept of each length."""
        return max(_NARROW, _MAX_EXPANSIONS // max(1, sum(len(item.choices) for item in self.items)))

    def search(self, width: int, cost: float) -> tuple[tuple[float, tuple[int, ...]] | None, bool]:
        """The cost and the picks of the best selection that is cheaper than `cost`, keeping the `width` partial ones of
        least bound; and whether there was no need to drop others.
        """
        is_exact = True
        # What is ruled out costs at least `cost`; equal to rounding is not cheaper.
        ceiling = cost - self.bound - _ROUNDING * abs(cost) if cost < math.inf else math.inf
        states: list[_State] = [(0.0, tuple(0 for _ in self.limits), None)]
        for item in self.items:
            grown: dict[tuple[int, ...], _State] = {}
            for risen, taken, picks in states:
                for rise, at, takes in item.choices:
                    if risen + rise >= ceiling:
                        break
                    now = tuple(map(sum, zip(taken, takes, strict=True)))
                    if any(map(_exceeds, now, item.least_after, self.limits)):
                        continue
                    known = grown.get(now)
                    if known is None or risen + rise < known[0]:
                        grown[now] = (risen + rise, now, (item.place, at, picks))
            states = sorted(_unbeaten(list(grown.values()), self.prices), key=itemgetter(0, 1))
            if len(states) > width:
                states, is_exact = _spread(states, width), False
        finished = [(risen + self._left(taken), picks) for risen, taken, picks in states]
        if not finished:
            return None, is_exact
        above, picks = min(finished, key=itemgetter(0))
        if above >= ceiling:
            return None, is_exact
        return (self.bound + above, _unrolled(picks, len(self.items))), is_exact

    def rounded(self) -> tuple[float, tuple[int, ...]] | None:
        """The best selection of what is cheapest at prices somewhat above those of the bound; None where none fits."""
        best: tuple[float, tuple[int, ...]] | None = None
        for raises in product(_RAISES, repeat=len(self.limits)):
            extra = [price * raised for price, raised in zip(self.prices, raises, strict=True)]
            chosen = [(i.place, min(i.choices, key=partial(_price_of, extra=extra))) for i in self.items]
            taken = tuple(sum(choice[2][k] for _, choice in chosen) for k in range(len(self.limits)))
            if all(map(int.__le__, taken, self.limits)):
                cost = self.bound + sum(choice[0] for _, choice in chosen) + self._left(taken)
                if best is None or cost < best[0]:
                    best = (cost, tuple(choice[1] for _, choice in sorted(chosen)))
        return best

    def exchanged(self, found: tuple[float, tuple[int, ...]]) -> tuple[float, tuple[int, ...]]:
        """A selection after exchanges of the choices of one or two items, as long as they make it cheaper. Only those
        to choices near the bound are tried.
        """
        cost, picks = found
        for _ in range(_MAX_ROUNDS):
            room, moves = self._moves(picks)
            best: tuple[float, tuple[_Move, ...]] = (-_ROUNDING * abs(cost), ())
            for i, first in enumerate(moves):
                for pair in ((first,), *((first, second) for second in moves[i + 1 :] if second.place != first.place)):
                    saved = sum(move.cost for move in pair)
                    if saved < best[0] and all(sum(m.takes[k] for m in pair) <= left for k, left in enumerate(room)):
                        best = (saved, pair)
            if not best[1]:
                break
            cost += best[0]
            changed = list(picks)
            for move in best[1]:
                changed[move.place] = move.index
            picks = tuple(changed)
        return cost, picks

    def _moves(self, picks: tuple[int, ...]) -> tuple[tuple[int, ...], list[_Move]]:
        """What a selection leaves of the limits; and the moves away from it that rise least above the bound."""
        room, moves = self.limits, list[tuple[float, _Move]]()
        for item in self.items:
            rise, _, takes = next(choice for choice in item.choices if choice[1] == picks[item.place])
            room = tuple(left - taken for left, taken in zip(room, takes, strict=True))
            for other, index, others in item.choices:
                if index != picks[item.place]:
                    more = tuple(b - a for a, b in zip(takes, others, strict=True))
                    cost = other - rise - sum(p * m for p, m in zip(self.prices, more, strict=True))
                    moves.append((other, _Move(cost, more, item.place, index)))
        moves.sort(key=itemgetter(0))
        return room, [move for _, move in moves[:_MAX_MOVES]]

    def _left(self, taken: tuple[int, ...]) -> float:
        """What is not taken of the limits, at their prices."""
        return sum(p * (limit - t) for p, limit, t in zip(self.prices, self.limits, taken, strict=True))


def _price_of(choice: tuple[float, int, tuple[int, ...]], extra: list[float]) -> float:
    return choice[0] + sum(price * taken for price, taken in zip(extra, choice[2], strict=True))


def _exceeds(taken: int, least_after: int, limit: int) -> bool:
    return taken + least_after > limit


def _unbeaten(states: list[_State], prices: tuple[float, ...]) -> list[_State]:
    """Those of one resource that no other one beats in both what is taken and what it costs by itself."""
    if len(prices) > 1:
        return states
    kept, least = list[_State](), math.inf
    for state in sorted(states, key=lambda state: (state[1], state[0])):
        cost = state[0] - prices[0] * state[1][0]
        if cost < least:
            kept.append(state)
            least = cost
    return kept


def _spread(states: list[_State], width: int) -> list[_State]:
    """`width` of `states`, cheapest first: half of them the cheapest, half the cheapest of each part of the range of
    what is taken, so that some can still be completed within the limits and some use them up; and what takes least.
    """
    kept = [*states[: width // 2], min(states, key=lambda state: sum(state[1]))]
    for k in range(len(states[0][1])):
        amounts = [state[1][k] for state in states]
        least, parts = min(amounts), max(1, width // (2 * len(states[0][1])) - 1)
        size = (max(amounts) - least) / parts or 1.0
        cheapest = {int((state[1][k] - least) / size): state for state in reversed(states)}
        kept += cheapest.values()
    return sorted({state[1]: state for state in kept}.values(), key=itemgetter(0, 1))


def _unrolled(picks: _Picks | None, count: int) -> tuple[int, ...]:
    """The index of the choice of each item in order."""
    found = [0] * count
    while picks is not None:
        place, index, picks = picks
        found[place] = index
    return tuple(found)
