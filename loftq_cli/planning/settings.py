"""A recipe applied to a layer: the number format, the adapter, and the choice between quantizing and copying."""

from __future__ import annotations

import math
from dataclasses import replace

from loftq_cli.checkpoint.patterns import finds
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.planning.jobs import Procedure
from loftq_cli.planning.recipe import CodebookOptions, FormatOptions, Recipe
from loftq_cli.quant.formats import FORMATS, QuantSpec, override_spec
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec, LoraSpec


def spec_of(options: FormatOptions, layout: str, dtype: str) -> QuantSpec:
    """The number format of a layer in a container.

    options   the settled number format
    layout    the container, a key of LAYOUTS
    dtype     dtype of the stored model

    >>> spec_of(CodebookOptions("nf4", 64, double_quant=True), "bitsandbytes", "bfloat16")
    CodebookSpec(codebook='nf4', block_size=64, double_quant=True, nested_block_size=256)
    """
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
    """An integer format in a container.

    layout        the container, a key of LAYOUTS; decides between integer zero points and float offsets
    quant_type    an integer format, a key of FORMATS
    group_size    neighbouring columns of a row with a common scale
    symmetric     whether groups have no zero points
    dtype         dtype of the stored model
    scale_dtype   dtype of the scales; None: the default dtype of the container, or else `dtype`

    >>> affine_spec("gptq", "int4", 128, symmetric=True, dtype="bfloat16", scale_dtype=None).scale_dtype
    'float16'
    """
    row = LAYOUTS[layout]
    scales = scale_dtype or row.scale_dtype or dtype
    return AffineSpec(FORMATS[quant_type].bits, group_size, symmetric, row.zero_point, scales)


def decoded_dtype(layout: str, spec: QuantSpec, dtype: str) -> str:
    """The dtype of a decoded matrix in the loaders of a container: the dtype of the model, or the dtype of the scales.

    layout   the container, a key of LAYOUTS
    spec     the number format of the matrix
    dtype    dtype of the stored model

    >>> decoded_dtype("gptq", AffineSpec(4, 128, symmetric=True, scale_dtype="float16"), "bfloat16")
    'float16'
    """
    return LAYOUTS[layout].decoded_dtype(spec, dtype)


def procedure_of(recipe: Recipe) -> Procedure:
    """The way of computing base and adapter of every layer under `recipe`.

    >>> from loftq_cli.planning.settle import make_recipe
    >>> procedure_of(make_recipe(method="qlora", seed=7)).seed
    7
    """
    return Procedure(recipe.method, recipe.fitting, recipe.scales, recipe.seed, recipe.is_weighted)


def layer_settings(recipe: Recipe, module: str, dtype: str) -> tuple[QuantSpec, LoraSpec, bool]:
    """Settle the number format and the adapter of a layer, and whether to quantize the layer.

    recipe   values for all layers, and overrides; matching overrides are applied in order
    module   name of the module in the original
    dtype    dtype of the stored model

    >>> from loftq_cli.planning.settle import make_recipe
    >>> spec, lora, quantize = layer_settings(make_recipe(rank=8), "layers.0.q_proj", "bfloat16")
    >>> spec.quant_type, lora.rank, quantize
    ('nf4', 8, True)
    """
    spec, quantize = spec_of(recipe.quant, recipe.layout, dtype), True
    default = LoraSpec(recipe.rank, recipe.alpha or recipe.rank, recipe.rslora, recipe.adapter_dtype, recipe.pooling)
    rank, alpha = recipe.rank, None
    for override in recipe.override:
        if finds(override.match, module):
            quantize = quantize if override.quantize is None else override.quantize
            rank, alpha = override.rank or rank, override.alpha or alpha
            spec = override_spec(
                spec,
                quant_type=override.quant_type,
                group_size=override.group_size,
                block_size=override.block_size,
                double_quant=override.double_quant,
            )
    # Servers apply a single scaling to the model: alpha changes with the rank, so that the scaling stays.
    equal_alpha = default.scaling * (math.sqrt(rank) if recipe.rslora else rank)
    return spec, replace(default, rank=rank, alpha=equal_alpha if alpha is None else alpha), quantize
