"""Codebook formats: a matrix to codes and block constants as they are stored, and back to what a loader computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq_cli.errors import NumericError
from loftq_cli.tensors import CodebookSpec, CodebookTensor, NestedAbsmax
from loftq_cli.triton_kernels.codebook import dequantize_codebook, quantize_codebook
from loftq_cli.triton_kernels.double_quant import double_dequantize, double_quantize, dynamic_map


@dataclass(frozen=True, slots=True)
class CodebookQuantizer:
    """`spec` applied to matrices that a loader decodes to `dtype`."""

    spec: CodebookSpec
    dtype: str

    def quantize(self, weight: torch.Tensor) -> CodebookTensor:
        """The codes and constants of a float32 [out, in] matrix, exactly as they will be stored.

        Raises NumericError when a weight is NaN or infinite, or the constants overflow float32.
        """
        packed, absmax = quantize_codebook(weight, self.spec.codebook, self.spec.block_size)
        # A block's absmax is non-finite exactly when the block is, so this checks every weight.
        if not bool(torch.isfinite(absmax).all()):
            raise NumericError("holds NaN or infinite values")
        return CodebookTensor(
            packed=packed,
            absmax=self._nested(absmax) if self.spec.double_quant else absmax,
            spec=self.spec,
            shape=(weight.shape[0], weight.shape[1]),
            dtype=self.dtype,
        )

    def keep_nearer(self, weight: torch.Tensor, previous: CodebookTensor, new: CodebookTensor) -> CodebookTensor:
        """`new`: double quantization ties the constants of all blocks together, so none can stay as it was."""
        del weight, previous
        return new

    def dequantize(self, quantized: CodebookTensor) -> torch.Tensor:
        """float32 [out, in]: table[code] * decoded absmax, rounded to the dtype that the loader decodes to."""
        absmax = quantized.absmax
        if isinstance(absmax, NestedAbsmax):
            absmax = double_dequantize(
                absmax.codes, absmax.absmax, absmax.code_map, absmax.offset, quantized.spec.nested_block_size
            )
        out_features, in_features = quantized.shape
        values = dequantize_codebook(
            quantized.packed, absmax, quantized.spec.codebook, quantized.spec.block_size, out_features * in_features
        )
        return values.to(getattr(torch, quantized.dtype)).float().view(out_features, in_features)

    def _nested(self, absmax: torch.Tensor) -> NestedAbsmax:
        codes, nested_absmax, offset = double_quantize(absmax, self.spec.nested_block_size)
        if not bool(torch.isfinite(offset)) or not bool(torch.isfinite(nested_absmax).all()):
            raise NumericError("its block constants are too large to be double-quantized", hint="--no-double-quant")
        return NestedAbsmax(codes, nested_absmax, dynamic_map().to(absmax.device), offset)


def make_quantizer(spec: CodebookSpec, dtype: str, ranges: str) -> CodebookQuantizer:
    """The quantizer of `spec`; see `loftq_cli.quant.formats`."""
    del ranges  # a block's range is its absmax
    return CodebookQuantizer(spec, dtype)
