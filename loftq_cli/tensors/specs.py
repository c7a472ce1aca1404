"""The types that every floor speaks in: tensors as headers know them, number formats, and the adapter pair.

No arithmetic and no files here; torch is needed for annotations only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


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
