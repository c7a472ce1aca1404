"""Tensors as headers describe them, and the dtypes that files and models use. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# torch's own dtype names -> bytes per element. safetensors' short names ("BF16") stay inside checkpoint/.
ITEMSIZE = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
    "complex64": 8,
}
# What a weight may be stored in to be quantized. float8 needs scales that live in other tensors: not a plain weight.
WEIGHT_DTYPES = ("float32", "bfloat16", "float16", "float64")
# What a model may compute in, and what a merged or copied tensor may be cast to.
MODEL_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor of a checkpoint, as its header describes it: nothing is read until it is asked for.

    `alias_of` names an earlier tensor that is the same memory (tied weights in a torch file).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    alias_of: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


def config_file_beside(refs: Iterable[TensorRef]) -> Path | None:
    """Where the config.json of a model with these tensors lies: in the folder of its weights."""
    ref = next(iter(refs), None)
    return None if ref is None else ref.file.parent / "config.json"


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor that will be written: known from the plan, before any number is."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]
