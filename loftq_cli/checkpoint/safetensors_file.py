"""Reading .safetensors files with distrust: the header is checked against every rule of the format before any number is
read, including rules without a check in the safetensors library (repeated keys, unknown keys).

Format: https://github.com/huggingface/safetensors#format. Reading a header needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.json_files import parse_json_object
from loftq_cli.checkpoint.watched_file import CHUNK_NBYTES, WatchedFile
from loftq_cli.errors import InputError, printable
from loftq_cli.tensors.headers import ITEMSIZE, TensorRef

if TYPE_CHECKING:
    import torch

# Short name -> torch dtype name, in the sorting order of safetensors' writer (last dtypes first).
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}

_MAX_HEADER_NBYTES = 100_000_000  # limit of the format
_MAX_NDIM = 64  # limit of torch
_MAX_DIM = 1 << 48
_MAX_NBYTES = 1 << 62  # torch overflows computing larger sizes, even for a tensor without elements
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_DAMAGED = "the file is damaged or of another kind; download it again"


class SafetensorsFile:
    """A .safetensors file.

    tensors  : name -> TensorRef, in the order of the data
    metadata : `__metadata__` of the file; empty without metadata
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header. Raises InputError naming file and tensor when the header breaks a rule."""
        self.path = path
        self._file = WatchedFile.open(path)
        header, data_begin = _read_header(self._file)
        self.metadata = _check_metadata(header.pop("__metadata__", {}), path)
        entries = sorted(
            (_check_entry(name, value, path) for name, value in header.items()),
            key=lambda entry: (entry.begin, entry.end),
        )
        _check_cover(entries, self._file.nbytes - data_begin, path)
        self.tensors = {entry.ref.name: entry.ref for entry in entries}
        self._offsets = {entry.ref.name: data_begin + entry.begin for entry in entries}

    def load(self, name: str, *, pinned: bool = False) -> torch.Tensor:
        """Load a tensor, contiguous on the CPU, in fresh memory. `pinned` memory lets a GPU copy while computing.

        Raises StorageError when the file changed.
        """
        ref = self.tensors[name]
        tensor, memory = unread_tensor(ref.dtype, ref.shape, pinned=pinned)
        self._file.read_into(self._offsets[name], memory)
        return tensor

    def load_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Load rows [start, stop) of the first dimension, [stop - start, ...]; no further rows are read."""
        ref = self.tensors[name]
        shape = rows_shape(ref.shape, start, stop)
        row_nbytes = math.prod(shape[1:]) * ITEMSIZE[ref.dtype]
        tensor, memory = unread_tensor(ref.dtype, shape)
        self._file.read_into(self._offsets[name] + start * row_nbytes, memory)
        return tensor

    def chunks(self, name: str, chunk_nbytes: int = CHUNK_NBYTES) -> Iterator[memoryview]:
        """Yield the bytes of a tensor, little-endian and row-major, in pieces of at most `chunk_nbytes`."""
        return self._file.chunks(self._offsets[name], self.tensors[name].nbytes, chunk_nbytes)

    def sha256(self, name: str) -> str:
        """sha256 of the bytes of a tensor, as `chunks` yields the bytes."""
        return self._file.sha256(self._offsets[name], self.tensors[name].nbytes)

    def file_sha256(self) -> str:
        """sha256 of all bytes of the file, the header included. Raises StorageError when the file changed."""
        return self._file.sha256(0, self._file.nbytes)

    def check_unchanged(self) -> None:
        """Raises StorageError when the file was replaced or rewritten since opening."""
        self._file.check_unchanged()


