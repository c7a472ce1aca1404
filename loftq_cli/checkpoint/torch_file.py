"""Reading .bin, .pt and .pth checkpoints (zip files of torch.save) without running any code in the file.

Tensors are read in place from uncompressed members of the zip file, as described by the pickle inside
(torch_pickle.py); torch.load, pickle and zlib are never called.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.safetensors_file import rows_shape, tensor_from
from loftq_cli.checkpoint.torch_pickle import PickledTensor, read_state_dict
from loftq_cli.checkpoint.watched_file import CHUNK_NBYTES, WatchedFile
from loftq_cli.errors import InputError, printable
from loftq_cli.tensors.headers import ITEMSIZE, TensorRef

if TYPE_CHECKING:
    import torch

_MAX_PICKLE_NBYTES = 100_000_000  # the limit of a safetensors header
_MAX_DIRECTORY_NBYTES = 1 << 24  # 120,000 members at 130 bytes each, as torch.save writes
_MAX_VIEWS = 4  # most bytes of views over a storage, in sizes of the storage; tied weights need 2

_CONVERT = "convert it to .safetensors on a machine where you trust it"


class TorchFile:
    """A torch zip checkpoint: a flat dict of names to tensors, or a flat dict under "state_dict" or "model".

    Plain numbers and texts (an epoch, a version) may stand beside the inner dict and are left out. Any further object
    is refused by name unless the object is a tensor.

    tensors : name -> TensorRef, in the order of the dict; a tied tensor names the first owner in `alias_of`
    """

    def __init__(self, path: Path) -> None:
        """Read directory and pickle. Raises InputError with the file, and the entry for an entry without a tensor."""
        self.path = path
        self._file = WatchedFile.open(path)
        members = _read_members(self._file)
        root = _archive_root(members, path)
        _check_byteorder(self._file, members.get(f"{root}byteorder"))
        tensors = _read_state_dict(self._file, members[f"{root}data.pkl"])
        self.tensors: dict[str, TensorRef] = {}
        self._views: dict[str, _View] = {}
        self._collect(tensors, members, f"{root}data/")

    def load(self, name: str, *, pinned: bool = False) -> torch.Tensor:
        """Load a tensor, contiguous on the CPU, in fresh memory. `pinned` memory lets a GPU copy while computing.

        Raises StorageError when the file changed. Peak memory of a tensor not contiguous in the file: twice the tensor.
        """
        view = self._views[name]
        tensor = tensor_from(self._read(view), view.dtype, view.shape)
        return tensor.pin_memory() if pinned else tensor

    def load_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Load rows [start, stop) of the first dimension, [stop - start, ...]."""
        view = self._views[name]
        shape = rows_shape(view.shape, start, stop)
        offset = view.offset + start * view.stride[0] * ITEMSIZE[view.dtype]
        rows = _View(view.dtype, shape, view.stride, offset)
        return tensor_from(self._read(rows), rows.dtype, rows.shape)

    def chunks(self, name: str, chunk_nbytes: int = CHUNK_NBYTES) -> Iterator[memoryview]:
        """Yield the bytes of a tensor, little-endian and row-major, in pieces of at most `chunk_nbytes`.

        A tensor not contiguous in the file is loaded whole first.
        """
        if chunk_nbytes < 1:
            raise ValueError("chunk_nbytes is at least 1")
        view = self._views[name]
        if view.is_contiguous:
            return self._file.chunks(view.offset, self.tensors[name].nbytes, chunk_nbytes)
        data = memoryview(self._read(view))
        return (data[begin : begin + chunk_nbytes] for begin in range(0, len(data), chunk_nbytes))

    def sha256(self, name: str) -> str:
        """sha256 of the bytes of a tensor, as `chunks` yields the bytes."""
        view = self._views[name]
        if view.is_contiguous:
            return self._file.sha256(view.offset, self.tensors[name].nbytes)
        return hashlib.sha256(self._read(view)).hexdigest()

    def check_unchanged(self) -> None:
        """Raises StorageError when the file was replaced or rewritten since opening."""
        self._file.check_unchanged()

    def _collect(self, tensors: dict[str, PickledTensor], members: dict[str, _Member], prefix: str) -> None:
        first: dict[PickledTensor, str] = {}
        viewed: dict[str, int] = {}  # storage key -> bytes of all views
        for name, tensor in tensors.items():
            try:
                view = _place(tensor, members.get(prefix + tensor.storage.key))
                ref = TensorRef(name, tensor.dtype, tensor.shape, self.path, first.get(tensor))
                if ref.alias_of is None:
                    _count_view(viewed, tensor, ref.nbytes)
            except ValueError as exc:
                raise InputError(str(exc), file=self.path, tensor=name, hint=_CONVERT) from None
            first.setdefault(tensor, name)
            self.tensors[name] = ref
            self._views[name] = view

    def _read(self, view: _View) -> bytearray:
        """Read the elements of a view in row-major order."""
        nbytes = math.prod(view.shape) * ITEMSIZE[view.dtype]
        if view.is_contiguous:
            return self._file.read(view.offset, nbytes)
        span = view.span
        flat = tensor_from(self._file.read(view.offset, span * ITEMSIZE[view.dtype]), view.dtype, (span,))
        gathered = bytearray(nbytes)
        tensor_from(gathered, view.dtype, view.shape).copy_(flat.as_strided(view.shape, view.stride))
        return gathered


