"""The search for block constants, and their refinement."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loftq_cli.triton_kernels.codebook.contract import codebook_table
from loftq_cli.triton_kernels.refinement.contract import (
    Levels,
    codebook_levels,
    refine,
    refine_dense,
    residual,
    search_scales,
)

NF4 = codebook_levels(codebook_table("nf4"))
LEVELS = (
    (NF4, 64),
    (Levels(None, 4, "int", torch.bfloat16), 64),
    (Levels(None, 3, "none", torch.float16), 32),
    (Levels(None, 2, "float", torch.bfloat16), 128),
)


def searching() -> None:
    weight, importance = torch.empty(16, 1024), torch.ones(1024)
    for levels, block_size in LEVELS:
        found = search_scales(weight, block_size, levels)
        search_scales(weight, block_size, levels, found, importance)
        residual(weight, found, block_size, levels, torch.empty_like(weight))
    search_scales(weight, 64, NF4, importance=importance)
    search_scales(weight, 64, NF4, search_scales(weight, 64, NF4))
    search_scales(weight, 16, LEVELS[1][0], importance=importance)
    search_scales(torch.empty(4, 6144), 6144, LEVELS[1][0], importance=torch.ones(6144))


def refining() -> None:
    weight, importance, hessian = torch.empty(64, 1024), torch.ones(1024), torch.empty(1024, 1024)
    for levels, block_size in LEVELS:
        blocks = search_scales(weight, block_size, levels)
        refine(weight, blocks, block_size, levels, torch.empty(1024, 16), importance, sweeps=1, fits_scales=True)
        refine_dense(weight, blocks, block_size, levels, hessian, sweeps=1, fits_scales=True)
    for rank in (64, 256):
        refine(weight, blocks, block_size, levels, torch.empty(1024, rank), sweeps=1, fits_scales=True)
    refine(weight, blocks, block_size, levels, torch.empty(1024, 16), sweeps=1, fits_scales=False)
    for block_size in (16, 256):
        blocks = search_scales(weight, block_size, NF4)
        refine_dense(weight, blocks, block_size, NF4, hessian, sweeps=1, fits_scales=block_size == 16)


CALLS: list[Callable[[], None]] = [searching, refining]
