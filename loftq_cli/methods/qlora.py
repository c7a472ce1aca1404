"""QLoRA (Dettmers et al., arXiv 2305.14314): quantize once; the adapter adds nothing until it is trained."""

from __future__ import annotations

import torch

from loftq_cli.methods.method import Initialization, zero_adapter
from loftq_cli.metrics import relative
from loftq_cli.quant.formats import Quantizer
from loftq_cli.tensors import LoraSpec
from loftq_cli.triton_kernels.error_stats import error_stats


def initialize(
    weight: torch.Tensor,
    quantizer: Quantizer,
    lora: LoraSpec,
    *,
    iterations: int,
    svd: str,
    init: str | None,
    generator: torch.Generator,
) -> Initialization:
    """Q = quantize(W); lora_A uniform as PEFT draws it (Kaiming, a = √5: bound 1/√in), lora_B zero."""
    del iterations, svd, init
    quantized = quantizer.quantize(weight)
    sums = error_stats(weight, quantizer.dequantize(quantized))
    pair = zero_adapter(weight, lora, generator)
    return Initialization(quantized, pair, relative(sums.squared_error, sums.squared_weight), (), 0)
