"""The choice under limits: against every selection tried, at limits met exactly and missed by one, with equal costs."""

from __future__ import annotations

import doctest
import itertools
import math
import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from loftq_cli.allocation import choice, integer_program
from loftq_cli.allocation.choice import Choice, Selection, select
from loftq_cli.errors import UsageError

Items = list[list[Choice]]


def taken(items: Items, picks: tuple[int, ...]) -> tuple[int, ...]:
    """What a selection takes of each limit."""
    amounts = [item[pick].takes for item, pick in zip(items, picks, strict=True)]
    return tuple(map(sum, zip(*amounts, strict=True)))


def selections(items: Items, limits: tuple[int, ...]) -> list[tuple[float, int, tuple[int, ...]]]:
    """The cost, the sum of what is taken, and the picks of every selection within the limits, by trying everything."""
    every = itertools.product(*(range(len(item)) for item in items))
    return [
        (math.fsum(item[pick].cost for item, pick in zip(items, picks, strict=True)), sum(taken(items, picks)), picks)
        for picks in every
        if all(amount <= limit for amount, limit in zip(taken(items, picks), limits, strict=True))
    ]


def check(items: Items, limits: tuple[int, ...], tolerance: float = 1e-9) -> bool:
    """Assert that `select` agrees with trying everything; returns whether there was a selection at all."""
    expected, selection = selections(items, limits), select(items, limits)
    if not expected:
        assert selection is None
        return False
    assert selection is not None
    assert all(amount <= limit for amount, limit in zip(taken(items, selection.picks), limits, strict=True))
    assert selection.cost == math.fsum(item[pick].cost for item, pick in zip(items, selection.picks, strict=True))
    assert selection.cost <= min(expected)[0] + tolerance
    return True


@st.composite
def problems(draw: st.DrawFn, costs: st.SearchStrategy[float], most: int) -> tuple[Items, tuple[int, ...]]:
    """Up to five items with up to four choices; one or two limits, which a selection meets exactly or misses by one."""
    resources = draw(st.integers(1, 2))
    takes = st.tuples(*[st.integers(0, most)] * resources)
    items = draw(st.lists(st.lists(st.builds(Choice, costs, takes), min_size=1, max_size=4), min_size=1, max_size=5))
    met = [draw(st.sampled_from(item)).takes for item in items]
    return items, tuple(sum(amounts) - draw(st.integers(0, 1)) for amounts in zip(*met, strict=True))


FRACTIONS = st.floats(0, 1, width=32)


@given(problems(FRACTIONS, 20))
@settings(max_examples=150, deadline=None)
def test_no_selection_within_the_limits_is_cheaper(problem: tuple[Items, tuple[int, ...]]) -> None:
    check(*problem)


@given(problems(FRACTIONS, 10**9))
@settings(max_examples=100, deadline=None)
def test_bytes_of_large_layers_are_counted_exactly(problem: tuple[Items, tuple[int, ...]]) -> None:
    check(*problem)


@given(problems(st.integers(0, 4).map(float), 6))
@settings(max_examples=150, deadline=None)
def test_of_equal_costs_the_selection_that_takes_less_wins(problem: tuple[Items, tuple[int, ...]]) -> None:
    items, limits = problem
    if check(items, limits):
        selection = select(items, limits)
        assert selection is not None
        assert (selection.cost, sum(taken(items, selection.picks))) == min(selections(items, limits))[:2]


def test_three_limits_are_kept_too() -> None:
    draw = random.Random(0)
    for _ in range(30):
        items = [[Choice(draw.random(), tuple(draw.choices(range(9), k=3))) for _ in range(4)] for _ in range(4)]
        check(items, (12, 16, 20))


