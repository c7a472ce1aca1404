"""MLX's affine container, as mlx-lm loads it: codes, scales and float offsets (biases)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from loftq_cli.layouts import grouped
from loftq_cli.layouts.layout import ModelFacts, StoredTensors
from loftq_cli.tensors import AffineSpec

QUANTIZED_ON_DISK = True


def _settings(stored: StoredTensors) -> Mapping[str, Any]:
    found = stored.config.get("quantization")
    return found if isinstance(found, dict) and found.get("mode", "affine") == "affine" else {}


_OFFSETS = grouped.FloatOffsets("MLX", "biases", _settings)
fit, planned, pack, code_rows = _OFFSETS.fit, _OFFSETS.planned, _OFFSETS.pack, _OFFSETS.code_rows
quantized_names, stored_matrix, parts, unpack = (
    _OFFSETS.quantized_names,
    _OFFSETS.stored_matrix,
    _OFFSETS.parts,
    _OFFSETS.unpack,
)


def model_config(config: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
    """The source's config with `quantization`; a linear without scales stays as it is without being listed."""
    spec = cast(AffineSpec, facts.spec)
    return {**config, "quantization": {"group_size": spec.group_size, "bits": spec.bits, "mode": "affine"}}
