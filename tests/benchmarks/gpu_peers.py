"""bitsandbytes' CUDA kernels as the benchmark calls them, on the same matrices. Times nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from tests.benchmarks.gpu_card import is_real

if TYPE_CHECKING:
    from tests.benchmarks.gpu_cases import Calls, Matrix


def unusable() -> str | None:
    """Why it is not run, where that can be known. A simulated device must not be shown to it: it would remember."""
    if not is_real():
        return "not run: the device is simulated"
    return "not run: bitsandbytes is not installed" if find_spec("bitsandbytes") is None else None


def same_codes(matrix: Matrix) -> bool:
    """Whether our codes and constants are its own, bit for bit."""
    packed, state = _quantized(matrix, double=False)
    return torch.equal(packed.view(-1), matrix.packed) and torch.equal(state.absmax, matrix.absmax)


def products(matrices: Sequence[Matrix], x: torch.Tensor) -> Calls:
    """For one token its own product; for more, what its layers do: decode, then torch's."""
    import bitsandbytes as bnb

    coded = [_quantized(matrix, double=False) for matrix in matrices]
    return [partial(bnb.matmul_4bit, x, packed.t(), quant_state=state) for packed, state in coded]


def _quantize(matrices: Sequence[Matrix], *, double: bool) -> Calls:
    return [partial(_quantized, matrix, double=double) for matrix in matrices]


def _decode(matrices: Sequence[Matrix]) -> Calls:
    from bitsandbytes.functional import dequantize_4bit

    return [partial(dequantize_4bit, *_quantized(matrix, double=False)) for matrix in matrices]


def _quantized(matrix: Matrix, *, double: bool) -> Any:
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(matrix.weight, blocksize=64, quant_type="nf4", compress_statistics=double)


CODEBOOK: dict[str, Callable[[Sequence[Matrix]], Calls]] = {
    "quantize": partial(_quantize, double=False),
    "quantize double": partial(_quantize, double=True),
    "decode": _decode,
}