@pytest.mark.parametrize("resources", [1, 2])
def test_a_limit_that_is_met_exactly_is_kept_and_one_less_is_not(resources: int) -> None:
    item = [Choice(1.0, (7_000_001,) * resources), Choice(2.0, (5_000_003,) * resources)]

    assert select([item] * 3, (21_000_003,) * resources) == Selection((0, 0, 0), 3.0)
    assert select([item] * 3, (21_000_002,) * resources) == Selection((0, 0, 1), 4.0)
    assert select([item] * 3, (15_000_009,) * resources) == Selection((1, 1, 1), 6.0)
    assert select([item] * 3, (15_000_008,) * resources) is None


def test_limits_that_can_be_kept_one_by_one_but_not_together_have_no_selection() -> None:
    item = [Choice(1.0, (1, 3)), Choice(1.0, (3, 1))]

    assert select([item, item], (4, 4)) == Selection((0, 1), 2.0)
    assert select([item, item], (4, 3)) is None


def test_the_first_of_equal_choices_is_picked() -> None:
    item = [Choice(3.0, (1,)), Choice(2.0, (2,)), Choice(2.0, (2,))]

    assert select([item, item], (4,)) == Selection((1, 1), 4.0)


def test_items_with_equal_choices_have_ascending_picks() -> None:
    item, other = [Choice(4.0, (2,)), Choice(1.0, (3,))], [Choice(5.0, (2,)), Choice(0.5, (9,))]

    assert select([item, other, item, item], (10,)) == Selection((0, 0, 1, 1), 11.0)


def test_the_order_of_items_and_choices_does_not_change_what_is_selected() -> None:
    items = layers_like_a_model(5, 2)
    limits = limits_at(items, 0.3)
    selection = select(items, limits)
    assert selection is not None
    for seed in range(3):
        places, shuffled = list(range(len(items))), random.Random(seed)
        shuffled.shuffle(places)
        orders = [shuffled.sample(range(len(item)), len(item)) for item in items]
        again = select([[items[place][i] for i in orders[place]] for place in places], limits)
        assert again is not None
        picks = {place: orders[place][pick] for place, pick in zip(places, again.picks, strict=True)}
        assert tuple(picks[place] for place in range(len(items))) == selection.picks


def test_amounts_beyond_what_the_solver_counts_exactly_stay_within_the_limit() -> None:
    # Twice 2**40 + 1 bytes exceed the limit by one, less than the solver tells apart.
    item = [Choice(1.0, (2**40 + 1,)), Choice(2.0, (2**39,))]

    selection = select([item, item], (2**41 + 1,))

    assert selection == Selection((0, 1), 3.0)


@pytest.mark.parametrize("seed", [143, 147, 258])
def test_an_answer_that_rounding_pushed_over_a_limit_is_not_taken(seed: int) -> None:
    # Amounts near 1e9, one less than a selection takes. HiGHS 1.12 takes that selection, minus a billionth of a choice.
    draw = random.Random(seed)
    items = [[Choice(draw.random(), (draw.randrange(1, 10**9),)) for _ in range(4)] for _ in range(4)]
    met = sum(draw.choice(item).takes[0] for item in items)

    assert check(items, (met - 1,))


# Problems as large as models.


