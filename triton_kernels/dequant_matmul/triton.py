"""Products with a codebook matrix on a GPU. Few tokens: a kernel decodes codes while multiplying, and no matrix is
written. Many tokens: the matrix is decoded once, in the dtype of the tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loftq_cli.triton_kernels.codebook import triton as codebook_triton
from loftq_cli.triton_kernels.codebook.triton import TRITON_DTYPES
from loftq_cli.triton_kernels.dequant_matmul import reference as dequant_matmul_reference
from loftq_cli.triton_kernels.launch_triton import cdiv, launch
from loftq_cli.triton_kernels.tiles_triton import decode_tile, product_tile

# The most tokens of a program. More tokens mean more programs that decode equal codes, about ten instructions a weight;
# a decoded matrix costs a write and a read of 2 bytes a weight. Derived, not measured.
FUSED_TOKENS = 64


def product(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """See dequant_matmul/reference.py."""
    if shape[1] % 2:  # a byte holds codes of two rows
        return dequant_matmul_reference.product(
            x, packed, absmax, table, block_size, shape, dtype, lora_A, lora_B, scaling
        )
    low_rank = None
    if lora_A is not None and lora_B is not None:
        low_rank = (x.float() @ lora_A.float().T).mul_(scaling), lora_B.T
    if len(x) > FUSED_TOKENS:
        return _plus(x @ _decoded(packed, absmax, table, block_size, shape, dtype, x.dtype).T, low_rank)
    return fused(x, packed, absmax, table, block_size, shape, dtype, low_rank, is_gradient=False)


def input_gradient(
    gradient: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """See dequant_matmul/reference.py."""
    if shape[1] % 2:
        return dequant_matmul_reference.input_gradient(
            gradient, packed, absmax, table, block_size, shape, dtype, lora_A, lora_B, scaling
        )
    low_rank = None
    if lora_A is not None and lora_B is not None:
        low_rank = (gradient.float() @ lora_B.float()).mul_(scaling), lora_A
    if len(gradient) > FUSED_TOKENS:
        return _plus(gradient @ _decoded(packed, absmax, table, block_size, shape, dtype, gradient.dtype), low_rank)
    return fused(gradient, packed, absmax, table, block_size, shape, dtype, low_rank, is_gradient=True)


def fused(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    is_gradient: bool,
) -> torch.Tensor:
    """x·Qᵀ, or x·Q for a gradient, plus the product of `low_rank`: float32 [tokens, rank] and [rank, out or in]."""
    gives = shape[1] if is_gradient else shape[0]
    out = torch.empty((len(x), gives), dtype=x.dtype, device=x.device)
    tile = _tile(len(x), x.dtype)
    left, right = (x, x) if low_rank is None else (low_rank[0], low_rank[1].contiguous())
    launch(
        _product,
        (cdiv(len(x), tile["TOKENS"]), cdiv(gives, tile["GIVEN"])),
        x,
        packed,
        absmax,
        table,
        left,
        right,
        out,
        len(x),
        *shape,
        0 if low_rank is None else left.shape[1],
        IS_GRADIENT=is_gradient,
        HAS_DELTA=low_rank is not None,
        DECODED=TRITON_DTYPES[dtype],
        BLOCK_SIZE=block_size,
        **tile,
    )
    return out


def _tile(tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of a program: 16 (the least of tl.dot) to 64 tokens, and the inputs of a step. float32 has no tensor cores:
    operands lie in registers, which suffice for 16 inputs.
    """
    sizes = {"TOKENS": 16, "GIVEN": 32} if tokens <= 16 else {"TOKENS": FUSED_TOKENS, "GIVEN": 64}
    if dtype == torch.float32:
        return sizes | {"READ": 16, "num_warps": 4 if tokens <= 16 else 8}
    return sizes | {"READ": 64, "num_warps": 4}


def _decoded(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    read_as: torch.dtype,
) -> torch.Tensor:
    """Q [out, in] in `read_as`."""
    values = torch.empty(shape[0] * shape[1], dtype=dtype, device=packed.device)
    codebook_triton.dequantize(packed, absmax, table, block_size, values)
    return values.view(shape).to(read_as)


def _plus(product: torch.Tensor, low_rank: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """The sum in the dtype of `product`; `product` was rounded once before."""
    if low_rank is None:
        return product
    left, right = (factor.to(product.dtype) for factor in low_rank)
    return product.addmm_(left, right)


@triton.jit
def _product(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    table_ptr,
    left_ptr,
    right_ptr,
    out_ptr,
    tokens,
    rows,
    columns,
    rank,
    IS_GRADIENT: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    DECODED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    GIVEN: tl.constexpr,
    READ: tl.constexpr,
):
    first_token, first_given = tl.program_id(0).to(tl.int64) * TOKENS, tl.program_id(1) * GIVEN
    token = tl.arange(0, TOKENS)[:, None] + first_token
    reads, gives = columns, rows
    if IS_GRADIENT:
        reads, gives = rows, columns
    total = tl.zeros([TOKENS, GIVEN], tl.float32)
    for start in range(0, reads, READ):
        read = tl.arange(0, READ)[None, :] + start
        x = tl.load(x_ptr + token * reads + read, mask=(token < tokens) & (read < reads), other=0.0)
        if IS_GRADIENT:
            weight = decode_tile(
                packed_ptr, absmax_ptr, table_ptr, start, first_given, rows, columns, DECODED, BLOCK_SIZE, READ, GIVEN
            )
        else:
            weight = tl.trans(
                decode_tile(
                    packed_ptr,
                    absmax_ptr,
                    table_ptr,
                    first_given,
                    start,
                    rows,
                    columns,
                    DECODED,
                    BLOCK_SIZE,
                    GIVEN,
                    READ,
                )
            )
        total = tl.dot(x, weight.to(x.dtype), total, input_precision="ieee")
    if HAS_DELTA:
        total += product_tile(left_ptr, right_ptr, first_token, first_given, tokens, gives, rank, TOKENS, GIVEN)
    given = tl.arange(0, GIVEN)[None, :] + first_given
    is_given = (token < tokens) & (given < gives)
    tl.store(out_ptr + token * gives + given, total.to(out_ptr.dtype.element_ty), mask=is_given)
