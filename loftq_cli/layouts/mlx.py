"""MLX's affine container, for mlx-lm: codes, scales and float offsets (biases)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loftq_cli.errors import InputError, printable
from loftq_cli.layouts.grouped import FloatOffsetLayout
from loftq_cli.layouts.layout import ModelFacts
from loftq_cli.layouts.stored_tensors import StoredTensors
from loftq_cli.quant.formats import QuantSpec, as_affine


class MlxLayout(FloatOffsetLayout):
    """Integers with float offsets; modules may differ in bits and group size."""

    name = "mlx"
    label = "MLX"
    biases = "biases"

    def settings(self, stored: StoredTensors, module: str | None) -> Mapping[str, Any]:
        """Find the entry of `module` in the config's `quantization`, or the common entry.

        Raises InputError for a module in a mode other than affine.
        """
        common = stored.config.get("quantization")
        if not isinstance(common, dict) or common.get("mode", "affine") != "affine":
            return {}
        entry = None if module is None else common.get(module) or common.get(stored.loaded(module))
        if not isinstance(entry, dict):
            return common
        if entry.get("mode", "affine") != "affine":
            mode = printable(repr(entry["mode"]), 80)
            message = f"its quantization has mode {mode} for {printable(str(module))}; we read affine"
            raise InputError(message, file=stored.config_file)
        return entry

    def model_config(self, config: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """Add a `quantization` to the model's config, with an entry for each module of uncommon bits or group size. MLX
        leaves a linear without scales in full precision, listed or not.
        """
        entries = {module: _describe_format(spec) for module, spec in facts.other_specs.items()}
        return {**config, "quantization": {**_describe_format(facts.spec), "mode": "affine", **entries}}


def _describe_format(spec: QuantSpec) -> dict[str, Any]:
    integers = as_affine(spec)
    return {"group_size": integers.group_size, "bits": integers.bits}


LAYOUT = MlxLayout()