@dataclass(frozen=True, slots=True)
class _View:
    """The elements of a tensor: `offset` in bytes from the start of the file, `stride` in elements."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def span(self) -> int:
        """Elements from the first to the last, both included; 0 for an empty tensor."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return 0 in self.shape
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of the zip file: offset and size of the bytes."""

    offset: int
    nbytes: int


class _BoundedInput(io.FileIO):
    """A file with a limit on the zip directory, because zipfile reads the directory whole."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY_NBYTES:
            raise zipfile.BadZipFile(f"its directory claims {size} bytes")
        return super().read(size)

    def seek(self, position: int, whence: int = os.SEEK_SET, /) -> int:
        try:
            return super().seek(position, whence)
        except (OSError, OverflowError) as exc:
            raise zipfile.BadZipFile("its directory points outside the file") from exc


def _read_members(file: WatchedFile) -> dict[str, _Member]:
    """The members of the zip file. Raises InputError unless the file is a plain zip file of uncompressed members."""
    head = bytes(file.read(0, min(file.nbytes, 512)))
    if not head.startswith(b"PK\x03\x04"):
        raise InputError(_other_format(head), file=file.path, hint=_CONVERT)
    try:
        with file.opened() as descriptor:
            with zipfile.ZipFile(_BoundedInput(descriptor, closefd=False)) as archive:
                infos, end = archive.infolist(), archive.start_dir
            return _check_members(descriptor, infos, end)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as exc:
        raise InputError(f"is not a usable torch file: {exc}", file=file.path, hint=_CONVERT) from exc


def _other_format(head: bytes) -> str:
    if head[257:262] == b"ustar":
        return "is a tar file of a very old torch, which is not read here"
    if head.startswith(b"\x80"):
        return "is a bare pickle of the legacy torch format, which is not read here"
    return "is not a torch zip file"


def _check_members(descriptor: int, infos: list[zipfile.ZipInfo], end: int) -> dict[str, _Member]:
    members: dict[str, _Member] = {}
    covered = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name = printable(info.orig_filename, 80)
        if info.flag_bits & ~0x808 or info.compress_type != zipfile.ZIP_STORED:  # bit 3: sizes follow, 11: UTF-8
            raise ValueError(f"its member {name} is compressed or encrypted")
        if info.compress_size != info.file_size:
            raise ValueError(f"its member {name} has two sizes")
        is_outside = "\\" in info.filename or info.filename.startswith("/") or ".." in info.filename.split("/")
        if is_outside or info.filename != info.orig_filename:
            raise ValueError(f"its member {name} has a name that leads elsewhere")
        if info.filename in members:
            raise ValueError(f"its member {name} stands twice")
        if info.header_offset < covered:
            raise ValueError(f"its member {name} overlaps the one before it")
        offset = _data_offset(descriptor, info)
        covered = offset + info.file_size
        if covered > end:
            raise ValueError(f"its member {name} ends after the data")
        members[info.filename] = _Member(offset, info.file_size)
    return members