def tensor_from(buffer: bytearray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """View `buffer`, of exactly the right size, as a tensor of `shape` and `dtype`; the memory is shared.

    >>> tensor_from(bytearray(b"\\x01\\x02\\x03"), "uint8", (3,)).tolist()
    [1, 2, 3]
    """
    import torch

    torch_dtype: torch.dtype = getattr(torch, dtype)
    if not buffer:  # frombuffer refuses empty buffers
        return torch.empty(shape, dtype=torch_dtype)
    return torch.frombuffer(buffer, dtype=torch_dtype).reshape(shape)


def unread_tensor(dtype: str, shape: tuple[int, ...], *, pinned: bool = False) -> tuple[torch.Tensor, memoryview]:
    """Allocate an uninitialized tensor of `shape` and `dtype`; return the tensor and the bytes of the tensor, writable.

    >>> tensor, memory = unread_tensor("uint8", (2,))
    >>> memory[:] = bytes([5, 6])
    >>> tensor.tolist()
    [5, 6]
    """
    import torch

    flat = torch.empty(math.prod(shape) * ITEMSIZE[dtype], dtype=torch.uint8, pin_memory=pinned)
    return flat.view(getattr(torch, dtype)).reshape(shape), flat.numpy().data


def rows_shape(shape: tuple[int, ...], start: int, stop: int) -> tuple[int, ...]:
    """The shape of rows [start, stop) of a tensor of `shape`. Raises ValueError for rows outside the tensor.

    >>> rows_shape((4, 64), 1, 3)
    (2, 64)
    """
    if not shape or not 0 <= start <= stop <= shape[0]:
        raise ValueError(f"no rows {start}:{stop} in a tensor of shape {list(shape)}")
    return (stop - start, *shape[1:])


def checked_shape(shape: Any, itemsize: int) -> tuple[int, ...]:
    """Return a shape as a tuple of sizes within torch's limits, for elements of `itemsize` bytes. Raises ValueError
    with the reason otherwise.

    >>> checked_shape([2, 3], itemsize=4)
    (2, 3)
    """
    if not isinstance(shape, (list, tuple)) or len(shape) > _MAX_NDIM:
        raise ValueError(f"its shape is not a list of at most {_MAX_NDIM} sizes")
    if not all(type(size) is int and 0 <= size <= _MAX_DIM for size in shape):
        raise ValueError("its shape holds something that is not a size")
    if math.prod(size or 1 for size in shape) * itemsize > _MAX_NBYTES:
        raise ValueError("its shape is larger than any memory")
    return tuple(shape)


def is_tensor_name(name: object) -> bool:
    """True if `name` is non-empty text with an encoding in UTF-8 (a lone surrogate has no encoding).

    >>> is_tensor_name("lm_head.weight"), is_tensor_name("")
    (True, False)
    """
    try:
        return isinstance(name, str) and len(name.encode()) > 0
    except UnicodeEncodeError:
        return False


@dataclass(frozen=True, slots=True)
class _Entry:
    ref: TensorRef
    begin: int
    end: int


def _read_header(file: WatchedFile) -> tuple[dict[str, Any], int]:
    """The header object, and the offset of the data."""
    if file.nbytes < 8:
        raise InputError("is too short for a safetensors file", file=file.path, hint=_DAMAGED)
    header_nbytes = int.from_bytes(file.read(0, 8), "little")
    if header_nbytes > _MAX_HEADER_NBYTES:
        message = f"its header claims {header_nbytes} bytes; {_MAX_HEADER_NBYTES} are allowed"
        raise InputError(message, file=file.path, hint=_DAMAGED)
    if header_nbytes > file.nbytes - 8:
        message = f"its header claims {header_nbytes} bytes; the file has {file.nbytes}"
        raise InputError(message, file=file.path, hint=_DAMAGED)
    data = file.read(8, header_nbytes)
    if not data.startswith(b"{"):
        raise InputError("the header does not begin with {", file=file.path, hint=_DAMAGED)
    return parse_json_object(data, file=file.path, what="the header"), 8 + header_nbytes


def _check_metadata(metadata: Any, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("the header's __metadata__ does not map text to text", file=path, hint=_DAMAGED)
    return metadata


def _check_entry(name: str, entry: Any, path: Path) -> _Entry:
    try:
        if not is_tensor_name(name):
            raise ValueError("its name is empty or not Unicode text")
        if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
            raise ValueError("its header entry does not hold exactly dtype, shape and data_offsets")
        dtype = _check_dtype(entry["dtype"])
        shape = checked_shape(entry["shape"], ITEMSIZE[dtype])
        ref = TensorRef(name, dtype, shape, path)
        begin, end = _check_offsets(entry["data_offsets"])
        if end - begin != ref.nbytes:
            raise ValueError(f"its shape and dtype make {ref.nbytes} bytes, its offsets {end - begin}")
    except ValueError as exc:
        raise InputError(str(exc), file=path, tensor=name, hint=_DAMAGED) from None
    return _Entry(ref, begin, end)


def _check_dtype(dtype: Any) -> str:
    if not isinstance(dtype, str):
        raise ValueError("its dtype is not text")
    if dtype not in DTYPES:
        raise ValueError(f"its dtype {printable(dtype, 40)} is not known")
    return DTYPES[dtype]


def _check_offsets(offsets: Any) -> tuple[int, int]:
    if isinstance(offsets, list) and len(offsets) == 2:
        begin, end = offsets
        if type(begin) is int and type(end) is int and 0 <= begin <= end:
            return begin, end
    raise ValueError("its data_offsets are not two numbers in ascending order")


def _check_cover(entries: list[_Entry], data_nbytes: int, path: Path) -> None:
    """Refuse data with holes or overlaps: tensors fill the data from the first byte to the last, side by side."""
    covered = 0
    for entry in entries:
        if entry.begin != covered:
            flaw = "overlaps the tensor before it" if entry.begin < covered else "leaves a hole before it"
            raise InputError(f"its data {flaw}", file=path, tensor=entry.ref.name, hint=_DAMAGED)
        if entry.end > data_nbytes:
            message = f"its data ends at byte {entry.end}; the file holds {data_nbytes} bytes of data"
            raise InputError(message, file=path, tensor=entry.ref.name, hint=_DAMAGED)
        covered = entry.end
    if covered != data_nbytes:
        message = f"{data_nbytes - covered} bytes after the last tensor belong to nothing"
        raise InputError(message, file=path, hint=_DAMAGED)
