"""The pickle of a torch checkpoint, read as data: a machine for the few opcodes of torch.save, and a fixed list of
allowed names. Nothing in the pickle is imported or called; the bytes of the tensors are elsewhere.

Why not torch.load(weights_only=True): torch's unpickler calls functions by names from the file, and files have made the
unpickler run code (CVE-2025-32434, mended in torch 2.6) and write outside of allocated memory (CVE-2026-24747, mended
in torch 2.10). The unpickler also allocates sizes from the file: under torch 2.13, a compressed file of 8 MB takes
8.3 GB of memory, and a file of 1.5 KB gives a tensor of 200,000 x 200,000 numbers. PyTorch's manual calls the mode no
complete boundary of trust. A plan needs names, shapes and places only, and the interpreter here gives all three without
torch.
"""

from __future__ import annotations

import io
import pickletools
import warnings
from dataclasses import dataclass
from typing import Any

from loftq_cli.checkpoint.safetensors_file import checked_shape, is_tensor_name
from loftq_cli.errors import printable
from loftq_cli.tensors.headers import ITEMSIZE

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
    "torch.storage.UntypedStorage": None,  # dtypes without a storage class (float8, uint16)
}
_DTYPES = {f"torch.{name}": name for name in ITEMSIZE}
_ORDERED_DICT = "collections.OrderedDict"
_PARAMETER = "torch._utils._rebuild_parameter"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_TENSOR_WITH_DTYPE = "torch._utils._rebuild_tensor_v3"
_ALLOWED = {*_STORAGE_DTYPES, *_DTYPES, _ORDERED_DICT, _PARAMETER, _TENSOR, _TENSOR_WITH_DTYPE}

_MAX_STACK = 1 << 16  # pickle writes dicts in batches of 1000 pairs, so a real stack stays below 5000
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK: Any = object()


@dataclass(frozen=True, slots=True)
class _Name:
    """A global of the pickle, as text."""

    text: str


@dataclass(frozen=True, slots=True)
class PickledStorage:
    key: str
    dtype: str | None  # None: bytes
    numel: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    storage: PickledStorage
    dtype: str
    offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_state_dict(data: bytearray) -> dict[str, PickledTensor]:
    """Name -> tensor of a dict pickled by torch.save. Raises ValueError with the name of any further content.

    >>> import pickle
    >>> read_state_dict(bytearray(pickle.dumps({"epoch": 3}, protocol=2)))
    Traceback (most recent call last):
    ValueError: holds 'epoch' (int), which is not a tensor
    """
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # pickletools warns of odd backslashes
        return _state_dict(_Interpreter(len(data)).run(data))


def _state_dict(value: Any) -> dict[str, PickledTensor]:
    """The dict of tensors in the pickled value. Raises ValueError with the name of an entry without a tensor."""
    inner = [key for key in ("state_dict", "model") if isinstance(value, dict) and isinstance(value.get(key), dict)]
    plain = (int, float, str, type(None))
    if inner:
        unknown = [key for key, item in value.items() if key != inner[0] and not isinstance(item, plain)]
        if unknown:
            raise ValueError(f"holds {_describe(unknown[0], value)} beside its {inner[0]}")
        value = value[inner[0]]
    if not isinstance(value, dict):
        raise ValueError("does not hold a dict of tensors")
    for name, item in value.items():
        if not isinstance(item, PickledTensor):
            raise ValueError(f"holds {_describe(name, value)}, which is not a tensor")
        if not is_tensor_name(name):
            raise ValueError(f"names a tensor {printable(repr(name))}")
    return value


def _describe(key: Any, holder: dict[Any, Any]) -> str:
    kind = {PickledTensor: "tensor", PickledStorage: "storage", _Name: "type"}.get(
        type(holder[key]), type(holder[key]).__name__
    )
    return f"{printable(repr(key))} ({kind})"


class _Interpreter:
    """A pickle machine for data alone. `run` returns dicts, lists, tuples, numbers, texts, _Name, PickledStorage and
    PickledTensor; any further opcode or global raises ValueError with the name.

    Memory stays below 25 times the size of the pickle: hostile pickles of 4 to 8 MB reached 23 times.
    """

    def __init__(self, nbytes: int) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._weight = 0  # number of containers: dicts and lists take most memory
        self._max_weight = 1000 + nbytes // 8  # torch.save spends over 10 bytes on each unit
        self._max_memo = 1000 + nbytes // 5  # every slot above 255 needs a LONG_BINPUT of 5 bytes

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
                name_text = (
                    f"{module}.{attribute}" if isinstance(module, str) and isinstance(attribute, str) else "something"
                )
                raise ValueError(
                    f"names {printable(name_text)} by STACK_GLOBAL, which torch.save does not write by default"
                )
            case "BINPERSID":
                self._push_container(_storage(self._pop()))
            case "REDUCE":
                args, function = self._pop(), self._pop()
                self._push_container(_rebuild(function, args), 2)
            case "BUILD":
                state = self._pop()
                self._top(dict)
                if type(state) is not dict or state.keys() != {"_metadata"}:
                    raise ValueError("sets attributes on an object")
            case _:
                name_text = f" for {printable(arg).replace(' ', '.', 1)}" if name == "INST" else ""
                raise ValueError(f"holds the opcode {name}{name_text}, which torch.save does not write for tensors")

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


def _storage(persistent_id: Any) -> PickledStorage:
    if type(persistent_id) is tuple and len(persistent_id) == 5:
        tag, kind, key, location, numel = persistent_id
        is_known = tag == "storage" and isinstance(kind, _Name) and kind.text in _STORAGE_DTYPES
        if is_known and isinstance(key, str) and isinstance(location, str) and type(numel) is int and numel >= 0:
            return PickledStorage(key, _STORAGE_DTYPES[kind.text], numel)
    raise ValueError("describes a storage in an unknown way")


def _rebuild(function: Any, args: Any) -> Any:
    """The result of a rebuilder of torch, as data. Hooks must be absent, as torch.save writes none."""
    name = function.text if isinstance(function, _Name) else None
    args = args if type(args) is tuple else (None,)
    if name == _ORDERED_DICT and not args:
        return {}
    if name == _PARAMETER and len(args) == 3 and isinstance(args[0], PickledTensor) and args[2] == {}:
        return args[0]
    if (
        name in (_TENSOR, _TENSOR_WITH_DTYPE)
        and len(args) >= 6
        and isinstance(args[0], PickledStorage)
        and args[5] == {}
    ):
        storage, offset, shape, stride, _requires_grad, _hooks, *further = args
        dtype = storage.dtype
        if name == _TENSOR_WITH_DTYPE and dtype is None and further and isinstance(further[0], _Name):
            dtype = _DTYPES.get(further.pop(0).text)
        if dtype is not None and not further:  # further arguments would be conjugate or negative bits
            return _tensor(storage, dtype, offset, shape, stride)
    raise ValueError(f"calls {printable(name)} in a way that torch.save does not for plain tensors")


def _tensor(storage: PickledStorage, dtype: str, offset: Any, shape: Any, stride: Any) -> PickledTensor:
    sizes, steps = checked_shape(shape, ITEMSIZE[dtype]), checked_shape(stride, 0)
    if len(sizes) != len(steps) or type(offset) is not int or offset < 0:
        raise ValueError("holds a tensor whose shape, strides and offset do not fit together")
    return PickledTensor(storage, dtype, offset, sizes, steps)
