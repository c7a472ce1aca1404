"""A whole matrix on a GPU, for merge and inspect: merged with an adapter, quantized again, or compared. A function
called `..._on` returns None when the processor has to take the matrix: see `SharedDevice.run`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from loftq_cli.errors import NumericError
from loftq_cli.quant.formats import QuantizedTensor, Quantizer
from loftq_cli.runtime.gpu import SharedDevice
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.matrices import CodebookOperand, LoraPair
from loftq_cli.tensors.metrics import (
    GroupErrors,
    LayerError,
    MergeSums,
    group_errors,
    is_finite,
    layer_error,
    merge_sums,
)
from loftq_cli.tensors.rows import STREAMED_NUMEL, ComputedRows, Rows, TensorRows, slabs_of
from loftq_cli.tensors.updates import Update

if TYPE_CHECKING:
    import torch

WholeMatrix: TypeAlias = QuantizedTensor | TensorRows

# Matrices of at most so many weights, 128 MB in bfloat16, are made side by side: threads beside a GPU read, hash and
# write, each thread a matrix.
BESIDE_NUMEL = 1 << 26

_SLAB_NUMEL = 1 << 24  # weights in a slab, for work without a kernel over the whole matrix

# Bytes of device memory: each weight needs a matrix in float64, a copy in float32, and codes or a copy of the result;
# each weight of a slab needs more.
_NBYTES, _SLAB_NBYTES = 16, 48


@dataclass(frozen=True, slots=True)
class MergedMatrix:
    """W + s·B·A in the dtype to write, and the sums over W, s·B·A and the rounding to the dtype."""

    tensor: torch.Tensor
    sums: MergeSums


@dataclass(frozen=True, slots=True)
class RequantizedMatrix:
    """W + s·B·A quantized; ||W||², ||s·B·A||², and the surviving part of the adapter (None without an adapter)."""

    quantized: QuantizedTensor
    squared_weight: float = 0.0
    squared_delta: float = 0.0
    retained: float | None = None


def merge_on(
    gpu: SharedDevice, read: Callable[[], WholeMatrix], numel: int, update: Update | None, dtype: str, *, turned: bool
) -> MergedMatrix | None:
    """The matrix of `numel` weights from `read`, merged in `dtype`: [out, in], or [in, out] if `turned`. None for a
    result with NaN or infinity.

    Codes of a codebook with an unpooled adapter become merged weights in a single pass; integers, pooled adapters, DoRA
    and weights in full precision are merged slab by slab, as on a processor.
    """

    def work(inputs: tuple[WholeMatrix, Update | None]) -> MergedMatrix:
        import torch

        merged = _merge(*inputs, getattr(torch, dtype))
        if not (math.isfinite(merged.sums.squared_weight) and is_finite(merged.tensor)):
            raise NumericError("is not finite")
        return MergedMatrix(merged.tensor.T.contiguous() if turned else merged.tensor, merged.sums)

    return gpu.run(work, lambda: (read(), update), _nbytes(numel))


def requantize_on(
    gpu: SharedDevice, read: Callable[[], WholeMatrix], numel: int, update: Update | None, quantizer: Quantizer
) -> RequantizedMatrix | None:
    """`requantize` for the matrix of `numel` weights from `read`. None when the merged matrix cannot be quantized."""

    def work(inputs: tuple[WholeMatrix, Update | None]) -> RequantizedMatrix:
        return requantize(_rows(inputs[0]), inputs[1], quantizer)

    return gpu.run(work, lambda: (read(), update), _nbytes(numel))


def requantize(
    weight: Rows, update: Update | None, quantizer: Quantizer, workers: Workers = SERIAL
) -> RequantizedMatrix:
    """The merged matrix quantized again, on the device of `weight`. Peak memory beside `weight`: the quantized matrix.

    Raises NumericError when the merged matrix cannot be quantized.

    >>> import torch
    >>> from loftq_cli.quant.formats import CodebookSpec, make_quantizer
    >>> from loftq_cli.tensors.updates import Term
    >>> update = Update((Term(LoraPair(torch.ones(1, 64), torch.ones(2, 1), scaling=0.5)),))
    >>> merged = requantize(TensorRows(torch.ones(2, 64)), update, make_quantizer(CodebookSpec(), "float32"))
    >>> round(merged.squared_weight, 3), round(merged.quantized.dequantize()[0, 0].item(), 3)
    (128.0, 1.5)
    """
    from loftq_cli.triton_kernels.backend import has_kernels
    from loftq_cli.triton_kernels.error_stats.contract import error_stats
    from loftq_cli.triton_kernels.merging.contract import retention_sums

    delta = None if update is None else update.reader()

    def merge_rows(part: slice) -> torch.Tensor:
        rows = weight.rows(part)
        return rows if delta is None else (exact := rows.float()) + delta(part, exact)

    merged = ComputedRows(weight.shape, merge_rows, weight.multiple, weight.device, weight.slab_numel)
    quantized = quantizer.quantize(merged, workers=workers)
    if delta is None:
        return RequantizedMatrix(quantized)
    stored, added_to = quantizer.decoded(quantized), delta

    def compare(part: slice) -> tuple[float, float, float]:
        rows = weight.rows(part).float()
        added = added_to(part, rows)
        if has_kernels("merging", rows.device.type):
            squared_weight, squared_delta, retained = retention_sums(rows, stored.rows(part), added).tolist()
            return squared_weight, squared_delta, retained
        sums = error_stats(rows, rows, added)
        change = stored.rows(part).float() - rows
        return sums.squared_weight, sums.squared_delta, float((change.double() * added).sum())

    sums_of_slabs = list(workers.map(compare, slabs_of(weight, stored.multiple, STREAMED_NUMEL)))
    return RequantizedMatrix(quantized, *(math.fsum(column) for column in zip(*sums_of_slabs, strict=True)))


def errors_on(
    gpu: SharedDevice,
    read: Callable[[], tuple[TensorRows, WholeMatrix]],
    numel: int,
    lora: LoraPair | None,
    group_size: int | None,
) -> tuple[LayerError, GroupErrors | None] | None:
    """The `layer_error` of a weight beside the stored matrix from `read`, and the `group_errors` if `group_size` is a
    number. A single pass decodes and compares codes of a codebook. None for an error of NaN or infinity.
    """

    def work(
        inputs: tuple[tuple[TensorRows, WholeMatrix], LoraPair | None],
    ) -> tuple[LayerError, GroupErrors | None]:
        (original, stored), pair = inputs
        weight = _rows(original)
        error = _error(weight, stored, pair)
        return error, None if group_size is None else group_errors(weight, _rows(stored), pair, group_size)

    return gpu.run(work, lambda: (read(), lora), _nbytes(numel))


def tries_on(
    gpu: SharedDevice, read: Callable[[], TensorRows], numel: int, quantizers: Mapping[str, Quantizer]
) -> dict[str, LayerError] | None:
    """The error of each quantizer, by name, for the matrix of `numel` weights from `read`."""

    def work(matrix: TensorRows) -> dict[str, LayerError]:
        rows = _rows(matrix)
        return {name: _error(rows, quantizer.quantize(rows), None) for name, quantizer in quantizers.items()}

    return gpu.run(work, read, _nbytes(numel))


def _nbytes(numel: int) -> int:
    return numel * _NBYTES + min(numel, _SLAB_NUMEL) * _SLAB_NBYTES


def _rows(matrix: WholeMatrix) -> Rows:
    """A matrix by rows, on the device of the stored tensors."""
    rows: Rows = matrix if isinstance(matrix, TensorRows) else matrix.decoded()
    return ComputedRows(rows.shape, rows.rows, rows.multiple, rows.device, _SLAB_NUMEL)


def _merge(weight: WholeMatrix, update: Update | None, dtype: torch.dtype) -> MergedMatrix:
    import torch

    lora = None if update is None else update.plain
    if not isinstance(weight, TensorRows) and lora is not None and lora.group_size == 1:
        codes = weight.operand()
        if codes is not None:
            return _merge_codes(codes, weight.shape, getattr(torch, weight.dtype), lora, dtype)
    return _merge_rows(_rows(weight), update, dtype)


def _merge_codes(
    codes: CodebookOperand, shape: tuple[int, int], values: torch.dtype, lora: LoraPair, dtype: torch.dtype
) -> MergedMatrix:
    """Codes [out, in] whose values a loader rounds to `values`, merged in `dtype`."""
    import torch

    from loftq_cli.triton_kernels.error_stats.contract import codebook_error_sums
    from loftq_cli.triton_kernels.merging.contract import merge_codebook

    lora_A, lora_B = lora.lora_A.float(), lora.lora_B.float()
    # The error of codes beside a matrix of zeros is the squared norm.
    nothing = torch.zeros(shape, dtype=torch.bfloat16, device=lora_A.device)
    squared_weight = codebook_error_sums(nothing, *codes, values).tolist()[1]
    del nothing
    tensor = merge_codebook(*codes, shape, values, lora_A, lora_B, lora.scaling, dtype)
    sums = codebook_error_sums(tensor, *codes, values, lora_A, lora_B, lora.scaling).tolist()
    return MergedMatrix(tensor, MergeSums.of(squared_weight, sums[1], sums[2], sums[4]))


def _merge_rows(weight: Rows, update: Update | None, dtype: torch.dtype) -> MergedMatrix:
    import torch

    delta = None if update is None else update.reader()
    tensor, sums_of_slabs = torch.empty(weight.shape, dtype=dtype, device=weight.device), []
    for part in slabs_of(weight, numel=STREAMED_NUMEL):
        rows = weight.rows(part).float()
        added = None if delta is None else delta(part, rows)
        tensor[part] = rows if added is None else rows + added
        sums_of_slabs.append(merge_sums(rows, tensor[part], added))
    return MergedMatrix(tensor, MergeSums.total(sums_of_slabs))


def _error(weight: Rows, decoded: WholeMatrix, lora: LoraPair | None) -> LayerError:
    """The error of the matrix. Raises NumericError for an error of NaN or infinity."""
    error = None if isinstance(decoded, TensorRows) else _error_of_codes(weight, decoded, lora)
    error = error or layer_error(weight, _rows(decoded), lora)
    if not (math.isfinite(error.squared_weight) and math.isfinite(error.squared_error)):
        raise NumericError("is not finite")
    return error


def _error_of_codes(weight: Rows, quantized: QuantizedTensor, lora: LoraPair | None) -> LayerError | None:
    """The error, decoded and compared in a single pass; None for a pooled adapter and for codes without a kernel."""
    import torch

    from loftq_cli.triton_kernels.error_stats.contract import codebook_error_sums

    codes = quantized.operand() if lora is None or lora.group_size == 1 else None
    if codes is None:
        return None
    rows, values = weight.rows(slice(0, weight.shape[0])), getattr(torch, quantized.dtype)
    factors = () if lora is None else (lora.lora_A.float(), lora.lora_B.float(), lora.scaling)
    return LayerError(*codebook_error_sums(rows, *codes, values, *factors)[:5].tolist())
