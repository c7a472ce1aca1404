"""Codebook formats for a stack of equal matrices on a GPU. No call waits for the GPU: unusual matrices are marked, and
the reader of the result quantizes a marked matrix again with the careful code of `loftq_cli.quant.codebook`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq_cli.quant.codebook import is_near
from loftq_cli.quant.formats import QuantizedTensor, QuantSpec, as_codebook
from loftq_cli.tensors.matrices import CodebookTensor, NestedAbsmax
from loftq_cli.triton_kernels.codebook.contract import quantize_codebook
from loftq_cli.triton_kernels.double_quant.contract import double_dequantize, double_quantize, dynamic_map
from loftq_cli.triton_kernels.residual.contract import CodedStack, quantize_difference


@dataclass(frozen=True, slots=True)
class QuantizedStack:
    """n quantized matrices of equal shape.

    coded         the codes, and the constants as a loader decodes the constants
    nested        the double-quantized constants, each with a first dimension n; None without double quantization
    is_ordinary   bool [n]: True if the matrix needs no careful code
    """

    coded: CodedStack
    nested: NestedAbsmax | None
    is_ordinary: torch.Tensor

    @property
    def constants(self) -> torch.Tensor | NestedAbsmax:
        """The constants as stored."""
        return self.coded.absmax if self.nested is None else self.nested


def quantize_stack(
    weight: torch.Tensor,
    spec: QuantSpec,
    dtype: str,
    update: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> QuantizedStack:
    """The stored codes and constants of `weight` [n, out, in], or of weight - left @ right for `update` (left, right).

    left is float32 [n, out, rank], right float32 [n, rank, in]. A matrix is ordinary if all weights are finite, no
    block is zero, double quantization ruins no constant, and no value overflows `dtype`, a loader's dtype.
    Raises TypeError for a format without `has_code_kernels`.

    >>> from loftq_cli.tensors.specs import CodebookSpec
    >>> stack = quantize_stack(torch.ones(3, 2, 64), CodebookSpec("nf4", 64), "float32")
    >>> stack.coded.packed.shape, stack.is_ordinary.tolist()
    (torch.Size([3, 64]), [True, True, True])
    """
    spec, n = as_codebook(spec), len(weight)
    if update is not None:
        packed, absmax = quantize_difference(weight, *update, spec.codebook, spec.block_size)
    elif weight[0].numel() % spec.block_size == 0:  # the stack is then a tall matrix of whole blocks
        packed, absmax = (part.view(n, -1) for part in quantize_codebook(weight, spec.codebook, spec.block_size))
    else:
        pairs = [quantize_codebook(matrix, spec.codebook, spec.block_size) for matrix in weight]
        packed, absmax = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    largest = absmax.amax(dim=1)
    is_ordinary = (largest < torch.finfo(getattr(torch, dtype)).max / 2) & largest.isfinite()
    decoded, nested = absmax, None
    if spec.double_quant:
        decoded, nested = _nest(absmax, spec.nested_block_size)
        is_ordinary &= nested.offset.isfinite()
        # The constants of a matrix less an adapter are not judged: see `CodebookQuantizer`.
        is_ordinary &= is_near(absmax, nested.absmax) if update is None else nested.absmax.isfinite().all(dim=1)
    coded = CodedStack(packed, decoded, spec.codebook, spec.block_size, getattr(torch, dtype))
    return QuantizedStack(coded, nested, is_ordinary)


def unstacked(
    packed: torch.Tensor,
    constants: torch.Tensor | NestedAbsmax,
    spec: QuantSpec,
    shape: tuple[int, int],
    dtype: str,
    i: int,
) -> QuantizedTensor:
    """The i-th matrix [out, in] = `shape` of a stack with packed codes uint8 [n, bytes] and constants [n, blocks].

    Raises TypeError for a format without `has_code_kernels`.

    >>> from loftq_cli.tensors.specs import CodebookSpec
    >>> spec, packed = CodebookSpec("nf4", 64, double_quant=False), torch.full((3, 32), 255, dtype=torch.uint8)
    >>> unstacked(packed, torch.tensor([[1.0], [2.0], [3.0]]), spec, (1, 64), "float32", 1).dequantize().unique()
    tensor([2.])
    """
    spec = as_codebook(spec)
    if isinstance(constants, NestedAbsmax):
        nested = NestedAbsmax(constants.codes[i], constants.absmax[i], constants.code_map, constants.offset[i])
        return CodebookTensor(packed[i], nested, spec, shape, dtype)
    return CodebookTensor(packed[i], constants[i], spec, shape, dtype)


def _nest(absmax: torch.Tensor, nested_block_size: int) -> tuple[torch.Tensor, NestedAbsmax]:
    """Constants float32 [n, blocks] as a loader decodes the constants, and the double-quantized form."""
    code_map = dynamic_map(absmax.device)
    codes, nested_absmax, offset = double_quantize(absmax, nested_block_size)
    decoded = double_dequantize(codes, nested_absmax, code_map, offset, nested_block_size)
    return decoded, NestedAbsmax(codes, nested_absmax, code_map, offset)
