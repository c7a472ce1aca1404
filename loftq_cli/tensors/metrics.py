"""Errors of a quantized layer with an adapter, and of a whole model. Plain numbers, no files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.rows import STREAMED_NUMEL, Rows, slabs_of

if TYPE_CHECKING:
    import torch

    from loftq_cli.tensors.matrices import LoraPair


@dataclass(frozen=True, slots=True)
class LayerError:
    """The error of a layer against the original weight W.

    squared_weight       ||W||², for weighted totals
    squared_base_error   ||W − dequant(Q)||²
    squared_error        ||W − dequant(Q) − s·B·A||², the error of the loaded model
    max_error            largest |W − dequant(Q) − s·B·A|
    squared_delta        ||s·B·A||²
    """

    squared_weight: float
    squared_base_error: float
    squared_error: float
    max_error: float
    squared_delta: float

    @property
    def base_error(self) -> float:
        """Relative Frobenius error without the adapter."""
        return relative(self.squared_base_error, self.squared_weight)

    @property
    def error(self) -> float:
        """Relative Frobenius error with the adapter."""
        return relative(self.squared_error, self.squared_weight)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in dB, with the adapter."""
        return sqnr_db(self.error)

    @property
    def delta_norm(self) -> float:
        """Frobenius norm of s·B·A."""
        return math.sqrt(self.squared_delta)


@dataclass(frozen=True, slots=True)
class MergeSums:
    """Sums over a merged weight M: the exact sum W + Δ in the dtype of the file.

    squared_weight    ||W||²
    squared_delta     ||Δ||²
    retained          <M − W, Δ>
    squared_rounding  ||M − (W + Δ)||²
    """

    squared_weight: float
    squared_delta: float
    retained: float
    squared_rounding: float

    @classmethod
    def of(
        cls, squared_weight: float, squared_change: float, squared_rounding: float, squared_delta: float
    ) -> MergeSums:
        """The sums from squares alone; `squared_change` is ||M − W||². <c, d> = (||c||² + ||d||² − ||c − d||²) / 2.

        >>> MergeSums.of(4.0, squared_change=1.0, squared_rounding=0.0, squared_delta=1.0).retained
        1.0
        """
        retained = (squared_change + squared_delta - squared_rounding) / 2
        return cls(squared_weight, squared_delta, retained, squared_rounding)

    @classmethod
    def total(cls, sums: Iterable[MergeSums]) -> MergeSums:
        """The sums over all parts of a weight.

        >>> MergeSums.total([MergeSums(1.0, 2.0, 3.0, 4.0)] * 2)
        MergeSums(squared_weight=2.0, squared_delta=4.0, retained=6.0, squared_rounding=8.0)
        """
        parts = list(sums)
        return cls(
            squared_weight=math.fsum(part.squared_weight for part in parts),
            squared_delta=math.fsum(part.squared_delta for part in parts),
            retained=math.fsum(part.retained for part in parts),
            squared_rounding=math.fsum(part.squared_rounding for part in parts),
        )


@dataclass(frozen=True, slots=True)
class GroupErrors:
    """Relative error of each group of an integer format, √(||error||² / ||W||²) over the group.

    worst_row, worst_group   the group with error `max_error`; groups of zeros are left out
    """

    groups: int
    mean_error: float
    max_error: float
    worst_row: int
    worst_group: int


def relative(squared_error: float, squared_weight: float) -> float:
    """√(squared_error / squared_weight); 0 for an exact copy of a zero matrix, infinite for a wrong copy.

    >>> relative(1.0, 4.0), relative(0.0, 0.0), relative(1.0, 0.0)
    (0.5, 0.0, inf)
    """
    if squared_weight == 0.0:
        return 0.0 if squared_error == 0.0 else math.inf
    return math.sqrt(squared_error / squared_weight)


def sqnr_db(error: float) -> float:
    """The signal-to-noise ratio in dB, 20·log10(1 / error), of a relative error; infinite for an exact copy.

    >>> sqnr_db(0.1), sqnr_db(0.0)
    (20.0, inf)
    """
    return math.inf if error == 0.0 else -20.0 * math.log10(error)


