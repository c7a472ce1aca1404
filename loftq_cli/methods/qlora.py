"""QLoRA (Dettmers et al., arXiv 2305.14314): quantize once; the adapter adds nothing until it is trained."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loftq_cli.methods.method import Initialization, zero_adapter
from loftq_cli.quant.formats import Quantizer
from loftq_cli.rows import Rows
from loftq_cli.tensors import LoraSpec
from loftq_cli.workers import SERIAL, Workers


def initialize(
    weight: Rows,
    quantizer: Quantizer,
    lora: LoraSpec,
    *,
    iterations: int,
    svd: str,
    init: str | None,
    generator: torch.Generator,
    sink: Callable[[slice, torch.Tensor], None] | None = None,
    workers: Workers = SERIAL,
) -> Initialization:
    """Q = quantize(W); lora_A uniform as PEFT draws it (Kaiming, a = √5: bound 1/√in), lora_B zero."""
    del iterations, svd, init
    quantized = quantizer.quantize(weight, sink=sink, workers=workers)
    return Initialization(quantized, zero_adapter(weight, lora, generator))
