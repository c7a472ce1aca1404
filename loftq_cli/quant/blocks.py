"""Searching and refining the block constants of a matrix by rows, for both families of formats. Each family stores and
decodes constants by itself.
"""

from __future__ import annotations

import math

import torch

from loftq_cli.quant.formats import Cost
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.rows import Rows, slabs_of
from loftq_cli.triton_kernels.refinement.contract import Blocks, Levels, refine, refine_dense, search_scales


def searched(
    target: torch.Tensor,
    block_size: int,
    levels: Levels,
    start: tuple[torch.Tensor, torch.Tensor | None] | None,
    importance: torch.Tensor | None,
) -> Blocks:
    """The codes and constants of least squared error of some rows, float32 [rows, in], which begin with a block: codes
    [rows · in], constants [blocks]. `start` holds scales and offsets to begin with, [blocks].

    Blocks that go from one row to the next are taken as they come, and `importance` is left aside. The last may be
    short.
    """
    rows, columns = target.shape
    is_aligned = columns % block_size == 0
    if not is_aligned:
        importance = None
        padding = -target.numel() % block_size  # zeros have a code without error, and no say in the least squares
        target = torch.nn.functional.pad(target.reshape(-1), (0, padding)).view(-1, block_size)
    shape = (len(target), target.shape[1] // block_size)
    begun = None
    if start is not None:
        scales, offsets = start
        codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)  # nothing looks at them
        offsets = None if offsets is None else offsets.reshape(shape).contiguous()
        begun = Blocks(codes, scales.reshape(shape).contiguous(), offsets)
    found = search_scales(target.contiguous(), block_size, levels, begun, importance)
    offsets = None if found.offsets is None else found.offsets.reshape(-1)
    return Blocks(found.codes.reshape(-1)[: rows * columns], found.scales.reshape(-1), offsets)


def refine_rows(
    weight: Rows,
    blocks: Blocks,
    block_size: int,
    levels: Levels,
    cost: Cost,
    *,
    fits_scales: bool,
    workers: Workers = SERIAL,
) -> tuple[float, float] | None:
    """A pass over all `blocks` of a matrix, codes [out, in], in place; the cost of the error before and after.

    None, with meaningless `blocks`, for a cost that rises, and for numbers with squares beyond float32.
    """

    def work(part: slice) -> tuple[float, float]:
        offsets = None if blocks.offsets is None else blocks.offsets[part]
        own = Blocks(blocks.codes[part], blocks.scales[part], offsets)
        rows = weight.rows(part).float()
        if cost.hessian is not None:
            found = refine_dense(rows, own, block_size, levels, cost.hessian, sweeps=1, fits_scales=fits_scales)
            return float(found.before.sum()), float(found.after.sum())
        vectors = rows.new_zeros(rows.shape[1], 1) if cost.vectors is None else cost.vectors
        made = refine(
            rows, own, block_size, levels, vectors, sweeps=1, fits_scales=fits_scales, importance=cost.importance
        )
        return float(made.before.sum()), float(made.after.sum())

    pairs = list(workers.map(work, slabs_of(weight)))
    before, after = math.fsum(cost for cost, _ in pairs), math.fsum(cost for _, cost in pairs)
    return (before, after) if math.isfinite(after) and after <= before else None
