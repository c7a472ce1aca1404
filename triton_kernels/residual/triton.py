"""The passes of an alternation over a stack of matrices on a GPU: each pass reads weights and codes once.

A tile is as wide as a block, or as a power of two that divides the block, so a row of a tile has a single absmax.
Matrices whose rows are not whole blocks, and blocks too long for a tile, go through a decoded matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from loftq_cli.triton_kernels.codebook import triton as codebook_triton
from loftq_cli.triton_kernels.codebook.triton import (
    CELLS,
    TRITON_DTYPES,
    decode_pairs,
    encode,
    encoder_cells,
    largest_magnitude,
    pack_pairs,
    reciprocal,
)
from loftq_cli.triton_kernels.launch_triton import cdiv, launch

if TYPE_CHECKING:
    from loftq_cli.triton_kernels.residual.contract import CodedStack

_TILE_NUMEL = 4096  # weights of a quantized tile: 16 a thread with 8 warps, three programs a multiprocessor
_LARGEST_BLOCK = 256  # longest block of a tile with rows enough for a matrix product
_ROWS, _COLUMNS = 64, 64  # of a decoded tile, at most
_RANKS = 64  # vectors of a program with 8 warps: twice as many spill registers
# Programs that run at once on a large GPU: two for each of 132 multiprocessors. More parts store more sums.
_PROGRAMS = 264


def quantize_difference(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    packed: torch.Tensor,
    absmax: torch.Tensor,
) -> None:
    """See residual/reference.py."""
    n, out_features, in_features = weight.shape
    if not _is_tiled(in_features, block_size) or block_size > _LARGEST_BLOCK:
        for i in range(n):
            update = (left[i] @ right[i]).view(-1)
            codebook_triton.quantize(weight[i].view(-1), update, table, block_size, packed[i], absmax[i])
        return
    cells, rank = encoder_cells(table), left.shape[2]
    rows = _TILE_NUMEL // block_size
    launch(
        _quantize_difference,
        (cdiv(out_features, rows) * (in_features // block_size), n),
        weight,
        left,
        right,
        cells,
        packed,
        absmax,
        out_features,
        in_features,
        rank,
        DEPTH=len(cells) // CELLS - 1,
        BLOCK_SIZE=block_size,
        ROWS=rows,
        RANKS=min(_padded(rank), _RANKS),
        num_warps=8,
    )


def residual_product(
    weight: torch.Tensor, coded: CodedStack, table: torch.Tensor, vectors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See residual/reference.py. Each program sums squares in float32; the sum over programs is float64."""
    n, out_features, in_features = weight.shape
    rank = vectors.shape[2]
    if not _is_tiled(in_features, coded.block_size):
        lost = _decoded_residual(weight, coded, table)
        return torch.bmm(lost.bfloat16().float(), vectors.float()), lost.double().square().sum(dim=(1, 2))
    columns, ranks = min(coded.block_size, _COLUMNS), min(_padded(rank), _RANKS)
    tiles, rank_tiles = cdiv(out_features, _ROWS), cdiv(rank, ranks)
    parts = _parts(n * tiles * rank_tiles, in_features // columns)
    products = torch.empty((parts, n, out_features, rank), dtype=torch.float32, device=weight.device)
    squares = torch.empty((n, tiles * parts), dtype=torch.float32, device=weight.device)
    launch(
        _residual_product,
        (tiles * parts, rank_tiles, n),
        weight,
        coded.packed,
        coded.absmax,
        table,
        vectors,
        products,
        squares,
        out_features,
        in_features,
        rank,
        parts,
        cdiv(in_features // columns, parts),
        DECODED=TRITON_DTYPES[coded.dtype],
        BLOCK_SIZE=coded.block_size,
        ROWS=_ROWS,
        COLUMNS=columns,
        RANKS=ranks,
        num_warps=8,
    )
    return _summed(products), squares.sum(dim=1, dtype=torch.float64)


def transposed_residual_product(
    weight: torch.Tensor, coded: CodedStack, table: torch.Tensor, vectors: torch.Tensor
) -> torch.Tensor:
    """See residual/reference.py."""
    n, out_features, in_features = weight.shape
    rank = vectors.shape[2]
    if not _is_tiled(in_features, coded.block_size):
        lost = _decoded_residual(weight, coded, table)
        return torch.bmm(vectors.float().transpose(1, 2), lost.bfloat16().float())
    columns, ranks = min(coded.block_size, _COLUMNS), min(_padded(rank), _RANKS)
    tiles, rank_tiles, row_tiles = in_features // columns, cdiv(rank, ranks), cdiv(out_features, _ROWS)
    parts = _parts(n * tiles * rank_tiles, row_tiles)
    products = torch.empty((parts, n, rank, in_features), dtype=torch.float32, device=weight.device)
    launch(
        _transposed_residual_product,
        (tiles * parts, rank_tiles, n),
        weight,
        coded.packed,
        coded.absmax,
        table,
        vectors,
        products,
        out_features,
        in_features,
        rank,
        parts,
        cdiv(row_tiles, parts),
        DECODED=TRITON_DTYPES[coded.dtype],
        BLOCK_SIZE=coded.block_size,
        ROWS=_ROWS,
        COLUMNS=columns,
        RANKS=ranks,
        num_warps=8,
    )
    return _summed(products)


def _is_tiled(in_features: int, block_size: int) -> bool:
    """Whether rows are whole blocks, and blocks are whole tiles for a matrix product."""
    is_power = block_size & (block_size - 1) == 0
    return is_power and block_size >= 16 and in_features % block_size == 0


def _padded(rank: int) -> int:
    """The next power of two that a matrix product accepts."""
    return max(16, 1 << (rank - 1).bit_length())


def _parts(programs: int, steps: int) -> int:
    """The number of parts of a sum of `steps` terms, so that enough programs run."""
    return max(1, min(steps, _PROGRAMS // max(programs, 1)))


def _summed(products: torch.Tensor) -> torch.Tensor:
    """Sum over the parts in a fixed order: atomic additions would change the bytes from run to run."""
    return products[0] if len(products) == 1 else products.sum(dim=0)


def _decoded_residual(weight: torch.Tensor, coded: CodedStack, table: torch.Tensor) -> torch.Tensor:
    decoded = torch.empty(weight.shape, dtype=coded.dtype, device=weight.device)
    for i in range(len(weight)):
        codebook_triton.dequantize(coded.packed[i], coded.absmax[i], table, coded.block_size, decoded[i].view(-1))
    return weight.float() - decoded.float()


@triton.jit
def _quantize_difference(
    weight_ptr,
    left_ptr,
    right_ptr,
    cells_ptr,
    packed_ptr,
    absmax_ptr,
    out_features,
    in_features,
    rank,
    DEPTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    blocks = in_features // BLOCK_SIZE  # in a row
    matrix = tl.program_id(1).to(tl.int64)
    # Neighbouring programs share rows of `left`, and their weights are contiguous.
    row = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) % blocks
    column = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    is_row = row < out_features
    update = tl.zeros([ROWS, BLOCK_SIZE], tl.float32)
    for start in range(0, rank, RANKS):
        inner = start + tl.arange(0, RANKS)
        left = tl.load(
            left_ptr + (matrix * out_features + row)[:, None] * rank + inner[None, :],
            mask=is_row[:, None] & (inner < rank)[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptr + (matrix * rank + inner)[:, None] * in_features + column[None, :],
            mask=(inner < rank)[:, None],
            other=0.0,
        )
        update = tl.dot(left, right, update)
    line = matrix * out_features + row  # row of the stack seen as a single tall matrix
    weight = tl.load(weight_ptr + line[:, None] * in_features + column[None, :], mask=is_row[:, None], other=0.0)
    values = weight.to(tl.float32) - update
    largest = largest_magnitude(values)
    tl.store(absmax_ptr + line * blocks + block, largest, mask=is_row)
    scaled = values * reciprocal(largest, ROWS)[:, None]
    packed = pack_pairs(encode(scaled, cells_ptr, DEPTH), ROWS, BLOCK_SIZE // 2)
    byte = block * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)
    tl.store(packed_ptr + line[:, None] * (in_features // 2) + byte[None, :], packed, mask=is_row[:, None])


@triton.jit
def _lost(
    weight_ptr,
    packed_ptr,
    absmax_ptr,
    table_ptr,
    line,
    is_row,
    start,
    in_features,
    DECODED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """weight - decoded, float32 [ROWS, COLUMNS], for rows `line` and columns from `start`; 0 beyond the last row."""
    column = start + tl.arange(0, COLUMNS)
    byte = start // 2 + tl.arange(0, COLUMNS // 2)
    absmax = tl.load(absmax_ptr + line * (in_features // BLOCK_SIZE) + start // BLOCK_SIZE, mask=is_row, other=0.0)
    packed = tl.load(packed_ptr + line[:, None] * (in_features // 2) + byte[None, :], mask=is_row[:, None], other=0)
    weight = tl.load(weight_ptr + line[:, None] * in_features + column[None, :], mask=is_row[:, None], other=0.0)
    high, low = decode_pairs(packed, table_ptr, absmax[:, None])
    return weight.to(tl.float32) - tl.interleave(high, low).to(DECODED).to(tl.float32)


@triton.jit(do_not_specialize=["parts", "steps"])  # a single compilation serves all sizes
def _residual_product(
    weight_ptr,
    packed_ptr,
    absmax_ptr,
    table_ptr,
    vectors_ptr,
    products_ptr,
    squares_ptr,
    out_features,
    in_features,
    rank,
    parts,
    steps,
    DECODED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    part, matrix = tl.program_id(0) % parts, tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) // parts) * ROWS + tl.arange(0, ROWS)
    inner = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    is_row = row < out_features
    line = matrix * out_features + row
    product = tl.zeros([ROWS, RANKS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    first = part * steps * COLUMNS
    for start in range(first, tl.minimum(first + steps * COLUMNS, in_features), COLUMNS):
        lost = _lost(
            weight_ptr, packed_ptr, absmax_ptr, table_ptr, line, is_row, start, in_features,
            DECODED, BLOCK_SIZE, ROWS, COLUMNS,
        )  # fmt: skip
        column = start + tl.arange(0, COLUMNS)
        vectors = tl.load(
            vectors_ptr + (matrix * in_features + column)[:, None] * rank + inner[None, :],
            mask=(inner < rank)[None, :],
            other=0.0,
        )
        squares += tl.sum(lost * lost, axis=1)
        product = tl.dot(lost.to(tl.bfloat16), vectors, product)
    place = products_ptr + (part * tl.num_programs(2) + matrix) * out_features * rank
    is_product = is_row[:, None] & (inner < rank)[None, :]
    tl.store(place + row[:, None].to(tl.int64) * rank + inner[None, :], product, mask=is_product)
    if tl.program_id(1) == 0:
        tl.store(squares_ptr + matrix * tl.num_programs(0) + tl.program_id(0), tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=["parts", "steps"])
def _transposed_residual_product(
    weight_ptr,
    packed_ptr,
    absmax_ptr,
    table_ptr,
    vectors_ptr,
    products_ptr,
    out_features,
    in_features,
    rank,
    parts,
    steps,
    DECODED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    part, matrix = tl.program_id(0) % parts, tl.program_id(2).to(tl.int64)
    start = (tl.program_id(0) // parts) * COLUMNS
    inner = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    product = tl.zeros([RANKS, COLUMNS], tl.float32)
    first = part * steps * ROWS
    for top in range(first, tl.minimum(first + steps * ROWS, out_features), ROWS):
        row = top + tl.arange(0, ROWS)
        is_row = row < out_features
        line = matrix * out_features + row
        lost = _lost(
            weight_ptr, packed_ptr, absmax_ptr, table_ptr, line, is_row, start, in_features,
            DECODED, BLOCK_SIZE, ROWS, COLUMNS,
        )  # fmt: skip
        vectors = tl.load(
            vectors_ptr + line[None, :] * rank + inner[:, None],
            mask=is_row[None, :] & (inner < rank)[:, None],
            other=0.0,
        )
        product = tl.dot(vectors, lost.to(tl.bfloat16), product)
    place = products_ptr + (part * tl.num_programs(2) + matrix) * rank * in_features
    column = start + tl.arange(0, COLUMNS)
    offsets = inner[:, None].to(tl.int64) * in_features + column[None, :]
    tl.store(place + offsets, product, mask=(inner < rank)[:, None])
