"""QLoRA (Dettmers et al., arXiv 2305.14314): quantize once; the adapter adds nothing before training."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loftq_cli.methods.alternation import refine_alone
from loftq_cli.methods.method import Fitting, Initialization, zero_adapter
from loftq_cli.methods.weighting import Weighting
from loftq_cli.quant.formats import Quantizer
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.rows import Rows
from loftq_cli.tensors.specs import LoraSpec


def initialize(
    weight: Rows,
    quantizer: Quantizer,
    lora: LoraSpec,
    fitting: Fitting,
    *,
    generator: torch.Generator,
    weighting: Weighting | None = None,
    sink: Callable[[slice, torch.Tensor], None] | None = None,
    workers: Workers = SERIAL,
) -> Initialization:
    """Q = quantize(W) of W [out, in]; lora_A [r, in] is uniform as PEFT draws lora_A (Kaiming, a = √5: bound 1/√in),
    lora_B [out, r] is zero. Given a `weighting`, `fitting.rounds` rounds refine codes and constants: rounds lower the
    error of the layer's outputs. Given a `sink`, codes go to `sink` and the result has no codes.
    """
    quantized = quantizer.quantize(weight, sink=sink, workers=workers)
    adapter = zero_adapter(weight, lora, generator)
    if weighting is None:
        return Initialization(quantized, adapter)
    return refine_alone(weight, quantizer, quantized, adapter, fitting, weighting, workers)
