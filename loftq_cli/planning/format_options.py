"""The number format of a recipe: absent options get a default, options without meaning for the format are refused."""

from __future__ import annotations

from collections.abc import Collection

from loftq_cli.errors import UsageError
from loftq_cli.layouts.foreign_names import foreign_hint
from loftq_cli.layouts.layout import DENSE_HINT, LAYOUTS, either
from loftq_cli.methods.method import METHODS
from loftq_cli.planning.recipe import AffineOptions, CodebookOptions, FormatOptions, RecipeFields
from loftq_cli.quant.formats import FORMATS
from loftq_cli.tensors.headers import MODEL_DTYPES
from loftq_cli.tensors.libraries import DEFAULT_LIBRARY, Library

CODEBOOK_OPTIONS = ("block_size", "double_quant")
AFFINE_OPTIONS = ("group_size", "symmetric", "scale_dtype")

_BLOCK_SIZE, _GROUP_SIZE = 64, 64


def settle_format(fields: RecipeFields, quant_type: str, layout: str, typed: Collection[str] = ()) -> FormatOptions:
    """Settle the number format: the options in `fields`, and defaults for absent options.

    fields       the requested options; only options of number formats, the method and the overrides are read
    quant_type   the number format, a key of FORMATS
    layout       the container, a key of LAYOUTS
    typed        names of options from the command line; the hint spells a typed option as a flag

    Raises UsageError for an integer option beside a codebook, for a codebook option beside integers, and for a block
    size or group size unknown to the format.

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


def check_library(layout: str, library: Library) -> None:
    """Raises UsageError when `library` has no loader for the container called `layout`. The default library is checked
    where a container needs more than a loader.

    >>> from loftq_cli.tensors.libraries import library_of
    >>> check_library("gptq", library_of({"_class_name": "UNet2DModel"}))
    Traceback (most recent call last):
    loftq_cli.errors.UsageError: diffusers loads no base in gptq (--quant-type nf4 or fp4, or --layout dense)
    """
    if library is DEFAULT_LIBRARY or library.name in LAYOUTS[layout].libraries:
        return
    rows = [row for row in LAYOUTS.values() if library.name in row.libraries and row.stores_codes]
    quant_types = either([quant_type for row in rows for quant_type in row.quant_types])
    hint = f"--quant-type {quant_types}, or {DENSE_HINT}"
    raise UsageError(f"{library.name} loads no base in {layout}", hint=hint)


def check_layout(options: FormatOptions, layout: str) -> None:
    """Raises UsageError unless the container called `layout` holds the number format.

    options   the settled number format
    layout    a key of LAYOUTS

    >>> check_layout(CodebookOptions("nf4", 64, double_quant=True), "gptq")
    Traceback (most recent call last):
    loftq_cli.errors.UsageError: layout gptq does not hold nf4 (one of bitsandbytes, dense)
    """
    row, quant_type = LAYOUTS[layout], options.quant_type
    if quant_type not in row.quant_types:
        holding = ", ".join(name for name, candidate in LAYOUTS.items() if quant_type in candidate.quant_types)
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
    """Raises UsageError for a block size or group size unknown to the format called `quant_type`.

    quant_type   a key of FORMATS
    block_size   weights with a common absmax; None is right for every format
    group_size   columns with a common scale; None is right for every format

    >>> check_sizes("nf4", block_size=64, group_size=32)
    Traceback (most recent call last):
    loftq_cli.errors.UsageError: group_size 32 does not exist for nf4 (leave group_size out)
    """
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
    """Raises UsageError unless `value`, the value of the option called `name`, is among `choices`.

    >>> check_choice("svd", "slow", ["fast", "exact"])
    Traceback (most recent call last):
    loftq_cli.errors.UsageError: svd 'slow' does not exist (one of fast, exact)
    """
    if value in choices:
        return
    hint = f"one of {', '.join(choices)}"
    if value is not None and value.lower() in choices:
        hint = f"write {value.lower()}"
    elif value is not None and name == "quant_type":
        hint = foreign_hint(value) or hint
    raise UsageError(f"{name} {value!r} does not exist", hint=hint)


def refuse(name: str, where: str, typed: Collection[str] = ()) -> None:
    """Raises UsageError: the option called `name` means nothing.

    where   the setting without a meaning for the option, as words after "with"
    typed   names of options from the command line; the hint spells a typed option as a flag, and other options as keys

    >>> refuse("block_size", "quant_type int4", typed=["block_size"])
    Traceback (most recent call last):
    loftq_cli.errors.UsageError: block_size means nothing with quant_type int4 (leave --block-size out)
    """
    spelled = f"--{name.replace('_', '-')}" if name in typed else name
    raise UsageError(f"{name} means nothing with {where}", hint=f"leave {spelled} out")


def _default_symmetry(fields: RecipeFields, quant_type: str, layout: str) -> bool:
    """Whether integers are symmetric, so without zero points, when the user leaves the choice open.

    Servers' 8-bit kernels read symmetric weights. A zero point is worth the space when codes have fewer bits.
    Pooled adapters merge into zero points, and containers of float offsets hold an offset for every group. Overrides
    of format or group size become symmetric where loaders mix symmetric formats only.
    """
    row = LAYOUTS[layout]
    if row.zero_point == "float" or (fields.method is not None and METHODS[fields.method].is_pooled):
        return False
    is_mixed = any(override.quant_type or override.group_size for override in fields.override or ())
    return quant_type == "int8" or (is_mixed and row.mixed == "symmetric")
