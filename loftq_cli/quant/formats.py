"""The table of number formats, and how a format becomes a quantizer. Names and limits need no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from loftq_cli.tensors import CodebookSpec, CodebookTensor

if TYPE_CHECKING:
    import torch

# Every kind of quantized matrix and of its specification; a new family adds its own classes here.
QuantSpec = CodebookSpec
QuantizedTensor = CodebookTensor


class Quantizer(Protocol):
    """One matrix, there and back. `dequantize` gives what a loader of the stored tensor computes."""

    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        """The quantized form of float32 [out, in]."""
        ...

    def dequantize(self, quantized: QuantizedTensor) -> torch.Tensor:
        """float32 [out, in], rounded to the dtype that the loader decodes to."""
        ...


@dataclass(frozen=True, slots=True)
class Format:
    """One row of the table: the module that implements it, its bits a weight, and the block sizes it takes."""

    module: str
    bits: int
    block_sizes: tuple[int, ...]
    summary: str


FORMATS: dict[str, Format] = {
    "nf4": Format(
        module="loftq_cli.quant.codebook",
        bits=4,
        block_sizes=(32, 64, 128, 256, 512, 1024, 2048, 4096),
        summary="4-bit NormalFloat, one absmax per block",
    ),
}


def make_quantizer(spec: QuantSpec, dtype: str) -> Quantizer:
    """The quantizer of `spec` whose values a loader decodes to `dtype` ("bfloat16", ...)."""
    quantizer: Quantizer = import_module(FORMATS[spec.codebook].module).make_quantizer(spec, dtype)
    return quantizer
