"""Quantized matrices and adapter pairs in memory: records of tensors, with methods for decoding.

The two kinds of quantized matrix have equal properties and methods, so users of a matrix never ask for the kind:
`spec`, `shape`, `dtype`, `decoded`, `dequantize`, `operand`, `to_buffers` and `from_buffers`. torch is imported on use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from loftq_cli.tensors.rows import plain, row_multiple
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec, Pooling

if TYPE_CHECKING:
    import torch

_NESTED_BUFFERS = ("absmax_codes", "absmax_absmax", "absmax_code_map", "absmax_offset")


class CodebookOperand(NamedTuple):
    """A codebook matrix as an argument of kernels: the first arguments of operations on codes.

    packed      uint8 [ceil(numel / 2)], two codes a byte
    absmax      float32 [ceil(numel / block_size)], decoded where double quantization stored the constants
    codebook    name of the table of values
    block_size  number of weights with a common constant
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    codebook: str
    block_size: int


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """Double-quantized absmax: `codes` uint8 [n_blocks], `absmax` float32 [ceil(n_blocks / nested_block_size)],
    `code_map` float32 [256], `offset` float32 [].
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    code_map: torch.Tensor
    offset: torch.Tensor

    def decoded(self, nested_block_size: int) -> torch.Tensor:
        """float32 [n_blocks]: `code_map[codes] * absmax[block // nested_block_size] + offset`."""
        from loftq_cli.triton_kernels.double_quant.contract import double_dequantize

        return double_dequantize(self.codes, self.absmax, self.code_map, self.offset, nested_block_size)


@dataclass(frozen=True, slots=True)
class CodebookTensor:
    """A matrix in a codebook format.

    packed : uint8 [ceil(numel / 2)], two 4-bit codes a byte, the first element in the high nibble
    absmax : float32 [ceil(numel / block_size)], or the double-quantized form
    spec   : the number format
    shape  : [out, in] of the matrix
    dtype  : a loader rounds decoded values to the dtype ("bfloat16", ...)
    """

    packed: torch.Tensor
    absmax: torch.Tensor | NestedAbsmax
    spec: CodebookSpec
    shape: tuple[int, int]
    dtype: str

    def decoded_absmax(self) -> torch.Tensor:
        """float32 [n_blocks]: the block constants of a loader's arithmetic."""
        absmax = self.absmax
        return absmax.decoded(self.spec.nested_block_size) if isinstance(absmax, NestedAbsmax) else absmax

    def decoded(self, codes: Callable[[slice], torch.Tensor] | None = None) -> DecodedCodebook:
        """The matrix of a loader by rows: table[code] * absmax, rounded to `dtype`.

        For a matrix without codes, the function `codes` returns the packed codes of some rows.
        """
        return DecodedCodebook(self, self.decoded_absmax(), codes)

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]: all rows of `decoded`."""
        return self.decoded().rows(slice(0, self.shape[0])).float()

    def operand(self) -> CodebookOperand | None:
        """The matrix as an argument of kernels for codes."""
        return CodebookOperand(self.packed, self.decoded_absmax(), self.spec.codebook, self.spec.block_size)

    def to_buffers(self) -> dict[str, torch.Tensor]:
        """The tensors by the names of a module's buffers: packed, and absmax or four nested parts."""
        if not isinstance(self.absmax, NestedAbsmax):
            return {"packed": self.packed, "absmax": self.absmax}
        nested = (self.absmax.codes, self.absmax.absmax, self.absmax.code_map, self.absmax.offset)
        return {"packed": self.packed, **dict(zip(_NESTED_BUFFERS, nested, strict=True))}

    @classmethod
    def from_buffers(
        cls, buffers: Mapping[str, torch.Tensor], spec: CodebookSpec, shape: tuple[int, int], dtype: str
    ) -> CodebookTensor:
        """The inverse of `to_buffers`."""
        if not spec.double_quant:
            return cls(buffers["packed"], buffers["absmax"], spec, shape, dtype)
        nested = NestedAbsmax(*(buffers[name] for name in _NESTED_BUFFERS))
        return cls(buffers["packed"], nested, spec, shape, dtype)


