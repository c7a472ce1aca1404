"""The types that every floor speaks in: tensors as headers know them, number formats, and the adapter pair.

No arithmetic and no files here; torch is needed for annotations only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
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


def config_file_beside(refs: Iterable[TensorRef]) -> Path | None:
    """Where the config.json of a model with these tensors lies: in the folder of its weights."""
    ref = next(iter(refs), None)
    return None if ref is None else ref.file.parent / "config.json"


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

    @property
    def quant_type(self) -> str:
        """The format's name: a key of FORMATS."""
        return self.codebook


@dataclass(frozen=True, slots=True)
class AffineSpec:
    """Group-wise integers: groups of `group_size` neighbouring columns of one row, one scale each, unsigned codes.

    zero_point "int"    value = (code - zero point) * scale; the zero point is an integer in the range of the codes,
                        2^(bits - 1) everywhere if `symmetric`
    zero_point "float"  value = code * scale + bias, the bias in the scales' dtype
    """

    bits: int
    group_size: int
    symmetric: bool
    zero_point: str = "int"
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.zero_point not in ("int", "float"):
            raise ValueError("zero_point is int or float")
        if self.symmetric and self.zero_point == "float":
            raise ValueError("a symmetric format has no float zero point")

    @property
    def quant_type(self) -> str:
        """The format's name: a key of FORMATS."""
        return f"int{self.bits}"


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
class AffineTensor:
    """A matrix in a group-wise integer format.

    codes        uint8 [out, in], each below 2^bits
    scales       [out, in / group_size] in `spec.scale_dtype`
    zero_points  uint8 in the shape of the scales; None if symmetric, or where there are biases
    biases       floating point in the shape of the scales, or None
    dtype        what a loader decodes to; values are rounded to it
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    biases: torch.Tensor | None
    spec: AffineSpec
    dtype: str


POOLINGS = ("peft", "paper", "repo")


@dataclass(frozen=True, slots=True)
class Pooling:
    """QA-LoRA's pooled input: lora_A reads one number for each `group_size` neighbouring inputs.

    "paper"  their sum (Xu et al., arXiv 2309.14717)
    "repo"   their mean (the paper's code)
    "peft"   their mean times the number of groups (PEFT's use_qalora)
    """

    convention: str
    group_size: int

    def __post_init__(self) -> None:
        if self.convention not in POOLINGS:
            raise ValueError(f"the pooling convention is one of {', '.join(POOLINGS)}")
        if self.group_size < 1:
            raise ValueError("group_size is at least 1")

    def factor(self, in_features: int) -> float:
        """The pooled input is this times the sum over the group."""
        if self.convention == "paper":
            return 1.0
        groups = in_features // self.group_size if self.convention == "peft" else 1
        return groups / self.group_size


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """The adapter of one linear layer. `scaling` is defined here and nowhere else."""

    rank: int
    alpha: float
    rslora: bool = False
    dtype: str = "float32"
    pooling: Pooling | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError("rank is at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError("alpha is a positive finite number")

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rank-stabilized LoRA (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def group_size(self) -> int:
        """Inputs that lora_A reads as one: 1 where nothing is pooled."""
        return self.pooling.group_size if self.pooling else 1


@dataclass(frozen=True, slots=True)
class LoraPair:
    """lora_A [rank, in / group_size] and lora_B [out, rank] in their stored dtype; to the weight of output o and input
    i they add `scaling * (lora_B @ lora_A)[o, i // group_size]`. Of a pooled adapter, `scaling` holds its factor too.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    group_size: int = 1


def lora_pair(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, pooling: Pooling | None) -> LoraPair:
    """The adapter of these factors; `scaling` is alpha / rank or alpha / sqrt(rank), and the pooling's comes to it."""
    if pooling is None:
        return LoraPair(lora_A, lora_B, scaling)
    return LoraPair(lora_A, lora_B, scaling * pooling.factor(lora_A.shape[1] * pooling.group_size), pooling.group_size)
