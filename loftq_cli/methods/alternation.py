"""The alternation of LoftQ (Li et al., arXiv 2310.08659, Algorithm 1) for any kind of adapter: quantize W − s·B·A, fit
s·B·A to the residual E = W − dequant(Q), repeat. dequant(Q) is the matrix a loader computes.

The paper has no start from the adapter of W, no momentum, no final rounds that refine codes and constants beside the
adapter, and no share of the cost for the base alone: `Fitting.keep_base` makes W − γ·s·B·A the target of the base, with
γ = 1 − keep_base. triton_kernels/refinement/README.md derives the rounds and the target, and defines the symbols.
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

TIE = 1e-9  # a squared error has to fall by more than this part to count as lower

# Multiple of the last step by which an alternation of the joint fit extrapolates; 0.5 and 1.5 are worse, measured on
# MiniLM. Momentum lowers the cost with `keep_base` too: by 0.7 % at 0.25, and by less than 0.1 % at 0.75. Momentum
# begins at alternation 3, the first with two earlier adapters of quantization errors.
_MOMENTUM = 1.0
_FIRST_WITH_MOMENTUM = 3


@dataclass(frozen=True, slots=True)
class Adapting:
    """The fit of an adapter to a residual.

    fit      computes the best adapter of a residual E [out, in], and the gain, the amount by which the adapter lowers
             the cost of the residual
    solve    the low-rank solver inside `fit`
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
    """The cheapest step of `fitting.iterations` alternations followed by `fitting.rounds` rounds of refinement: base
    and adapter, and the relative errors of all steps. `fitting.start` and `fitting.fit` see STARTS and FITS.

    weight      W [out, in]
    adapting    the fit of an adapter to the residual E = W − dequant(Q)
    weighting   the cost c of an error. A step costs γ·c(E − s·B·A) + (1 − γ)·c(E), where γ is `fitting.adapter_share`
    dtype       float32 or bfloat16, of the stored residual

    A single alternation is enough for γ = 0: the target of the base is W, whatever the adapter.

    A step of the paper's alternation can raise the error, for instance by the ranges of integer formats at 2 bits. All
    groups of integers that are farther from W − s·B·A than before then get back the previous codes and constants, and
    the adapter is fitted again. The joint fit extrapolates: convergence is faster, and a step may raise the cost. A
    round replaces the best step only if the round lowers the cost.
    Costs of a float32 residual without statistics are measured with the stored adapter. All further costs belong to
    the float32 factors of the adapter, good to four digits (`Factors.gain`).
    Peak memory: the residual, and the quantized matrix twice.
    """
    loop = _Alternation(weight, quantizer, adapting, weighting, fitting.adapter_share, dtype, workers)
    total = loop.measure_weight_cost()
    current = loop.make_first_step(quantizer.quantize(weight, workers=workers), fitting.start)
    best, best_iteration, errors = current, 1, [current.cost]
    before: LoraPair | None = None
    iterations = fitting.iterations if fitting.adapter_share else 1
    for iteration in range(2, iterations + 1):
        previous = current
        extrapolates = fitting.fit == "joint" and iteration >= _FIRST_WITH_MOMENTUM and before is not None
        adapter = extrapolate(previous.pair, before) if extrapolates and before is not None else previous.pair
        before, update = previous.pair, loop.make_base_update(adapter)
        quantized = quantizer.quantize(weight, minus=update, start=previous.quantized, workers=workers)
        current = loop.make_step(quantized)
        if (
            current.cost > previous.cost
            and not extrapolates
            and quantizer.keep_nearer(weight, update, previous.quantized, current.quantized, workers=workers)
        ):
            current = loop.make_step(current.quantized)
        # Kernels differ in the last digits of sums; the choice between equal steps must not depend on the kernel.
        if current.cost < (1 - TIE) * best.cost:
            best, best_iteration = current, iteration
        errors.append(current.cost)
    for round_number in range(1, fitting.rounds + 1):
        # Double quantization takes back a little of the gain from fitted constants: the last round moves codes only.
        candidate = loop.refine(best, fits_scales=round_number < fitting.rounds)
        if candidate is None:
            break
        errors.append(candidate.cost)
        if candidate.cost < (1 - TIE) * best.cost:
            best, best_iteration = candidate, iterations + round_number
    return Initialization(
        best.quantized,
        best.pair,
        relative(loop.squared_base_error, loop.measure_squared_weight()),
        tuple(relative(error, total) for error in errors),
        best_iteration,
    )


