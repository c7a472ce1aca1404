"""Group-wise integer quantization compiled for a processor; bytes equal affine/reference.py.

The reference computes scales and offsets, a number or two a group, and decodes: torch decodes at the speed of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loftq_cli.triton_kernels.affine import reference as affine_reference
from loftq_cli.triton_kernels.cpu_kernels import encode_groups, min_max

dequantize = affine_reference.dequantize


def quantize(
    groups: torch.Tensor, bits: int, offset: str, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See affine/reference.py."""
    return affine_reference.quantize_as(_CompiledForm(bits, offset, scale_dtype), groups)


@dataclass(frozen=True, slots=True)
class _CompiledForm(affine_reference.Form):
    def extremes(self, piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ends = np.empty((2, len(piece)), np.float32)
        min_max(piece.numpy(), ends)
        lowest, highest = torch.from_numpy(ends)[:, :, None]
        return lowest, highest

    def encode(self, piece: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        codes = torch.empty(piece.shape, dtype=torch.uint8)
        scales, offsets = (constants.float().view(-1).numpy() for constants in (scale, offset))
        encode_groups(piece.numpy(), scales, offsets, self.offset == "float", 2**self.bits - 1, codes.numpy())
        return codes
