"""Group-wise integer quantization: the contract. A group is `group_size` neighbouring columns of one row; its value is
(code - zero_point) * scale with unsigned codes, the form that compressed-tensors and GPTQ checkpoints store.

Ranges follow the min-max observer of compressed-tensors (`calculate_qparams`).
"""

from __future__ import annotations

import torch

from loftq_cli.triton_kernels.backend import implementation

AFFINE_BITS = (2, 3, 4, 8)
SCALE_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def quantize_affine(
    weight: torch.Tensor, bits: int, group_size: int, *, symmetric: bool, scale_dtype: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes uint8 [out, in], scales [out, in / group_size] in `scale_dtype`, and zero points of a float32 [out, in].

    Symmetric: scale = absmax / ((2^bits - 1) / 2); the zero point is 2^(bits - 1) everywhere and None is returned.
    Otherwise scale = (max - min) / (2^bits - 1) over the group and 0, and the zero points, uint8 in the shape of the
    scales, are round(-min / scale), clamped. The scale is rounded to its dtype before anything is divided by it. A code
    is round(w / scale) + zero point, clamped; both roundings go half to even. A scale that rounds to 0 becomes 1, and
    its group decodes to 0.

    A scale is NaN or Inf where its group holds one, and Inf where it (or max - min) overflows; every code there is
    the zero point, and the caller decides. A finite scale can decode to Inf too, where a product overflows its dtype
    (65504 in float16).
    Raises ValueError unless `weight` is contiguous float32 with two dimensions and groups divide its rows.
    """
    if weight.dtype != torch.float32 or weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError("weight must be contiguous float32 with two dimensions")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"unknown scale dtype {scale_dtype!r}; known: {', '.join(SCALE_DTYPES)}")
    n_groups = _groups_per_row(weight, bits, group_size)
    codes, scales, zero_points = implementation("affine", weight.device.type).quantize(
        weight.view(-1, group_size), bits, symmetric, SCALE_DTYPES[scale_dtype]
    )
    rows = weight.shape[0]
    zero_points = None if zero_points is None else zero_points.view(rows, n_groups)
    return codes.view(weight.shape), scales.view(rows, n_groups), zero_points


def dequantize_affine(
    codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, bits: int, group_size: int
) -> torch.Tensor:
    """float32 [out, in]: (code - zero point) * scale, each step rounded to the dtype of the scales as loaders do.

    Codes uint8 [out, in]; scales and zero points [out, in / group_size]. Zero points are integers of any kind, None
    for 2^(bits - 1), or float32: then both steps are float32 whatever the scales are.
    Raises ValueError when shapes or dtypes do not fit.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError("codes must be uint8 with two dimensions")
    shape = (codes.shape[0], _groups_per_row(codes, bits, group_size))
    if scales.dtype not in SCALE_DTYPES.values() or scales.shape != shape:
        raise ValueError(f"scales must be one of {', '.join(SCALE_DTYPES)} with shape {shape}")
    if zero_points is not None:
        is_integer = not zero_points.is_floating_point() and zero_points.dtype != torch.bool
        if zero_points.shape != shape or not (is_integer or zero_points.dtype == torch.float32):
            raise ValueError(f"zero_points must be integers or float32 with shape {shape}")
        zero_points = zero_points.reshape(-1)
    values: torch.Tensor = implementation("affine", codes.device.type).dequantize(
        codes.reshape(-1, group_size), scales.reshape(-1), zero_points, bits
    )
    return values.view(codes.shape)


def _groups_per_row(matrix: torch.Tensor, bits: int, group_size: int) -> int:
    if bits not in AFFINE_BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, AFFINE_BITS))}")
    columns = matrix.shape[1]
    if group_size < 1 or columns % group_size:
        raise ValueError(f"{columns} columns do not split into groups of {group_size}")
    return columns // group_size