def refine_alone(
    weight: Rows,
    quantizer: Quantizer,
    quantized: QuantizedTensor,
    adapter: LoraPair,
    fitting: Fitting,
    weighting: Weighting,
    workers: Workers = SERIAL,
) -> Initialization:
    """The base of an adapter that adds nothing yet: `quantized` after `fitting.rounds` rounds that lower the cost of
    W − dequant(Q), the last of codes only. Rounds end early for rows that are not whole blocks.

    weight [out, in] is the original W. `adapter` is returned unchanged, and no errors are measured.
    """
    cost = weighting.left_over(None)
    for round_number in range(1, fitting.rounds + 1):
        fits_scales = round_number < fitting.rounds
        refinement = quantizer.refine(weight, quantized, cost, fits_scales=fits_scales, workers=workers)
        if refinement is None:
            break
        quantized = refinement.quantized
    return Initialization(quantized, adapter)


def extrapolate(pair: LoraPair, before: LoraPair) -> LoraPair:
    """The step from `before` to `pair` extended by `_MOMENTUM`: an adapter of twice the rank, in float32, that adds
    D + _MOMENTUM·(D − D₀), where D is the s·B·A of `pair` and D₀ the s·B·A of `before`. Scalings are equal.

    >>> before, pair = (LoraPair(torch.full((1, 1), a), torch.ones(1, 1), scaling=1.0) for a in (2.0, 3.0))
    >>> delta_rows(extrapolate(pair, before))(slice(0, 1)).item()
    4.0
    """
    lora_A = torch.cat([pair.lora_A.float() * (1.0 + _MOMENTUM), before.lora_A.float() * -_MOMENTUM])
    lora_B = torch.cat([pair.lora_B.float(), before.lora_B.float()], dim=1)
    return replace(pair, lora_A=lora_A, lora_B=lora_B)


@dataclass(frozen=True, slots=True)
class _Step:
    """The result of an iteration or a round.

    quantized   the base Q
    pair        the adapter of the residual W − dequant(Q)
    cost        γ·c(E − s·B·A) + (1 − γ)·c(E), where c is the cost of an error and E = W − dequant(Q)
    """

    quantized: QuantizedTensor
    pair: LoraPair
    cost: float


