"""LoftQ (Li et al., arXiv 2310.08659): the adapter starts as the best approximation of what quantization lost."""

from __future__ import annotations

import math

import torch

from loftq_cli.lowrank import Solver, make_solver
from loftq_cli.methods.alternation import alternate
from loftq_cli.methods.method import Initialization
from loftq_cli.quant.formats import Quantizer
from loftq_cli.tensors import LoraPair, LoraSpec


def initialize(
    weight: torch.Tensor,
    quantizer: Quantizer,
    lora: LoraSpec,
    *,
    iterations: int,
    svd: str,
    init: str | None,
    generator: torch.Generator,
) -> Initialization:
    """The best of `iterations` alternations; see `alternate`.

    The loop sees what will be stored: constants after double quantization and in their dtype, lora_A and lora_B in
    theirs, and the scaling divided out of them.
    """
    del init
    solve = make_solver(svd, lora.rank, tuple(weight.shape), generator)
    return alternate(weight, quantizer, lambda residual: fit_adapter(residual, lora, solve), iterations)


def fit_adapter(residual: torch.Tensor, lora: LoraSpec, solve: Solver) -> LoraPair:
    """The adapter with s·B·A = the rank-r approximation of `residual` that `solve` finds, in the adapter's dtype."""
    left, right = solve(residual)
    # Both public implementations fit B·A and forget s, which most loaders then multiply by: the gain is lost.
    root = math.sqrt(lora.scaling)
    dtype = getattr(torch, lora.dtype)
    return LoraPair(lora_A=(right / root).to(dtype), lora_B=(left / root).to(dtype), scaling=lora.scaling)
