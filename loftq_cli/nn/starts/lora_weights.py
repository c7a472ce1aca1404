"""The fitted start of LoftQ for a model wrapped by PEFT over a 4-bit base: the codes of the base stay, and each adapter
becomes the best adapter of the quantization error.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn

from loftq_cli.errors import MismatchError
from loftq_cli.methods.loftq import fit_adapter
from loftq_cli.methods.lowrank import make_solver
from loftq_cli.nn.starts.layer_jobs import check_solver, computing
from loftq_cli.nn.starts.original_weights import Original, open_original
from loftq_cli.nn.starts.peft_layers import PeftLayer, peft_layers
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.runtime.workers import Workers
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import LoraSpec

Model = TypeVar("Model", bound=nn.Module)


def replace_lora_weights(
    peft_model: Model,
    original: Original,
    *,
    adapter_name: str | None = None,
    svd: str = "exact",
    threads: int | None = None,
) -> Model:
    """Fit the LoRA factors of `peft_model` over 4-bit linears to the quantization error, in place: s·B·A becomes the
    best rank-r approximation of W − dequant(Q), with PEFT's scaling s (first iteration of LoftQ, arXiv 2310.08659).
    Returns `peft_model`. The base and all further adapters do not change.

    peft_model    a model wrapped by PEFT over Linear4bit of bitsandbytes, or over QuantizedLinear
    original      the weights W before quantization, each [out, in] floating point: the path of the full-precision
                  checkpoint, the model in memory, a mapping from module or tensor names to tensors (a state_dict), or a
                  function from a module name to a tensor. The names are the names before PEFT wrapped the model.
    adapter_name  the adapter to fit, the active adapter by default
    svd           the low-rank solver: "exact", "faithful" or "fast"
    threads       the number of available processors by default

    The function reads one weight at a time, and changes nothing before every layer is fitted. An adapter over a linear
    in full precision does not change, because the linear has no quantization error.
    PEFT's replace_lora_weights_loftq forgets the scaling: for alpha = 2 · rank the correction is twice too large.

    Raises UsageError for a model without LoRA layers over 4-bit linears, an unknown or merged adapter, DoRA and further
    variants of LoRA, and a rank above min(out, in); MismatchError for an original with a missing weight, another shape,
    or numbers of another model; InputError for NaN or infinite weights, and for a quantized original.

    >>> from peft import LoraConfig, get_peft_model
    >>> from loftq_cli.nn import QLoRALinear
    >>> linear = nn.Linear(64, 32)
    >>> base = nn.Sequential(QLoRALinear.from_linear(linear, rank=1).base_layer)
    >>> model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    >>> model = replace_lora_weights(model, {"0": linear.weight})
    >>> bool(model.base_model.model[0].lora_B["default"].weight.any())
    True
    """
    check_solver(svd)
    layers = peft_layers(peft_model, adapter_name)
    work = sum(math.prod(layer.shape) for layer in layers)
    with open_original(original) as weights, computing(work, threads) as workers:
        for layer in layers:
            weights.check(layer.name, layer.shape)
        pairs = [_fit(layer, weights.load(layer.name, layer.shape), svd, workers) for layer in layers]
    for layer, pair in zip(layers, pairs, strict=True):
        layer.replace(pair.lora_A, pair.lora_B)
    return peft_model


def _fit(layer: PeftLayer, weight: torch.Tensor, svd: str, workers: Workers) -> LoraPair:
    """The adapter of W − dequant(Q), float32. Raises MismatchError for a weight of another model than the base."""
    quantized, rows, residual = layer.quantized(), TensorRows(weight), torch.empty(layer.shape, dtype=torch.float32)
    squared = make_quantizer(quantized.spec, quantized.dtype).residual(rows, quantized, residual, workers=workers)
    _check_residual(layer.name, squared, float(weight.double().square().sum()))
    solve = make_solver(svd, layer.rank, layer.shape, torch.Generator().manual_seed(0), workers)
    pair, _ = fit_adapter(residual, LoraSpec(layer.rank, layer.scaling * layer.rank), solve)
    return pair


def _check_residual(name: str, squared: float, squared_weight: float) -> None:
    if squared == 0.0:
        message = "original equals what the base decodes to: nothing was lost that an adapter could hold"
        raise MismatchError(message, tensor=name, hint="name the full-precision checkpoint, not a dequantized one")
    # Unrelated weights differ by √2 of the norm; 2 bits lose half of the norm.
    if not squared < squared_weight:
        message = "original is not what the base was quantized from: both differ by more than the weight itself"
        raise MismatchError(message, tensor=name, hint="name the checkpoint of the base")
