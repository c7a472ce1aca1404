"""An existing linear becomes a quantized base and the factors of an adapter. Checks the linear; knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.methods.weighting import Weighting
from loftq_cli.nn.fake_quantized_linear import FakeQuantizedLinear
from loftq_cli.nn.quantized_linear import QuantizedLinear
from loftq_cli.nn.starts.layer_jobs import initialize, initialize_trainable
from loftq_cli.planning.jobs import LayerJob
from loftq_cli.runtime.workers import Workers
from loftq_cli.tensors.headers import WEIGHT_DTYPES
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import LoraSpec


@dataclass(frozen=True, slots=True)
class LinearStart:
    """The parts of an adapted linear.

    base_layer       QuantizedLinear, or FakeQuantizedLinear where the base trains
    lora_A, lora_B   the factors, in the shapes of LoraPair
    lora             rank, alpha and pooling
    """

    base_layer: nn.Linear
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    lora: LoraSpec


@dataclass(frozen=True, slots=True)
class LinearFacts:
    """A linear in three words: `shape` [out, in] and `dtype` ("bfloat16", ...) of the weight; `transposed` is True for
    a weight stored as [in, out].
    """

    shape: tuple[int, int]
    dtype: str
    transposed: bool


def is_conv1d(module: object) -> bool:
    """True if `module` is transformers' Conv1D, the linear of GPT-2, with a weight stored as [in, out].

    >>> is_conv1d(nn.Linear(2, 3))
    False
    """
    return isinstance(module, nn.Module) and hasattr(module, "nf") and type(module).__name__ == "Conv1D"


def check_linear(linear: object, name: str = "") -> LinearFacts:
    """The shape and the dtype of a linear with a quantizable weight; `name` is for messages.

    Raises UsageError for a module beside nn.Linear and Conv1D, for the linear inside MultiheadAttention, for a
    quantized or empty weight, and for a weight without memory.

    >>> check_linear(nn.Linear(2, 3))
    LinearFacts(shape=(3, 2), dtype='float32', transposed=False)
    """
    tensor = name or None
    if isinstance(linear, QuantizedLinear | FakeQuantizedLinear):
        message = f"{type(linear).__name__} is quantized already"
        raise UsageError(message, tensor=tensor, hint="start from the full-precision linear")
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        message = "the weight of this linear is read past its forward, as MultiheadAttention does"
        raise UsageError(message, tensor=tensor, hint="leave it out, or replace the attention by separate linears")
    if not (isinstance(linear, nn.Linear) or is_conv1d(linear)):
        message = f"{type(linear).__name__} is not a linear"
        raise UsageError(message, tensor=tensor, hint="an nn.Linear, or transformers' Conv1D")
    weight = cast(nn.Module, linear).weight
    if not isinstance(weight, torch.Tensor) or nn.parameter.is_lazy(weight):
        raise UsageError("the linear has no weight yet", tensor=tensor, hint="run one forward pass first")
    if weight.is_meta:
        hint = "give it memory and numbers first, as with to_empty and load_state_dict"
        raise UsageError("the weight is on the meta device", tensor=tensor, hint=hint)
    dtype = str(weight.dtype).removeprefix("torch.")
    if dtype not in WEIGHT_DTYPES:
        message = f"the weight is {dtype}, not floating point of 16 bits or more"
        raise UsageError(message, tensor=tensor, hint="start from the full-precision linear")
    transposed = is_conv1d(linear)
    if isinstance(linear, nn.Linear) and tuple(weight.shape) != (linear.out_features, linear.in_features):
        message = f"the weight is {tuple(weight.shape)}, and the linear has {linear.in_features} inputs and "
        message += f"{linear.out_features} outputs: the numbers are packed"
        raise UsageError(message, tensor=tensor, hint="start from the full-precision linear")
    rows, columns = weight.shape
    if 0 in (rows, columns):
        raise UsageError(f"the weight is empty: {rows} by {columns}", tensor=tensor, hint="leave this linear out")
    return LinearFacts((columns, rows) if transposed else (rows, columns), dtype, transposed)


def make_start(
    linear: nn.Module,
    job: LayerJob,
    workers: Workers,
    *,
    freeze_base: bool = True,
    cache: bool = False,
    weighting: Weighting | None = None,
) -> LinearStart:
    """Base and adapter of a linear after `check_linear`. The CPU computes both, so the numbers equal the numbers of
    `loftq quantize`. `linear` does not change.

    Raises NumericError or InputError, with the tensor's name, when the numbers cannot be quantized.

    >>> from loftq_cli.nn.starts.layer_jobs import layer_job, layer_recipe
    >>> from loftq_cli.runtime.workers import SERIAL
    >>> options = {"method": "qlora", "rank": 4}
    >>> job = layer_job(layer_recipe(options), "", (32, 64), "float32", transposed=False, is_container_named=False)
    >>> make_start(nn.Linear(64, 32), job, SERIAL).base_layer
    QuantizedLinear(in_features=64, out_features=32, bias=True, nf4, block 64)
    """
    weight = cast(torch.Tensor, linear.weight).detach()
    bias = None if linear.bias is None else cast(torch.Tensor, linear.bias).detach().clone()
    rows = TensorRows(weight.cpu(), job.matrix.transposed)
    base: nn.Linear
    try:
        if freeze_base:
            initial = initialize(job, rows, weighting, workers)
            pair = initial.lora
            base = QuantizedLinear(initial.quantized, bias, dtype=weight.dtype, cache=cache)
        else:
            start = initialize_trainable(job, rows, weighting, workers)
            pair = start.lora
            base = FakeQuantizedLinear(start.weight, bias, start.spec, start.dtype, start.scales)
    except LoftqError as error:
        if error.tensor or not job.name:
            raise
        raise type(error)(error.message, file=error.file, tensor=job.name, hint=error.hint) from None
    return LinearStart(base, pair.lora_A, pair.lora_B, job.lora)
