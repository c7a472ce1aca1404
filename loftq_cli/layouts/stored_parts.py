"""Checks that all containers share while they read: stored tensors against the plan of a matrix, keys of a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq_cli.errors import InputError, printable
from loftq_cli.layouts.stored_tensors import StoredTensors
from loftq_cli.tensors.headers import OutTensor


def file_of(part: str, stored: StoredTensors) -> Path:
    """The file of the tensor called `part`; the path of the whole model for a tensor that is missing."""
    ref = stored.refs.get(part)
    return ref.file if ref is not None else stored.path


def check_part(part: OutTensor, stored: StoredTensors, file: Path, *, asks: str, flat: bool = False) -> None:
    """Raises InputError unless `stored` has the tensor `part` in this dtype and shape. `flat` accepts any shape of a
    single long side with the right number of elements.
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
    """The quantization_config of config.json; None for a config with another quant_method, or without any."""
    config = stored.config.get("quantization_config")
    return config if isinstance(config, dict) and config.get("quant_method") == quant_method else None


def whole_number(values: Mapping[str, Any], key: str, stored: StoredTensors, *, least: int = 1) -> int:
    """A number of the quantization_config. Raises InputError for anything but a whole number from `least` up."""
    value = values.get(key)
    if type(value) is not int or value < least:
        message = f"its quantization_config has {key} {printable(repr(value), 80)}, not a whole number from {least} up"
        raise InputError(message, file=stored.config_file)
    return value
