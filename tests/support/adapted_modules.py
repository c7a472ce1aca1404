"""Quantized linears with adapters of every method, and the float64 formulas of what they compute."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional
import torch
from torch import nn

from loftq_cli.nn import LoftQLinear, QALoRALinear, QLoRALinear
from loftq_cli.quant.formats import FORMATS, make_quantizer
from loftq_cli.tensors.matrices import CodebookTensor, NestedAbsmax
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec, LoraSpec, Pooling

OUT, IN, RANK, POOL = 48, 128, 4, 32
ALPHA = 6.0
SCALING = 1.5  # alpha / rank


# What PEFT, the paper and its code read of a group of 32 of 128 inputs, by definition.
POOLED = {
    "peft": lambda groups: groups.mean(-1) * 4,
    "paper": lambda groups: groups.sum(-1),
    "repo": lambda groups: groups.mean(-1),
}
KINDS = ["loftq", "qlora", *POOLED]
CLASSES = {"loftq": LoftQLinear, "qlora": QLoRALinear}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spec_of(quant_type: str, *, symmetric: bool = False, zero_point: str = "int", group_size: int = POOL) -> Any:
    if quant_type == "nf4":
        return CodebookSpec()
    return AffineSpec(FORMATS[quant_type].bits, group_size, symmetric, zero_point)


def quantize(weight: torch.Tensor, spec: Any, dtype: str = "float32") -> Any:
    return make_quantizer(spec, dtype).quantize(TensorRows(weight))


def quantized(quant_type: str = "int4", dtype: str = "float32", **spec: Any) -> Any:
    return quantize(random(OUT, IN, seed=1) * 0.1, spec_of(quant_type, **spec), dtype)


def decoded(tensor: Any) -> torch.Tensor:
    """The weight that the stored numbers mean, in float64, by the definition of the formats."""
    if not isinstance(tensor, CodebookTensor):
        scales = tensor.scales.double().repeat_interleave(tensor.spec.group_size, 1)
        if tensor.biases is not None:
            return tensor.codes.double() * scales + tensor.biases.double().repeat_interleave(tensor.spec.group_size, 1)
        middle = torch.full(tensor.scales.shape, 2.0 ** (tensor.spec.bits - 1))
        zero_points = middle if tensor.zero_points is None else tensor.zero_points
        return (tensor.codes.double() - zero_points.double().repeat_interleave(tensor.spec.group_size, 1)) * scales
    nested = tensor.absmax
    assert isinstance(nested, NestedAbsmax)
    absmax = nested.code_map[nested.codes.long()].double()
    absmax = absmax * nested.absmax.double().repeat_interleave(256)[: len(absmax)] + nested.offset.double()
    table = bitsandbytes.functional.get_4bit_type("nf4", device="cpu").double()
    values = table[torch.stack([tensor.packed >> 4, tensor.packed & 15], 1).long().flatten()]
    return (values * absmax.repeat_interleave(64)).view(tensor.shape)


def adapted(
    kind: str, base: nn.Linear, *, dtype: torch.dtype = torch.float32, pool: int = POOL, size: float = 0.1
) -> Any:
    """The module of a method over `base`, with random factors."""
    pooling = Pooling(kind, pool) if kind in POOLED else None
    lora = LoraSpec(RANK, ALPHA, dtype=str(dtype).removeprefix("torch."), pooling=pooling)
    lora_A = random(RANK, IN // lora.group_size, seed=2, dtype=dtype) * size
    lora_B = random(OUT, RANK, seed=3, dtype=dtype) * size
    return CLASSES.get(kind, QALoRALinear)(base, lora_A, lora_B, lora)


def added(kind: str, x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, pool: int = POOL) -> torch.Tensor:
    """s·B·A·x by the definition of each method."""
    read = POOLED[kind](x.unflatten(-1, (-1, pool))) if kind in POOLED else x
    return SCALING * (read @ lora_A.T @ lora_B.T)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """`tolerance` is a share of the largest expected value: sums of many terms, some of which nearly cancel."""
    assert found.shape == expected.shape
    assert float((found.detach().double() - expected.detach().double()).abs().max()) <= tolerance * float(
        expected.detach().abs().max()
    )
