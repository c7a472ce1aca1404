"""What an error of a layer costs: its squares, or those of what it does to the layer's inputs, tr(E·H·Eᵀ) with
H = E[x·xᵀ]; and what of that an adapter takes. Knows neither files nor formats.
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
from loftq_cli.tensors.metrics import delta_rows, relative
from loftq_cli.tensors.rows import Rows, TensorRows, slabs_of

# Of the mean of diag(H), what is added to the diagonal: directions that the calibration text did not show.
_DAMPING = 1e-3
_MOST_DAMPING = 1.0


class Weighting(Protocol):
    """The costs of a layer's errors E [out, in], and the coordinates in which an adapter that makes the cost least is a
    truncated SVD: of E·F, with A = Vᵀ·T⁻¹ for its right singular vectors V.

    A pooled adapter adds the same to `group_size` neighbouring columns: A is [r, in / group_size].
    """

    def spread(self, columns: torch.Tensor) -> torch.Tensor:
        """F @ columns."""
        ...

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ F."""
        ...

    def adapter_rows(self, right: torch.Tensor) -> torch.Tensor:
        """right @ T⁻¹: lora_A, but for the scaling, of a right factor in these coordinates."""
        ...

    def right_of(self, lora_A: torch.Tensor) -> torch.Tensor:
        """lora_A @ T, the inverse of `adapter_rows`."""
        ...

    def rooted(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 [n, in] times a root of H: the squares of that are what they cost."""
        ...

    def left_over(self, vectors: torch.Tensor | None) -> Cost:
        """What errors cost beside an adapter with these orthonormal right vectors [k, r] in these coordinates, which
        then takes its part; without any, what they cost.
        """
        ...

    @property
    def importance(self) -> torch.Tensor | None:
        """diag(H), float32 [in]; None for ones."""
        ...

    @property
    def is_plain(self) -> bool:
        """Whether H and F are identities, and nothing has to be done about them."""
        ...


def make_weighting(statistics: torch.Tensor | None, group_size: int, device: torch.device | str = "cpu") -> Weighting:
    """The weighting of a layer by the `statistics` of its inputs, float32 [in, in], or [in] for the diagonal alone;
    None: each weight counts the same.

    Raises NumericError for statistics that are not those of any inputs.
    """
    if statistics is None:
        return Diagonal(None, group_size)
    given = statistics.to(device)
    diagonal = given if given.dim() == 1 else given.diagonal()
    mean = float(diagonal.double().mean())
    if not (math.isfinite(mean) and mean > 0.0) or bool((diagonal < 0.0).any()):
        raise NumericError("the statistics of its inputs are not those of any inputs", hint="loftq calibrate again")
    # Units do not matter; of the order of 1, squares are inside float32's range.
    return (Diagonal if given.dim() == 1 else Dense).of(given / mean, group_size)


@dataclass(frozen=True)
class Diagonal:
    """H = diag(importance), or the identity. F = H·P·T⁻¹, where P [in, in / group_size] repeats each column of a
    group, and T² = Pᵀ·H·P is diagonal too.
    """

    importance: torch.Tensor | None
    group_size: int

    @classmethod
    def of(cls, importance: torch.Tensor, group_size: int) -> Diagonal:
        return cls(importance + _DAMPING, group_size)

    @property
    def is_plain(self) -> bool:
        return self.importance is None and self.group_size == 1

    @cached_property
    def _root(self) -> torch.Tensor:
        """The diagonal of T, [in / group_size], or one number for all."""
        if self.importance is None:
            return torch.tensor(math.sqrt(self.group_size))
        return self.importance.view(-1, self.group_size).sum(dim=1).sqrt_()

    def spread(self, columns: torch.Tensor) -> torch.Tensor:
        root = self._root.to(columns.device)
        wide = (columns / (root if root.dim() == 0 else root[:, None])).repeat_interleave(self.group_size, dim=0)
        return wide if self.importance is None else wide * self.importance[:, None]

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows if self.importance is None else rows * self.importance
        return rows.view(len(rows), -1, self.group_size).sum(dim=2) / self._root.to(rows.device)

    def adapter_rows(self, right: torch.Tensor) -> torch.Tensor:
        return right / self._root.to(right.device)

    def right_of(self, lora_A: torch.Tensor) -> torch.Tensor:
        return lora_A * self._root.to(lora_A.device)

    def rooted(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.importance is None else rows * self.importance.sqrt()

    def left_over(self, vectors: torch.Tensor | None) -> Cost:
        return Cost(None if vectors is None else self.spread(vectors).contiguous(), self.importance)


@dataclass(frozen=True)
class Dense:
    """H = C·Cᵀ with the lower triangular C of Cholesky. F = H·P·T⁻ᵀ with T·Tᵀ = Pᵀ·H·P; without groups that is C, and
    any other root of H would give the same adapter.
    """

    hessian: torch.Tensor
    group_size: int
    root: torch.Tensor
    pooled_root: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, group_size: int) -> Dense:
        """Raises NumericError for a matrix that is not positive semidefinite."""
        hessian = (hessian + hessian.T) / 2
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
        # Of a triangle a quarter of the columns at a time: two fifths of the product are zeros.
        root, step = self.root.to(rows.dtype), -(-len(self.root) // 4)
        parts = [rows[:, i:] @ root[i:, i : i + step] for i in range(0, len(root), step)]
        return torch.cat(parts, dim=1)

    def left_over(self, vectors: torch.Tensor | None) -> Cost:
        if vectors is None:
            return Cost(hessian=self.hessian)
        taken = self.spread(vectors)
        return Cost(hessian=torch.addmm(self.hessian, taken, taken.T, alpha=-1.0))


def cost_of(weighting: Weighting, error: torch.Tensor, workers: Workers = SERIAL, *, rounds: bool = False) -> float:
    """tr(E·H·Eᵀ) of E [out, in], float32 or bfloat16; if it `rounds`, multiplied in the dtype of E."""

    def total(part: slice) -> float:
        rows = error[part] if rounds else error[part].float()
        return float(weighting.rooted(rows).float().square().sum(dim=1).double().sum())

    return math.fsum(workers.map(total, slabs_of(TensorRows(error))))


def output_error(weighting: Weighting, weight: Rows, decoded: Rows, lora: LoraPair, workers: Workers = SERIAL) -> float:
    """√(what the error of `decoded` with the adapter costs / what losing all of the weight would)."""
    delta = delta_rows(lora)

    def costs(part: slice) -> tuple[float, float]:
        rows = weight.rows(part).float()
        return cost_of(weighting, rows - decoded.rows(part) - delta(part)), cost_of(weighting, rows)

    found = list(workers.map(costs, slabs_of(weight, decoded.multiple)))
    return relative(math.fsum(error for error, _ in found), math.fsum(whole for _, whole in found))
