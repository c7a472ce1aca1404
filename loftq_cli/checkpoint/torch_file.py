"""Reading .bin, .pt and .pth checkpoints (the zip files that torch.save writes) without running anything in them.

The pickle inside is read as data: the few opcodes that torch.save emits, and a fixed list of names that it may mention.
Tensors are read from the zip's uncompressed members in place; torch.load, pickle and zlib are never called.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.safetensors_file import (
    CHUNK_NBYTES,
    WatchedFile,
    checked_shape,
    is_tensor_name,
    rows_shape,
    tensor_from,
)
from loftq_cli.errors import InputError, printable
from loftq_cli.tensors import ITEMSIZE, TensorRef

if TYPE_CHECKING:
    import torch

_STORAGE_DTYPES: dict[str, str | None] = {
    "torch.BoolStorage": "bool",
    "torch.ByteStorage": "uint8",
    "torch.CharStorage": "int8",
    "torch.ShortStorage": "int16",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.IntStorage": "int32",
    "torch.FloatStorage": "float32",
    "torch.LongStorage": "int64",
    "torch.DoubleStorage": "float64",
    "torch.ComplexFloatStorage": "complex64",
    "torch.storage.UntypedStorage": None,  # what dtypes without a storage class of their own (float8, uint16) use
}
_DTYPES = {f"torch.{name}": name for name in ITEMSIZE}
_ORDERED_DICT = "collections.OrderedDict"
_PARAMETER = "torch._utils._rebuild_parameter"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_TENSOR_WITH_DTYPE = "torch._utils._rebuild_tensor_v3"
_ALLOWED = {*_STORAGE_DTYPES, *_DTYPES, _ORDERED_DICT, _PARAMETER, _TENSOR, _TENSOR_WITH_DTYPE}

_MAX_PICKLE_NBYTES = 100_000_000  # as much as a safetensors header may have
_MAX_DIRECTORY_NBYTES = 1 << 24  # 120,000 members at the 130 bytes that torch.save spends on each
_MAX_STACK = 1 << 16  # pickle writes dicts in batches of 1000 pairs, so a real stack stays below 5000
_MAX_VIEWS = 4  # times a storage's own size that different views of it may add up to; tied weights need 2

_CONVERT = "convert it to .safetensors on a machine where you trust it"
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK: Any = object()


class TorchFile:
    """One torch zip checkpoint: a flat dict of names to tensors, or one such dict under "state_dict" or "model".

    Beside that inner dict only plain numbers and texts may stand (an epoch, a version); they are not tensors and
    are left out. Anything else that is not a tensor is refused by name.

    tensors : name -> TensorRef, in the order of the dict; a tied tensor names the first one in `alias_of`
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError naming the file, and the tensor, of anything that is not plainly a tensor in it."""
        self.path = path
        self._file = WatchedFile.open(path)
        members = _read_members(self._file)
        root = _archive_root(members, path)
        _check_byteorder(self._file, members.get(f"{root}byteorder"))
        tensors = _read_state_dict(self._file, members[f"{root}data.pkl"])
        self.tensors: dict[str, TensorRef] = {}
        self._views: dict[str, _View] = {}
        self._collect(tensors, members, f"{root}data/")

    def load(self, name: str) -> torch.Tensor:
        """The tensor, contiguous on the CPU, in memory of its own. Raises StorageError when the file changed.

        A tensor that is not contiguous in the file costs twice its memory for a moment.
        """
        view = self._views[name]
        return tensor_from(self._read(view), view.dtype, view.shape)

    def load_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the first dimension, [stop - start, ...]."""
        view = self._views[name]
        shape = rows_shape(view.shape, start, stop)
        offset = view.offset + start * view.stride[0] * ITEMSIZE[view.dtype]
        rows = _View(view.dtype, shape, view.stride, offset)
        return tensor_from(self._read(rows), rows.dtype, rows.shape)

    def chunks(self, name: str, chunk_nbytes: int = CHUNK_NBYTES) -> Iterator[memoryview]:
        """The tensor's bytes, little-endian and row-major, in pieces of at most `chunk_nbytes`.

        A tensor that is not contiguous in the file is loaded whole first.
        """
        if chunk_nbytes < 1:
            raise ValueError("chunk_nbytes is at least 1")
        view = self._views[name]
        if view.is_contiguous:
            return self._file.chunks(view.offset, self.tensors[name].nbytes, chunk_nbytes)
        data = memoryview(self._read(view))
        return (data[begin : begin + chunk_nbytes] for begin in range(0, len(data), chunk_nbytes))

    def check_unchanged(self) -> None:
        """Raises StorageError when the file was replaced or rewritten since it was opened."""
        self._file.check_unchanged()

    def _collect(self, tensors: dict[str, _Tensor], members: dict[str, _Member], prefix: str) -> None:
        first: dict[_Tensor, str] = {}
        viewed: dict[str, int] = {}  # storage key -> bytes of its different views
        for name, tensor in tensors.items():
            try:
                view = _placed(tensor, members.get(prefix + tensor.storage.key))
                ref = TensorRef(name, tensor.dtype, tensor.shape, self.path, first.get(tensor))
                if ref.alias_of is None:
                    _count_view(viewed, tensor, ref.nbytes)
            except ValueError as exc:
                raise InputError(str(exc), file=self.path, tensor=name, hint=_CONVERT) from None
            first.setdefault(tensor, name)
            self.tensors[name] = ref
            self._views[name] = view

    def _read(self, view: _View) -> bytearray:
        """The view's elements in row-major order."""
        nbytes = math.prod(view.shape) * ITEMSIZE[view.dtype]
        if view.is_contiguous:
            return self._file.read(view.offset, nbytes)
        span = view.span
        flat = tensor_from(self._file.read(view.offset, span * ITEMSIZE[view.dtype]), view.dtype, (span,))
        gathered = bytearray(nbytes)
        tensor_from(gathered, view.dtype, view.shape).copy_(flat.as_strided(view.shape, view.stride))
        return gathered