def _data_offset(descriptor: int, info: zipfile.ZipInfo) -> int:
    """Offset of the bytes of a member: after the local header. The header must agree with the directory.
    Source: APPNOTE.TXT 4.3.7.
    """
    fixed = os.pread(descriptor, 30, info.header_offset)
    if len(fixed) == 30:
        signature, _, flags, method, *_, name_nbytes, extra_nbytes = struct.unpack("<4s5H3I2H", fixed)
        name = os.pread(descriptor, name_nbytes, info.header_offset + 30)
        encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
        if (signature, flags, method, name) == (b"PK\x03\x04", info.flag_bits, 0, info.filename.encode(encoding)):
            return info.header_offset + 30 + int(name_nbytes) + int(extra_nbytes)
    raise ValueError(f"its member {printable(info.filename, 80)} is described in two ways")


def _archive_root(members: dict[str, _Member], path: Path) -> str:
    """The prefix of "data.pkl" in the member names, slash included."""
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if not pickles:
        raise InputError("holds no folder/data.pkl, where torch.save puts its pickle", file=path, hint=_CONVERT)
    if len(pickles) > 1:
        raise InputError(f"holds {len(pickles)} pickles named data.pkl, not one", file=path, hint=_CONVERT)
    return pickles[0].removesuffix("data.pkl")


def _check_byteorder(file: WatchedFile, member: _Member | None) -> None:
    if member is not None and file.read(member.offset, min(member.nbytes, 16)) != b"little":
        raise InputError("was not written on a little-endian machine", file=file.path, hint=_CONVERT)


def _read_state_dict(file: WatchedFile, member: _Member) -> dict[str, PickledTensor]:
    if member.nbytes > _MAX_PICKLE_NBYTES:
        message = f"its data.pkl has {member.nbytes} bytes; {_MAX_PICKLE_NBYTES} are allowed"
        raise InputError(message, file=file.path, hint=_CONVERT)
    try:
        return read_state_dict(file.read(member.offset, member.nbytes))
    except ValueError as exc:
        raise InputError(f"its data.pkl {exc}", file=file.path, hint=_CONVERT) from exc


def _place(tensor: PickledTensor, member: _Member | None) -> _View:
    """Place a tensor in the file. Raises ValueError for a tensor beyond the storage."""
    storage, itemsize = tensor.storage, ITEMSIZE[tensor.dtype]
    nbytes = storage.numel * (1 if storage.dtype is None else itemsize)
    if member is None or member.nbytes != nbytes:
        storage_size = "is missing" if member is None else f"has {member.nbytes} bytes"
        raise ValueError(f"its storage {printable(storage.key, 40)} should have {nbytes} bytes and {storage_size}")
    if any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride, strict=True)):
        raise ValueError(f"it is expanded (stride 0) to shape {list(tensor.shape)}, more than its storage holds")
    view = _View(tensor.dtype, tensor.shape, tensor.stride, member.offset + tensor.offset * itemsize)
    if (tensor.offset + view.span) * itemsize > nbytes or math.prod(tensor.shape) * itemsize > nbytes:
        raise ValueError(f"its shape {list(tensor.shape)} reaches outside its storage of {nbytes} bytes")
    return view


def _count_view(viewed: dict[str, int], tensor: PickledTensor, nbytes: int) -> None:
    key, storage = tensor.storage.key, tensor.storage
    viewed[key] = viewed.get(key, 0) + nbytes
    if viewed[key] > _MAX_VIEWS * storage.numel * (1 if storage.dtype is None else ITEMSIZE[tensor.dtype]):
        raise ValueError(f"it is one of too many views of storage {printable(key, 40)}")
