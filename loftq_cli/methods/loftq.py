"""LoftQ (Li et al., arXiv 2310.08659): the adapter starts as the best approximation of what quantization lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from loftq_cli.methods.alternation import Adapting, alternate
from loftq_cli.methods.lowrank import Factors, Solver, balanced, is_exact, make_solver
from loftq_cli.methods.method import Fitting, Initialization
from loftq_cli.methods.weighting import Weighting, make_weighting
from loftq_cli.quant.formats import Quantizer
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.rows import Rows
from loftq_cli.tensors.specs import LoraSpec

_SMALL_NUMEL = 1 << 16  # weights below which a product costs less than calling it


def initialize(
    weight: Rows,
    quantizer: Quantizer,
    lora: LoraSpec,
    fitting: Fitting,
    *,
    generator: torch.Generator,
    weighting: Weighting | None = None,
    sink: Callable[[slice, torch.Tensor], None] | None = None,
    workers: Workers = SERIAL,
) -> Initialization:
    """The best of the alternations and rounds of `fitting`; see `alternate`.

    The loop sees the stored numbers: constants after double quantization and rounded to the stored dtype, lora_A and
    lora_B rounded to the adapter's dtype, with the scaling divided out.
    """
    del sink
    weighting = weighting or make_weighting(None, 1)
    coordinates = None if weighting.is_plain else weighting
    solve = make_solver(fitting.svd, lora.rank, weight.shape, generator, workers, coordinates)
    # A bfloat16 residual takes half the memory and changes the result by less than the iteration misses anyway, except
    # where some inputs are far larger than others.
    decomposes = is_exact(fitting.svd, lora.rank, weight.shape)
    is_small = decomposes or weighting.importance is not None or math.prod(weight.shape) <= _SMALL_NUMEL
    dtype = torch.float32 if is_small else torch.bfloat16
    # Rounding depends on the balance of the factors: factors in a 16-bit dtype are balanced at every step.
    balances = lora.dtype != "float32"
    adapting = Adapting(lambda residual: fit_adapter(residual, lora, solve, balances, coordinates), solve)
    best = alternate(weight, quantizer, adapting, fitting, weighting, dtype, workers)
    return best if balances or decomposes else replace(best, lora=balanced_pair(best.lora))


def fit_adapter(
    residual: torch.Tensor,
    lora: LoraSpec,
    solve: Solver,
    balances: bool = True,
    weighting: Weighting | None = None,
) -> tuple[LoraPair, float]:
    """The adapter with s·B·A = the rank-r approximation of `residual` [out, in], in the adapter's dtype; and the gain:
    how much the adapter lowers the squared error of the residual, or the cost by `weighting`.

    solve      the solver, in the coordinates of `weighting` where one is given
    balances   whether √S stands in both factors
    """
    factors = solve(residual, balances=balances)
    right = factors.right if weighting is None else weighting.adapter_rows(factors.right)
    # Both public implementations fit B·A and forget s; most loaders multiply by s, and the gain is lost.
    root = math.sqrt(lora.scaling)
    dtype = getattr(torch, lora.dtype)
    pair = LoraPair((right / root).to(dtype), (factors.left / root).to(dtype), lora.scaling)
    return pair, factors.gain


def balanced_pair(lora: LoraPair) -> LoraPair:
    """The same adapter with equal norms in both factors; lora_B is orthonormal, up to the scaling."""
    factors = balanced(Factors(lora.lora_B, lora.lora_A, 0.0))
    return replace(lora, lora_A=factors.right, lora_B=factors.left)
