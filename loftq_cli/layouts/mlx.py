"""MLX's affine container, as mlx-lm loads it: codes, scales and float offsets (biases)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from loftq_cli.errors import InputError, printable
from loftq_cli.layouts import grouped
from loftq_cli.layouts.layout import ModelFacts, StoredTensors
from loftq_cli.tensors.specs import AffineSpec

QUANTIZED_ON_DISK = True


def _settings(stored: StoredTensors, module: str | None) -> Mapping[str, Any]:
    found = stored.config.get("quantization")
    if not isinstance(found, dict) or found.get("mode", "affine") != "affine":
        return {}
    own = None if module is None else found.get(module) or found.get(stored.loaded(module))
    if not isinstance(own, dict):
        return found
    if own.get("mode", "affine") != "affine":
        what = f"its quantization has mode {printable(repr(own['mode']), 80)} for {printable(module)}; we read affine"
        raise InputError(what, file=stored.config_file)
    return own


_OFFSETS = grouped.FloatOffsets("MLX", "biases", _settings)
fit, planned, pack, code_rows = _OFFSETS.fit, _OFFSETS.planned, _OFFSETS.pack, _OFFSETS.code_rows
quantized_names, stored_matrix, parts, unpack = (
    _OFFSETS.quantized_names,
    _OFFSETS.stored_matrix,
    _OFFSETS.parts,
    _OFFSETS.unpack,
)


def model_config(config: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
    """The source's config with `quantization`, in which modules of other bits or groups have entries of their own; a
    linear without scales stays as it is without being listed.
    """
    others = {module: _entry(cast(AffineSpec, spec)) for module, spec in facts.other_specs.items()}
    return {**config, "quantization": {**_entry(cast(AffineSpec, facts.spec)), "mode": "affine", **others}}


def _entry(spec: AffineSpec) -> dict[str, Any]:
    return {"group_size": spec.group_size, "bits": spec.bits}
