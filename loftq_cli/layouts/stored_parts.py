"""Checks for reading any container: stored tensors against the plan of a matrix, keys of a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.quantized_source import SIDE_FILE
from loftq_cli.errors import InputError, printable
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.layouts.stored_tensors import StoredTensors
from loftq_cli.tensors.headers import OutTensor


def file_of(part: str, stored: StoredTensors) -> Path:
    """The file of a stored tensor, for an error; the path of the model for an absent tensor.

    part     tensor name
    stored   the stored tensors
    """
    ref = stored.refs.get(part)
    return ref.file if ref is not None else stored.path


def check_part(part: OutTensor, stored: StoredTensors, file: Path, *, asks: str, flat: bool = False) -> None:
    """Raises InputError unless a stored tensor has the planned dtype and shape.

    part     name, dtype and shape in the plan of a matrix
    stored   the stored tensors
    file     file for the error about an absent tensor
    asks     the source of the plan, as words for the error
    flat     accepts any shape of a single long side with the right number of elements
    """
    ref = stored.refs.get(part.name)
    if ref is not None and ref.dtype == part.dtype:
        is_flat = flat and math.prod(ref.shape) == math.prod(part.shape) == max(ref.shape, default=0)
        if ref.shape == part.shape or is_flat:
            return
    stored_form = "missing" if ref is None else f"{ref.dtype} {ref.shape}"
    expected = f"{asks} asks for {part.dtype} {part.shape}"
    raise InputError(f"is {stored_form}, and {expected}", file=file if ref is None else ref.file, tensor=part.name)


def quantization_config(stored: StoredTensors, quant_method: str) -> Mapping[str, Any] | None:
    """The quantization_config of config.json, or of the container's side file; None for a config with a different
    quant_method, or without an entry.

    stored         the stored tensors and the config
    quant_method   the container's name in the config
    """
    config = stored.config.get("quantization_config")
    if not isinstance(config, dict):
        return None
    side_file = config.get(SIDE_FILE)
    is_from_side_file = side_file is not None and side_file == LAYOUTS[quant_method].side_file
    return config if is_from_side_file or config.get("quant_method") == quant_method else None


def whole_number(values: Mapping[str, Any], key: str, stored: StoredTensors, *, least: int = 1) -> int:
    """Read a whole number from a config.

    values   the object of the config with the number
    key      the key of the number
    stored   the stored tensors, for errors
    least    the smallest allowed number

    Raises InputError for anything but a whole number from `least` up.
    """
    value = values.get(key)
    if type(value) is not int or value < least:
        message = f"its quantization_config has {key} {printable(repr(value), 80)}, not a whole number from {least} up"
        raise InputError(message, file=stored.config_file)
    return value
