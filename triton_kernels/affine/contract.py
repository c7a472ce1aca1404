"""Group-wise integer quantization: the contract.

A group is `group_size` neighbouring columns of a row. A value is (code - zero_point) * scale with unsigned codes, as
compressed-tensors and GPTQ store, or code * scale + bias, as MLX stores. The range of a group is the range of the
weights; refinement/ searches for a range with less error. Ranges with integer zero points follow the observer of
compressed-tensors (`calculate_qparams`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq_cli.triton_kernels.backend import implementation

AFFINE_BITS = (2, 3, 4, 8)
SCALE_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
ZERO_POINTS = ("int", "float")


@dataclass(frozen=True, slots=True)
class AffineGroups:
    """A quantized matrix: codes uint8 [out, in], and for each group a scale and at most an offset [out, in /
    group_size].

    Scales and biases have the scale dtype, zero points are uint8. Without an offset the zero point is 2^(bits - 1).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    biases: torch.Tensor | None


def quantize_affine(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    scale_dtype: str,
    zero_point: str = "int",
) -> AffineGroups:
    """Codes, scales and offsets of a float32 [out, in]. All arithmetic is float32 and rounds half to even.

    The range [low, high] of a group spans the weights of the group, and 0 unless the zero point is "float". Scale and
    offset of the range are rounded to the stored dtype before use:
    - symmetric: scale = max(-low, high) / ((2^bits - 1) / 2); no offset is returned.
    - zero_point "int": scale = (high - low) / (2^bits - 1); zero point round(-low / scale), clamped.
    - zero_point "float": scale = (high - low) / (2^bits - 1); bias = low.
    A code is round(w / scale) + zero point, or round((w - bias) / scale), clamped. A scale that rounds to 0 becomes 1:
    the group decodes to 0, and with a bias to the bias plus whole steps.

    A scale is NaN or Inf where the group holds NaN or Inf, and Inf where the scale (or high - low) overflows. A bias
    can overflow too. Codes of such a group are the zero point (0 with biases), and the caller decides how to react. A
    finite scale can decode to Inf where a product overflows the scale dtype (65504 in float16). Raises ValueError
    unless `weight` is contiguous float32 with two dimensions and groups divide its rows, for unknown choices, and for a
    symmetric float zero point.

    >>> weight = torch.tensor([[0.0, 1.0, 2.0, 15.0]])
    >>> groups = quantize_affine(weight, 4, 4, symmetric=False, scale_dtype="float32")
    >>> groups.codes.tolist(), groups.scales.item(), groups.zero_points.item()
    ([[0, 1, 2, 15]], 1.0, 0)
    """
    if weight.dtype != torch.float32 or weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError("weight must be contiguous float32 with two dimensions")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"unknown scale dtype {scale_dtype!r}; known: {', '.join(SCALE_DTYPES)}")
    if zero_point not in ZERO_POINTS:
        raise ValueError(f"unknown zero point {zero_point!r}; known: {', '.join(ZERO_POINTS)}")
    if symmetric and zero_point == "float":
        raise ValueError("symmetric quantization has no float zero point")
    shape = (weight.shape[0], _groups_per_row(weight, bits, group_size))
    codes, scales, offsets = implementation("affine", weight.device.type).quantize(
        weight.view(-1, group_size), bits, "none" if symmetric else zero_point, SCALE_DTYPES[scale_dtype]
    )
    offsets = None if offsets is None else offsets.view(shape)
    zero_points, biases = (None, offsets) if zero_point == "float" else (offsets, None)
    return AffineGroups(codes.view(weight.shape), scales.view(shape), zero_points, biases)


def dequantize_affine(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bits: int,
    group_size: int,
    *,
    biases: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode to float32 [out, in].

    Zero points: (code - zero point) * scale, each step rounded to the dtype of the scales, as loaders round. Biases:
    code * scale + bias, each step in float32, as MLX and the "metal" loader of transformers compute. Codes are uint8
    [out, in]; scales and offsets [out, in / group_size]. Zero points have any integer dtype, or are None for
    2^(bits - 1); biases have any dtype of scales.
    Raises ValueError when shapes or dtypes do not fit, and for zero points beside biases.

    >>> codes = torch.tensor([[0, 1, 2, 15]], dtype=torch.uint8)
    >>> dequantize_affine(codes, torch.tensor([[0.5]]), None, 4, 4).tolist()
    [[-4.0, -3.5, -3.0, 3.5]]
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError("codes must be uint8 with two dimensions")
    shape = (codes.shape[0], _groups_per_row(codes, bits, group_size))
    if zero_points is not None and biases is not None:
        raise ValueError("zero_points and biases exclude each other")
    for name, tensor in (("scales", scales), ("biases", biases)):
        if tensor is not None and (tensor.dtype not in SCALE_DTYPES.values() or tensor.shape != shape):
            raise ValueError(f"{name} must be one of {', '.join(SCALE_DTYPES)} with shape {shape}")
    if zero_points is not None:
        is_integer = not zero_points.is_floating_point() and zero_points.dtype != torch.bool
        if zero_points.shape != shape or not is_integer:
            raise ValueError(f"zero_points must be integers with shape {shape}")
        zero_points = zero_points.reshape(-1)
    values: torch.Tensor = implementation("affine", codes.device.type).dequantize(
        codes.reshape(-1, group_size),
        scales.reshape(-1),
        zero_points,
        None if biases is None else biases.reshape(-1),
        bits,
    )
    return values.view(codes.shape)


def _groups_per_row(matrix: torch.Tensor, bits: int, group_size: int) -> int:
    if bits not in AFFINE_BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, AFFINE_BITS))}")
    columns = matrix.shape[1]
    if group_size < 1 or columns % group_size:
        raise ValueError(f"{columns} columns do not split into groups of {group_size}")
    return columns // group_size
