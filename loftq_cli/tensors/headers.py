"""Records of tensors from headers, and the dtypes of files and models. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Dtype names of torch -> bytes per element. Short names of safetensors ("BF16") stay inside checkpoint/ and output/.
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
# Dtypes of quantizable weights. A float8 weight has scales in separate tensors, so float8 is no plain weight.
WEIGHT_DTYPES = ("float32", "bfloat16", "float16", "float64")
FLOAT_PREFIXES = ("float", "bfloat", "complex")  # dtype names of numbers that may be NaN or infinite
# Dtypes of a model's arithmetic. Merged or copied tensors are cast to a dtype of the list.
MODEL_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of a checkpoint, as described by a header; no number is read.

    `alias_of` names an earlier tensor in shared memory (tied weights in a torch file).
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
    """The path of config.json in the folder of the tensors; None without tensors.

    >>> ref = TensorRef("lm_head.weight", "bfloat16", (2, 3), file=Path("model/model.safetensors"))
    >>> config_file_beside([ref]).as_posix(), config_file_beside([])
    ('model/config.json', None)
    """
    ref = next(iter(refs), None)
    return None if ref is None else ref.file.parent / "config.json"


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor of the output, known from the plan before any number is read."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]
