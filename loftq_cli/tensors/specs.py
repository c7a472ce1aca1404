"""The specifications of number formats, of QA-LoRA's pooling and of a layer's adapter, for all packages.

No files here, and no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CodebookSpec:
    """Block-wise codebook quantization: blocks of `block_size` elements of the flattened row-major matrix, an absmax
    for each block, and codes as places in a fixed table.

    codebook            name of the table, a key of CODEBOOKS
    block_size          weights with a common absmax
    double_quant        True if the absmax are 8-bit codes themselves, with constants of their own
    nested_block_size   absmax with a common constant under double quantization
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
        """False: the codes are no integers with a scale and an offset."""
        return False

    @property
    def has_code_kernels(self) -> bool:
        """True: GPU kernels read the stored codes, alone and in stacks of equal matrices."""
        return True

    @property
    def scale_dtype(self) -> str:
        """The dtype of a loader's products of table values and block constants."""
        return "float32"

    @property
    def group_size_or_none(self) -> int | None:
        """None: blocks may cross rows and are no groups of columns."""
        return None

    @property
    def zero_point_kind(self) -> str | None:
        """None: a codebook format has no zero points."""
        return None

    @property
    def size_text(self) -> str:
        """The number of weights with a common constant, as text.

        >>> CodebookSpec("nf4", 64).size_text
        'block 64'
        """
        return f"block {self.block_size}"

    @property
    def layer_options(self) -> dict[str, Any]:
        """The recipe options of the format for a layer in a model of codebook formats, by name."""
        return {"block_size": self.block_size}

    def has_whole_groups_in(self, columns: int) -> bool:
        """False: `columns` neighbouring columns are never whole groups, see `group_size_or_none`."""
        del columns
        return False


@dataclass(frozen=True, slots=True)
class AffineSpec:
    """Group-wise integers: groups of `group_size` neighbouring columns of a row, a scale for each group, and unsigned
    codes of `bits` bits. Scales and biases have the dtype `scale_dtype`.

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
        """True: the codes are integers with a scale and an offset."""
        return True

    @property
    def has_code_kernels(self) -> bool:
        """False: no GPU kernel reads the stored codes."""
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
        """The number of weights with a common scale, as text.

        >>> AffineSpec(4, 128, symmetric=True).size_text
        'group 128'
        """
        return f"group {self.group_size}"

    @property
    def layer_options(self) -> dict[str, Any]:
        """The recipe options of the format for a layer in a model of integer formats, by name."""
        return {"quant_type": self.quant_type, "group_size": self.group_size}

    def has_whole_groups_in(self, columns: int) -> bool:
        """True if `columns` neighbouring columns are whole groups.

        >>> [AffineSpec(4, 32, symmetric=False).has_whole_groups_in(columns) for columns in (64, 48)]
        [True, False]
        """
        return columns % self.group_size == 0


POOLINGS = ("peft", "paper", "repo")


@dataclass(frozen=True, slots=True)
class Pooling:
    """QA-LoRA's pooled input: lora_A reads a single number for each group of `group_size` neighbouring inputs.

    convention   "paper": the sum of the group (Xu et al., arXiv 2309.14717)
                 "repo": the mean of the group (the paper's code)
                 "peft": the mean of the group times the number of groups (PEFT's use_qalora)
    """

    convention: str
    group_size: int

    def __post_init__(self) -> None:
        if self.convention not in POOLINGS:
            raise ValueError(f"the pooling convention is one of {', '.join(POOLINGS)}")
        if self.group_size < 1:
            raise ValueError("group_size is at least 1")

    def factor(self, in_features: int) -> float:
        """The number f in pooled input = f · sum of the group, for `in_features` inputs.

        >>> [Pooling(convention, group_size=4).factor(in_features=32) for convention in POOLINGS]
        [2.0, 1.0, 0.25]
        """
        if self.convention == "paper":
            return 1.0
        groups = in_features // self.group_size if self.convention == "peft" else 1
        return groups / self.group_size


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """The adapter of a linear layer. `scaling` is defined here and nowhere else.

    rank      rows of lora_A and columns of lora_B
    alpha     lora_alpha
    rslora    True divides alpha by √rank in place of rank
    dtype     dtype of lora_A and lora_B
    pooling   the pooled input of QA-LoRA, or None
    """

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
        """Inputs in a pooled group: 1 where nothing is pooled."""
        return self.pooling.group_size if self.pooling else 1
