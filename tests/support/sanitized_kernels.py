"""The kernels of a conversion on a GPU, on small inputs with ragged ends: for `compute-sanitizer`, which slows them
down a hundredfold. Checks nothing by itself.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.sanitized_kernels

Without its cache, torch gives every tensor an allocation of its own, at whose end reading on is an error.
"""

from __future__ import annotations

import torch

from loftq_cli.triton_kernels.affine.contract import dequantize_affine, quantize_affine
from loftq_cli.triton_kernels.codebook.contract import codebook_residual, dequantize_codebook, quantize_codebook
from loftq_cli.triton_kernels.dequant_matmul.contract import dequant_matmul, dequant_matmul_input_gradient
from loftq_cli.triton_kernels.double_quant.contract import double_dequantize, double_quantize, dynamic_map
from loftq_cli.triton_kernels.error_stats.contract import codebook_error_sums, error_stats
from loftq_cli.triton_kernels.merging.contract import merge_codebook, retention_sums
from loftq_cli.triton_kernels.packing.contract import pack_rows, unpack_rows
from loftq_cli.triton_kernels.refinement.contract import Levels, search_scales
from loftq_cli.triton_kernels.residual.contract import (
    CodedStack,
    quantize_difference,
    residual_product,
    transposed_residual_product,
)

BFLOAT16 = torch.bfloat16


def run_kernels() -> None:
    """Each at least once, with rows, columns, ranks and ends that fill no tile."""
    for n in (64 * 129, 64 * 3 + 31, 7):
        weight = torch.randn(n, device="cuda").to(BFLOAT16)
        for minus in (None, torch.randn(n, device="cuda")):
            packed, absmax = quantize_codebook(weight, "nf4", 64, minus=minus)
        dequantize_codebook(packed, absmax, "nf4", 64, n, BFLOAT16)
        codebook_residual(weight, packed, absmax, "nf4", 64, BFLOAT16, torch.empty_like(weight))
    double_dequantize(*_doubled(torch.rand(1000, device="cuda")), 256)
    for shape, rank in (((2, 70, 192), 3), ((1, 65, 128), 70), ((2, 10, 100), 4)):
        _alternate(torch.randn(shape, device="cuda").to(BFLOAT16), rank)
    _integers(torch.randn(37, 192, device="cuda"))
    torch.cuda.synchronize()


def _doubled(absmax: torch.Tensor) -> tuple[torch.Tensor, ...]:
    codes, nested_absmax, offset = double_quantize(absmax, 256)
    return codes, nested_absmax, dynamic_map(absmax.device), offset


def _alternate(weight: torch.Tensor, rank: int) -> None:
    n, rows, columns = weight.shape
    left, right = torch.randn(n, rows, rank, device="cuda"), torch.randn(n, rank, columns, device="cuda")
    packed, absmax = quantize_difference(weight, left, right, "nf4", 64)
    coded = CodedStack(packed, absmax, "nf4", 64, BFLOAT16)
    residual_product(weight, coded, right.transpose(1, 2).contiguous())
    transposed_residual_product(weight, coded, left)
    codes, lora = (packed[0], absmax[0], "nf4", 64), (right[0], left[0])
    codebook_error_sums(weight[0], *codes, BFLOAT16, *lora)
    merged = merge_codebook(*codes, (rows, columns), BFLOAT16, *lora, 2.0, BFLOAT16)
    retention_sums(weight[0], merged, merged)
    error_stats(weight[0], merged)
    for operation, width in ((dequant_matmul, columns), (dequant_matmul_input_gradient, rows)):
        operation(torch.randn(5, width, device="cuda").to(BFLOAT16), *codes, (rows, columns), BFLOAT16, *lora)


def _integers(weight: torch.Tensor) -> None:
    for bits in (4, 3):
        groups = quantize_affine(weight, bits, 48, symmetric=False, scale_dtype="bfloat16")
        dequantize_affine(groups.codes, groups.scales, groups.zero_points, bits, 48)
        search_scales(weight, 48, Levels(None, bits, "int", BFLOAT16))
        unpack_rows(pack_rows(groups.codes, bits), bits, weight.shape[1])


if __name__ == "__main__":
    run_kernels()
    print("all kernels ran")
