"""transformers' "metal" container: codes, scales and float offsets (qbiases). Apple GPUs compute with them as they are;
elsewhere transformers decodes them at load. Every tensor of the model must have the dtype of the scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from loftq_cli.layouts import grouped
from loftq_cli.layouts.layout import ModelFacts, StoredTensors
from loftq_cli.layouts.stored_parts import quantization_config
from loftq_cli.tensors.specs import AffineSpec

QUANTIZED_ON_DISK = True


def _settings(stored: StoredTensors, module: str | None) -> Mapping[str, Any]:
    del module  # one number format for the whole model
    return quantization_config(stored, "metal") or {}


_OFFSETS = grouped.FloatOffsets("metal", "qbiases", _settings)
fit, planned, pack, code_rows = _OFFSETS.fit, _OFFSETS.planned, _OFFSETS.pack, _OFFSETS.code_rows
quantized_names, stored_matrix, parts, unpack = (
    _OFFSETS.quantized_names,
    _OFFSETS.stored_matrix,
    _OFFSETS.parts,
    _OFFSETS.unpack,
)


def model_config(config: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
    """The source's config with a `quantization_config` that makes transformers load the tensors as they are."""
    spec = cast(AffineSpec, facts.spec)
    quantization = {
        "quant_method": "metal",
        "bits": spec.bits,
        "group_size": spec.group_size,
        "modules_to_not_convert": grouped.kept_names(facts),
    }
    return {**config, "quantization_config": quantization}
