"""The decoded values as an ordinary checkpoint in the model's own dtype: for loaders that know no quantization.

The numbers are those that the 4-bit container decodes to; what is saved is nothing on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loftq_cli.layouts.layout import SMALLER_GROUPS, Fit, ModelFacts, StoredMatrix
from loftq_cli.quant.formats import QuantizedTensor, QuantSpec, make_quantizer
from loftq_cli.tensors.headers import OutTensor
from loftq_cli.tensors.specs import AffineSpec

if TYPE_CHECKING:
    import torch

QUANTIZED_ON_DISK = False


def fit(spec: QuantSpec, shape: tuple[int, int], *, transposed: bool) -> Fit:
    """Every shape that has whole groups: a loader sees plain numbers."""
    del transposed
    if isinstance(spec, AffineSpec) and shape[1] % spec.group_size:
        return Fit(None, f"rows of {shape[1]} are not whole groups of {spec.group_size}", SMALLER_GROUPS)
    return Fit(spec)


def planned(matrix: StoredMatrix) -> tuple[OutTensor, ...]:
    """One tensor, in the orientation of the source."""
    shape = matrix.shape[::-1] if matrix.transposed else matrix.shape
    return (OutTensor(matrix.name, matrix.dtype, shape),)


def pack(matrix: StoredMatrix, quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The decoded matrix in its dtype."""
    import torch

    values = make_quantizer(quantized.spec, quantized.dtype).dequantize(quantized)
    values = values.to(getattr(torch, matrix.dtype))
    return {matrix.name: (values.T if matrix.transposed else values).contiguous()}


def model_config(config: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
    """The source's config as it is."""
    del facts
    return dict(config)
