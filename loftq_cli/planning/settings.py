"""A recipe applied to one layer: its number format, its adapter, and whether it is quantized at all."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.planning.recipe import Recipe
from loftq_cli.quant.formats import FORMATS, QuantSpec, override_spec
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec, LoraSpec, Pooling


def spec_of(recipe: Recipe, dtype: str) -> QuantSpec:
    """The number format of a recipe for a model of `dtype`."""
    if not FORMATS[recipe.quant_type].is_affine:
        return CodebookSpec(recipe.quant_type, int(recipe.block_size or 0), bool(recipe.double_quant))
    return affine_spec(
        str(recipe.layout),
        recipe.quant_type,
        int(recipe.group_size or 0),
        symmetric=bool(recipe.symmetric),
        dtype=dtype,
        scale_dtype=recipe.scale_dtype,
    )


def affine_spec(
    layout: str, quant_type: str, group_size: int, *, symmetric: bool, dtype: str, scale_dtype: str | None
) -> AffineSpec:
    """An integer format as the container called `layout` holds it, in a model of `dtype`."""
    row = LAYOUTS[layout]
    scales = scale_dtype or row.scale_dtype or dtype
    return AffineSpec(FORMATS[quant_type].bits, group_size, symmetric, row.zero_point, scales)


def decoded_dtype(layout: str, spec: QuantSpec, dtype: str) -> str:
    """What the loaders of a container decode a matrix to, in a model of `dtype`."""
    return LAYOUTS[layout].decoded_dtype(spec, dtype)


def layer_settings(recipe: Recipe, module: str, dtype: str) -> tuple[QuantSpec, LoraSpec, bool]:
    """The specification, the adapter and whether to quantize, after the overrides that match `module`."""
    spec, quantize = spec_of(recipe, dtype), True
    pooling = Pooling(recipe.pooling, int(recipe.group_size or 0)) if recipe.pooling else None
    default = LoraSpec(recipe.rank, recipe.alpha or recipe.rank, recipe.rslora, recipe.adapter_dtype, pooling)
    rank, alpha = recipe.rank, None
    for override in recipe.override:
        if re.search(override.match, module):
            quantize = quantize if override.quantize is None else override.quantize
            rank, alpha = override.rank or rank, override.alpha or alpha
            spec = override_spec(
                spec,
                quant_type=override.quant_type,
                group_size=override.group_size,
                block_size=override.block_size,
                double_quant=override.double_quant,
            )
    # Servers apply one scaling to the whole model, so another rank brings the alpha that keeps it.
    kept = default.scaling * (math.sqrt(rank) if recipe.rslora else rank)
    return spec, replace(default, rank=rank, alpha=kept if alpha is None else alpha), quantize
