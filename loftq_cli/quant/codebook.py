"""Codebook formats: a matrix becomes stored codes and block constants, and stored numbers the matrix of a loader."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from loftq_cli.errors import NumericError
from loftq_cli.quant.blocks import refine_rows, search_constants
from loftq_cli.quant.formats import Cost, Refinement
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.matrices import CodebookTensor, DecodedCodebook, NestedAbsmax, rows_of_blocks
from loftq_cli.tensors.rows import SLAB_NUMEL, STREAMED_NUMEL, Rows, not_finite, row_multiple, slabs_of
from loftq_cli.tensors.specs import CodebookSpec
from loftq_cli.triton_kernels.codebook.contract import (
    codebook_residual,
    codebook_table,
    quantize_codebook,
)
from loftq_cli.triton_kernels.double_quant.contract import double_dequantize, double_quantize, dynamic_map
from loftq_cli.triton_kernels.refinement.contract import Blocks, Levels

# The largest error of double quantization, as a share of a nested absmax: half of the widest gap in the map, 0.9 / 128,
# and rounding to a grid.
_NESTED_ERROR = 0.0072

# The floor under the divisor of a block: smaller numbers have lost digits already. A nested absmax with an overflowing
# reciprocal is below the floor, and so is the error of the block.
_SMALLEST = 1e-38

# The allowed share of nonzero blocks with a smaller constant than a constant ruined by double quantization.
_RUINED_SHARE = 0.25

_CODE_OF_ZERO = 7


@dataclass(frozen=True, slots=True)
class CodebookQuantizer:
    """`spec` applied to matrices that a loader decodes to `dtype`.

    scales       how the constant of a block is chosen: a name in SCALES
    importance   float32 [in]: weights of the columns' errors in a search for constants
    """

    spec: CodebookSpec
    dtype: str
    scales: str = "absmax"
    importance: torch.Tensor | None = None

    def quantize(
        self,
        weight: Rows,
        *,
        minus: Callable[[slice], torch.Tensor] | None = None,
        start: CodebookTensor | None = None,
        sink: Callable[[slice, torch.Tensor], None] | None = None,
        workers: Workers = SERIAL,
    ) -> CodebookTensor:
        """The stored codes and constants of a matrix. Rows from `minus` are subtracted before quantizing.

        A search begins with the constants of `start`. A `sink` receives the packed codes a few rows at a time, in
        order, and the result then holds no codes.
        Raises NumericError when a weight is NaN or infinite, when a stored number decodes to infinity in a loader's
        dtype, and when double quantization ruins the constants of a matrix: see `_is_ruined`.
        """
        spec, (out_features, in_features) = self.spec, weight.shape
        numel = out_features * in_features
        packed = torch.empty(0 if sink else (numel + 1) // 2, dtype=torch.uint8, device=weight.device)
        absmax = torch.empty(-(-numel // spec.block_size), dtype=torch.float32, device=weight.device)
        start_absmax = None if start is None or self.scales != "search" else start.decoded_absmax()

        def encode(part: slice) -> torch.Tensor:
            first, last = part.start * in_features, part.stop * in_features
            codes, constants = rows_of_blocks(packed, absmax, part, in_features, spec.block_size)
            if sink:
                codes = torch.empty((last - first + 1) // 2, dtype=torch.uint8, device=weight.device)
            subtracted = None if minus is None else minus(part)
            if self.scales == "search":
                target = weight.rows(part).float()
                target = target if subtracted is None else target - subtracted
                start_constants = None
                if start_absmax is not None:
                    start_constants = (
                        rows_of_blocks(packed, start_absmax, part, in_features, spec.block_size)[1],
                        None,
                    )
                blocks = search_constants(
                    target, spec.block_size, self._levels(weight.device), start_constants, self.importance
                )
                codes.copy_(_pack(blocks.codes))
                constants.copy_(blocks.scales)
                return codes
            quantize_codebook(
                weight.rows(part), spec.codebook, spec.block_size, minus=subtracted, out=(codes, constants)
            )
            return codes

        parts = self._slabs(weight, STREAMED_NUMEL if sink else SLAB_NUMEL)
        for part, codes in zip(parts, workers.map(encode, parts), strict=True):
            if sink:
                sink(part, codes)
        # The constant of a block is finite exactly if all weights of the block are: no weight goes unchecked.
        if not bool(torch.isfinite(absmax).all()):
            raise not_finite(weight)
        stored = self._nest(absmax, judges=minus is None) if spec.double_quant else absmax
        quantized = CodebookTensor(packed, stored, spec, (out_features, in_features), self.dtype)
        # The largest weight of a block is the constant: a block decodes to infinity exactly if the constant rounds to
        # infinity. Double quantization moves a constant by less than the largest constant.
        limit = torch.finfo(getattr(torch, self.dtype)).max
        if absmax.numel() and max(map(abs, map(float, torch.aminmax(absmax)))) >= limit / 2:
            largest = quantized.decoded_absmax().abs().max()
            if not bool(torch.isfinite(largest.to(getattr(torch, self.dtype)))):
                hint = "--no-double-quant, or --exclude it" if spec.double_quant else "--exclude it"
                raise NumericError(f"decodes to numbers too large for {self.dtype}", hint=hint)
        return quantized

    def refine(
        self,
        weight: Rows,
        quantized: CodebookTensor,
        cost: Cost,
        *,
        fits_scales: bool = True,
        workers: Workers = SERIAL,
    ) -> Refinement | None:
        """A pass over codes and constants; see `Quantizer`. The cost after the pass leaves out double quantization."""
        spec, shape = self.spec, quantized.shape
        if shape[1] % spec.block_size:
            return None
        absmax = quantized.decoded_absmax().view(shape[0], -1)
        blocks = Blocks(_unpack(quantized.packed, shape), absmax.clone(), None)
        levels = self._levels(weight.device)
        costs = refine_rows(weight, blocks, spec.block_size, levels, cost, fits_scales=fits_scales, workers=workers)
        if costs is None:
            return None
        constants: torch.Tensor | NestedAbsmax = quantized.absmax
        if fits_scales:
            fitted = blocks.scales.reshape(-1)
            constants = self._nest(fitted, judges=False) if spec.double_quant else fitted
        return Refinement(replace(quantized, packed=_pack(blocks.codes.view(-1)), absmax=constants), *costs)

    def residual(
        self, weight: Rows, quantized: CodebookTensor, out: torch.Tensor, *, workers: Workers = SERIAL
    ) -> float:
        """Write weight - dequant(quantized) into `out` [out, in], float32 or bfloat16; return the sum of squares."""
        spec, absmax, in_features = self.spec, quantized.decoded_absmax(), weight.shape[1]

        def subtract(part: slice) -> float:
            packed, constants = rows_of_blocks(quantized.packed, absmax, part, in_features, spec.block_size)
            dtype = getattr(torch, quantized.dtype)
            rows = weight.rows(part)
            return codebook_residual(rows, packed, constants, spec.codebook, spec.block_size, dtype, out[part])

        return sum(workers.map(subtract, self._slabs(weight)))

    def keep_nearer(
        self,
        weight: Rows,
        minus: Callable[[slice], torch.Tensor],
        previous: CodebookTensor,
        new: CodebookTensor,
        *,
        workers: Workers = SERIAL,
    ) -> bool:
        """Returns False and changes nothing: double quantization ties the constants of all blocks together."""
        del weight, minus, previous, new, workers
        return False

    def decoded(
        self, quantized: CodebookTensor, codes: Callable[[slice], torch.Tensor] | None = None
    ) -> DecodedCodebook:
        """The matrix that a loader computes; see `CodebookTensor.decoded`."""
        return quantized.decoded(codes)

    def dequantize(self, quantized: CodebookTensor) -> torch.Tensor:
        """The whole of `decoded` as float32 [out, in]."""
        return quantized.dequantize()

    def _slabs(self, weight: Rows, numel: int = SLAB_NUMEL) -> list[slice]:
        return slabs_of(weight, row_multiple(weight.shape[1], self.spec.block_size), numel)

    def _nest(self, absmax: torch.Tensor, *, judges: bool) -> NestedAbsmax:
        """The double-quantized form of constants float32 [n_blocks]. Raises NumericError when constants or the mean
        overflow, and under `judges` when double quantization ruins the constants.

        The constants of a matrix less an adapter are not judged: the matrix itself was judged first, and subtracting
        turns zero blocks into rounding noise.
        """
        size, code_map = self.spec.nested_block_size, dynamic_map(absmax.device)
        codes, nested_absmax, offset = double_quantize(absmax, size)
        hint = "--no-double-quant, or double_quant = false in an [[override]]"
        if not bool(torch.isfinite(offset)) or not bool(torch.isfinite(nested_absmax).all()):
            raise NumericError("its block constants are too large to be double-quantized", hint=hint)
        if judges and not bool(is_near(absmax, nested_absmax)):
            decoded = double_dequantize(codes, nested_absmax, code_map, offset, size)
            if _is_ruined(absmax, decoded):
                raise NumericError("its block constants differ too much to be double-quantized", hint=hint)
        return NestedAbsmax(codes, nested_absmax, code_map, offset)

    def _levels(self, device: torch.device | str) -> Levels:
        """The levels of the table. A negative constant mirrors an asymmetric table; double quantization takes constants
        of a single sign, as a mean of both signs would describe neither.
        """
        table = codebook_table(self.spec.codebook, device)
        return Levels(table, 4, "none", torch.float32, is_signed=not self.spec.double_quant)


def is_near(absmax: torch.Tensor, nested_absmax: torch.Tensor) -> torch.Tensor:
    """bool [...]: True if double quantization moves each constant float32 [..., blocks] by less than the smallest
    constant. The nested constants float32 [..., nested blocks] decide without decoding, and suffice for most matrices.

    >>> [bool(is_near(torch.tensor([smallest, 4.0]), torch.tensor([2.0]))) for smallest in (1.0, 0.01)]
    [True, False]
    """
    if not absmax.numel():
        return torch.ones(absmax.shape[:-1], dtype=torch.bool, device=absmax.device)
    near: torch.Tensor = (nested_absmax.amax(dim=-1) * _NESTED_ERROR).clamp(min=_SMALLEST) < absmax.amin(dim=-1)
    return near


def _is_ruined(absmax: torch.Tensor, decoded: torch.Tensor) -> bool:
    """True if double quantization has swallowed ordinary constants float32 [n_blocks] beside far larger constants.
    Double quantization is exact to 0.7 % of the largest constant among 256, counted from the mean of all constants, and
    is finer near the mean.

    A constant c is ruined by an error of c or more: c decodes to zero, to a negative number, or to 2c, and zeros would
    be closer to the weights of the block. Ruined constants do no harm in a few blocks of dying rows, where the noise is
    far below the neighbours; they do harm where the noise is as large as ordinary constants. A matrix is refused when
    the error of a ruined constant reaches the lower quartile of the constants of all nonzero blocks. An accepted matrix
    has an error of at most the constant itself or the quartile in each block.

    The largest error in units of the bound, measured: 0.09 in MiniLM and 0.04 in tiny-llama, at the worst block size.
    Normal weights in blocks of 64 give 0.02 to 0.43 when 1 to 16 columns are 50 times larger, and up to 0.81 when the
    columns are 100 times larger. A single weight 1e3 times larger gives 0.03 to 0.48, and 1e6 times larger 2.5 among 4
    million weights and 500 among 4096. Double quantization at 0.5 adds up to three times the error of NF4 itself, a
    poor result; an error of 1 leaves nothing to lose.
    """
    error = (decoded - absmax).abs_()
    if not bool(torch.isfinite(error.max())):
        return True
    nonzero_absmax = absmax.masked_fill(absmax == 0, torch.inf)  # a zero block decodes to zero with any constant
    worst = error.masked_fill_(error < nonzero_absmax, 0.0).max()
    if worst < _SMALLEST:
        return False
    return int((nonzero_absmax <= worst).sum()) >= _RUINED_SHARE * int((absmax > 0).sum())


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [ceil(n / 2)] of codes [n]; an odd end is filled with the code of 0.0, as bitsandbytes does."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), _CODE_OF_ZERO)])
    pairs = codes.view(torch.int16)  # the first of two codes in the low byte; several times faster than by strides
    return (pairs << 4).bitwise_or_(pairs >> 8).to(torch.uint8)


def _unpack(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Codes uint8 [out, in]."""
    return torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[: math.prod(shape)].view(shape)


def make_quantizer(spec: CodebookSpec, dtype: str, scales: str, importance: torch.Tensor | None) -> CodebookQuantizer:
    """The quantizer of a codebook format; parameters as in `loftq_cli.quant.formats.make_quantizer`.

    >>> make_quantizer(CodebookSpec("nf4", 64), "bfloat16", "absmax", None).dtype
    'bfloat16'
    """
    return CodebookQuantizer(spec, dtype, scales, importance)
