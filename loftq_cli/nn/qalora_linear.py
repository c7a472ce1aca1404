"""QA-LoRA's linear: the adapter reads sums over groups of inputs, and merges into the offsets of the base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self, Unpack

import torch
from torch import nn
from torch.nn import functional

from loftq_cli.errors import UsageError
from loftq_cli.nn.adapted_linear import AdaptedLinear, copy_bias, group_sums
from loftq_cli.nn.fake_quantized_linear import FakeQuantizedLinear
from loftq_cli.nn.loftq_linear import AffineKeywords
from loftq_cli.nn.quantized_linear import QuantizedLinear
from loftq_cli.quant.affine import move_offsets
from loftq_cli.quant.formats import FORMATS, as_affine, as_affine_tensor
from loftq_cli.tensors.metrics import group_delta


@dataclass(frozen=True, slots=True)
class QuantizationStats:
    """The effect of rounded zero points on the effective weight: mean and largest absolute difference over all weights,
    and the number of groups.
    """

    mean_error: float
    max_error: float
    groups: int


class QALoRALinear(AdaptedLinear):
    """QA-LoRA (arXiv 2309.14717): the adapter reads sums over groups of inputs. The update U [out, groups] = s·B·A then
    fits into the offsets of a quantized base.
    """

    _is_pooled = True
    _quantization_enabled = False

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int,
        bits: int,
        group_size: int,
        alpha: float | None = None,
        *,
        iterations: int | None = None,
        freeze_base: bool = True,
        fit: str | None = None,
        init: str | None = None,
        pooling: str | None = None,
        svd: str = "fast",
        rslora: bool = False,
        adapter_dtype: str = "float32",
        name: str = "",
        seed: int = 0,
        cache: bool = False,
        **options: Unpack[AffineKeywords],
    ) -> Self:
        """A QALoRALinear with the numbers of `loftq quantize --method qalora --quant-type intN` for the matrix.
        `linear` does not change.

        linear       nn.Linear, or transformers' Conv1D, with a weight [out, in] of 16 bits or more
        rank         columns of lora_B
        bits         bits of a code: 2, 3, 4 or 8
        group_size   neighbouring inputs with a common scale and zero point; the adapter reads the sum of the group
        alpha        the scaling is alpha / rank; None for rank
        init         "residual" (the adapter starts with the quantization error) or "standard" (the adapter adds
                     nothing, as in the paper); None for "residual"
        pooling      the convention of the pooled input: "peft", "paper" or "repo"; None for "peft"

        `LoftQLinear.from_linear` describes the remaining parameters; `fit` and `iterations` of None take the command
        line's defaults. Raises the errors of `LoftQLinear.from_linear`, and UsageError for bits without a format.

        >>> layer = QALoRALinear.from_linear(nn.Linear(128, 64), rank=4, bits=4, group_size=32)
        >>> layer.lora_A.shape, layer.lora_B.shape
        (torch.Size([4, 4]), torch.Size([64, 4]))
        >>> layer.merge()  # the adapter goes into the zero points
        QuantizedLinear(in_features=128, out_features=64, bias=True, int4, group 32)
        """
        formats = {row.bits: quant_type for quant_type, row in FORMATS.items() if row.is_affine}
        if type(bits) is not int or bits not in formats:
            allowed = ", ".join(map(str, sorted(formats)))
            raise UsageError(f"there are no integers of {bits!r} bits", hint=f"bits is one of {allowed}")
        recipe: dict[str, object] = {
            **options,
            "method": "qalora",
            "quant_type": formats[bits],
            "group_size": group_size,
            "rank": rank,
            "alpha": alpha,
            "iterations": iterations,
            "fit": fit,
            "init": init,
            "pooling": pooling,
            "svd": svd,
            "rslora": rslora,
            "adapter_dtype": adapter_dtype,
            "seed": seed,
        }
        return cls._from_linear(linear, recipe, name=name, freeze_base=freeze_base, cache=cache)

    @property
    def quantization_enabled(self) -> bool:
        """True if training sees the rounded zero points of `loftq merge --round-zeros`: zero' = round(zero − U / scale)
        in the range of the codes. The adapter gets the gradient of the unrounded U (straight-through); the gradient of
        the input sees the rounded weight.

        Off by default, because float offsets hold U exactly; off also suits a warm-up. Raises ValueError for True over
        a base without integer zero points.
        """
        return self._quantization_enabled

    @quantization_enabled.setter
    def quantization_enabled(self, enabled: bool) -> None:
        if enabled:
            self._zero_points()
        self._quantization_enabled = bool(enabled)

    def quantization_stats(self) -> QuantizationStats:
        """The distance of rounded zero points from the present effective weight, also with `quantization_enabled` off.

        Raises ValueError for a base without integer zero points.
        """
        update = self._update().detach()
        # Groups are of equal size, and the two weights have equal codes: differences of U are differences of weights.
        difference = (self._round_update(update) - update.double()).abs()
        return QuantizationStats(float(difference.mean()), float(difference.max()), difference.numel())

    def merge(self) -> nn.Linear:
        """A QuantizedLinear with the codes of the base and float32 offsets. The offsets hold the adapter exactly;
        `quantization_enabled` has no effect. An nn.Linear for a base without integer codes.

        Raises ValueError when adapter groups are not whole groups of the base.
        """
        base = self._quantized_base()
        if base is None or not base.spec.is_affine:
            return super().merge()
        stored = as_affine_tensor(base.quantized())
        spec = replace(stored.spec, symmetric=False, zero_point="float", scale_dtype="float32")
        delta = group_delta(self.pair()).repeat_interleave(self._groups_read_as_one(stored.spec.group_size), dim=1)
        quantized = move_offsets(stored, delta, spec, "float32")
        merged = QuantizedLinear(quantized, copy_bias(self.bias), dtype=base.weight.dtype, cache=base.cache)
        return merged.train(self.training)

    def _adapter_output(self, input: torch.Tensor) -> torch.Tensor:
        if not self.quantization_enabled:
            return super()._adapter_output(input)
        update = self._update()
        group_size = input.shape[-1] // update.shape[1]
        # The difference is 0, and has the gradient of U.
        through = self._round_update(update.detach()).to(update.dtype) + (update - update.detach())
        return functional.linear(group_sums(input, group_size), through)

    def _update(self) -> torch.Tensor:
        """U for every group of the base, [out, in / group_size] in the adapter's dtype."""
        base, group_size = self.base_layer, None
        if isinstance(base, QuantizedLinear | FakeQuantizedLinear):
            group_size = base.spec.group_size_or_none
        update = (self.lora_B @ self.lora_A) * self.scaling
        if group_size is None:
            return update
        return update.repeat_interleave(self._groups_read_as_one(group_size), dim=1)

    def _round_update(self, update: torch.Tensor) -> torch.Tensor:
        """float64 [out, groups]: the update by the rounded zero points of `move_offsets` in place of `update`."""
        scales, zero_points, highest = self._zero_points()
        rounded_zeros = ((scales * zero_points - update.double()) / scales).round().clamp(0, highest)
        return scales * (zero_points - rounded_zeros)

    def _zero_points(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Scales and zero points of the base, float64 [out, groups], and the highest code. Raises ValueError for a base
        without integer zero points.
        """
        base = self._quantized_base()
        kind = None if base is None else base.spec.zero_point_kind
        if base is None or kind is None:
            raise ValueError("the base holds no integer codes: it has no zero points to round")
        if kind == "float":
            raise ValueError("the base has float offsets, which hold the update exactly: there is nothing to round")
        if kind == "none":
            raise ValueError("the base is symmetric: it has no zero points to round")
        spec = as_affine(base.spec)
        self._groups_read_as_one(spec.group_size)
        scales, zero_points = (base.get_buffer(name).double() for name in ("scales", "zero_points"))
        return scales, zero_points, 2**spec.bits - 1

    def _quantized_base(self) -> QuantizedLinear | None:
        """The base with the present codes; None for a dense base."""
        base = self.base_layer
        if isinstance(base, FakeQuantizedLinear):
            return base.frozen()
        return base if isinstance(base, QuantizedLinear) else None

    def _groups_read_as_one(self, group_size: int) -> int:
        """The number of groups of the base in a pooled group. Raises ValueError for pooled groups of broken groups."""
        pooled = self.lora.group_size
        if pooled % group_size:
            raise ValueError(f"pooled groups of {pooled} are not whole groups of {group_size} of the base")
        return pooled // group_size
