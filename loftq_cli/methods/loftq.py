"""LoftQ (Li et al., arXiv 2310.08659): the adapter starts as the rank-r approximation of the quantization error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from loftq_cli.methods.alternation import Adapting, alternate
from loftq_cli.methods.lowrank import Factors, Solver, balance_factors, is_exact, make_solver
from loftq_cli.methods.method import Fitting, Initialization
from loftq_cli.methods.weighting import Weighting, make_weighting
from loftq_cli.quant.formats import Quantizer
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.rows import Rows
from loftq_cli.tensors.specs import LoraSpec

_SMALL_NUMEL = 1 << 16  # weights; a product with a smaller matrix takes less time than the call


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
    """Base and adapter of the cheapest step among the alternations and rounds of `fitting`; see `alternate`.

    weight [out, in]; lora_A [r, in] and lora_B [out, r] in the adapter's dtype, with √s divided out of each factor. The
    loop sees the stored numbers: constants after double quantization and rounded to the stored dtype, and factors
    rounded to the adapter's dtype. `weighting` None means the sum of squares; `sink` is ignored.
    Raises NumericError for a residual without a singular value decomposition.
    """
    del sink
    weighting = weighting or make_weighting(None, 1)
    coordinates = None if weighting.is_plain else weighting
    solve = make_solver(fitting.svd, lora.rank, weight.shape, generator, workers, coordinates)
    # A bfloat16 residual takes half the memory and changes the result by less than the error of the iteration, except
    # where some inputs are far larger than the rest: a fit with statistics has a float32 residual.
    decomposes = is_exact(fitting.svd, lora.rank, weight.shape)
    is_small = decomposes or weighting.importance is not None or math.prod(weight.shape) <= _SMALL_NUMEL
    dtype = torch.float32 if is_small else torch.bfloat16
    # Rounding to 16 bits depends on the balance of the factors, so the loop has to see balanced factors.
    balances = lora.dtype != "float32"
    adapting = Adapting(lambda residual: fit_adapter(residual, lora, solve, balances, coordinates), solve)
    best = alternate(weight, quantizer, adapting, fitting, weighting, dtype, workers)
    # Only subspace iteration leaves factors unbalanced; balanced factors would not be balanced by balancing again.
    is_balanced = balances or decomposes or fitting.svd != "fast"
    return best if is_balanced else replace(best, lora=balanced_pair(best.lora))


def fit_adapter(
    residual: torch.Tensor,
    lora: LoraSpec,
    solve: Solver,
    balances: bool = True,
    weighting: Weighting | None = None,
) -> tuple[LoraPair, float]:
    """The adapter with s·B·A = the best rank-r approximation of `residual` [out, in], in the adapter's dtype; and the
    gain, the amount by which the adapter lowers the squared error of the residual, or the cost by `weighting`.

    residual   float32 or bfloat16
    solve      the solver; a solver in the coordinates of `weighting` if a weighting is passed
    balances   whether √S stands in both factors

    >>> residual = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    >>> solve = make_solver("exact", 1, (2, 2), torch.Generator())
    >>> pair, gain = fit_adapter(residual, LoraSpec(rank=1, alpha=2.0), solve)
    >>> torch.allclose(pair.scaling * pair.lora_B @ pair.lora_A, residual), round(gain, 3)
    (True, 125.0)
    """
    factors = solve(residual, balances=balances)
    right = factors.right if weighting is None else weighting.adapter_rows(factors.right)
    # Most loaders multiply by s. Both public implementations of LoftQ fit B·A and forget s, and the gain is lost.
    root = math.sqrt(lora.scaling)
    dtype = getattr(torch, lora.dtype)
    pair = LoraPair((right / root).to(dtype), (factors.left / root).to(dtype), lora.scaling)
    return pair, factors.gain


def balanced_pair(lora: LoraPair) -> LoraPair:
    """An adapter with an equal product B·A and equal norms in both factors, in float32.

    lora_B [out, r] must have orthogonal columns of equal norm, as unbalanced factors of "fast" have.

    >>> pair = balanced_pair(LoraPair(torch.tensor([[4.0, 0.0]]), torch.tensor([[1.0], [0.0]]), scaling=1.0))
    >>> pair.lora_A.tolist(), pair.lora_B.tolist()
    ([[2.0, 0.0]], [[2.0], [0.0]])
    """
    factors = balance_factors(Factors(lora.lora_B, lora.lora_A, 0.0))
    return replace(lora, lora_A=factors.right, lora_B=factors.left)
