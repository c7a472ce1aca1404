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
from loftq_cli.triton_kernels.cpu_compiler import kernel, round_bfloat16

dequantize = affine_reference.dequantize


def quantize(
    groups: torch.Tensor, bits: int, offset: str, scale_dtype: torch.dtype, ranges: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See affine_reference.py."""
    return affine_reference.quantize_as(_CompiledForm(bits, offset, scale_dtype), groups, ranges)


@dataclass(frozen=True, slots=True)
class _CompiledForm(affine_reference.Form):
    def min_max(self, piece: torch.Tensor) -> torch.Tensor:
        ends = np.empty((2, len(piece)), np.float32)
        _min_max(piece.numpy(), ends)
        lowest, highest = torch.from_numpy(ends)[:, :, None]
        if self.offset == "float":
            return torch.stack((lowest, highest))
        lowest, highest = lowest.clamp(max=0.0), highest.clamp(min=0.0)
        return torch.maximum(-lowest, highest)[None] if self.offset == "none" else torch.stack((lowest, highest))

    def encode(self, piece: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        codes = torch.empty(piece.shape, dtype=torch.uint8)
        _encode(piece.numpy(), *self._constants(scale, offset), self.offset == "float", 2**self.bits - 1, codes.numpy())
        return codes

    def squared_error(self, piece: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        scale, offset = self.fit(ends)
        is_float = self.offset == "float"
        if self.scale_dtype == torch.float16 and not is_float:
            codes = self.encode(piece, scale, offset)
            decoded = affine_reference.decode(codes, scale, offset, is_bias=False)
            return (piece - decoded).square_().sum(1, keepdim=True, dtype=torch.float64)
        errors = np.empty(len(piece), np.float64)
        rounds = self.scale_dtype == torch.bfloat16 and not is_float
        _errors(piece.numpy(), *self._constants(scale, offset), is_float, rounds, 2**self.bits - 1, errors)
        return torch.from_numpy(errors)[:, None]

    @staticmethod
    def _constants(scale: torch.Tensor, offset: torch.Tensor) -> tuple[Any, Any]:
        return scale.float().reshape(-1).numpy(), offset.float().reshape(-1).numpy()


@kernel()
def _min_max(groups: Any, ends: Any) -> None:
    for row in range(groups.shape[0]):
        lowest, highest = _least(groups[row]), _greatest(groups[row])
        ends[0, row], ends[1, row] = lowest, highest


@kernel()
def _least(group: Any) -> Any:
    """NaN where there is one."""
    least, has_nan = group[0], False
    for i in range(group.size):
        least = group[i] if group[i] < least else least
        has_nan |= group[i] != group[i]
    return np.float32(np.nan) if has_nan else least


@kernel()
def _greatest(group: Any) -> Any:
    """NaN where there is one."""
    greatest, has_nan = group[0], False
    for i in range(group.size):
        greatest = group[i] if group[i] > greatest else greatest
        has_nan |= group[i] != group[i]
    return np.float32(np.nan) if has_nan else greatest


@kernel()
def _steps(group: Any, scale: Any, offset: Any, is_float: bool, top: Any, steps: Any) -> None:
    """The codes of a group as float32."""
    zero = np.float32(0.0)
    if is_float:
        for i in range(group.size):
            x = np.rint((group[i] - offset) / scale)
            x = x if abs(x) < np.float32(np.inf) else zero  # NaN is not less either
            steps[i] = min(max(x, zero), top)
    else:
        for i in range(group.size):
            x = np.rint(group[i] / scale)
            x = (x if x == x else zero) + offset
            steps[i] = min(max(x, zero), top)


@kernel()
def _encode(groups: Any, scales: Any, offsets: Any, is_float: bool, top: int, codes: Any) -> None:
    steps = np.empty(groups.shape[1], np.float32)
    for row in range(groups.shape[0]):
        _steps(groups[row], scales[row], offsets[row], is_float, np.float32(top), steps)
        _to_bytes(steps, codes[row])


@kernel()
def _to_bytes(steps: Any, codes: Any) -> None:
    for i in range(codes.size):
        codes[i] = np.uint8(np.int32(steps[i]))


@kernel()
def _values(steps: Any, scale: Any, offset: Any, is_float: bool, rounds: bool, values: Any) -> None:
    """What codes decode to."""
    bits = values.view(np.uint32)
    if is_float:
        for i in range(values.size):
            values[i] = np.float32(steps[i]) * scale
        for i in range(values.size):
            values[i] += offset
    else:
        for i in range(values.size):
            values[i] = np.float32(steps[i]) - offset
        if rounds:
            round_bfloat16(bits)
        for i in range(values.size):
            values[i] *= scale
        if rounds:
            round_bfloat16(bits)


@kernel(reassociates=True)
def _squared_difference(group: Any, values: Any) -> float:
    """float32 squares summed in float64."""
    total = 0.0
    for i in range(group.size):
        difference = group[i] - values[i]
        total += np.float64(difference * difference)
    return total


@kernel()
def _errors(groups: Any, scales: Any, offsets: Any, is_float: bool, rounds: bool, top: int, errors: Any) -> None:
    steps, values = np.empty(groups.shape[1], np.float32), np.empty(groups.shape[1], np.float32)
    for row in range(groups.shape[0]):
        _steps(groups[row], scales[row], offsets[row], is_float, np.float32(top), steps)
        _values(steps, scales[row], offsets[row], is_float, rounds, values)
        errors[row] = _squared_difference(groups[row], values)
