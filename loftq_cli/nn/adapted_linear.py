"""A frozen linear and the adapter that is trained: one class for each method. Knows no files and no models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loftq_cli.nn.quantized_linear import QuantizedLinear, dense_linear
from loftq_cli.nn.read_only_weight import ReadOnlyWeight
from loftq_cli.quant.affine import move_offsets
from loftq_cli.quant.formats import as_affine, as_affine_tensor
from loftq_cli.tensors.matrices import LoraPair, lora_pair
from loftq_cli.tensors.metrics import adapter_delta, group_delta
from loftq_cli.tensors.specs import LoraSpec


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an adapter was loaded from, and what of it is written down again with the trained one.

    base         the directory of the base
    config       adapter_config.json
    provenance   the record of the base that the adapter was made for, if there is one
    """

    base: Path | None
    config: Mapping[str, Any]
    provenance: Mapping[str, Any] | None


class AdaptedLinear(nn.Module):
    """A frozen linear and a trainable adapter: y = base(x) + s·B·A·x, where A reads x, or its sums over groups.

    base_layer       QuantizedLinear, or an nn.Linear where the weight is stored dense
    lora_A, lora_B   Parameters as in LoraPair, computed with in their own dtype
    lora             rank, alpha and pooling, as they are saved
    scaling          s, the pooling's factor included
    origin           where it was loaded from, if anywhere
    """

    _is_pooled = False

    def __init__(
        self,
        base_layer: nn.Linear,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        lora: LoraSpec,
        *,
        origin: Origin | None = None,
    ) -> None:
        """Raises ValueError where the factors do not fit the base or `lora`."""
        super().__init__()
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        inputs = self.in_features // lora.group_size
        if (lora.pooling is not None) != self._is_pooled:
            what = "a pooled adapter" if self._is_pooled else "an adapter that is not pooled"
            raise ValueError(f"{type(self).__name__} is for {what}")
        if lora_A.shape != (lora.rank, inputs) or inputs * lora.group_size != self.in_features:
            raise ValueError(f"lora_A {tuple(lora_A.shape)} does not read {self.in_features} inputs")
        if lora_B.shape != (self.out_features, lora.rank):
            raise ValueError(f"lora_B {tuple(lora_B.shape)} does not give {self.out_features} outputs")
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone())
        self.lora, self.origin = lora, origin
        self.scaling = lora_pair(lora_A, lora_B, lora.scaling, lora.pooling).scaling
        self._start = (lora_A.detach().clone(), lora_B.detach().clone())

    @property
    def weight(self) -> torch.Tensor:
        """base + s·B·A [out, in] as it is now, for reading as `QuantizedLinear.weight`; no gradient goes through it."""
        like = self.base_layer.weight
        shape = (self.out_features, self.in_features)
        return ReadOnlyWeight(lambda: self._merged_weight().to(like.dtype), shape, like.dtype, like.device)

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's."""
        return self.base_layer.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., out] of [..., in]."""
        output: torch.Tensor = self.base_layer(input)
        return output + self._added(input.to(self.lora_A.dtype)).to(output.dtype)

    def reset(self) -> None:
        """Back to the adapter that was loaded: that of LoftQ and of residual QA-LoRA, which holds the quantization
        error of this base; of the other methods, the one that adds nothing, or what had been trained before.
        """
        with torch.no_grad():
            for parameter, start in zip((self.lora_A, self.lora_B), self._start, strict=True):
                parameter.copy_(start)

    def merge(self) -> nn.Linear:
        """A frozen dense linear with dequant(Q) + s·B·A, added in float32 and rounded to the dtype of `weight`."""
        dtype = self.base_layer.weight.dtype
        return dense_linear(self._merged_weight().to(dtype), _copied(self.bias)).train(self.training)

    def extra_repr(self) -> str:
        """The adapter's rank and scaling."""
        return f"rank={self.lora.rank}, scaling={self.scaling:g}"

    def _added(self, input: torch.Tensor) -> torch.Tensor:
        """s·B·A·x [..., out] of [..., in] in the adapter's dtype."""
        read = _group_sums(input, self.lora.group_size)
        return functional.linear(functional.linear(read, self.lora_A), self.lora_B) * self.scaling

    def pair(self) -> LoraPair:
        return LoraPair(self.lora_A.detach(), self.lora_B.detach(), self.scaling, self.lora.group_size)

    def _merged_weight(self) -> torch.Tensor:
        base = self.base_layer
        weight = base.dequantized() if isinstance(base, QuantizedLinear) else base.weight.detach().float()
        return adapter_delta(self.pair()).add_(weight)


class LoftQLinear(AdaptedLinear):
    """LoftQ (arXiv 2310.08659): the adapter starts as the best approximation of what quantization lost."""


class QLoRALinear(AdaptedLinear):
    """QLoRA (arXiv 2305.14314): the adapter starts by adding nothing."""


@dataclass(frozen=True, slots=True)
class QuantizationStats:
    """What rounding the zero points does to the effective weight: mean and largest absolute difference over all
    weights, and the number of groups that have a zero point.
    """

    mean_error: float
    max_error: float
    groups: int