def layers_like_a_model(count: int, resources: int) -> Items:
    """Formats of 2 to 8 bits in three group sizes, and five ranks where there are two resources."""
    draw, items = random.Random(0), []
    for _ in range(count):
        numel, weight = draw.choice((1 << 20, 1 << 22, 1 << 24)), math.exp(draw.gauss(0.0, 1.0))
        formats = [
            (numel * bits // 8 + 2 * numel // size, weight * 4.0**-bits * size**0.3 * (1 + 0.1 * draw.random()))
            for bits in (2, 3, 4, 8)
            for size in (32, 64, 128)
        ]
        ranks = (4, 8, 16, 32, 64) if resources == 2 else (16,)
        items.append(
            [
                Choice(error * (1 - 0.07 * math.log(rank)), (nbytes, 8 * rank * math.isqrt(numel))[:resources])
                for nbytes, error in formats
                for rank in ranks
            ]
        )
    return items


def limits_at(items: Items, share: float) -> tuple[int, ...]:
    """Limits at a share of the way from the least that a selection takes to the most."""
    bounds = []
    for k in range(len(items[0][0].takes)):
        least, most = (sum(end(choice.takes[k] for choice in item) for item in items) for end in (min, max))
        bounds.append(least + int((most - least) * share))
    return tuple(bounds)


def cheapest_by_table(items: Items, limit: int) -> float:
    """The least cost under one limit, from the table of dynamic programming: after each item, the least cost for each
    amount; amounts that cost more than a smaller amount are dropped.
    """
    table = {0: 0.0}
    for item in items:
        grown: dict[int, float] = {}
        for amount, cost in table.items():
            for option in item:
                after = amount + option.takes[0]
                if after <= limit:
                    grown[after] = min(grown.get(after, math.inf), cost + option.cost)
        table, least = {}, math.inf
        for amount, cost in sorted(grown.items()):
            if cost < least:
                table[amount] = least = cost
    return min(table.values())


@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
def test_a_model_of_many_layers_is_solved_as_well_as_by_dynamic_programming(share: float) -> None:
    items = layers_like_a_model(16, 1)
    limits = limits_at(items, share)

    selection = select(items, limits)

    assert selection is not None
    assert selection.cost == pytest.approx(cheapest_by_table(items, limits[0]), rel=1e-12)


def test_with_two_limits_a_model_of_many_layers_costs_little_more_than_a_fractional_one() -> None:
    items = layers_like_a_model(64, 2)
    limits = limits_at(items, 0.3)
    columns = [choice for item in items for choice in item]
    one_each = np.repeat(np.eye(len(items)), [len(item) for item in items], axis=1)
    relaxed = linprog(
        [choice.cost for choice in columns],
        A_ub=np.array([choice.takes for choice in columns]).T,
        b_ub=limits,
        A_eq=one_each,
        b_eq=np.ones(len(items)),
    )

    selection = select(items, limits)

    assert selection is not None
    assert all(amount <= limit for amount, limit in zip(taken(items, selection.picks), limits, strict=True))
    assert relaxed.fun <= selection.cost <= 1.01 * relaxed.fun


# The solver and its surroundings.


def test_a_search_that_is_cut_short_is_an_error_and_no_choice() -> None:
    items = layers_like_a_model(64, 2)

    with pytest.raises(UsageError, match=r"^no choice of formats and ranks was proven the best: Time limit"):
        select(items, limits_at(items, 0.3), seconds=0.0)

    assert select(items, limits_at(items, 0.3), seconds=100.0) is not None


def test_what_the_solver_prints_is_no_result(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    milp = integer_program.load_solver()

    def printing(*arguments: object, **options: object) -> object:
        os.write(1, b"a line of HiGHS\n")
        return milp(*arguments, **options)

    monkeypatch.setattr(integer_program, "load_solver", lambda: printing)
    select([[Choice(1.0, (1,))]], (1,))
    os.write(1, b"a result\n")

    assert capfd.readouterr().out == "a result\n"


def test_threads_may_select_at_once() -> None:
    items = layers_like_a_model(8, 1)
    expected, results = select(items, limits_at(items, 0.3)), list[Selection | None]()
    threads = [threading.Thread(target=lambda: results.append(select(items, limits_at(items, 0.3)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == [expected] * 4


def test_without_scipy_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)

    with pytest.raises(UsageError) as caught:
        select([[Choice(1.0, (1,))]], (1,))

    assert str(caught.value) == (
        "--target-bpw, --target-size and --lora-budget need scipy, which is not installed (pip install scipy)"
    )


def test_scipy_is_imported_on_use_only() -> None:
    code = "import sys, loftq_cli.allocation.allocation; sys.exit('scipy' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(choice).failed == 0
    assert doctest.testmod(choice).attempted > 0