def total_error(layers: Iterable[LayerError]) -> LayerError:
    """The error of all layers as a single long vector: sums of squares, the largest of the maxima.

    >>> total_error([LayerError(1.0, 1.0, 1.0, 0.5, 0.0), LayerError(3.0, 0.0, 0.0, 0.25, 0.0)]).error
    0.5
    """
    layer_errors = list(layers)
    return LayerError(
        squared_weight=math.fsum(e.squared_weight for e in layer_errors),
        squared_base_error=math.fsum(e.squared_base_error for e in layer_errors),
        squared_error=math.fsum(e.squared_error for e in layer_errors),
        max_error=max((e.max_error for e in layer_errors), default=0.0),
        squared_delta=math.fsum(e.squared_delta for e in layer_errors),
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """True if every number is finite, judged by minimum and maximum: 20 times faster than a look at each number. A
    complex number has to be finite in both parts.

    >>> import torch
    >>> is_finite(torch.tensor([1.0, 2.0])), is_finite(torch.tensor([1.0, torch.nan]))
    (True, False)
    """
    import torch

    real = real_values(tensor)
    if not real.is_floating_point() or not real.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(real))


def real_values(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of `tensor` in a dtype that torch compares: both parts of complex numbers, and 8-bit floats in
    float32.

    >>> import torch
    >>> real_values(torch.tensor([1.0 + 2.0j])).tolist()
    [[1.0, 2.0]]
    """
    import torch

    if tensor.is_complex():
        return torch.view_as_real(tensor)
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def delta_rows(lora: LoraPair, dtype: torch.dtype | None = None) -> Callable[[slice], torch.Tensor]:
    """A function from a slice of rows to rows of s·B·A, [rows, in] in `dtype` (float32 by default).

    >>> import torch
    >>> from loftq_cli.tensors.matrices import LoraPair
    >>> delta_rows(LoraPair(torch.ones(1, 2), torch.tensor([[1.0], [2.0]]), scaling=0.5))(slice(1, 2))
    tensor([[1., 1.]])
    """
    import torch

    if dtype in (None, torch.float32):
        lora_A, lora_B = lora.lora_A.float(), lora.lora_B.float()
    else:
        lora_A, lora_B = lora.lora_A.to(dtype), (lora.lora_B.float() * lora.scaling).to(dtype)

    def rows(part: slice) -> torch.Tensor:
        delta = lora_B[part] @ lora_A
        if delta.dtype == torch.float32:
            delta *= lora.scaling  # last, as in PEFT
        return delta if lora.group_size == 1 else delta.repeat_interleave(lora.group_size, dim=1)

    return rows


def adapter_delta(lora: LoraPair) -> torch.Tensor:
    """s·B·A in float32 [out, in], from the stored factors.

    >>> import torch
    >>> from loftq_cli.tensors.matrices import LoraPair
    >>> adapter_delta(LoraPair(torch.ones(1, 1), torch.ones(1, 1), scaling=0.5, group_size=2))
    tensor([[0.5000, 0.5000]])
    """
    return delta_rows(lora)(slice(None))


def group_delta(lora: LoraPair) -> torch.Tensor:
    """s·B·A in float64 [out, in / group_size]: the number added to every weight of a group.

    >>> import torch
    >>> from loftq_cli.tensors.matrices import LoraPair
    >>> group_delta(LoraPair(torch.ones(1, 1), torch.ones(1, 1), scaling=0.5, group_size=2))
    tensor([[0.5000]], dtype=torch.float64)
    """
    return (lora.lora_B.double() @ lora.lora_A.double()).mul_(lora.scaling)


def squared_norm(lora: LoraPair) -> float:
    """||s·B·A||² over all weights, from the factors alone: s² · tr(BᵀB · AAᵀ) in float64.

    >>> import torch
    >>> from loftq_cli.tensors.matrices import LoraPair
    >>> squared_norm(LoraPair(torch.ones(1, 1), torch.ones(1, 1), scaling=0.5, group_size=2))
    0.5
    """
    lora_A, lora_B = lora.lora_A.double(), lora.lora_B.double()
    product = ((lora_B.T @ lora_B) * (lora_A @ lora_A.T)).sum()
    return lora.scaling**2 * lora.group_size * float(product)


def layer_error(weight: Rows, decoded: Rows, lora: LoraPair | None, workers: Workers = SERIAL) -> LayerError:
    """The error of `decoded` plus the adapter `lora` against `weight`, [out, in]. Peak memory: a few rows a thread.

    >>> import torch
    >>> from loftq_cli.tensors.rows import TensorRows
    >>> layer_error(TensorRows(torch.tensor([[3.0, 4.0]])), TensorRows(torch.tensor([[3.0, 3.0]])), None).error
    0.2
    """
    from loftq_cli.triton_kernels.error_stats.contract import ErrorSums, error_stats

    # lora_B is all zero before training: skip the product.
    delta = None if lora is None or not bool(lora.lora_B.any()) else delta_rows(lora)

    def sums(part: slice) -> ErrorSums:
        return error_stats(weight.rows(part), decoded.rows(part), None if delta is None else delta(part))

    parts = slabs_of(weight, decoded.multiple, STREAMED_NUMEL)
    sums_of_slabs = list(workers.map(sums, parts))
    return LayerError(
        squared_weight=math.fsum(part.squared_weight for part in sums_of_slabs),
        squared_base_error=math.fsum(part.squared_base_error for part in sums_of_slabs),
        squared_error=math.fsum(part.squared_error for part in sums_of_slabs),
        max_error=_largest(part.max_error for part in sums_of_slabs),
        squared_delta=math.fsum(part.squared_delta for part in sums_of_slabs),
    )


def merge_sums(weight: torch.Tensor, merged: torch.Tensor, delta: torch.Tensor | None) -> MergeSums:
    """The sums for a few rows: `weight` in float32, `merged` in the dtype of the file, and the update `delta` in
    float32; None stands for no update, and `merged` is not looked at. Overwrites `delta`.

    >>> import torch
    >>> weight, merged = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0])
    >>> merge_sums(weight, merged, delta=torch.tensor([1.0, 1.0]))
    MergeSums(squared_weight=2.0, squared_delta=2.0, retained=1.0, squared_rounding=1.0)
    """
    import torch

    from loftq_cli.triton_kernels.error_stats.contract import error_stats

    if delta is None:
        return MergeSums.of(error_stats(weight, weight).squared_weight, 0.0, 0.0, 0.0)
    stored = merged.float() if merged.dtype == torch.float16 else merged
    # One pass: W − M is the change, and W − (M − Δ) the rounding, both with the sign turned.
    sums = error_stats(weight, stored, delta.neg_())
    return MergeSums.of(sums.squared_weight, sums.squared_base_error, sums.squared_error, sums.squared_delta)


def group_errors(
    weight: Rows, decoded: Rows, lora: LoraPair | None, group_size: int, workers: Workers = SERIAL
) -> GroupErrors:
    """Errors of groups of `group_size` neighbouring columns; further parameters as in `layer_error`.

    >>> import torch
    >>> from loftq_cli.tensors.rows import TensorRows
    >>> weight, decoded = torch.tensor([[3.0, 4.0, 1.0, 0.0]]), torch.tensor([[3.0, 4.0, 0.5, 0.0]])
    >>> group_errors(TensorRows(weight), TensorRows(decoded), None, group_size=2)
    GroupErrors(groups=2, mean_error=0.25, max_error=0.5, worst_row=0, worst_group=1)
    """
    import torch

    delta = None if lora is None else delta_rows(lora)

    def errors(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        rows = weight.rows(part).float()
        difference = rows - (decoded.rows(part) if delta is None else decoded.rows(part) + delta(part))
        shape = (len(rows), -1, group_size)
        # Norms accumulate in float64: squares of 1e20 or of 1e-23 leave the range of float32.
        norms = torch.linalg.vector_norm(rows.view(shape), dim=2, dtype=torch.float64)  # [rows, groups in a row]
        lost = torch.linalg.vector_norm(difference.view(shape), dim=2, dtype=torch.float64)
        return (lost / norms).where(norms > 0, 0.0), norms > 0

    groups = nonzero_groups = worst = 0
    total, largest = 0.0, 0.0
    per_row = weight.shape[1] // group_size
    parts = slabs_of(weight, decoded.multiple, STREAMED_NUMEL)
    for slab_errors, is_counted in workers.map(errors, parts):
        slab_largest = float(slab_errors.max()) if slab_errors.numel() else 0.0
        if slab_largest > largest or (math.isnan(slab_largest) and not math.isnan(largest)):  # a NaN always wins
            largest, worst = slab_largest, groups + int(slab_errors.argmax())
        groups += slab_errors.numel()
        nonzero_groups += int(is_counted.sum())
        total += float(slab_errors.double().sum())
    return GroupErrors(
        groups=groups,
        mean_error=total / max(nonzero_groups, 1),
        max_error=largest,
        worst_row=worst // max(per_row, 1),
        worst_group=worst % max(per_row, 1),
    )


def _largest(values: Iterable[float]) -> float:
    """The largest value; NaN if any value is NaN."""
    largest = 0.0
    for value in values:
        largest = value if value > largest or math.isnan(value) else largest
    return largest
