"""Header-first writing of .safetensors files: the plan knows every name, dtype and shape, so the layout comes first and
tensors follow in any order. Bytes equal a file written by safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.safetensors_file import DTYPES, rows_shape, unread_tensor
from loftq_cli.errors import StorageError
from loftq_cli.output import disk
from loftq_cli.tensors.headers import ITEMSIZE, OutTensor

if TYPE_CHECKING:
    import torch


def safetensors_layout(
    tensors: Sequence[OutTensor], metadata: Mapping[str, str] = MappingProxyType({})
) -> tuple[bytes, dict[str, int], int]:
    """Lay out a file: the header bytes, the offset of each tensor, and the size of the file in bytes.

    Wide dtypes come first, then names in order, so every tensor is aligned and the layout depends on nothing else.
    `__metadata__` holds a single key, and after that key the keys of `metadata`: the order of several keys in
    safetensors' writer varies between processes.

    >>> header, offsets, nbytes = safetensors_layout([OutTensor("b", "uint8", (2,)), OutTensor("a", "float32", (3,))])
    >>> nbytes - len(header), offsets["b"] - offsets["a"]
    (14, 12)
    """
    rank = {dtype: place for place, dtype in enumerate(DTYPES.values())}
    short_name = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offsets: dict[str, int] = {}
    end = 0
    for tensor in sorted(tensors, key=lambda t: (-rank[t.dtype], t.name.encode())):
        entries[tensor.name] = {
            "dtype": short_name[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        offsets[tensor.name] = end
        end += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    start = 8 + len(header)
    return (
        struct.pack("<Q", len(header)) + header,
        {name: start + offset for name, offset in offsets.items()},
        start + end,
    )


class NotDurableError(StorageError):
    """The system could not bring a file to the disk: written bytes of finished units may be lost."""


@dataclass(slots=True)
class _OpenFile:
    """A descriptor, and the number of threads that use the descriptor now."""

    descriptor: int
    users: int = 0


class Descriptors:
    """Descriptors of output files, for several threads. Of more files than `most`, the file used longest ago is brought
    to the disk and closed, and opened again on the next use: a run with thousands of files needs few descriptors.

    most   most files to keep open; None takes half of the descriptors that the process may have
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = _half_of_all_descriptors() if most is None else most
        self._files: dict[Path, _OpenFile] = {}  # the file used last comes last
        self._inodes: dict[Path, int] = {}
        self._lock = Lock()

    @contextmanager
    def of(self, path: Path) -> Iterator[int]:
        """Yield a descriptor of the file `path` during the block; an absent file is made at the first use. Raises
        StorageError when the disk refuses, or when another file has taken the name since the first use.
        """
        with self._lock:
            file = self._files.pop(path, None) or _OpenFile(self._opened(path))
            self._files[path] = file
            file.users += 1
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.users -= 1
                self._close_surplus()

    def sync(self, path: Path) -> None:
        """Return when all bytes written to `path` are on the disk. Raises StorageError otherwise."""
        with self._lock:
            is_open = path in self._files
        if is_open:  # a closed file is on the disk
            with self.of(path) as descriptor:
                disk.sync(descriptor, path)

    def close(self, path: Path) -> None:
        """Close `path` without a sync."""
        with self._lock:
            file = self._files.pop(path, None)
        if file is not None:
            os.close(file.descriptor)

    def _opened(self, path: Path) -> int:
        descriptor = disk.open_file(path)
        inode = os.fstat(descriptor).st_ino
        if self._inodes.setdefault(path, inode) != inode:
            os.close(descriptor)
            raise StorageError("was replaced by another file while it was written", file=path)
        return descriptor

    def _close_surplus(self) -> None:
        idle = [path for path, file in self._files.items() if not file.users][: max(0, len(self._files) - self._most)]
        for path in idle:
            file = self._files.pop(path)
            try:
                disk.sync(file.descriptor, path)
            except StorageError as error:
                raise NotDurableError(error.message, file=path, hint=error.hint) from None
            finally:
                os.close(file.descriptor)


def _half_of_all_descriptors() -> int:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 16 if most == resource.RLIM_INFINITY else most // 2


