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


def search_constants(
    target: torch.Tensor,
    block_size: int,
    levels: Levels,
    start: tuple[torch.Tensor, torch.Tensor | None] | None,
    importance: torch.Tensor | None,
) -> Blocks:
    """The codes uint8 [rows · in] and constants [blocks] of least squared error for a `target` float32 [rows, in].

    The target begins with a block. `start` holds scales and offsets [blocks] to begin with. `importance` float32 [in]
    weighs the squared errors of columns. Blocks may cross rows; the search then ignores `importance`. The last block
    may be short.

    >>> levels = Levels(None, 4, "none", torch.float32)
    >>> blocks = search_constants(torch.tensor([[-4.0, 4.0]]), 2, levels, None, None)
    >>> blocks.codes.tolist(), blocks.scales.shape
    ([1, 15], torch.Size([1]))
    """
    rows, columns = target.shape
    is_aligned = columns % block_size == 0
    if not is_aligned:
        importance = None
        padding = -target.numel() % block_size  # zeros have a code without error, and no say in the least squares
        target = torch.nn.functional.pad(target.reshape(-1), (0, padding)).view(-1, block_size)
    shape = (len(target), target.shape[1] // block_size)
    start_blocks = None
    if start is not None:
        scales, offsets = start
        codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)  # nobody reads the codes
        offsets = None if offsets is None else offsets.reshape(shape).contiguous()
        start_blocks = Blocks(codes, scales.reshape(shape).contiguous(), offsets)
    blocks = search_scales(target.contiguous(), block_size, levels, start_blocks, importance)
    offsets = None if blocks.offsets is None else blocks.offsets.reshape(-1)
    return Blocks(blocks.codes.reshape(-1)[: rows * columns], blocks.scales.reshape(-1), offsets)


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
    """Refine all `blocks` of a matrix, codes uint8 [out, in], in place. Returns the cost before and after the pass.

    Returns None, and leaves meaningless `blocks`, when the cost rises, and when squares leave the range of float32.
    """

    def work(part: slice) -> tuple[float, float]:
        offsets = None if blocks.offsets is None else blocks.offsets[part]
        part_blocks = Blocks(blocks.codes[part], blocks.scales[part], offsets)
        rows = weight.rows(part).float()
        if cost.hessian is not None:
            errors = refine_dense(
                rows, part_blocks, block_size, levels, cost.hessian, sweeps=1, fits_scales=fits_scales
            )
            return float(errors.before.sum()), float(errors.after.sum())
        vectors = rows.new_zeros(rows.shape[1], 1) if cost.vectors is None else cost.vectors
        refined_rows = refine(
            rows,
            part_blocks,
            block_size,
            levels,
            vectors,
            sweeps=1,
            fits_scales=fits_scales,
            importance=cost.importance,
        )
        return float(refined_rows.before.sum()), float(refined_rows.after.sum())

    pairs = list(workers.map(work, slabs_of(weight)))
    before, after = math.fsum(cost for cost, _ in pairs), math.fsum(cost for _, cost in pairs)
    return (before, after) if math.isfinite(after) and after <= before else None
