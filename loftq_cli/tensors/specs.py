"""The types that every floor speaks in: tensors as headers know them, number formats, and the adapter pair.

No arithmetic and no files here; torch is needed for annotations only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


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

    @property
    def is_affine(self) -> bool:
        """Whether the codes are integers with a scale and an offset: False."""
        return False

    @property
    def has_code_kernels(self) -> bool:
        """Whether GPU kernels read the codes as they are stored, alone and in stacks of equal matrices: True."""
        return True

    @property
    def scale_dtype(self) -> str:
        """The dtype in which a loader multiplies table values by block constants."""
        return "float32"

    @property
    def group_size_or_none(self) -> int | None:
        """None: blocks run on from one row to the next and are no groups of columns."""
        return None

    @property
    def zero_point_kind(self) -> str | None:
        """None: a codebook format has no zero points."""
        return None

    @property
    def size_text(self) -> str:
        """How many weights share a constant.

        >>> CodebookSpec("nf4", 64).size_text
        'block 64'
        """
        return f"block {self.block_size}"

    @property
    def layer_options(self) -> dict[str, Any]:
        """The recipe options that choose this format for a layer, by name, in a model of codebook formats."""
        return {"block_size": self.block_size}

    def has_whole_groups_in(self, columns: int) -> bool:
        """Whether `columns` neighbouring columns are whole groups: never, see `group_size_or_none`."""
        del columns
        return False


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

    @property
    def is_affine(self) -> bool:
        """Whether the codes are integers with a scale and an offset: True."""
        return True

    @property
    def has_code_kernels(self) -> bool:
        """Whether GPU kernels read the codes as they are stored, alone and in stacks of equal matrices: False."""
        return False

    @property
    def group_size_or_none(self) -> int | None:
        """The group size: the number of neighbouring columns in a row with a common scale."""
        return self.group_size

    @property
    def zero_point_kind(self) -> str | None:
        """How the offset of a group is stored: "none" (symmetric), "int" or "float".

        >>> AffineSpec(4, 64, symmetric=False).zero_point_kind
        'int'
        """
        return "none" if self.symmetric else self.zero_point

    @property
    def size_text(self) -> str:
        """How many weights share a scale.

        >>> AffineSpec(4, 128, symmetric=True).size_text
        'group 128'
        """
        return f"group {self.group_size}"

    @property
    def layer_options(self) -> dict[str, Any]:
        """The recipe options that choose this format for a layer, by name, in a model of integer formats."""
        return {"quant_type": self.quant_type, "group_size": self.group_size}

    def has_whole_groups_in(self, columns: int) -> bool:
        """Whether `columns` neighbouring columns are whole groups.

        >>> [AffineSpec(4, 32, symmetric=False).has_whole_groups_in(columns) for columns in (64, 48)]
        [True, False]
        """
        return columns % self.group_size == 0


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
