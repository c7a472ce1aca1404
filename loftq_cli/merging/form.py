"""The form of a merged model: decoded, quantized again, or the codes of the base with changed offsets.

Options, base and kind of adapter decide the form; tensors are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loftq_cli.errors import UsageError
from loftq_cli.layouts.layout import (
    DENSE,
    DENSE_HINT,
    FLOAT_OFFSETS,
    INTEGER_ZEROS,
    LAYOUTS,
    default_layout,
    either,
    mixing_layouts,
)
from loftq_cli.model.stored import BaseModel
from loftq_cli.planning.format_options import check_layout, settle_format
from loftq_cli.planning.recipe import RecipeFields
from loftq_cli.planning.settings import spec_of
from loftq_cli.quant.formats import FORMATS, QuantSpec
from loftq_cli.tensors.headers import MODEL_DTYPES
from loftq_cli.tensors.specs import POOLINGS

TOKENIZERS = ("base", "adapter")


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """The options of a merge. An option of None follows from base and adapter.

    dtype            dtype of the weights in full precision; None for the dtype of the base
    layout           container of the merged weights
    requantize       number format to quantize the merged weights to
    group_size       columns with a common scale, for `requantize` to integers
    symmetric        whether groups have no zero point, for `requantize` to integers
    scale_dtype      dtype of scales and offsets
    round_zeros      whether a QA-LoRA adapter merges into integer zero points
    pooling          convention of a QA-LoRA adapter; wins over the config of the adapter
    max_shard_size   size of a weight file, like "5GB"
    force            whether to merge in spite of a foreign base or a lost adapter
    remote_code      whether the result keeps the base's code for loaders
    tokenizer        "base" or "adapter"; None for the adapter's tokenizer where the adapter's directory holds one

    Raises UsageError for a value outside the tables, and for options that contradict each other.

    >>> MergeOptions(requantize="int4", round_zeros=True)
    Traceback (most recent call last):
    loftq_cli.errors.UsageError: --requantize chooses new codes, and --round-zeros keeps them (one of the two)
    """

    dtype: str | None = None
    layout: str | None = None
    requantize: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    scale_dtype: str | None = None
    round_zeros: bool = False
    pooling: str | None = None
    max_shard_size: str = "5GB"
    force: bool = False
    remote_code: bool = True
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("dtype", MODEL_DTYPES),
            ("layout", LAYOUTS),
            ("requantize", FORMATS),
            ("scale_dtype", MODEL_DTYPES),
            ("pooling", POOLINGS),
            ("tokenizer", TOKENIZERS),
        ):
            value = getattr(self, name)
            if value is not None and value not in choices:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} {value!r} does not exist", hint=f"one of {', '.join(choices)}")
        if self.requantize and self.round_zeros:
            raise UsageError("--requantize chooses new codes, and --round-zeros keeps them", hint="one of the two")
        if self.requantize is None and (self.group_size is not None or self.symmetric is not None):
            raise UsageError("--group-size and --symmetric are for --requantize", hint="leave them out")


@dataclass(frozen=True, slots=True)
class MergeForm:
    """The container and the number format of the merged weights.

    layout        name of the container
    spec          number format to quantize to; None for dense weights and for kept codes
    keeps_codes   whether the codes of the base stay and only the offsets change
    scale_dtype   dtype of scales and offsets beside kept codes; None for the default

    >>> MergeForm("dense").is_quantized, MergeForm("metal", keeps_codes=True).is_quantized
    (False, True)
    """

    layout: str
    spec: QuantSpec | None = None
    keeps_codes: bool = False
    scale_dtype: str | None = None

    @property
    def is_quantized(self) -> bool:
        """True when the merged weights are stored quantized."""
        return self.spec is not None or self.keeps_codes

    def model_dtype(self, dtype: str) -> str:
        """The dtype of the model's dense tensors: `dtype`, unless loaders need the dtype of the scales everywhere."""
        if not LAYOUTS[self.layout].one_dtype:
            return dtype
        if self.spec is not None:
            return self.spec.scale_dtype
        return self.scale_dtype or "float32"

    def spec_for(self, stored: QuantSpec) -> QuantSpec:
        """The number format of a merged weight with the codes of `stored`, the number format in the base."""
        return LAYOUTS[self.layout].spec_with_offsets(stored, self.scale_dtype)