class QALoRALinear(AdaptedLinear):
    """QA-LoRA (arXiv 2309.14717): the adapter reads sums over groups of inputs, so that the offsets of a quantized base
    can hold what it adds, U [out, groups] = s·B·A.
    """

    _is_pooled = True
    _quantization_enabled = False

    @property
    def quantization_enabled(self) -> bool:
        """Whether training sees rounded zero points, as `loftq merge --round-zeros` writes them: zero' =
        round(zero − U / scale) in the range of the codes. The gradient of the adapter is that of U unrounded
        (straight-through); that of the input sees the rounded weight.

        Off by default, also for a warm-up: float offsets hold U exactly, so merging into them leaves nothing to
        simulate. Turning it on raises ValueError for a base without integer zero points.
        """
        return self._quantization_enabled

    @quantization_enabled.setter
    def quantization_enabled(self, enabled: bool) -> None:
        if enabled:
            self._zero_points()
        self._quantization_enabled = bool(enabled)

    def quantization_stats(self) -> QuantizationStats:
        """How far rounded zero points are from the effective weight now, whether or not training sees them.

        Raises ValueError for a base without integer zero points.
        """
        update = self._update().detach()
        # Groups are of one size, and base and codes are in both weights: differences of U are those of the weights.
        difference = (self._rounded(update) - update.double()).abs()
        return QuantizationStats(float(difference.mean()), float(difference.max()), difference.numel())

    def merge(self) -> nn.Linear:
        """A QuantizedLinear with the codes of the base, and float32 offsets that hold the adapter exactly, whatever
        `quantization_enabled`. A dense linear where the base has no integer codes.

        Raises ValueError where the adapter's groups are not whole groups of the base.
        """
        base = self.base_layer
        if not isinstance(base, QuantizedLinear) or not base.spec.is_affine:
            return super().merge()
        stored = as_affine_tensor(base.quantized())
        spec = replace(stored.spec, symmetric=False, zero_point="float", scale_dtype="float32")
        delta = group_delta(self.pair()).repeat_interleave(self._groups_read_as_one(stored.spec.group_size), dim=1)
        moved = move_offsets(stored, delta, spec, "float32")
        merged = QuantizedLinear(moved, _copied(self.bias), dtype=base.weight.dtype, cache=base.cache)
        return merged.train(self.training)

    def _added(self, input: torch.Tensor) -> torch.Tensor:
        if not self.quantization_enabled:
            return super()._added(input)
        update = self._update()
        group_size = input.shape[-1] // update.shape[1]
        # The difference is 0, and has the gradient of U.
        through = self._rounded(update.detach()).to(update.dtype) + (update - update.detach())
        return functional.linear(_group_sums(input, group_size), through)

    def _update(self) -> torch.Tensor:
        """U for every group of the base, [out, in / group_size] in the adapter's dtype."""
        group_size = _group_size(self.base_layer)
        update = (self.lora_B @ self.lora_A) * self.scaling
        return update if group_size is None else update.repeat_interleave(self._groups_read_as_one(group_size), dim=1)

    def _rounded(self, update: torch.Tensor) -> torch.Tensor:
        """What rounded zero points add in place of `update`, float64; they are those of `move_offsets`."""
        scales, zero_points, highest = self._zero_points()
        moved = ((scales * zero_points - update.double()) / scales).round().clamp(0, highest)
        return scales * (zero_points - moved)

    def _zero_points(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Scales and zero points of the base in float64, and the highest code. Raises ValueError without them."""
        spec = self.base_layer.spec if isinstance(self.base_layer, QuantizedLinear) else None
        kind = None if spec is None else spec.zero_point_kind
        if spec is None or kind is None:
            raise ValueError("the base holds no integer codes: it has no zero points to round")
        if kind == "float":
            raise ValueError("the base has float offsets, which hold the update exactly: there is nothing to round")
        if kind == "none":
            raise ValueError("the base is symmetric: it has no zero points to round")
        integers = as_affine(spec)
        self._groups_read_as_one(integers.group_size)
        scales, zero_points = (self.base_layer.get_buffer(name).double() for name in ("scales", "zero_points"))
        return scales, zero_points, 2**integers.bits - 1

    def _groups_read_as_one(self, group_size: int) -> int:
        """How many groups of the base make one pooled group. Raises ValueError for a pooled group of broken groups."""
        pooled = self.lora.group_size
        if pooled % group_size:
            raise ValueError(f"pooled groups of {pooled} are not whole groups of {group_size} of the base")
        return pooled // group_size


def _group_size(base: nn.Module) -> int | None:
    """The group size of a base of integers; None for any other base."""
    return base.spec.group_size_or_none if isinstance(base, QuantizedLinear) else None


def _group_sums(input: torch.Tensor, group_size: int) -> torch.Tensor:
    """[..., in / group_size]: sums over neighbouring inputs."""
    groups = input.shape[-1] // group_size  # named: -1 could not tell it of an empty batch
    return input if group_size == 1 else input.reshape(*input.shape[:-1], groups, group_size).sum(-1)


def _copied(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach().clone()
