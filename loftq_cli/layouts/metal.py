"""transformers' "metal" container: codes, scales and float offsets (qbiases). Apple GPUs compute with the stored codes;
transformers decodes at load on other devices. Every tensor of the model must have the dtype of the scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loftq_cli.layouts.grouped import FloatOffsetLayout, kept_names
from loftq_cli.layouts.layout import ModelFacts
from loftq_cli.layouts.stored_parts import quantization_config
from loftq_cli.layouts.stored_tensors import StoredTensors
from loftq_cli.quant.formats import as_affine


class MetalLayout(FloatOffsetLayout):
    """Integers with float offsets, a single number format for the model."""

    name = "metal"
    label = "metal"
    biases = "qbiases"

    def settings(self, stored: StoredTensors, module: str | None) -> Mapping[str, Any]:
        """Find the model's quantization_config, for every module."""
        del module
        return quantization_config(stored, self.name) or {}

    def model_config(self, config: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """Add a `quantization_config` for transformers to the model's config."""
        spec = as_affine(facts.spec)
        quantization = {
            "quant_method": self.name,
            "bits": spec.bits,
            "group_size": spec.group_size,
            "modules_to_not_convert": kept_names(facts),
        }
        return {**config, "quantization_config": quantization}


LAYOUT = MetalLayout()
