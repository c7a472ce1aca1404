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

    The loop sees what will be stored: constants after double quantization and in their dtype, lora_A and lora_B in
    theirs, and the scaling divided out of them.
    """
    del sink
    weighting = weighting or make_weighting(None, 1)
    coordinates = None if weighting.is_plain else weighting
    solve = make_solver(fitting.svd, lora.rank, weight.shape, generator, workers, coordinates)
    # A bfloat16 residual changes what iteration finds by less than it misses anyway, and takes half the memory; but
    # for inputs some of which are far larger than others.
    decomposes = is_exact(fitting.svd, lora.rank, weight.shape)
    is_small = decomposes or weighting.importance is not None or math.prod(weight.shape) <= _SMALL_NUMEL
    dtype = torch.float32 if is_small else torch.bfloat16
    # Rounding depends on how the factors are balanced: what is not stored in float32 has to be so at every step.
    balances = lora.dtype != "float32"
    adapting = Adapting(lambda residual: fit_adapter(residual, lora, solve, balances, coordinates), solve)
    found = alternate(weight, quantizer, adapting, fitting, weighting, dtype, workers)
    return found if balances or decomposes else replace(found, lora=balanced_pair(found.lora))


def fit_adapter(
    residual: torch.Tensor,
    lora: LoraSpec,
    solve: Solver,
    balances: bool = True,
    weighting: Weighting | None = None,
) -> tuple[LoraPair, float]:
    """The adapter with s·B·A = the rank-r approximation of `residual` that `solve` finds, in the adapter's dtype, and
    by how much it lowers the squared error, or what that costs by a `weighting` whose coordinates `solve` is in.
    """
    found = solve(residual, balances=balances)
    right = found.right if weighting is None else weighting.adapter_rows(found.right)
    # Both public implementations fit B·A and forget s, which most loaders then multiply by: the gain is lost.
    root = math.sqrt(lora.scaling)
    dtype = getattr(torch, lora.dtype)
    pair = LoraPair((right / root).to(dtype), (found.left / root).to(dtype), lora.scaling)
    return pair, found.gain


def balanced_pair(lora: LoraPair) -> LoraPair:
    """The same adapter with equal norms in both factors; lora_B is orthonormal, up to the scaling."""
    found = balanced(Factors(lora.lora_B, lora.lora_A, 0.0))
    return replace(lora, lora_A=found.right, lora_B=found.left)
