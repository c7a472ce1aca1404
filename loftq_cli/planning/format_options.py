"""The number format of a recipe: missing options get a default, options of the other kind of format are refused."""

from __future__ import annotations

from collections.abc import Collection

from loftq_cli.errors import UsageError
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.methods.method import METHODS
from loftq_cli.planning.recipe import AffineOptions, CodebookOptions, FormatOptions, RecipeFields
from loftq_cli.quant.formats import FORMATS
from loftq_cli.tensors.headers import MODEL_DTYPES

CODEBOOK_OPTIONS = ("block_size", "double_quant")
AFFINE_OPTIONS = ("group_size", "symmetric", "scale_dtype")

_BLOCK_SIZE, _GROUP_SIZE = 64, 64


def settle_format(fields: RecipeFields, quant_type: str, layout: str, typed: Collection[str] = ()) -> FormatOptions:
    """The number format `quant_type` with the options that `fields` ask for, and defaults for the others.

    layout   the container, a key of LAYOUTS
    typed    names of options that the user typed as flags, for the hint

    Raises UsageError for an option of the other kind of format, and for a size that the format does not have.

    >>> settle_format(RecipeFields(), "nf4", "bitsandbytes")
    CodebookOptions(quant_type='nf4', block_size=64, double_quant=True)
    """
    is_affine = FORMATS[quant_type].is_affine
    for name in CODEBOOK_OPTIONS if is_affine else AFFINE_OPTIONS:
        if getattr(fields, name) is not None:
            refuse(name, f"quant_type {quant_type}", typed)
    check_sizes(quant_type, fields.block_size, fields.group_size)
    if not is_affine:
        has_double_quant = True if fields.double_quant is None else fields.double_quant
        return CodebookOptions(quant_type, fields.block_size or _BLOCK_SIZE, has_double_quant)
    if fields.scale_dtype is not None:
        check_choice("scale_dtype", fields.scale_dtype, MODEL_DTYPES)
    symmetric = _default_symmetry(fields, quant_type, layout) if fields.symmetric is None else fields.symmetric
    return AffineOptions(quant_type, fields.group_size or _GROUP_SIZE, symmetric, fields.scale_dtype)


def check_layout(options: FormatOptions, layout: str) -> None:
    """Raises UsageError for a number format that the container called `layout` does not hold."""
    row, quant_type = LAYOUTS[layout], options.quant_type
    if quant_type not in row.quant_types:
        holding = ", ".join(name for name, other in LAYOUTS.items() if quant_type in other.quant_types)
        raise UsageError(f"layout {layout} does not hold {quant_type}", hint=f"one of {holding}")
    if isinstance(options, CodebookOptions):
        return
    if row.group_sizes and options.group_size not in row.group_sizes:
        sizes = ", ".join(map(str, row.group_sizes))
        raise UsageError(f"layout {layout} does not hold groups of {options.group_size}", hint=f"one of {sizes}")
    if options.symmetric and row.zero_point == "float":
        raise UsageError(f"layout {layout} stores an offset for every group", hint="--asymmetric")
    if options.scale_dtype is not None and options.scale_dtype not in row.scale_dtypes:
        dtypes = ", ".join(row.scale_dtypes)
        raise UsageError(f"layout {layout} has no {options.scale_dtype} scales", hint=f"one of {dtypes}")


def check_sizes(quant_type: str, block_size: int | None, group_size: int | None) -> None:
    """Raises UsageError for a size of blocks or groups that the format called `quant_type` does not have."""
    row = FORMATS[quant_type]
    for name, size, sizes in (
        ("block_size", block_size, row.block_sizes),
        ("group_size", group_size, row.group_sizes),
    ):
        if size is not None and size not in sizes:
            raise UsageError(
                f"{name} {size} does not exist for {quant_type}",
                hint=f"one of {', '.join(map(str, sizes))}" if sizes else f"leave {name} out",
            )


def check_choice(name: str, value: str | None, choices: Collection[str]) -> None:
    """Raises UsageError unless `value` of the option `name` is one of `choices`."""
    if value not in choices:
        raise UsageError(f"{name} {value!r} does not exist", hint=f"one of {', '.join(choices)}")


def refuse(name: str, where: str, typed: Collection[str] = ()) -> None:
    """Raises UsageError: the option `name` means nothing `where` it was asked for. The hint spells the option as the
    user did: as a flag where `typed` has the name, else as the key of a file.
    """
    spelled = f"--{name.replace('_', '-')}" if name in typed else name
    raise UsageError(f"{name} means nothing with {where}", hint=f"leave {spelled} out")


def _default_symmetry(fields: RecipeFields, quant_type: str, layout: str) -> bool:
    """Whether integers have no zero points. Servers' 8-bit kernels read symmetric weights; with fewer bits a zero point
    is worth its space.
    """
    row = LAYOUTS[layout]
    if row.zero_point == "float" or (fields.method is not None and METHODS[fields.method].is_pooled):
        return False
    is_mixed = any(override.quant_type or override.group_size for override in fields.override or ())
    return quant_type == "int8" or (is_mixed and row.mixed == "symmetric")
