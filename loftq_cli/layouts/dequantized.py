"""The decoded values as an ordinary checkpoint in the model's dtype: for loaders without quantization.

A loader reads the numbers that a loader of the quantized container would compute. The container saves no space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loftq_cli.layouts.layout import SMALLER_GROUPS, Fit, Layout, ModelFacts, StoredMatrix
from loftq_cli.layouts.stored_tensors import CodeRows, StoredTensors
from loftq_cli.quant.formats import QuantizedTensor, QuantSpec
from loftq_cli.tensors.headers import OutTensor

if TYPE_CHECKING:
    import torch


class DenseLayout(Layout):
    """Decoded values: nothing is quantized on disk, and nothing can be unpacked."""

    name = "dense"

    def fit(self, spec: QuantSpec, shape: tuple[int, int], *, transposed: bool) -> Fit:
        """Accept all shapes of whole groups: a loader sees plain numbers."""
        del transposed
        size = spec.group_size_or_none
        if size is not None and shape[1] % size:
            return Fit(None, f"rows of {shape[1]} are not whole groups of {size}", SMALLER_GROUPS)
        return Fit(spec)

    def planned(self, matrix: StoredMatrix) -> tuple[OutTensor, ...]:
        """Plan a tensor in the orientation of the original."""
        shape = matrix.shape[::-1] if matrix.transposed else matrix.shape
        return (OutTensor(matrix.name, matrix.dtype, shape),)

    def pack(self, matrix: StoredMatrix, quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Decode the matrix, in the dtype of `matrix`."""
        import torch

        values = quantized.dequantize().to(getattr(torch, matrix.dtype))
        return {matrix.name: (values.T if matrix.transposed else values).contiguous()}

    def code_rows(self, matrix: StoredMatrix) -> CodeRows | None:
        """Return None: no codes are on disk."""
        del matrix
        return None

    def quantized_names(self, stored: StoredTensors) -> list[str]:
        """Return no names: nothing is quantized on disk."""
        del stored
        return []

    def stored_matrix(self, name: str, stored: StoredTensors, *, transposed: bool) -> StoredMatrix:
        """Raises ValueError: `quantized_names` has no names."""
        raise ValueError(f"{name} is not quantized")

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the name of the tensor alone."""
        return (name,)

    def unpack(self, matrix: StoredMatrix, stored: StoredTensors, *, has_codes: bool = True) -> QuantizedTensor:
        """Raises ValueError: decoded values have no codes."""
        raise ValueError(f"{matrix.name} is not quantized")

    def model_config(self, config: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """Return the model's config, unchanged."""
        del facts
        return dict(config)


LAYOUT = DenseLayout()
