"""Integer programs for HiGHS: a choice for each item, of least weight, with limits on sums over the choices.

The solver is scipy.optimize.milp; HiGHS proves the minimum. (Huangfu and Hall, Parallelizing the dual revised simplex
method, Mathematical Programming Computation 10, 2018, https://highs.dev.)
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]
    Ints = np.ndarray[Any, np.dtype[np.int64]]

_MAX_ANSWERS = 100  # HiGHS may exceed a limit by a billionth: an answer in a hundred does
_STDOUT_LOCK = threading.Lock()  # a single thread at a time may redirect the descriptor


def load_solver() -> Callable[..., Any]:
    """Return `scipy.optimize.milp`. Raises UsageError when scipy is not installed.

    >>> load_solver().__name__
    'milp'
    """
    try:
        from scipy.optimize import milp
    except ImportError:
        message = "--target-bpw, --target-size and --lora-budget need scipy, which is not installed"
        raise UsageError(message, hint="pip install scipy") from None
    solver: Callable[..., Any] = milp
    return solver


@dataclass(frozen=True, slots=True)
class IntegerProgram:
    """A variable of 0 or 1 for each choice of each item; the variables of an item sum to 1.

    item_of   [choices] int64, the item of each choice, ascending from 0 without gaps
    costs     [choices] float64
    takes     [limits, choices] int64, the amount of each limit in a choice
    limits    [limits] int64

    >>> import numpy as np
    >>> program = IntegerProgram(np.array([0, 0]), np.array([4.0, 1.0]), np.array([[2, 3]]), np.array([2]))
    >>> program.minimize(program.costs, seconds=10.0)
    array([0])
    """

    item_of: Ints
    costs: Floats
    takes: Ints
    limits: Ints

    def minimize(self, weights: Floats, seconds: float, most: float = math.inf) -> Ints | None:
        """Return the positions of the selected choices, [items] int64, ascending; None when no solution exists.

        weights   [choices] float64; the selected weights have the least sum
        seconds   time for a proof
        most      the largest sum of costs of a solution

        HiGHS proves the minimum up to an absolute difference of 1e-6. HiGHS computes in floats and takes 0.999999 for
        1, so integer arithmetic checks the answer; HiGHS solves again without an answer that breaks a limit.
        Raises UsageError when `seconds` pass before the proof, or when HiGHS has no better answers.
        """
        solve = load_solver()
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint

        bounds = Bounds(0, self._find_usable(most))
        constraints = [
            LinearConstraint(self._build_item_matrix(), 1, 1),
            LinearConstraint(self.takes, -np.inf, self.limits),
            LinearConstraint(self.costs[None], -np.inf, most),
        ]
        options = {"mip_rel_gap": 0.0, "time_limit": seconds}
        for _ in range(_MAX_ANSWERS):
            with _silence_stdout():
                answer = solve(weights, integrality=1, bounds=bounds, constraints=constraints, options=options)
            if answer.status == 2:
                return None
            if answer.status != 0:
                break
            variables = np.round(answer.x)
            selected = np.flatnonzero(variables)
            if self._is_solution(selected, most):
                return selected
            constraints.append(LinearConstraint(variables[None], -np.inf, variables.sum() - 1))
        message = f"no choice of formats and ranks was proven the best: {answer.message}"
        raise UsageError(message, hint="name the format of some layers in [[override]] of a recipe")

    def _is_solution(self, selected: Ints, most: float) -> bool:
        """Whether `selected` has exactly one choice of each item, within the limits and `most`."""
        import numpy as np

        is_one_each = np.array_equal(self.item_of[selected], np.arange(self.item_of[-1] + 1))
        is_within = bool((self.takes[:, selected].sum(axis=1) <= self.limits).all())
        return is_one_each and is_within and float(self.costs[selected].sum()) <= most

    def _find_usable(self, most: float) -> Floats:
        """Return 1.0 for each choice of possible use in a solution of costs up to `most`, else 0.0; [choices] float64.

        Prices of the limits give a lower bound of the costs of all solutions (the Lagrangian bound). A choice is
        useless when the priced cost is further above the item's least than `most` is above the bound.
        """
        import numpy as np
        from scipy.optimize import linprog

        if most == math.inf:
            return np.ones(len(self.costs))
        one_each = self._build_item_matrix()
        items = one_each.shape[0]
        relaxed = linprog(self.costs, A_ub=self.takes, b_ub=self.limits, A_eq=one_each, b_eq=np.ones(items))
        prices = np.maximum(-relaxed.ineqlin.marginals, 0.0)  # any prices of 0 or more give a bound
        priced = self.costs + prices @ self.takes
        least = np.full(items, np.inf)
        np.minimum.at(least, self.item_of, priced)
        bound = least.sum() - prices @ self.limits
        return np.asarray(priced - least[self.item_of] <= most - bound, dtype=float)

    def _build_item_matrix(self) -> Any:
        """Return the sparse matrix [items, choices] with a 1 where the choice belongs to the item."""
        import numpy as np
        from scipy.sparse import csr_array

        count = len(self.item_of)
        return csr_array((np.ones(count), (self.item_of, np.arange(count))))


@contextmanager
def _silence_stdout() -> Iterator[None]:
    """Keep lines of HiGHS out of the program's results: HiGHS 1.12 prints to stdout despite options."""
    with _STDOUT_LOCK:
        stdout = os.dup(1)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 1)
            yield
        finally:
            ctypes.CDLL(None).fflush(None)  # lines wait in a buffer of the C library
            os.dup2(stdout, 1)
            os.close(nowhere)
            os.close(stdout)