@dataclass(frozen=True, slots=True)
class _Name:
    """A global that the pickle mentions, as text."""

    text: str


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: str | None  # None: bytes
    numel: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _View:
    """Where a tensor's elements lie: `offset` in bytes from the start of the file, `stride` in elements."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def span(self) -> int:
        """Elements from the first to the last, both included; 0 when there are none."""
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
    """A member of the zip file: where its bytes are in the file."""

    offset: int
    nbytes: int


class _BoundedInput(io.FileIO):
    """A file whose zip directory cannot be larger than we allow: zipfile reads it whole."""

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
    """The members of the zip file. Raises InputError when it is not a plain zip file of uncompressed members."""
    head = bytes(file.read(0, min(file.nbytes, 512)))
    if not head.startswith(b"PK\x03\x04"):
        raise InputError(_other_format(head), file=file.path, hint=_CONVERT)
    try:
        with file.opened() as descriptor:
            with zipfile.ZipFile(_BoundedInput(descriptor, closefd=False)) as archive:
                infos, end = archive.infolist(), archive.start_dir
            return _checked_members(descriptor, infos, end)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as exc:
        raise InputError(f"is not a usable torch file: {exc}", file=file.path, hint=_CONVERT) from exc


def _other_format(head: bytes) -> str:
    if head[257:262] == b"ustar":
        return "is a tar file of a very old torch, which is not read here"
    if head.startswith(b"\x80"):
        return "is a bare pickle of the legacy torch format, which is not read here"
    return "is not a torch zip file"


def _checked_members(descriptor: int, infos: list[zipfile.ZipInfo], end: int) -> dict[str, _Member]:
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
    """Where the member's bytes begin: behind its local header, which must agree with the directory.
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
    """What stands before "data.pkl" in the member names, with its slash."""
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if not pickles:
        raise InputError("holds no folder/data.pkl, where torch.save puts its pickle", file=path, hint=_CONVERT)
    if len(pickles) > 1:
        raise InputError(f"holds {len(pickles)} pickles named data.pkl, not one", file=path, hint=_CONVERT)
    return pickles[0].removesuffix("data.pkl")


def _check_byteorder(file: WatchedFile, member: _Member | None) -> None:
    if member is not None and file.read(member.offset, min(member.nbytes, 16)) != b"little":
        raise InputError("was not written on a little-endian machine", file=file.path, hint=_CONVERT)


def _read_state_dict(file: WatchedFile, member: _Member) -> dict[str, _Tensor]:
    if member.nbytes > _MAX_PICKLE_NBYTES:
        message = f"its data.pkl has {member.nbytes} bytes; {_MAX_PICKLE_NBYTES} are allowed"
        raise InputError(message, file=file.path, hint=_CONVERT)
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # pickletools on odd backslashes
            return _state_dict(_Interpreter(member.nbytes).run(file.read(member.offset, member.nbytes)))
    except ValueError as exc:
        raise InputError(f"its data.pkl {exc}", file=file.path, hint=_CONVERT) from exc


