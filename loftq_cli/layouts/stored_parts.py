"""What reading a container has in common: its tensors against what the matrix they make must have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq_cli.errors import InputError, printable
from loftq_cli.layouts.stored_tensors import StoredTensors
from loftq_cli.tensors.headers import OutTensor


def file_of(part: str, stored: StoredTensors) -> Path:
    """The file that the tensor called `part` lies in; what is read, where there is no such tensor."""
    ref = stored.refs.get(part)
    return ref.file if ref is not None else stored.path


def check_part(part: OutTensor, stored: StoredTensors, file: Path, *, asks: str, flat: bool = False) -> None:
    """Raises InputError unless the tensor of that name has that dtype and shape; with `flat`, that many elements."""
    ref = stored.refs.get(part.name)
    if ref is not None and ref.dtype == part.dtype:
        is_flat = flat and math.prod(ref.shape) == math.prod(part.shape) == max(ref.shape, default=0)
        if ref.shape == part.shape or is_flat:
            return
    found = "missing" if ref is None else f"{ref.dtype} {ref.shape}"
    expected = f"{asks} asks for {part.dtype} {part.shape}"
    raise InputError(f"is {found}, and {expected}", file=file if ref is None else ref.file, tensor=part.name)


def quantization_config(stored: StoredTensors, quant_method: str) -> Mapping[str, Any] | None:
    """The quantization_config of config.json, if it is one of `quant_method`."""
    found = stored.config.get("quantization_config")
    return found if isinstance(found, dict) and found.get("quant_method") == quant_method else None


def whole_number(values: Mapping[str, Any], key: str, stored: StoredTensors, *, least: int = 1) -> int:
    """A number of the quantization_config. Raises InputError."""
    value = values.get(key)
    if type(value) is not int or value < least:
        what = f"its quantization_config has {key} {printable(repr(value), 80)}, not a whole number from {least} up"
        raise InputError(what, file=stored.config_file)
    return value
