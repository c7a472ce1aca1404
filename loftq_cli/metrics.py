"""What an error is: of a quantized layer with its adapter, and of a whole model. Plain numbers, no files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from loftq_cli.tensors import LoraPair


@dataclass(frozen=True, slots=True)
class LayerError:
    """How far a layer is from its original weight W.

    squared_weight       ||W||², for weighted totals
    squared_base_error   ||W − dequant(Q)||²
    squared_error        ||W − dequant(Q) − s·B·A||²: what the loaded model computes
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
class GroupErrors:
    """Relative error of each group of an integer format, √(||error||² / ||W||²) over the group.

    worst_row, worst_group   the group whose error is `max_error`; groups of zeros are left out
    """

    groups: int
    mean_error: float
    max_error: float
    worst_row: int
    worst_group: int


def relative(squared_error: float, squared_weight: float) -> float:
    """√(squared_error / squared_weight); 0 for an exact copy of a zero matrix, infinite for a wrong one."""
    if squared_weight == 0.0:
        return 0.0 if squared_error == 0.0 else math.inf
    return math.sqrt(squared_error / squared_weight)


def sqnr_db(error: float) -> float:
    """20·log10(1 / error); infinite for an exact copy."""
    return math.inf if error == 0.0 else -20.0 * math.log10(error)


def total_error(layers: Iterable[LayerError]) -> LayerError:
    """The error of all layers taken as one long vector: sums of squares, the largest of the maxima."""
    listed = list(layers)
    return LayerError(
        squared_weight=math.fsum(e.squared_weight for e in listed),
        squared_base_error=math.fsum(e.squared_base_error for e in listed),
        squared_error=math.fsum(e.squared_error for e in listed),
        max_error=max((e.max_error for e in listed), default=0.0),
        squared_delta=math.fsum(e.squared_delta for e in listed),
    )


def adapter_delta(lora: LoraPair) -> torch.Tensor:
    """s·B·A in float32 [out, in], from the factors as they are stored."""
    delta = (lora.lora_B.float() @ lora.lora_A.float()).mul_(lora.scaling)
    return delta if lora.group_size == 1 else delta.repeat_interleave(lora.group_size, dim=1)


def group_delta(lora: LoraPair) -> torch.Tensor:
    """s·B·A in float64 [out, in / group_size]: what is added to every weight of a group."""
    return (lora.lora_B.double() @ lora.lora_A.double()).mul_(lora.scaling)


def group_errors(weight: torch.Tensor, approximation: torch.Tensor, group_size: int) -> GroupErrors:
    """The errors of the groups of `group_size` neighbouring columns; both matrices float32 [out, in]."""
    out_features, in_features = weight.shape
    shape = (out_features, in_features // group_size, group_size)
    squared_weight = weight.view(shape).square().sum(dim=2)  # [out, groups in a row]
    squared_error = (weight - approximation).view(shape).square().sum(dim=2)
    errors = (squared_error / squared_weight).sqrt().where(squared_weight > 0, 0.0)
    worst = int(errors.argmax())
    count = int((squared_weight > 0).sum())
    return GroupErrors(
        groups=errors.numel(),
        mean_error=float(errors.double().sum()) / max(count, 1),
        max_error=float(errors.view(-1)[worst]) if errors.numel() else 0.0,
        worst_row=worst // shape[1],
        worst_group=worst % shape[1],
    )


def layer_error(weight: torch.Tensor, dequantized: torch.Tensor, lora: LoraPair | None) -> LayerError:
    """The error of a layer; all matrices float32 [out, in]. Peak memory: two more matrices of that size."""
    from loftq_cli.triton_kernels.error_stats import error_stats

    base = error_stats(weight, dequantized)
    if lora is None:
        return LayerError(base.squared_weight, base.squared_error, base.squared_error, base.max_error, 0.0)
    delta = adapter_delta(lora)
    squared_delta = error_stats(delta, delta).squared_weight
    adapted = error_stats(weight, delta.add_(dequantized))
    return LayerError(
        squared_weight=base.squared_weight,
        squared_base_error=base.squared_error,
        squared_error=adapted.squared_error,
        max_error=adapted.max_error,
        squared_delta=squared_delta,
    )