def _state_dict(value: Any) -> dict[str, _Tensor]:
    """The dict of tensors in what the pickle holds. Raises ValueError naming what is not a tensor."""
    inner = [key for key in ("state_dict", "model") if isinstance(value, dict) and isinstance(value.get(key), dict)]
    plain = (int, float, str, type(None))
    if inner:
        others = [key for key, item in value.items() if key != inner[0] and not isinstance(item, plain)]
        if others:
            raise ValueError(f"holds {_described(others[0], value)} beside its {inner[0]}")
        value = value[inner[0]]
    if not isinstance(value, dict):
        raise ValueError("does not hold a dict of tensors")
    for name, item in value.items():
        if not isinstance(item, _Tensor):
            raise ValueError(f"holds {_described(name, value)}, which is not a tensor")
        if not is_tensor_name(name):
            raise ValueError(f"names a tensor {printable(repr(name))}")
    return value


def _described(key: Any, holder: dict[Any, Any]) -> str:
    kind = {_Tensor: "tensor", _Storage: "storage", _Name: "type"}.get(type(holder[key]), type(holder[key]).__name__)
    return f"{printable(repr(key))} ({kind})"


class _Interpreter:
    """A pickle machine that knows only data. `run` returns dicts, lists, tuples, numbers, texts, _Name, _Storage and
    _Tensor; it raises ValueError, and names the opcode or global, for anything else.

    Memory stays below 25 times the pickle's size: 23 was the most that hostile pickles of 4 to 8 MB reached.
    """

    def __init__(self, nbytes: int) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._weight = 0  # of the containers made: a dict or list takes more memory than the rest
        self._max_weight = 1000 + nbytes // 8  # torch.save spends over 10 bytes on each unit
        self._max_memo = 1000 + nbytes // 5  # LONG_BINPUT, which every slot above 255 needs, has 5 bytes

    def run(self, data: bytearray) -> Any:
        stream = io.BytesIO(data)
        for opcode, arg, position in pickletools.genops(stream):
            if opcode.name == "STOP" or (opcode.name == "PROTO" and position == 0):
                continue
            self._step(opcode.name, arg)
            if len(self._stack) > _MAX_STACK or len(self._memo) > self._max_memo:
                raise ValueError("needs more memory than its size allows")
        if stream.read(1):
            raise ValueError("goes on after its end")
        return self._pop()

    def _step(self, name: str, arg: Any) -> None:
        match name:
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                self._stack.append(arg)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                self._stack.append(arg)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self._stack.append(_CONSTANTS[name])
            case "MARK":
                self._stack.append(_MARK)
            case "EMPTY_TUPLE":
                self._stack.append(())
            case "EMPTY_LIST" | "EMPTY_DICT":
                self._push_container([] if name == "EMPTY_LIST" else {}, 2)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self._pop() for _ in range(int(name[-1]))]
                self._push_container(tuple(reversed(items)))
            case "TUPLE":
                self._push_container(tuple(self._pop_to_mark()))
            case "APPEND" | "APPENDS":
                items = [self._pop()] if name == "APPEND" else self._pop_to_mark()
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [self._pop(), self._pop()][::-1] if name == "SETITEM" else self._pop_to_mark()
                _set_items(self._top(dict), items)
            case "BINPUT" | "LONG_BINPUT":
                self._memo[arg] = self._top(object)
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top(object)
            case "BINGET" | "LONG_BINGET":
                if arg not in self._memo:
                    raise ValueError("is not well formed")
                self._stack.append(self._memo[arg])
            case "FRAME":
                pass
            case _:
                self._step_naming(name, arg)

    def _step_naming(self, name: str, arg: Any) -> None:
        match name:
            case "GLOBAL":
                self._stack.append(_allowed(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                attribute, module = self._pop(), self._pop()
                what = (
                    f"{module}.{attribute}" if isinstance(module, str) and isinstance(attribute, str) else "something"
                )
                raise ValueError(f"names {printable(what)} by STACK_GLOBAL, which torch.save does not write by default")
            case "BINPERSID":
                self._push_container(_storage(self._pop()))
            case "REDUCE":
                args, function = self._pop(), self._pop()
                self._push_container(_rebuilt(function, args), 2)
            case "BUILD":
                state = self._pop()
                self._top(dict)
                if type(state) is not dict or state.keys() != {"_metadata"}:
                    raise ValueError("sets attributes on an object")
            case _:
                what = f" for {printable(arg).replace(' ', '.', 1)}" if name == "INST" else ""
                raise ValueError(f"holds the opcode {name}{what}, which torch.save does not write for tensors")

    def _push_container(self, value: Any, weight: int = 1) -> None:
        self._weight += weight
        if self._weight > self._max_weight:
            raise ValueError("needs more memory than its size allows")
        self._stack.append(value)

    def _top(self, kind: type) -> Any:
        if not self._stack or self._stack[-1] is _MARK or not isinstance(self._stack[-1], kind):
            raise ValueError("is not well formed")
        return self._stack[-1]

    def _pop(self) -> Any:
        self._top(object)
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                items = self._stack[index + 1 :]
                del self._stack[index:]
                return items
        raise ValueError("is not well formed")


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    if len(items) % 2:
        raise ValueError("is not well formed")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):  # hashing a deep tuple would exhaust the C stack
            raise ValueError("holds a key that is neither text nor a number")
        if key in target:
            raise ValueError(f"holds the key {printable(key)} twice")
        target[key] = value


def _allowed(name: str) -> _Name:
    if name not in _ALLOWED:
        raise ValueError(f"names {printable(name)}, which is not part of a tensor; nothing of it was run")
    return _Name(name)


def _storage(persistent_id: Any) -> _Storage:
    if type(persistent_id) is tuple and len(persistent_id) == 5:
        tag, kind, key, location, numel = persistent_id
        is_known = tag == "storage" and isinstance(kind, _Name) and kind.text in _STORAGE_DTYPES
        if is_known and isinstance(key, str) and isinstance(location, str) and type(numel) is int and numel >= 0:
            return _Storage(key, _STORAGE_DTYPES[kind.text], numel)
    raise ValueError("describes a storage in an unknown way")


def _rebuilt(function: Any, args: Any) -> Any:
    """What torch's own rebuilders would make, as data. Hooks must be absent, as torch.save leaves them."""
    name = function.text if isinstance(function, _Name) else None
    args = args if type(args) is tuple else (None,)
    if name == _ORDERED_DICT and not args:
        return {}
    if name == _PARAMETER and len(args) == 3 and isinstance(args[0], _Tensor) and args[2] == {}:
        return args[0]
    if name in (_TENSOR, _TENSOR_WITH_DTYPE) and len(args) >= 6 and isinstance(args[0], _Storage) and args[5] == {}:
        storage, offset, shape, stride, _requires_grad, _hooks, *rest = args
        dtype = storage.dtype
        if name == _TENSOR_WITH_DTYPE and dtype is None and rest and isinstance(rest[0], _Name):
            dtype = _DTYPES.get(rest.pop(0).text)
        if dtype is not None and not rest:  # more arguments would be conjugate or negative bits
            return _tensor(storage, dtype, offset, shape, stride)
    raise ValueError(f"calls {printable(name)} in a way that torch.save does not for plain tensors")


def _tensor(storage: _Storage, dtype: str, offset: Any, shape: Any, stride: Any) -> _Tensor:
    sizes, steps = checked_shape(shape, ITEMSIZE[dtype]), checked_shape(stride, 0)
    if len(sizes) != len(steps) or type(offset) is not int or offset < 0:
        raise ValueError("holds a tensor whose shape, strides and offset do not fit together")
    return _Tensor(storage, dtype, offset, sizes, steps)


def _placed(tensor: _Tensor, member: _Member | None) -> _View:
    """Where the tensor lies in the file. Raises ValueError when it is not all inside its storage."""
    storage, itemsize = tensor.storage, ITEMSIZE[tensor.dtype]
    nbytes = storage.numel * (1 if storage.dtype is None else itemsize)
    if member is None or member.nbytes != nbytes:
        found = "is missing" if member is None else f"has {member.nbytes} bytes"
        raise ValueError(f"its storage {printable(storage.key, 40)} should have {nbytes} bytes and {found}")
    if any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride, strict=True)):
        raise ValueError(f"it is expanded (stride 0) to shape {list(tensor.shape)}, more than its storage holds")
    view = _View(tensor.dtype, tensor.shape, tensor.stride, member.offset + tensor.offset * itemsize)
    if (tensor.offset + view.span) * itemsize > nbytes or math.prod(tensor.shape) * itemsize > nbytes:
        raise ValueError(f"its shape {list(tensor.shape)} reaches outside its storage of {nbytes} bytes")
    return view


def _count_view(viewed: dict[str, int], tensor: _Tensor, nbytes: int) -> None:
    key, storage = tensor.storage.key, tensor.storage
    viewed[key] = viewed.get(key, 0) + nbytes
    if viewed[key] > _MAX_VIEWS * storage.numel * (1 if storage.dtype is None else ITEMSIZE[tensor.dtype]):
        raise ValueError(f"it is one of too many views of storage {printable(key, 40)}")