class _Alternation:
    """The state of all steps of a matrix: above all, the memory of the residual E = W − dequant(Q). `share` is γ."""

    def __init__(
        self,
        weight: Rows,
        quantizer: Quantizer,
        adapting: Adapting,
        weighting: Weighting,
        share: float,
        dtype: torch.dtype,
        workers: Workers,
    ) -> None:
        self._weight, self._quantizer, self._adapting = weight, quantizer, adapting
        self._weighting, self._share, self._workers = weighting, share, workers
        self._is_plain = weighting.importance is None
        self._residual = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self.squared_base_error = math.nan

    def make_first_step(self, alone: QuantizedTensor, start: str) -> _Step:
        """The first step. `alone` is W quantized without an adapter: the base of the step if `start` is "zero"."""
        self.squared_base_error = self._fill(alone)
        if start == "zero":
            return self._fit_step(alone, self.squared_base_error if self._is_plain else self._measure_residual_cost())
        for part in slabs_of(self._weight):
            self._residual[part] = self._weight.rows(part)
        principal, _ = self._adapting.fit(self._residual)
        update = self.make_base_update(principal)
        return self.make_step(self._quantizer.quantize(self._weight, minus=update, workers=self._workers))

    def make_step(self, quantized: QuantizedTensor) -> _Step:
        """The step with the base `quantized`: fits the adapter of the residual."""
        squared = self._fill(quantized)
        return self._fit_step(quantized, squared if self._is_plain else self._measure_residual_cost())

    def refine(self, best: _Step, *, fits_scales: bool) -> _Step | None:
        """A round: codes, and with `fits_scales` constants, refined beside the part of E that the adapter of `best`
        absorbs; then the adapter of the new residual. None for rows that are not whole blocks.
        """
        right = self._weighting.right_of(best.pair.lora_A.float())
        vectors = torch.linalg.qr(right.T).Q.contiguous()
        cost = self._weighting.left_over(vectors, self._share)
        refinement = self._quantizer.refine(
            self._weight, best.quantized, cost, fits_scales=fits_scales, workers=self._workers
        )
        if refinement is None:
            return None
        self._adapting.solve.restart(right)
        squared = self._fill(refinement.quantized)
        if not self._is_plain:
            # tr(E·H·Eᵀ) = c(E) + γ·||E·F·V||², equation 12 of the derivation: a product with H would cost more.
            absorbed = self._multiply_residual(self._weighting.spread(vectors))
            squared = refinement.after + self._share * float(absorbed.double().square().sum())
        return self._fit_step(refinement.quantized, squared)

    def make_base_update(self, pair: LoraPair) -> Callable[[slice], torch.Tensor]:
        """The function from a slice of rows to rows of γ·s·B·A, in the dtype of products with the residual: W minus the
        rows is the target of the base.
        """
        return self._make_update(replace(pair, scaling=self._share * pair.scaling))

    def measure_squared_weight(self) -> float:
        """||W||²."""

        def squares(part: slice) -> float:
            rows = self._weight.rows(part)
            return error_stats(rows, rows).squared_weight

        return math.fsum(self._workers.map(squares, slabs_of(self._weight)))

    def measure_weight_cost(self) -> float:
        """The cost of losing all of W: ||W||², or tr(W·H·Wᵀ)."""
        if self._is_plain:
            return self.measure_squared_weight()
        # No difference cancels digits of this cost, so the dtype with the fastest product is precise enough.
        dtype = product_dtype(torch.empty(0, dtype=torch.bfloat16, device=self._residual.device))

        def cost(part: slice) -> float:
            return cost_of(self._weighting, self._weight.rows(part).to(dtype), rounds=True)

        return math.fsum(self._workers.map(cost, slabs_of(self._weight)))

    def _make_update(self, pair: LoraPair) -> Callable[[slice], torch.Tensor]:
        return delta_rows(pair, product_dtype(self._residual))

    def _fill(self, quantized: QuantizedTensor) -> float:
        """Compute the residual of `quantized`; returns the sum of squares."""
        return self._quantizer.residual(self._weight, quantized, self._residual, workers=self._workers)

    def _measure_residual_cost(self) -> float:
        return cost_of(self._weighting, self._residual, self._workers)

    def _multiply_residual(self, right: torch.Tensor) -> torch.Tensor:
        """The residual @ right, float32 [out, r] for [in, r], a few rows at a time."""
        parts = slabs_of(self._weight)
        return torch.cat(list(self._workers.map(lambda part: self._residual[part].float() @ right, parts)))

    def _fit_step(self, quantized: QuantizedTensor, cost: float) -> _Step:
        """The step of a base whose residual is computed: fits the adapter. `cost` is the cost without the adapter."""
        pair, gain = self._adapting.fit(self._residual)
        if self._is_plain and self._residual.dtype == torch.float32:
            adapted_cost = self._measure_cost(pair)
            # Costs may be infinite: 0·∞ would be NaN.
            kept_cost = (1.0 - self._share) * cost if self._share < 1.0 else 0.0
            return _Step(quantized, pair, self._share * adapted_cost + kept_cost)
        return _Step(quantized, pair, max(cost - self._share * gain, 0.0))

    def _measure_cost(self, pair: LoraPair) -> float:
        """||E − s·B·A||² of the stored adapter."""
        rows_of, residual = self._make_update(pair), self._residual

        def squares(part: slice) -> float:
            return error_stats(residual[part], rows_of(part)).squared_base_error

        return math.fsum(self._workers.map(squares, slabs_of(self._weight)))
