"""The types that every floor speaks in: tensors as headers know them, number formats, and the adapter pair.

No arithmetic and no files here; torch is needed for annotations only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# torch's own dtype names -> bytes per element. safetensors' short names ("BF16") stay inside checkpoint/.
ITEMSIZE = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
    "complex64": 8,
}

# What a weight may be stored in to be quantized. float8 needs scales that live in other tensors: not a plain weight.
WEIGHT_DTYPES = ("float32", "bfloat16", "float16", "float64")

# What a model may compute in, and what a merged or copied tensor may be cast to.
MODEL_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor of a checkpoint, as its header describes it: nothing is read until it is asked for.

    `alias_of` names an earlier tensor that is the same memory (tied weights in a torch file).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    alias_of: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor that will be written: known from the plan, before any number is."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class CodebookSpec:
    """Block-wise codebook quantization: blocks of `block_size` elements of the flattened row-major matrix,
    one absmax each, codes that index a fixed table; with `double_quant` the absmax are 8-bit themselves,
    in blocks of `nested_block_size`.
    """

    codebook: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    nested_block_size: int = 256

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.nested_block_size < 1:
            raise ValueError("block sizes are at least 1")


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """Double-quantized absmax: `codes` uint8 [n_blocks], `absmax` float32 [ceil(n_blocks / nested_block_size)],
    `code_map` float32 [256], `offset` float32 [].

    Decoded: `code_map[codes] * absmax[block // nested_block_size] + offset`.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    code_map: torch.Tensor
    offset: torch.Tensor


@dataclass(frozen=True, slots=True)
class CodebookTensor:
    """A matrix in a codebook format.

    packed : uint8 [ceil(numel / 2)], two 4-bit codes a byte, the first element in the high nibble
    absmax : float32 [ceil(numel / block_size)], or its double-quantized form
    shape  : [out, in] of the matrix
    dtype  : what a loader decodes to ("bfloat16", ...); values are rounded to it
    """

    packed: torch.Tensor
    absmax: torch.Tensor | NestedAbsmax
    spec: CodebookSpec
    shape: tuple[int, int]
    dtype: str


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """The adapter of one linear layer. `scaling` is defined here and nowhere else."""

    rank: int
    alpha: float
    rslora: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError("rank is at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError("alpha is a positive finite number")

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rank-stabilized LoRA (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, slots=True)
class LoraPair:
    """lora_A [rank, in] and lora_B [out, rank] in their stored dtype; they add `scaling * lora_B @ lora_A`."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
