"""QLoRA (Dettmers et al., arXiv 2305.14314): quantize once; the adapter adds nothing until it is trained."""

from __future__ import annotations

import math

import torch

from loftq_cli.methods.method import Initialization
from loftq_cli.metrics import relative
from loftq_cli.quant.formats import Quantizer
from loftq_cli.tensors import LoraPair, LoraSpec
from loftq_cli.triton_kernels.error_stats import error_stats


def initialize(
    weight: torch.Tensor,
    quantizer: Quantizer,
    lora: LoraSpec,
    *,
    iterations: int,
    svd: str,
    generator: torch.Generator,
) -> Initialization:
    """Q = quantize(W); lora_A uniform as PEFT draws it (Kaiming, a = √5: bound 1/√in), lora_B zero."""
    del iterations, svd
    quantized = quantizer.quantize(weight)
    sums = error_stats(weight, quantizer.dequantize(quantized))
    out_features, in_features = weight.shape
    bound = 1.0 / math.sqrt(in_features)
    dtype = getattr(torch, lora.dtype)
    lora_A = torch.empty(lora.rank, in_features).uniform_(-bound, bound, generator=generator)
    pair = LoraPair(lora_A.to(dtype), torch.zeros(out_features, lora.rank, dtype=dtype), lora.scaling)
    return Initialization(quantized, pair, relative(sums.squared_error, sums.squared_weight), (), 0)
