"""A recipe applied to one layer: the number format, the adapter, and whether the layer is quantized at all."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.planning.jobs import Procedure
from loftq_cli.planning.recipe import CodebookOptions, FormatOptions, Recipe
from loftq_cli.quant.formats import FORMATS, QuantSpec, override_spec
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec, LoraSpec


def spec_of(options: FormatOptions, layout: str, dtype: str) -> QuantSpec:
    """The number format of `options` as the container called `layout` holds it, in a model of `dtype`."""
    if isinstance(options, CodebookOptions):
        return CodebookSpec(options.quant_type, options.block_size, options.double_quant)
    return affine_spec(
        layout,
        options.quant_type,
        options.group_size,
        symmetric=options.symmetric,
        dtype=dtype,
        scale_dtype=options.scale_dtype,
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


def procedure_of(recipe: Recipe) -> Procedure:
    """The way in which `recipe` computes base and adapter of every layer."""
    is_calibrated = recipe.calibration is not None
    return Procedure(recipe.method, recipe.fitting, recipe.scales, recipe.seed, is_calibrated)


def layer_settings(recipe: Recipe, module: str, dtype: str) -> tuple[QuantSpec, LoraSpec, bool]:
    """Number format, adapter, and whether to quantize, for the layer called `module` in a model of `dtype`: values of
    the recipe, then of every override that matches the name, in order.
    """
    spec, quantize = spec_of(recipe.quant, recipe.layout, dtype), True
    default = LoraSpec(recipe.rank, recipe.alpha or recipe.rank, recipe.rslora, recipe.adapter_dtype, recipe.pooling)
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
    # Servers apply one scaling to the whole model: another rank brings the alpha that keeps the scaling.
    equal_alpha = default.scaling * (math.sqrt(rank) if recipe.rslora else rank)
    return spec, replace(default, rank=rank, alpha=equal_alpha if alpha is None else alpha), quantize
