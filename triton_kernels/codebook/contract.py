"""Block-wise codebook quantization: the contract.

Blocks run over the flattened row-major tensor and may cross rows; the last block may be short. A byte holds two 4-bit
codes, the first element in the high nibble. A table ascends, and a code is a place in the table; a container with other
numbers renumbers codes while packing. NF4 is the table of QLoRA (arXiv 2305.14314, appendix E); FP4 has a sign, two
bits of exponent and a bit of mantissa.
"""

from __future__ import annotations

from functools import cache

import torch

from loftq_cli.triton_kernels.backend import implementation

CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    # Zero stands twice: FP4 has +0 and -0.
    "fp4": tuple(v / 12 for v in (-12, -8, -6, -4, -3, -2, -0.0625, 0.0, 0.0, 0.0625, 2, 3, 4, 6, 8, 12)),
}


# Dtypes in which kernels read weights and the factors of an adapter.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def codebook_table(codebook: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The table of `codebook`, float32 [16], ascending; read-only. Raises ValueError for an unknown name.

    >>> codebook_table("nf4")[[0, 7, 15]].tolist()
    [-1.0, 0.0, 1.0]
    """
    if codebook not in CODEBOOKS:
        raise ValueError(f"unknown codebook {codebook!r}; known: {', '.join(CODEBOOKS)}")
    return torch.tensor(CODEBOOKS[codebook], dtype=torch.float32, device=device)


def quantize_codebook(
    weight: torch.Tensor,
    codebook: str,
    block_size: int,
    *,
    minus: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a tensor, or weight - minus in float32: packed codes uint8 [ceil(numel / 2)] and absmax float32
    [ceil(numel / block_size)], written into `out` if given.

    The code of w is the number of midpoints of neighbouring table entries strictly below w / absmax; a zero block takes
    the code of 0.0. absmax is NaN or Inf exactly where the block holds NaN or Inf: the caller decides how to react.
    Raises ValueError unless the tensors are contiguous float32, bfloat16 or float16 and `block_size` even and positive.

    >>> packed, absmax = quantize_codebook(torch.tensor([0.0, 2.0, -2.0, 1.0]), "nf4", 4)
    >>> dequantize_codebook(packed, absmax, "nf4", 4, 4).tolist()[:3]
    [0.0, 2.0, -2.0]
    """
    numel = weight.numel()
    _check_floats("weight", weight, numel)
    if minus is not None:
        _check_floats("minus", minus, numel)
    if block_size < 2 or block_size % 2:
        raise ValueError("block_size must be even and positive")
    table = codebook_table(codebook, weight.device)
    if out is None:
        packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=weight.device)
        out = packed, torch.empty(-(-numel // block_size), dtype=torch.float32, device=weight.device)
    check_constants(*out, block_size, numel)
    flat = None if minus is None else minus.view(-1)
    implementation("codebook", weight.device.type).quantize(weight.view(-1), flat, table, block_size, *out)
    return out


def dequantize_codebook(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: str,
    block_size: int,
    numel: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Decode to `dtype` [numel]: table[code] * absmax of the block in float32, then rounded. The inverse of
    `quantize_codebook`, whose docstring has an example.

    Raises ValueError when the sizes of `packed` (uint8) and `absmax` (float32) do not belong to `numel`.

    >>> packed, absmax = torch.tensor([0xF7], dtype=torch.uint8), torch.tensor([2.0])
    >>> dequantize_codebook(packed, absmax, "nf4", block_size=2, numel=2).tolist()
    [2.0, 0.0]
    """
    check_constants(packed, absmax, block_size, numel)
    table = codebook_table(codebook, packed.device)
    values = torch.empty(numel, dtype=dtype, device=packed.device)
    implementation("codebook", packed.device.type).dequantize(
        packed.reshape(-1), absmax.reshape(-1), table, block_size, values
    )
    return values


def codebook_residual(
    weight: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: str,
    block_size: int,
    dtype: torch.dtype,
    out: torch.Tensor,
) -> float:
    """Write weight - decoded into `out` and return the sum of squares before the dtype of `out` rounds the differences.

    `packed` and `absmax` are decoded in `dtype`; the difference is float32.

    Raises ValueError unless both tensors are contiguous float32, bfloat16 or float16 of equal size and the constants
    fit.

    >>> packed, absmax = torch.tensor([0xF7], dtype=torch.uint8), torch.tensor([2.0])
    >>> weight, out = torch.tensor([2.5, 0.0]), torch.empty(2)
    >>> codebook_residual(weight, packed, absmax, "nf4", 2, torch.float32, out), out.tolist()
    (0.25, [0.5, 0.0])
    """
    numel = weight.numel()
    _check_floats("weight", weight, numel)
    _check_floats("out", out, numel)
    check_constants(packed, absmax, block_size, numel)
    table = codebook_table(codebook, weight.device)
    squares: float = implementation("codebook", weight.device.type).residual(
        weight.view(-1), packed.view(-1), absmax.view(-1), table, block_size, dtype, out.view(-1)
    )
    return squares


def _check_floats(name: str, tensor: torch.Tensor, numel: int) -> None:
    if tensor.dtype not in FLOATS or not tensor.is_contiguous() or tensor.numel() != numel:
        raise ValueError(f"{name} must be contiguous float32, bfloat16 or float16 with {numel} elements")


def check_constants(packed: torch.Tensor, absmax: torch.Tensor, block_size: int, numel: int) -> None:
    """Raises ValueError when the sizes of `packed` (uint8) and `absmax` (float32) do not belong to `numel`.

    >>> check_constants(torch.zeros(1, dtype=torch.uint8), torch.ones(1), block_size=2, numel=2)
    """
    if packed.dtype != torch.uint8 or packed.numel() != (numel + 1) // 2:
        raise ValueError(f"packed must be uint8 with {(numel + 1) // 2} elements")
    if absmax.dtype != torch.float32 or absmax.numel() != -(-numel // block_size):
        raise ValueError(f"absmax must be float32 with {-(-numel // block_size)} elements")
