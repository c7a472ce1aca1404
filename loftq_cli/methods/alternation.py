"""The alternation of LoftQ (Li et al., arXiv 2310.08659, Algorithm 1), for any kind of adapter: quantize what the
adapter does not hold, fit the adapter to what quantization lost, repeat. Everything is about what a loader computes.

Beyond the paper: it can begin with the adapter of the weights themselves, go on in the direction of its last step, and
end with rounds that refine codes and constants under what an adapter absorbs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from loftq_cli.methods.lowrank import Solver, product_dtype
from loftq_cli.methods.method import Fitting, Initialization
from loftq_cli.methods.weighting import Weighting, cost_of
from loftq_cli.quant.formats import QuantizedTensor, Quantizer
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.metrics import delta_rows, relative
from loftq_cli.tensors.rows import Rows, slabs_of
from loftq_cli.triton_kernels.error_stats.contract import error_stats

TIE = 1e-9  # of a squared error

# By how much of its last step an alternation of the joint fit goes on beyond it, from the third on: before, there is no
# step yet between two adapters of quantization errors. Measured on MiniLM, one and a half of it or half are worse.
_MOMENTUM = 1.0
_FIRST_WITH_MOMENTUM = 3


@dataclass(frozen=True, slots=True)
class Adapting:
    """How adapters are found.

    fit      the best adapter of a residual [out, in], and by how much it lowers what the residual costs
    solve    what `fit` finds it with
    """

    fit: Callable[[torch.Tensor], tuple[LoraPair, float]]
    solve: Solver


def alternate(
    weight: Rows,
    quantizer: Quantizer,
    adapting: Adapting,
    fitting: Fitting,
    weighting: Weighting,
    dtype: torch.dtype,
    workers: Workers = SERIAL,
) -> Initialization:
    """The best of `fitting.iterations` alternations and `fitting.rounds` rounds after them, by what the error
    W − dequant(Q) − s·B·A costs; the residual is held in `dtype`.

    Where a step of the paper's alternation would raise the error, as the ranges of integer formats can at 2 bits, the
    groups that quantizing again takes away from their target stay as they were: then no step raises it. The joint fit
    goes on beyond its steps, which is faster and may raise it. No round that is kept does.
    With a bfloat16 residual, the errors of the iterations are those of an adapter in float32, and good to four digits.
    Peak memory: the residual, and the quantized matrix twice.
    """
    loop = _Alternation(weight, quantizer, adapting, weighting, dtype, workers)
    total = loop.cost_of_weight()
    current = loop.first(quantizer.quantize(weight, workers=workers), fitting.start)
    best, best_iteration, errors = current, 1, [current.cost]
    before: LoraPair | None = None
    for iteration in range(2, fitting.iterations + 1):
        previous = current
        goes_beyond = fitting.fit == "joint" and iteration >= _FIRST_WITH_MOMENTUM and before is not None
        held = beyond(previous.pair, before) if goes_beyond and before is not None else previous.pair
        before, update = previous.pair, loop.update(held)
        quantized = quantizer.quantize(weight, minus=update, start=previous.quantized, workers=workers)
        current = loop.step(quantized)
        if (
            current.cost > previous.cost
            and not goes_beyond
            and quantizer.keep_nearer(weight, update, previous.quantized, current.quantized, workers=workers)
        ):
            current = loop.step(current.quantized)
        # Sums differ in their last digits between kernels: which of equals is returned must not depend on that.
        if current.cost < (1 - TIE) * best.cost:
            best, best_iteration = current, iteration
        errors.append(current.cost)
    for made in range(1, fitting.rounds + 1):
        # Double quantization takes back a little of what fitting constants gains: the last round has codes for it.
        refined = loop.refined(best, fits_scales=made < fitting.rounds)
        if refined is None:
            break
        errors.append(refined.cost)
        if refined.cost < (1 - TIE) * best.cost:
            best, best_iteration = refined, fitting.iterations + made
    return Initialization(
        best.quantized,
        best.pair,
        relative(loop.squared_base_error, loop.squared_weight()),
        tuple(relative(error, total) for error in errors),
        best_iteration,
    )


def refined_alone(
    weight: Rows,
    quantizer: Quantizer,
    quantized: QuantizedTensor,
    adapter: LoraPair,
    fitting: Fitting,
    weighting: Weighting,
    workers: Workers = SERIAL,
) -> Initialization:
    """A quantized matrix with an adapter that adds nothing yet, after `fitting.rounds` rounds of refinement."""
    cost = weighting.left_over(None)
    for made in range(1, fitting.rounds + 1):
        found = quantizer.refine(weight, quantized, cost, fits_scales=made < fitting.rounds, workers=workers)
        if found is None:
            break
        quantized = found.quantized
    return Initialization(quantized, adapter)


def beyond(pair: LoraPair, before: LoraPair) -> LoraPair:
    """What `pair` adds, and `_MOMENTUM` times what it adds more than the adapter before it."""
    lora_A = torch.cat([pair.lora_A.float() * (1.0 + _MOMENTUM), before.lora_A.float() * -_MOMENTUM])
    lora_B = torch.cat([pair.lora_B.float(), before.lora_B.float()], dim=1)
    return replace(pair, lora_A=lora_A, lora_B=lora_B)


@dataclass(frozen=True, slots=True)
class _Step:
    """One iteration: the base, its adapter, and what is lost with both."""

    quantized: QuantizedTensor
    pair: LoraPair
    cost: float


class _Alternation:
    """What all steps share: above all, the memory of the residual."""

    def __init__(
        self,
        weight: Rows,
        quantizer: Quantizer,
        adapting: Adapting,
        weighting: Weighting,
        dtype: torch.dtype,
        workers: Workers,
    ) -> None:
        self._weight, self._quantizer, self._adapting = weight, quantizer, adapting
        self._weighting, self._workers = weighting, workers
        self._is_plain = weighting.importance is None
        self._residual = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self.squared_base_error = math.nan

    def first(self, alone: QuantizedTensor, start: str) -> _Step:
        """The first step, from the matrix quantized alone."""
        self.squared_base_error = self._fill(alone)
        if start == "zero":
            return self._fitted(alone, self.squared_base_error if self._is_plain else self._cost_of_residual())
        for part in slabs_of(self._weight):
            self._residual[part] = self._weight.rows(part)
        principal, _ = self._adapting.fit(self._residual)
        update = self.update(principal)
        return self.step(self._quantizer.quantize(self._weight, minus=update, workers=self._workers))

    def step(self, quantized: QuantizedTensor) -> _Step:
        """A quantized matrix with the adapter of what it lost."""
        squared = self._fill(quantized)
        return self._fitted(quantized, squared if self._is_plain else self._cost_of_residual())

    def refined(self, best: _Step, *, fits_scales: bool) -> _Step | None:
        """One round: codes, and constants or not, refined under what the adapter absorbs, and the adapter of that."""
        right = self._weighting.right_of(best.pair.lora_A.float())
        vectors = torch.linalg.qr(right.T).Q.contiguous()
        cost = self._weighting.left_over(vectors)
        found = self._quantizer.refine(
            self._weight, best.quantized, cost, fits_scales=fits_scales, workers=self._workers
        )
        if found is None:
            return None
        self._adapting.solve.restart(right)
        squared = self._fill(found.quantized)
        if not self._is_plain:
            # What is known without another product of the residual and H: what the adapter left, and what it took.
            taken = self._times(self._weighting.spread(vectors))
            squared = found.after + float(taken.double().square().sum())
        return self._fitted(found.quantized, squared)

    def update(self, pair: LoraPair) -> Callable[[slice], torch.Tensor]:
        """What gives rows of s·B·A."""
        return delta_rows(pair, product_dtype(self._residual))

    def squared_weight(self) -> float:
        """||W||²."""

        def squares(part: slice) -> float:
            rows = self._weight.rows(part)
            return error_stats(rows, rows).squared_weight

        return math.fsum(self._workers.map(squares, slabs_of(self._weight)))

    def cost_of_weight(self) -> float:
        """What losing the whole matrix would cost."""
        if self._is_plain:
            return self.squared_weight()
        # Nothing is subtracted from it, so that it is enough to know it in the precision that is fastest.
        dtype = product_dtype(torch.empty(0, dtype=torch.bfloat16, device=self._residual.device))

        def cost(part: slice) -> float:
            return cost_of(self._weighting, self._weight.rows(part).to(dtype), rounds=True)

        return math.fsum(self._workers.map(cost, slabs_of(self._weight)))

    def _fill(self, quantized: QuantizedTensor) -> float:
        """The residual, and the sum of its squares."""
        return self._quantizer.residual(self._weight, quantized, self._residual, workers=self._workers)

    def _cost_of_residual(self) -> float:
        return cost_of(self._weighting, self._residual, self._workers)

    def _times(self, right: torch.Tensor) -> torch.Tensor:
        """The residual @ right, a few rows at a time."""
        parts = slabs_of(self._weight)
        return torch.cat(list(self._workers.map(lambda part: self._residual[part].float() @ right, parts)))

    def _fitted(self, quantized: QuantizedTensor, cost: float) -> _Step:
        """With the adapter of the residual, of which is known what it costs without."""
        pair, gain = self._adapting.fit(self._residual)
        if self._is_plain and self._residual.dtype == torch.float32:
            return _Step(quantized, pair, self._measured(pair))
        return _Step(quantized, pair, max(cost - gain, 0.0))

    def _measured(self, pair: LoraPair) -> float:
        rows_of, residual = self.update(pair), self._residual

        def squares(part: slice) -> float:
            return error_stats(residual[part], rows_of(part)).squared_base_error

        return math.fsum(self._workers.map(squares, slabs_of(self._weight)))