class SafetensorsWriter:
    """An output file, open for writing. An existing file of the right size is kept, for a resumed run."""

    def __init__(
        self,
        path: Path,
        tensors: Sequence[OutTensor],
        metadata: Mapping[str, str] = MappingProxyType({}),
        descriptors: Descriptors | None = None,
    ) -> None:
        """Lay out `path` for `tensors`. `descriptors` are shared with other files. Raises StorageError when the disk
        refuses.
        """
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._descriptors = descriptors or Descriptors()
        header, self._offsets, size = safetensors_layout(tensors, metadata)
        with self._descriptors.of(path) as descriptor:
            disk.resize(descriptor, size, path)
            disk.write_at(descriptor, 0, header, path)

    def write(self, name: str, tensor: torch.Tensor) -> str:
        """Write a whole tensor; return the sha256 of the bytes.

        Raises ValueError when dtype or shape differ from the plan.
        """
        planned = self._tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype != planned.dtype or tuple(tensor.shape) != planned.shape:
            raise ValueError(f"{name} is {dtype} {tuple(tensor.shape)}, planned were {planned.dtype} {planned.shape}")
        return self.write_chunks(name, [tensor_bytes(tensor)])

    def write_chunks(self, name: str, chunks: Iterable[memoryview]) -> str:
        """Write the bytes of a tensor, in order; return the sha256 of the bytes.

        Raises ValueError when the number of bytes differs from the plan.
        """
        place = self.place(name)
        for chunk in chunks:
            place.append(chunk)
        return place.close()

    def place(self, name: str) -> TensorPlace:
        """The place of a tensor, to be filled from the beginning to the end."""
        start = self._offsets[name]
        return TensorPlace(name, start, start + self._tensors[name].nbytes, self._write_at)

    def load(self, name: str) -> torch.Tensor:
        """Read back a whole tensor from the file."""
        planned = self._tensors[name]
        return self._read(planned.dtype, planned.shape, self._offsets[name])

    def load_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read back rows [start, stop) of a tensor from the file."""
        planned = self._tensors[name]
        shape = rows_shape(planned.shape, start, stop)
        row_nbytes = math.prod(shape[1:]) * ITEMSIZE[planned.dtype]
        return self._read(planned.dtype, shape, self._offsets[name] + start * row_nbytes)

    def _read(self, dtype: str, shape: tuple[int, ...], position: int) -> torch.Tensor:
        tensor, view = unread_tensor(dtype, shape)
        with self._descriptors.of(self.path) as descriptor:
            while view:
                try:
                    count = os.preadv(descriptor, [view], position)
                except OSError as error:
                    raise disk.storage_error(error, self.path) from None
                if not count:
                    raise StorageError("the file became shorter while it was written", file=self.path)
                view, position = view[count:], position + count
        return tensor

    def sha256(self, name: str) -> str:
        """sha256 of the bytes at the place of a tensor, read back from the file."""
        digest = hashlib.sha256()
        position = self._offsets[name]
        end = position + self._tensors[name].nbytes
        with self._descriptors.of(self.path) as descriptor:
            while position < end:
                chunk = os.pread(descriptor, min(1 << 22, end - position), position)
                if not chunk:
                    raise StorageError("the file became shorter while it was written", file=self.path)
                digest.update(chunk)
                position += len(chunk)
        return digest.hexdigest()

    def sync(self) -> None:
        """Return when all written bytes are on the disk. Raises StorageError otherwise."""
        self._descriptors.sync(self.path)

    def close(self) -> None:
        """Close the file."""
        self._descriptors.close(self.path)

    def _write_at(self, position: int, data: bytes | memoryview) -> None:
        with self._descriptors.of(self.path) as descriptor:
            disk.write_at(descriptor, position, data, self.path)


class TensorPlace:
    """The place of a tensor in a file open for writing."""

    def __init__(self, name: str, start: int, end: int, write_at: Callable[[int, bytes | memoryview], None]) -> None:
        self._name, self._start, self._position, self._end = name, start, start, end
        self._write_at, self._digest = write_at, hashlib.sha256()

    def append(self, data: bytes | memoryview) -> None:
        """Write the next bytes. Raises ValueError for more bytes than planned."""
        if self._position + len(data) > self._end:
            raise ValueError(f"{self._name} has more bytes than planned")
        self._write_at(self._position, data)
        self._digest.update(data)
        self._position += len(data)

    def close(self) -> str:
        """Return the sha256 of all bytes. Raises ValueError for fewer bytes than planned."""
        if self._position != self._end:
            n_written, planned = self._position - self._start, self._end - self._start
            raise ValueError(f"{self._name} has {n_written} bytes, planned were {planned}")
        return self._digest.hexdigest()


class OutputFiles:
    """Output files, open for writing, and the writer of each tensor by tensor name. Most of many files are closed when
    nobody writes or reads, see `Descriptors`.
    """

    def __init__(
        self,
        directory: Path,
        files: Mapping[str, Sequence[OutTensor]],
        metadata: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    ) -> None:
        """Lay out `files`, relative name -> tensors; `metadata` is relative name -> keys of the header. Raises
        StorageError when the disk refuses.
        """
        self._files, descriptors = files, Descriptors()
        self._writers: list[SafetensorsWriter] = []
        self._writer_of: dict[str, SafetensorsWriter] = {}
        for name, tensors in files.items():
            disk.make_directory((directory / name).parent)
            writer = SafetensorsWriter(directory / name, tensors, metadata.get(name, {}), descriptors)
            self._writers.append(writer)
            self._writer_of |= {tensor.name: writer for tensor in tensors}

    def __getitem__(self, name: str) -> SafetensorsWriter:
        return self._writer_of[name]

    def hold(self, sums: Mapping[str, str]) -> bool:
        """True if the files hold each tensor with the given sha256; the files are read back."""
        return all(self[name].sha256(name) == sha256 for name, sha256 in sums.items())

    def sums_by_file(self, sums: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """Regroup sha256 by tensor name: file name -> tensor name -> sha256."""
        return {file: {tensor.name: sums[tensor.name] for tensor in tensors} for file, tensors in self._files.items()}

    def sync(self) -> None:
        """Return when all written bytes and file names are on the disk. Raises StorageError."""
        for writer in self._writers:
            writer.sync()
        for folder in {writer.path.parent for writer in self._writers}:
            disk.sync_directory(folder)

    def close(self) -> None:
        """Close all files."""
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> OutputFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The row-major little-endian bytes of a CPU tensor; no copy for a contiguous tensor.

    >>> import torch
    >>> bytes(tensor_bytes(torch.tensor([1, 258], dtype=torch.int16)))
    b'\\x01\\x00\\x02\\x01'
    """
    import torch

    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