def choose_form(options: MergeOptions, base: BaseModel, *, is_pooled: bool) -> MergeForm:
    """The form of the merged model. A pooled adapter on an integer base moves offsets and loses nothing. Every
    remaining pair of adapter and base becomes dense, unless `options` quantize the merged weights again.

    is_pooled   whether a lora_A reads pooled inputs, as in QA-LoRA (Xu et al., arXiv 2309.14717)

    Raises UsageError for options that contradict each other, the base or the adapter.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> base = BaseModel.open(resolve_model("builtin:tiny-llama"))
    >>> choose_form(MergeOptions(requantize="int8", layout="gptq"), base, is_pooled=False).spec.quant_type
    'int8'
    """
    if options.requantize is not None:
        return _choose_requantized(options, base)
    specs = [matrix.spec for matrix in base.quantized.values()]
    can_move_offsets = is_pooled and bool(specs) and all(spec.is_affine for spec in specs)
    if options.round_zeros:
        return _choose_rounded(options, base, specs, can_move_offsets=can_move_offsets)
    layout = options.layout or (_exact_layout(base, specs) if can_move_offsets else DENSE)
    if not LAYOUTS[layout].stores_codes:
        if options.scale_dtype is not None:
            raise UsageError("--scale-dtype is for a quantized result", hint="leave it out")
        return MergeForm(layout)
    if not can_move_offsets:
        raise UsageError(
            f"--layout {layout} needs codes, and only a QA-LoRA adapter on an integer base keeps them",
            hint=f"--requantize int4, or {DENSE_HINT}",
        )
    if layout not in FLOAT_OFFSETS:
        raise UsageError(
            f"--layout {layout} holds integer zero points, which lose most of a QA-LoRA update",
            hint=f"--layout {either(FLOAT_OFFSETS)} is exact; --round-zeros measures what is lost",
        )
    _check_holds(layout, specs, options)
    return MergeForm(layout, keeps_codes=True, scale_dtype=options.scale_dtype)


def _choose_requantized(options: MergeOptions, base: BaseModel) -> MergeForm:
    quant_type = str(options.requantize)
    layout = options.layout or default_layout(quant_type)
    if not LAYOUTS[layout].stores_codes:
        raise UsageError(f"--requantize writes codes, and --layout {layout} has none", hint="one of the two")
    fields = RecipeFields(group_size=options.group_size, symmetric=options.symmetric, scale_dtype=options.scale_dtype)
    quant = settle_format(fields, quant_type, layout)
    check_layout(quant, layout)
    return MergeForm(layout, spec_of(quant, layout, options.dtype or base.family.dtype(base.tensors.values())))


def _choose_rounded(
    options: MergeOptions, base: BaseModel, specs: Sequence[QuantSpec], *, can_move_offsets: bool
) -> MergeForm:
    if not can_move_offsets:
        raise UsageError("--round-zeros is for a QA-LoRA adapter on an integer base", hint="leave it out")
    stored_in = base.layout.name
    layout = options.layout or (stored_in if stored_in in INTEGER_ZEROS else INTEGER_ZEROS[0])
    if layout not in INTEGER_ZEROS:
        raise UsageError(f"--layout {layout} has no integer zero points to round to", hint="leave out --round-zeros")
    _check_holds(layout, specs, options)
    return MergeForm(layout, keeps_codes=True, scale_dtype=options.scale_dtype)


def _exact_layout(base: BaseModel, specs: Sequence[QuantSpec]) -> str:
    """The container of the base if offsets are floats there, else the first container with room for the codes and
    float offsets, else DENSE.
    """
    if base.layout.name in FLOAT_OFFSETS:
        return base.layout.name
    fitting = (name for name in FLOAT_OFFSETS if _mixes(name, specs) and all(map(LAYOUTS[name].holds, specs)))
    return next(fitting, DENSE)


def _mixes(layout: str, specs: Sequence[QuantSpec]) -> bool:
    """True when a single model in the container may mix the number formats `specs`, with offsets."""
    return LAYOUTS[layout].mixed == "any" or len({(spec.quant_type, spec.group_size_or_none) for spec in specs}) == 1


def _check_holds(layout: str, specs: Sequence[QuantSpec], options: MergeOptions) -> None:
    row = LAYOUTS[layout]
    for spec in specs:
        if not row.holds(spec):
            message = f"--layout {layout} does not hold {spec.quant_type} in groups of {spec.group_size_or_none}"
            raise UsageError(message, hint=f"{DENSE_HINT} holds every merge")
    if not _mixes(layout, specs):
        message = f"--layout {layout} does not hold layers of several quant types or group sizes with offsets"
        mixing = [name for name in mixing_layouts(specs[0].quant_type, with_offsets=True) if name != DENSE]
        raise UsageError(message, hint=f"--layout {either(mixing)}, or {DENSE}")
    if options.scale_dtype is not None and options.scale_dtype not in row.scale_dtypes:
        raise UsageError(f"--layout {layout} has no {options.scale_dtype} scales", hint=", ".join(row.scale_dtypes))
