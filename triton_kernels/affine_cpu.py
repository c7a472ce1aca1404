"""Group-wise integer quantization compiled for the processor; byte for byte what affine_reference.py computes.

The scales and offsets themselves, one or two numbers a group, are the reference's, and so is decoding, which torch does
as fast as the memory. Errors of what is decoded in half precision, which numba does not have, are the reference's too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loftq_cli.triton_kernels import affine_reference
from loftq_cli.triton_kernels.cpu_kernels import encode_groups, min_max, squared_errors

dequantize = affine_reference.dequantize


def quantize(
    groups: torch.Tensor, bits: int, offset: str, scale_dtype: torch.dtype, ranges: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See affine_reference.py."""
    return affine_reference.quantize_as(_CompiledForm(bits, offset, scale_dtype), groups, ranges)


@dataclass(frozen=True, slots=True)
class _CompiledForm(affine_reference.Form):
    def extremes(self, piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ends = np.empty((2, len(piece)), np.float32)
        min_max(piece.numpy(), ends)
        lowest, highest = torch.from_numpy(ends)[:, :, None]
        return lowest, highest

    def encode(self, piece: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        codes = torch.empty(piece.shape, dtype=torch.uint8)
        encode_groups(
            piece.numpy(), *self._constants(scale, offset), self.offset == "float", 2**self.bits - 1, codes.numpy()
        )
        return codes

    def squared_error(self, piece: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        is_float = self.offset == "float"
        if self.scale_dtype == torch.float16 and not is_float:
            return affine_reference.Form.squared_error(self, piece, ends)
        scale, offset = self.fit(ends)
        errors = np.empty(len(piece), np.float64)
        rounds = self.scale_dtype == torch.bfloat16 and not is_float
        squared_errors(piece.numpy(), *self._constants(scale, offset), is_float, rounds, 2**self.bits - 1, errors)
        return torch.from_numpy(errors)[:, None]

    @staticmethod
    def _constants(scale: torch.Tensor, offset: torch.Tensor) -> tuple[Any, Any]:
        return scale.float().reshape(-1).numpy(), offset.float().reshape(-1).numpy()
