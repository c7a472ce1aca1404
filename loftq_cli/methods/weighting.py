"""The cost tr(E·H·Eᵀ) of an error E [out, in] of a layer, and the part of the cost an adapter absorbs. No files, no
number formats.

H [in, in] is the mean of x·xᵀ over the layer's inputs x: the cost is the mean squared error of the outputs. H is the
identity if there are no statistics: the cost is the sum of squares. triton_kernels/refinement/README.md defines the
symbols (section 1) and derives equations 1 to 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from loftq_cli.errors import NumericError
from loftq_cli.quant.formats import Cost
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.metrics import relative
from loftq_cli.tensors.rows import Rows, TensorRows, slabs_of

# A text of thousands of tokens shows products of inputs with an error, and a text is never the text of later use: the
# products are shrunk by _SHRINKAGE, and _DAMPING is added to diag(H), whose mean is 1. Measured on SmolLM2-135M, 8192
# tokens: KL of base and adapter in multiples of plain NF4 falls from .25 to .19 on the domain of the text, and from .33
# to .27 on another domain. A diagonal from the weights alone is off too: at 0.1 the KL of SmolLM2 in multiples of plain
# NF4 is .33 (base alone .58), at 0.001 .35 (.61); on another domain .37 (.67) and .38 (.64). At 0.3 the base loses 8 %.
# A full H without a Cholesky factor gets ten times more until the factor exists, up to _MOST_DAMPING.
_SHRINKAGE, _DAMPING = 0.3, 0.1
_MOST_DAMPING = 1.0

# Most |H_ij − H_ji| of rounding, for a diagonal of ones. The two sums add equal products of x_i and x_j in float32, in
# any order, in chunks of 4096 rows: each sum is off by at most 4096·2⁻²⁴ of √(H_ii·H_jj) (Higham, Accuracy and
# Stability of Numerical Algorithms, section 3.1), and `loftq calibrate` writes equal numbers.
_MAX_ASYMMETRY = 2 * 4096 * 2.0**-24
_CHECKED_ROWS = 1024  # rows of H in a check: the temporaries stay small beside H


class Weighting(Protocol):
    """H, and the coordinates F and T of the cheapest adapter s·B·A·Pᵀ: s·B = E·F·V and A = Vᵀ·T⁻¹, where V [groups, r]
    holds the first right singular vectors of E·F (equation 3).

    H   [in, in], the mean of x·xᵀ
    P   [in, groups], P[i, k] = 1 for an input i of group k. A pooled adapter adds an equal number to all `group_size`
        columns of a group; groups = in / group_size
    T   [groups, groups], a root of PᵀHP: T·Tᵀ = Pᵀ·H·P
    F   [in, groups], F = H·P·T⁻ᵀ
    """

    def spread(self, columns: torch.Tensor) -> torch.Tensor:
        """F @ columns: float32 [in, r] of [groups, r]."""
        ...

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ F: float32 [r, groups] of [r, in]."""
        ...

    def adapter_rows(self, right: torch.Tensor) -> torch.Tensor:
        """right @ T⁻¹, [r, groups]: lora_A of a right factor of E·F, before the scaling is divided out."""
        ...

    def right_of(self, lora_A: torch.Tensor) -> torch.Tensor:
        """lora_A @ T, [r, groups]: the inverse of `adapter_rows`."""
        ...

    def rooted(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, in] @ C with C·Cᵀ = H: the sum of squares of a row of the product is the cost e·H·eᵀ of row e."""
        ...

    def left_over(self, vectors: torch.Tensor | None, share: float = 1.0) -> Cost:
        """The cost c(E) = tr(E·M·Eᵀ) that an adapter with the right vectors V leaves (equations 4 and 12).

        vectors   V, orthonormal columns [groups, r]: M = H − γ·(F·V)·(F·V)ᵀ. None for no adapter: M = H
        share     γ, from 0 to 1, see `Fitting.adapter_share`
        """
        ...

    @property
    def importance(self) -> torch.Tensor | None:
        """diag(H), float32 [in]; None stands for ones."""
        ...

    @property
    def is_plain(self) -> bool:
        """True if H and F are identities, so callers may skip all products."""
        ...


def make_weighting(statistics: torch.Tensor | None, group_size: int, device: torch.device | str = "cpu") -> Weighting:
    """The weighting of a layer by statistics of the layer's inputs. H is divided by the mean of diag(H).

    statistics   H, float32 [in, in]; the diagonal of H, [in]; or None for the identity
    group_size   inputs that the adapter pools to a single number; 1 without pooling
    device       the device of H
    Raises NumericError unless diag(H) is finite and not negative with a positive mean, and H symmetric up to rounding
    and positive semidefinite.

    >>> weighting = make_weighting(torch.tensor([1.0, 3.0]), group_size=1)
    >>> weighting.importance
    tensor([0.6000, 1.6000])
    """
    if statistics is None:
        return Diagonal(None, group_size)
    statistics = statistics.to(device)
    diagonal = statistics if statistics.dim() == 1 else statistics.diagonal()
    mean = float(diagonal.double().mean())
    if not (math.isfinite(mean) and mean > 0.0) or bool((diagonal < 0.0).any()):
        raise NumericError("the statistics of its inputs are not those of any inputs", hint="loftq calibrate again")
    # A factor changes no minimum; squares of numbers of the order of 1 are inside the range of float32.
    return (Diagonal if statistics.dim() == 1 else Dense).of(statistics / mean, group_size)


@dataclass(frozen=True)
class Diagonal:
    """A diagonal H. T² = Pᵀ·H·P is then diagonal too, and F = H·P·T⁻¹.

    importance   diag(H), float32 [in]; None for the identity
    group_size   inputs that the adapter pools to a single number
    """

    importance: torch.Tensor | None
    group_size: int

    @classmethod
    def of(cls, importance: torch.Tensor, group_size: int) -> Diagonal:
        """The weighting by `importance`, of mean 1, with damping."""
        return cls(importance + _DAMPING, group_size)

    @property
    def is_plain(self) -> bool:
        return self.importance is None and self.group_size == 1

    @cached_property
    def _root(self) -> torch.Tensor:
        """The diagonal of T, [groups]; a single number for the identity."""
        if self.importance is None:
            return torch.tensor(math.sqrt(self.group_size))
        return self.importance.view(-1, self.group_size).sum(dim=1).sqrt_()

    def spread(self, columns: torch.Tensor) -> torch.Tensor:
        root = self._root.to(columns.device)
        pooled = columns / (root if root.dim() == 0 else root[:, None])
        repeated = pooled.repeat_interleave(self.group_size, dim=0)
        return repeated if self.importance is None else repeated * self.importance[:, None]

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows if self.importance is None else rows * self.importance
        return rows.view(len(rows), -1, self.group_size).sum(dim=2) / self._root.to(rows.device)

    def adapter_rows(self, right: torch.Tensor) -> torch.Tensor:
        return right / self._root.to(right.device)

    def right_of(self, lora_A: torch.Tensor) -> torch.Tensor:
        return lora_A * self._root.to(lora_A.device)

    def rooted(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.importance is None else rows * self.importance.sqrt()

    def left_over(self, vectors: torch.Tensor | None, share: float = 1.0) -> Cost:
        if vectors is None or share == 0.0:
            return Cost(None, self.importance)
        return Cost((self.spread(vectors) * math.sqrt(share)).contiguous(), self.importance)


def _is_symmetric(hessian: torch.Tensor) -> bool:
    """True when no H_ij differs from H_ji by more than rounding, for a diagonal that is not negative."""
    scale = hessian.diagonal().sqrt()
    for start in range(0, len(hessian), _CHECKED_ROWS):
        part = slice(start, start + _CHECKED_ROWS)
        difference = (hessian[part] - hessian[:, part].T).abs_()
        if not bool((difference <= _MAX_ASYMMETRY * scale[part, None] * scale).all()):
            return False
    return True


@dataclass(frozen=True)
class Dense:
    """A full H = C·Cᵀ. P is the identity if the adapter pools nothing: then T = F = C. Every root T of PᵀHP gives an
    equal adapter.

    hessian       H, float32 [in, in]
    group_size    inputs that the adapter pools to a single number
    root          C [in, in], the lower triangular Cholesky factor of H
    pooled_root   T [groups, groups], the lower triangular Cholesky factor of Pᵀ·H·P
    """

    hessian: torch.Tensor
    group_size: int
    root: torch.Tensor
    pooled_root: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, group_size: int) -> Dense:
        """The weighting by `hessian`, float32 [in, in] with a diagonal of mean 1, after the shrinking of products and
        the least damping that gives a Cholesky factor. Raises NumericError for a matrix that is not symmetric up to
        rounding, or not positive semidefinite.
        """
        if not _is_symmetric(hessian):
            raise NumericError("the statistics of its inputs are not symmetric", hint="loftq calibrate again")
        diagonal = hessian.diagonal().clone()
        hessian = (hessian + hessian.T) * ((1.0 - _SHRINKAGE) / 2)
        hessian.diagonal().copy_(diagonal)
        damping = _DAMPING
        while True:
            damped = hessian.clone()
            damped.diagonal().add_(damping)
            root, failed = torch.linalg.cholesky_ex(damped)
            if not int(failed) and bool(torch.isfinite(root).all()):
                break
            damping *= 10.0
            if damping > _MOST_DAMPING:
                raise NumericError(
                    "the statistics of its inputs are not positive semidefinite", hint="loftq calibrate again"
                )
        if group_size == 1:
            return cls(damped, group_size, root, root)
        groups = damped.view(len(damped) // group_size, group_size, -1, group_size).sum(dim=(1, 3))
        return cls(damped, group_size, root, torch.linalg.cholesky(groups))

    @property
    def importance(self) -> torch.Tensor:
        return self.hessian.diagonal().contiguous()

    @property
    def is_plain(self) -> bool:
        return False

    def spread(self, columns: torch.Tensor) -> torch.Tensor:
        if self.group_size == 1:
            return self.root @ columns
        solved: torch.Tensor = torch.linalg.solve_triangular(self.pooled_root.T, columns, upper=True)
        return self.hessian @ solved.repeat_interleave(self.group_size, dim=0)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        if self.group_size == 1:
            return rows @ self.root
        pooled = (rows @ self.hessian).view(len(rows), -1, self.group_size).sum(dim=2)
        solved: torch.Tensor = torch.linalg.solve_triangular(self.pooled_root.T, pooled, upper=True, left=False)
        return solved

    def adapter_rows(self, right: torch.Tensor) -> torch.Tensor:
        solved: torch.Tensor = torch.linalg.solve_triangular(self.pooled_root, right, upper=False, left=False)
        return solved

    def right_of(self, lora_A: torch.Tensor) -> torch.Tensor:
        return lora_A @ self.pooled_root

    def rooted(self, rows: torch.Tensor) -> torch.Tensor:
        # A quarter of the columns of C at a time, without the zero rows above: three eighths of the product are saved.
        root, step = self.root.to(rows.dtype), -(-len(self.root) // 4)
        parts = [rows[:, i:] @ root[i:, i : i + step] for i in range(0, len(root), step)]
        return torch.cat(parts, dim=1)

    def left_over(self, vectors: torch.Tensor | None, share: float = 1.0) -> Cost:
        if vectors is None or share == 0.0:
            return Cost(hessian=self.hessian)
        absorbed = self.spread(vectors)  # F·V
        return Cost(hessian=torch.addmm(self.hessian, absorbed, absorbed.T, alpha=-share))


def cost_of(weighting: Weighting, error: torch.Tensor, workers: Workers = SERIAL, *, rounds: bool = False) -> float:
    """tr(E·H·Eᵀ) of an error E [out, in], float32 or bfloat16: products in float32, or in the dtype of E if `rounds` is
    true; sums in float64 over the rows.

    >>> round(cost_of(make_weighting(torch.tensor([1.0, 3.0]), 1), torch.tensor([[2.0, 0.0]])), 4)
    2.4
    """

    def total(part: slice) -> float:
        rows = error[part] if rounds else error[part].float()
        return _squares(weighting.rooted(rows).float())

    return math.fsum(workers.map(total, slabs_of(TensorRows(error))))


@dataclass(frozen=True, slots=True)
class OutputErrors:
    """Relative errors of a layer's outputs, √(cost of the error / cost of W).

    plain_output_error   of plain rounding in the format of the base; None where plain rounding is impossible
    base_output_error    of the base alone
    output_error         of base and adapter together
    """

    plain_output_error: float | None
    base_output_error: float
    output_error: float


def output_errors(
    statistic: torch.Tensor,
    weight: Rows,
    plain: Rows | None,
    decoded: Rows,
    lora: LoraPair,
    workers: Workers = SERIAL,
) -> OutputErrors:
    """The errors of the outputs; an error is 0 for an exact copy of a zero matrix, infinite for a wrong copy.

    statistic   H, the mean of x·xᵀ over the inputs [in, in], or the diagonal of H [in]; float32
    weight      W [out, in]
    plain       W after plain rounding [out, in]; None where plain rounding is impossible
    decoded     dequant(Q) [out, in], the values of a loader
    lora        the adapter

    (W − dequant(Q) − s·B·A)·H is (W − dequant(Q))·H − s·B·(A·H): a single product with H gives the costs of base and of
    base plus adapter.

    >>> weight, decoded = TensorRows(torch.full((1, 2), 2.0)), TensorRows(torch.ones(1, 2))
    >>> lora = LoraPair(torch.ones(1, 2), torch.full((1, 1), 0.5), scaling=1.0)
    >>> output_errors(torch.ones(2), weight, decoded, decoded, lora)
    OutputErrors(plain_output_error=0.5, base_output_error=0.5, output_error=0.25)
    """
    hessian = statistic.to(weight.device)
    lora_A = lora.lora_A.float().repeat_interleave(lora.group_size, dim=1)
    lora_B, weighted_A = lora.lora_B.float() * lora.scaling, _weighted(lora_A, hessian)
    others = () if plain is None else (plain,)

    def cost(error: torch.Tensor, product: torch.Tensor) -> float:
        return max(0.0, float((error * product).sum(dim=1).double().sum()))

    def costs(part: slice) -> tuple[float, ...]:
        rows = weight.rows(part).float()
        base, factors = rows - decoded.rows(part), lora_B[part]
        product = _weighted(base, hessian)
        both = cost(base - factors @ lora_A, product - factors @ weighted_A)
        roundings = [rows - other.rows(part) for other in others]
        total = cost(rows, _weighted(rows, hessian))
        return total, cost(base, product), both, *(cost(error, _weighted(error, hessian)) for error in roundings)

    multiple = math.lcm(decoded.multiple, *(other.multiple for other in others))
    columns = zip(*workers.map(costs, slabs_of(weight, multiple)), strict=True)
    total, *errors = (math.fsum(column) for column in columns)
    base, both, *rounded = (relative(error, total) for error in errors)
    return OutputErrors(rounded[0] if rounded else None, base, both)


def _weighted(rows: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """rows · H [n, in], for a full or a diagonal H."""
    return rows * hessian if hessian.dim() == 1 else rows @ hessian


def _squares(rows: torch.Tensor) -> float:
    """The sum of squares of float32 rows, in float64 over the rows."""
    return float(rows.square().sum(dim=1).double().sum())
