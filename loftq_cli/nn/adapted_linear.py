"""A linear and a trainable adapter, for every method. Knows no files and no models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from loftq_cli.errors import UsageError
from loftq_cli.nn.fake_quantized_linear import FakeQuantizedLinear
from loftq_cli.nn.quantized_linear import QuantizedLinear, dense_linear
from loftq_cli.nn.read_only_weight import ReadOnlyWeight
from loftq_cli.nn.starts.layer_jobs import computing, count_work, layer_job, layer_recipe
from loftq_cli.nn.starts.linear_start import LinearStart, check_linear, make_start
from loftq_cli.nn.starts.option_types import python_remedies
from loftq_cli.tensors.matrices import LoraPair, lora_pair
from loftq_cli.tensors.metrics import adapter_delta
from loftq_cli.tensors.specs import LoraSpec


@dataclass(frozen=True, slots=True)
class Origin:
    """The source of an adapter, and the records for the copy of `save_adapter`.

    base         the directory of the base
    config       adapter_config.json
    provenance   the record of the adapter's base, or None
    """

    base: Path | None
    config: Mapping[str, Any]
    provenance: Mapping[str, Any] | None


class AdaptedLinear(nn.Module):
    """A linear and a trainable adapter: y = base(x) + s·B·A·x, where A reads x, or the sums of x over groups.

    base_layer       a frozen QuantizedLinear or nn.Linear, or a trainable FakeQuantizedLinear
    lora_A, lora_B   Parameters [rank, in / group_size] and [out, rank]; the adapter computes in the factors' dtype
    lora             rank, alpha and pooling
    scaling          s, with the pooling's factor
    origin           the source of a loaded adapter, or None
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
        """Copies the factors. Raises ValueError for factors unfit for the base or `lora`."""
        super().__init__()
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        inputs = self.in_features // lora.group_size
        if (lora.pooling is not None) != self._is_pooled:
            kind = "a pooled adapter" if self._is_pooled else "an adapter that is not pooled"
            raise ValueError(f"{type(self).__name__} is for {kind}")
        if lora_A.shape != (lora.rank, inputs) or inputs * lora.group_size != self.in_features:
            raise ValueError(f"lora_A {tuple(lora_A.shape)} does not read {self.in_features} inputs")
        if lora_B.shape != (self.out_features, lora.rank):
            raise ValueError(f"lora_B {tuple(lora_B.shape)} does not give {self.out_features} outputs")
        trains = isinstance(base_layer, FakeQuantizedLinear)
        self.base_layer: nn.Linear = base_layer if trains else base_layer.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone())
        self.lora, self.origin = lora, origin
        self.scaling = lora_pair(lora_A, lora_B, lora.scaling, lora.pooling).scaling
        self._start = (lora_A.detach().clone(), lora_B.detach().clone())

    @classmethod
    def of_start(cls, start: LinearStart, linear: nn.Module, origin: Origin | None = None) -> Self:
        """The module of a start from `make_start`, on the device and in the mode of `linear`."""
        layer = cls(start.base_layer, start.lora_A, start.lora_B, start.lora, origin=origin)
        return layer.to(next(linear.parameters()).device).train(linear.training)

    @classmethod
    def _from_linear(
        cls, linear: nn.Module, options: Mapping[str, Any], *, name: str, freeze_base: bool, cache: bool
    ) -> Self:
        """See `LoftQLinear.from_linear`; `options` are fields of a recipe, the method included."""
        with python_remedies():
            if cache and not freeze_base:
                message = "cache means nothing with freeze_base=False: the weight changes with every step"
                raise UsageError(message, hint="leave cache out")
            recipe, facts = layer_recipe(options), check_linear(linear, name)
            tensor = f"{name}.weight" if name and not name.endswith(".weight") else name
            job = layer_job(
                recipe,
                tensor,
                facts.shape,
                facts.dtype,
                transposed=facts.transposed,
                is_container_named=options.get("layout") is not None,
            )
            with computing(count_work(job)) as workers:
                return cls.of_start(make_start(linear, job, workers, freeze_base=freeze_base, cache=cache), linear)

    @property
    def weight(self) -> torch.Tensor:
        """The present dequant(Q) + s·B·A [out, in], without a gradient, for reading like `QuantizedLinear.weight`."""
        like = self.base_layer.weight
        shape = (self.out_features, self.in_features)
        return ReadOnlyWeight(lambda: self._merge_weight().to(like.dtype), shape, like.dtype, like.device)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias [out] of the base, or None."""
        return self.base_layer.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., out] of [..., in], in the dtype of `input`."""
        output: torch.Tensor = self.base_layer(input)
        return output + self._adapter_output(input.to(self.lora_A.dtype)).to(output.dtype)

    def reset(self) -> None:
        """Set lora_A and lora_B back to the factors of the start. A trainable base keeps the trained weight."""
        with torch.no_grad():
            for parameter, start in zip((self.lora_A, self.lora_B), self._start, strict=True):
                parameter.copy_(start)

    def freeze_base(self) -> Self:
        """Turn a trainable base into a QuantizedLinear with the codes of the trained weight, in place. Returns the
        module. A frozen base does not change.

        Raises NumericError for a weight with NaN or infinite values.
        """
        if isinstance(self.base_layer, FakeQuantizedLinear):
            self.base_layer = self.base_layer.frozen()
        return self

    def merge(self) -> nn.Linear:
        """A frozen nn.Linear with dequant(Q) + s·B·A, added in float32 and rounded to the dtype of `weight`."""
        dtype = self.base_layer.weight.dtype
        return dense_linear(self._merge_weight().to(dtype), copy_bias(self.bias)).train(self.training)

    def extra_repr(self) -> str:
        """The adapter's rank and scaling."""
        return f"rank={self.lora.rank}, scaling={self.scaling:g}"

    def _adapter_output(self, input: torch.Tensor) -> torch.Tensor:
        """s·B·A·x [..., out] of [..., in] in the adapter's dtype."""
        read = group_sums(input, self.lora.group_size)
        return functional.linear(functional.linear(read, self.lora_A), self.lora_B) * self.scaling

    def pair(self) -> LoraPair:
        """The present factors with the scaling, without gradients."""
        return LoraPair(self.lora_A.detach(), self.lora_B.detach(), self.scaling, self.lora.group_size)

    def _merge_weight(self) -> torch.Tensor:
        base = self.base_layer
        if isinstance(base, QuantizedLinear | FakeQuantizedLinear):
            weight = base.dequantized()
        else:
            weight = base.weight.detach().float()
        return adapter_delta(self.pair()).add_(weight)


def group_sums(input: torch.Tensor, group_size: int) -> torch.Tensor:
    """[..., in / group_size] of [..., in]: sums over groups of neighbouring inputs.

    >>> group_sums(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), group_size=2)
    tensor([[3., 7.]])
    """
    groups = input.shape[-1] // group_size  # -1 would be ambiguous for an empty batch
    return input if group_size == 1 else input.reshape(*input.shape[:-1], groups, group_size).sum(-1)


def copy_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach().clone()