@dataclass(frozen=True, slots=True)
class AffineTensor:
    """A matrix in a group-wise integer format.

    codes        uint8 [out, in], each below 2^bits
    scales       [out, in / group_size] in `spec.scale_dtype`
    zero_points  uint8 in the shape of the scales; None if symmetric, or where there are biases
    biases       floating point in the shape of the scales, or None
    spec         the number format
    dtype        a loader rounds decoded values to the dtype ("bfloat16", ...)
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    biases: torch.Tensor | None
    spec: AffineSpec
    dtype: str

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the matrix, also where `codes` are left out."""
        out_features, groups = self.scales.shape
        return out_features, groups * self.spec.group_size

    def part(self, rows: slice) -> AffineTensor:
        """The rows [rows.start, rows.stop) as a matrix: views, and no copies."""
        zero_points = None if self.zero_points is None else self.zero_points[rows]
        biases = None if self.biases is None else self.biases[rows]
        return AffineTensor(self.codes[rows], self.scales[rows], zero_points, biases, self.spec, self.dtype)

    def decoded(self, codes: Callable[[slice], torch.Tensor] | None = None) -> DecodedGroups:
        """The matrix of a loader by rows: (code - zero point) * scale, or code * scale + bias, rounded to `dtype`.

        For a matrix without codes, the function `codes` returns the codes of some rows.
        """
        return DecodedGroups(self, codes)

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]: all rows of `decoded`."""
        return self.decoded().rows(slice(0, self.shape[0])).float()

    def operand(self) -> CodebookOperand | None:
        """None: no kernel reads stored integer codes."""
        return None

    def to_buffers(self) -> dict[str, torch.Tensor]:
        """The tensors by the names of a module's buffers: codes packed into int32 words [out, ceil(in * bits / 32)],
        scales, and the zero points or biases if there are any.
        """
        from loftq_cli.triton_kernels.packing.contract import pack_rows

        buffers = {"codes": pack_rows(self.codes, self.spec.bits), "scales": self.scales}
        offsets = {"zero_points": self.zero_points, "biases": self.biases}
        return buffers | {name: tensor for name, tensor in offsets.items() if tensor is not None}

    @classmethod
    def from_buffers(
        cls, buffers: Mapping[str, torch.Tensor], spec: AffineSpec, shape: tuple[int, int], dtype: str
    ) -> AffineTensor:
        """The inverse of `to_buffers`; codes are unpacked into new memory."""
        from loftq_cli.triton_kernels.packing.contract import unpack_rows

        codes = unpack_rows(buffers["codes"], spec.bits, shape[1])
        return cls(codes, buffers["scales"], buffers.get("zero_points"), buffers.get("biases"), spec, dtype)


@dataclass(frozen=True, slots=True)
class DecodedCodebook:
    """The values of a codebook matrix by rows, see `loftq_cli.tensors.rows`; `absmax` float32 [n_blocks]."""

    quantized: CodebookTensor
    absmax: torch.Tensor
    codes: Callable[[slice], torch.Tensor] | None = None
    slab_numel: int = 0

    @property
    def device(self) -> torch.device:
        """The device of the constants and of decoded rows."""
        return self.absmax.device

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.quantized.shape

    @property
    def multiple(self) -> int:
        """The fewest rows of whole blocks: rows are read in multiples of the number, up to the last row."""
        return row_multiple(self.shape[1], self.quantized.spec.block_size)

    def rows(self, part: slice) -> torch.Tensor:
        """Rows [part.start, part.stop) as float32 or bfloat16; `part.start` is a multiple of `multiple`."""
        import torch

        from loftq_cli.triton_kernels.codebook.contract import dequantize_codebook

        spec, columns = self.quantized.spec, self.shape[1]
        packed, absmax = rows_of_blocks(self.quantized.packed, self.absmax, part, columns, spec.block_size)
        if self.codes is not None:
            packed = self.codes(part)
        dtype, numel = getattr(torch, self.quantized.dtype), (part.stop - part.start) * columns
        values = dequantize_codebook(packed, absmax, spec.codebook, spec.block_size, numel, dtype)
        return plain(values.view(-1, columns))


@dataclass(frozen=True, slots=True)
class DecodedGroups:
    """The values of an integer matrix by rows, see `loftq_cli.tensors.rows`."""

    quantized: AffineTensor
    codes: Callable[[slice], torch.Tensor] | None = None
    multiple: int = 1
    slab_numel: int = 0

    @property
    def device(self) -> torch.device:
        """The device of the scales and of decoded rows."""
        return self.quantized.scales.device

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.quantized.shape

    def rows(self, part: slice) -> torch.Tensor:
        """Rows [part.start, part.stop) as float32 or bfloat16."""
        import torch

        from loftq_cli.triton_kernels.affine.contract import dequantize_affine

        quantized, spec = self.quantized, self.quantized.spec
        values = dequantize_affine(
            quantized.codes[part] if self.codes is None else self.codes(part),
            quantized.scales[part],
            None if quantized.zero_points is None else quantized.zero_points[part],
            spec.bits,
            spec.group_size,
            biases=None if quantized.biases is None else quantized.biases[part],
        )
        return plain(values.to(getattr(torch, quantized.dtype)))


def rows_of_blocks(
    packed: torch.Tensor, absmax: torch.Tensor, part: slice, columns: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the packed codes uint8 and of the block constants float32 of the rows `part` of `columns` weights.

    The first row begins with a block.

    >>> import torch
    >>> packed, absmax = rows_of_blocks(torch.zeros(128), torch.arange(4), slice(1, 3), columns=64, block_size=64)
    >>> packed.shape, absmax
    (torch.Size([64]), tensor([1, 2]))
    """
    first, last = part.start * columns, part.stop * columns
    return packed[first // 2 : -(-last // 2)], absmax[first // block_size : -(-last // block_size)]


@dataclass(frozen=True, slots=True)
class LoraPair:
    """lora_A [rank, in / group_size] and lora_B [out, rank] in the stored dtype. The adapter adds
    `scaling * (lora_B @ lora_A)[o, i // group_size]` to the weight of output o and input i. The `scaling` of a pooled
    adapter includes the pooling's factor.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    group_size: int = 1


def lora_pair(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, pooling: Pooling | None) -> LoraPair:
    """The adapter of lora_A [rank, in / group_size] and lora_B [out, rank].

    `scaling` is alpha / rank or alpha / sqrt(rank); the pair's scaling is multiplied by the factor of `pooling`.

    >>> import torch
    >>> lora_pair(torch.ones(1, 2), torch.ones(3, 1), 0.5, Pooling("peft", group_size=4)).scaling
    0.25
    """
    if pooling is None:
        return LoraPair(lora_A, lora_B, scaling)
    return LoraPair(lora_A, lora_B, scaling * pooling.factor(lora_A.shape[1] * pooling.group_size), pooling.group_size)
