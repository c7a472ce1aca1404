"""LoRA layers of PEFT over a quantized linear, found in a model, and the codes of the linear.

Modules of PEFT (0.21) are recognized by attributes, modules of bitsandbytes by the form of the state: nothing is
imported.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq_cli.errors import UsageError
from loftq_cli.layouts.bitsandbytes import LAYOUT
from loftq_cli.layouts.stored_tensors import StoredTensors
from loftq_cli.nn.quantized_linear import QuantizedLinear
from loftq_cli.quant.formats import QuantizedTensor
from loftq_cli.tensors.headers import TensorRef

_PREFIX = "base_model.model."  # PeftModel puts the words before the names of modules
_IN_MEMORY = Path("the model")
_PLAIN = "make the adapter with a plain LoraConfig"


@dataclass(frozen=True, slots=True)
class PeftLayer:
    """An adapter of a PEFT layer over a quantized linear of `shape` [out, in].

    name            of the linear in the model before PEFT wrapped the model
    lora_A, lora_B  Parameters [rank, in] and [out, rank]
    scaling         PEFT's factor for B·A
    """

    name: str
    base: nn.Module
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    shape: tuple[int, int]

    @property
    def rank(self) -> int:
        """Rows of lora_A."""
        return self.lora_A.shape[0]

    def quantized(self) -> QuantizedTensor:
        """The codes and constants of the base, on the CPU."""
        if not isinstance(self.base, QuantizedLinear):
            return _of_bitsandbytes(self.base, self.name)
        on_cpu = self.base if self.base.weight.device.type == "cpu" else copy.deepcopy(self.base).to("cpu")
        return on_cpu.quantized()

    def replace(self, lora_A: torch.Tensor, lora_B: torch.Tensor) -> None:
        """Copy the factors into the Parameters. Dtypes and devices of the Parameters stay."""
        with torch.no_grad():
            self.lora_A.copy_(lora_A)
            self.lora_B.copy_(lora_B)


def peft_layers(model: nn.Module, adapter_name: str | None) -> list[PeftLayer]:
    """The layers of an adapter over quantized linears; `adapter_name` of None is the active adapter.

    Raises UsageError for a model without LoRA layers over quantized linears, and for an adapter in a merged state, on
    the meta device, of a variant of LoRA, or of a rank above min(out, in).
    """
    wrapped: dict[str, Any] = {name: module for name, module in model.named_modules() if _is_lora_layer(module)}
    if not wrapped:
        raise UsageError("the model has no LoRA layer of PEFT", hint="wrap it with peft.get_peft_model first")
    adapter = adapter_name or _active_adapter(wrapped)
    names = sorted({name for module in wrapped.values() for name in module.lora_A})
    if adapter not in names:
        raise UsageError(
            f"the model has no LoRA adapter {adapter!r}", hint=f"adapter_name is one of {', '.join(names)}"
        )
    layers = [
        _layer(name.removeprefix(_PREFIX), module, adapter)
        for name, module in wrapped.items()
        if adapter in module.lora_A and _is_quantized(module.get_base_layer())
    ]
    if not layers:
        message = f"adapter {adapter!r} has no layer over a 4-bit linear"
        raise UsageError(message, hint="load the base with BitsAndBytesConfig(load_in_4bit=True), or use attach")
    return layers


def _is_lora_layer(module: nn.Module) -> bool:
    has_parts = all(hasattr(module, name) for name in ("base_layer", "lora_A", "lora_B", "scaling"))
    return has_parts and isinstance(module.lora_A, nn.ModuleDict)


def _active_adapter(wrapped: Mapping[str, Any]) -> str:
    names = sorted({name for module in wrapped.values() for name in module.active_adapters})
    if len(names) != 1:
        first = names[0] if names else "default"
        raise UsageError(f"{len(names)} adapters are active", hint=f"name the adapter, as adapter_name={first!r}")
    return str(names[0])


def _is_quantized(base: Any) -> bool:
    return isinstance(base, QuantizedLinear) or hasattr(base.weight, "quant_state")


def _layer(name: str, module: Any, adapter: str) -> PeftLayer:
    _check_kind(name, module, adapter)
    base = module.get_base_layer()
    lora_A, lora_B, shape = module.lora_A[adapter].weight, module.lora_B[adapter].weight, _shape_of(base, name)
    layer = PeftLayer(name, base, lora_A, lora_B, float(module.scaling[adapter]), shape)
    if lora_A.is_meta or lora_B.is_meta:
        raise UsageError("has factors on the meta device", tensor=name, hint="load the adapter's weights first")
    if (lora_B.shape[0], lora_A.shape[1]) != shape:
        message = f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit a linear of {shape}"
        raise UsageError(message, tensor=name, hint=_PLAIN)
    if layer.rank > min(shape):
        message = f"rank {layer.rank} is more than the matrix has ({shape[0]} by {shape[1]})"
        raise UsageError(message, tensor=name, hint=f"LoraConfig(r={min(shape)}) or less")
    if not (math.isfinite(layer.scaling) and layer.scaling > 0):
        message = f"has the scaling {layer.scaling:g}, which no factors can be fitted to"
        raise UsageError(message, tensor=name, hint="LoraConfig(lora_alpha=...) above 0")
    return layer


def _check_kind(name: str, module: Any, adapter: str) -> None:
    if module.merged:
        raise UsageError("has a merged adapter", tensor=name, hint="call unmerge_adapter first")
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if variant is not None or adapter in getattr(module, "lora_magnitude_vector", {}):
        kind = "DoRA" if variant is None else type(variant).__name__
        raise UsageError(f"has an adapter of {kind}, whose start is not that of LoRA", tensor=name, hint=_PLAIN)


def _shape_of(base: Any, name: str) -> tuple[int, int]:
    if isinstance(base, QuantizedLinear):
        return base.out_features, base.in_features
    state = base.weight.quant_state
    if state is None:
        hint = "move the model to its device first: bitsandbytes quantizes then"
        raise UsageError("its weight is not quantized yet", tensor=name, hint=hint)
    # A pass in evaluation mode rounds the constants for good on processors with bfloat16 products (0.50).
    if getattr(state, "packing_format_for_cpu", False) or state.absmax.dtype not in (torch.float32, torch.uint8):
        message = "bitsandbytes has rounded the constants of its weight to bfloat16, in a pass in evaluation mode"
        raise UsageError(message, tensor=name, hint="load the base anew, and replace the weights before the first pass")
    rows, columns = state.shape
    return int(rows), int(columns)


def _of_bitsandbytes(base: nn.Module, name: str) -> QuantizedTensor:
    """The weight of a Linear4bit, read as the container on disk: a module's state_dict has the container's tensors."""
    tensors = {
        f"{name}.{key}": value.detach().cpu()
        for key, value in base.state_dict().items()
        if isinstance(value, torch.Tensor) and key.startswith("weight")
    }
    weight = f"{name}.weight"
    tensors[weight] = tensors[weight].contiguous().view(torch.uint8).view(-1, 1)  # quant_storage may be another dtype
    refs = {
        key: TensorRef(key, str(value.dtype).removeprefix("torch."), tuple(value.shape), _IN_MEMORY)
        for key, value in tensors.items()
    }
    stored = StoredTensors(
        refs=refs,
        config={},
        dtype="float32",
        load=tensors.__getitem__,
        load_rows=lambda key, first, last: tensors[key][first:last],
        raw=lambda key: tensors[key].numpy().tobytes(),
        path=_IN_MEMORY,
    )
    return LAYOUT.unpack(LAYOUT.stored_matrix(weight, stored, transposed=False), stored)
