"""What transformers, PEFT and bitsandbytes make of a converted directory: the model, what they said, its weights."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import bitsandbytes
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from loftq_cli.conversion.run import Outcome

transformers.utils.logging.disable_progress_bar()

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Loaded:
    """A converted directory in memory. `info` is transformers' account of the load, `said` are all warnings."""

    output: Path
    adapter: Path
    model: nn.Module
    peft: PeftModel
    info: dict[str, Any]
    said: list[str] = field(default_factory=list)

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.output / "loftq_report.json").read_text())

    @property
    def modules(self) -> dict[str, nn.Module]:
        """PEFT's layer for each module that the report names."""
        return {layer["module"]: self.model.get_submodule(layer["module"]) for layer in self.report["layers"]}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the base's files, read by safetensors."""
        return {k: v for path in sorted(self.output.glob("*.safetensors")) for k, v in load_file(path).items()}

    @property
    def adapter_tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.adapter / "adapter_model.safetensors")


def load(outcome: Outcome, auto: str) -> Loaded:
    """The base with the class called `auto`, then its adapter, ready for training."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, info = getattr(transformers, auto).from_pretrained(outcome.output, output_loading_info=True)
            folder = outcome.adapter.relative_to(outcome.output).as_posix()
            peft = PeftModel.from_pretrained(model, outcome.output, subfolder=folder, is_trainable=True)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    said += [str(warning.message) for warning in caught if not issubclass(warning.category, FutureWarning)]
    keep_trainable(model)  # loading is over here, and changed nothing
    return Loaded(outcome.output, outcome.adapter, model, peft, info, said)


def keep_trainable(model: ModelT) -> ModelT:
    """Keep the 4-bit layers as they were loaded, in place. On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a layer
    in its first evaluation, then decodes the layer wrongly, and gives no gradient through the layer.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def matrix(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear [out, in], decoded by bitsandbytes where it is 4-bit, in its dtype."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


def matrix_of_lora(layer: Any) -> torch.Tensor:
    """What PEFT adds to the weight of one of its layers, as [out, in] in float64: its own factors and scaling."""
    product = layer.lora_B["default"].weight.detach().double() @ layer.lora_A["default"].weight.detach().double()
    return layer.scaling["default"] * product


def peft_delta(layer: Any) -> torch.Tensor:
    """The same as PEFT itself computes it."""
    computed = layer.get_delta_weight("default").detach()
    return computed.T if isinstance(layer.base_layer, Conv1D) else computed


def relative_error(weight: torch.Tensor, approximation: torch.Tensor) -> float:
    """||weight − approximation|| / ||weight|| in float64."""
    weight = weight.double()
    return float((weight - approximation.double()).norm() / weight.norm())
