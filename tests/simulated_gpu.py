"""A simulated CUDA device, on which tests of a GPU pipeline run where there is none: they see whether the discipline of
device code is kept, not how fast it is.

A tensor on it is a wrapper with device cuda:0 around a tensor of the CPU, which every operation runs on at once, in the
order of the program. What order a real device would be bound to is kept in vector clocks: each stream counts its
operations and knows how far it has waited for the others, and so does the host. Modelled:

- Devices: an operation on tensors of both raises, but for 0-dimensional ones of the CPU and for copies. A generator of
  the CPU is refused. Kernels of Triton's interpreter take tensors of the device only.
- Order: two operations on overlapping bytes (of storage, from the first to the last that a tensor has), one of which
  writes, must be ordered by a stream, events or the host. Else `AssertionError("race: ...")`. There is no implicit
  order with the default stream. Memory that a stream frees may be given away on it at once: what other streams do with
  it must be waited for, or announced with record_stream. A new tensor counts as written by the stream that made it.
- Copies that are `non_blocking` between the device and pinned memory are late by as much as is legal. Before the host
  has waited, the destination is full of 0xFF; and a source that has changed by then is a race.
- Waits of the host: `syncs` has them, with the line of loftq_cli that waits.
- Memory: the bytes of live storages, against a limit.

Not modelled: time, more than one device, generators and graphs of the device, peers, work space inside operations,
fragmentation, the rounding of allocations, TF32 and the device's own last bits. Races of host threads with each other
are not seen, nor is a write of pinned memory that changes no byte. What runs is one operation at a time, under a lock.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_map_only

from loftq_cli.triton_kernels.backend import has_triton

DEVICE = torch.device("cuda", 0)
NAME = "simulated GPU"
aten = torch.ops.aten

# Operations for whose result or error check the host waits, and what `syncs` calls them where that is another name.
_WAITING = {
    "_local_scalar_dense": "item",
    "_linalg_check_errors": "linalg error check",
    "_linalg_eigh": "linalg_eigh",
    "_linalg_svd": "linalg_svd",
    "_unique2": "unique",
    **{
        name: name
        for name in ("nonzero", "masked_select", "equal", "allclose", "bincount", "unique_dim", "unique_consecutive")
    },
    **{name: name for name in ("linalg_eig", "linalg_lstsq", "multinomial", "histc")},
}
_active: SimulatedGpu | None = None


class Sync(NamedTuple):
    """A wait of the host: "item", "copy to host", "pageable copy", "blocking copy", "stream.synchronize",
    "event.synchronize", "device.synchronize" or the operation; and "file.py:line".
    """

    kind: str
    place: str


class Access(NamedTuple):
    """What operation `index` of `stream` did with some bytes of a storage."""

    first: int
    end: int
    stream: SimulatedStream
    index: int
    is_write: bool
    place: str


@dataclass
class Memory:
    """A storage of the device, or a pinned one (`home` is None): what was done with it that may still matter."""

    nbytes: int
    home: SimulatedStream | None
    accesses: list[Access] = field(default_factory=list)
    recorded: set[SimulatedStream] = field(default_factory=set)


class PendingCopy(NamedTuple):
    """A copy between pinned memory and the device: bytes that have not landed yet, or that must stay as they are."""

    stream: SimulatedStream
    index: int
    host: torch.Tensor
    value: torch.Tensor
    place: str


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated device; `inner` has its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> SimulatedTensor:
        tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _active is None:
            raise RuntimeError("the simulated GPU of this tensor is gone")
        with _active.lock:
            return _active.run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"simulated {self.inner!r}"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def record_stream(self, stream: SimulatedStream) -> None:  # type: ignore[override]
        gpu().memory_of(self).recorded.add(stream)

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def pin_memory(self, device: Any = None) -> torch.Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.Tensor': only dense CPU tensors can be pinned")


class SimulatedStream:
    """torch.cuda.Stream. `clock` is how far it has come, and how far it has waited for others."""

    device, device_index, device_type, priority = DEVICE, 0, 1, 0

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.gpu = gpu()
        self.clock: dict[SimulatedStream, int] = {self: 0}
        self.gpu.streams.append(self)
        self.stream_id = self.cuda_stream = len(self.gpu.streams) - 1

    def __repr__(self) -> str:
        return f"stream {self.stream_id}"

    def advance(self) -> int:
        """The index of a new operation on it, which comes after all that the host has waited for."""
        merge(self.clock, self.gpu.host)
        self.clock[self] += 1
        return self.clock[self]

    def wait_event(self, event: SimulatedEvent) -> None:
        merge(self.clock, event.clock)

    def wait_stream(self, stream: SimulatedStream) -> None:
        merge(self.clock, stream.clock)

    def record_event(self, event: SimulatedEvent | None = None) -> SimulatedEvent:
        event = event or SimulatedEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.gpu.wait("stream.synchronize", self.clock)

    def query(self) -> bool:
        return self.record_event().query()

    def __enter__(self) -> SimulatedStream:
        self._previous = self.gpu.current_stream()
        self.gpu.set_stream(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.gpu.set_stream(self._previous)


class SimulatedEvent:
    """torch.cuda.Event. Asked whether the device has reached it, it says no the first time, and yes the second."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.gpu = gpu()
        self.clock: dict[SimulatedStream, int] = {}
        self.was_asked = False

    def record(self, stream: SimulatedStream | None = None) -> None:
        stream = stream or self.gpu.current_stream()
        self.clock, self.was_asked = dict(stream.clock), False

    def wait(self, stream: SimulatedStream | None = None) -> None:
        (stream or self.gpu.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        self.gpu.wait("event.synchronize", self.clock)

    def query(self) -> bool:
        was_asked, self.was_asked = self.was_asked, True
        is_known = all(covers(self.gpu.host, stream, index) for stream, index in self.clock.items())
        if was_asked and not is_known:
            self.gpu.reach(self.clock)
        return was_asked or is_known

    def elapsed_time(self, end: SimulatedEvent) -> float:
        return 1.0


class SimulatedGpu:
    """What happened on the device: `syncs`, `races`, and its memory."""

    def __init__(self, memory_nbytes: int) -> None:
        self.memory_nbytes = memory_nbytes
        self.syncs: list[Sync] = []
        self.races: list[str] = []
        self.allocated = self.max_allocated = 0
        self.lock = threading.RLock()
        self.streams: list[SimulatedStream] = []
        self.host: dict[SimulatedStream, int] = {}
        self._memory: dict[int, Memory] = {}
        self._dead: list[int] = []  # storages that are gone: finalizers run anywhere, so they only say so
        self._freed: list[Memory] = []
        self._landings: list[PendingCopy] = []
        self._loans: list[PendingCopy] = []
        self._local = threading.local()

    # -- streams and the host

    def current_stream(self, device: Any = None) -> SimulatedStream:
        return getattr(self._local, "stream", self.streams[0])

    def set_stream(self, stream: SimulatedStream) -> None:
        self._local.stream = stream

    @contextmanager
    def stream(self, stream: SimulatedStream | None) -> Iterator[None]:
        """torch.cuda.stream: of this thread, as the current stream is."""
        previous = self.current_stream()
        self.set_stream(stream or previous)
        try:
            yield
        finally:
            self.set_stream(previous)

    def synchronize(self, device: Any = None) -> None:
        clock: dict[SimulatedStream, int] = {}
        for stream in self.streams:
            merge(clock, stream.clock)
        self.wait("device.synchronize", clock)

    def wait(self, kind: str, clock: dict[SimulatedStream, int]) -> None:
        """The host waits until `clock` is reached."""
        self.syncs.append(Sync(kind, place()))
        self.reach(clock)

    def reach(self, clock: dict[SimulatedStream, int]) -> None:
        """The host knows that `clock` is reached: copies up to it have landed, and gave their sources back."""
        with self.lock:
            merge(self.host, clock)
            self._land(lambda copy: covers(self.host, copy.stream, copy.index))
            self._give_back(lambda copy: covers(self.host, copy.stream, copy.index))

    def _land(self, is_due: Callable[[PendingCopy], bool]) -> None:
        due = [copy for copy in self._landings if is_due(copy)]
        self._landings = [copy for copy in self._landings if not is_due(copy)]
        for copy in due:
            copy.host.copy_(copy.value)
        for copy in self._landings:  # on its way to the same place
            if any(same_storage(copy.host, landed.host) for landed in due):
                bytes_of(copy.host).fill_(0xFF)

    def _give_back(self, is_due: Callable[[PendingCopy], bool]) -> None:
        """Sources of copies may change from now on."""
        returned = [copy for copy in self._loans if is_due(copy)]
        self._loans = [copy for copy in self._loans if not is_due(copy)]
        for copy in returned:
            if not torch.equal(bytes_of(copy.host), bytes_of(copy.value)):
                self.race(f"the pinned source of the copy at {copy.place} changed before the host waited for the copy")

    def race(self, message: str) -> None:
        self.races.append(f"race: {message}")
        raise AssertionError(self.races[-1])

    @contextmanager
    def expect_race(self, match: str) -> Iterator[None]:
        """A race that a test is about: its message matches, and it does not fail the block."""
        with pytest.raises(AssertionError, match=f"race: .*{match}"):
            yield
        self.races.clear()

    # -- memory

    def memory_of(self, tensor: torch.Tensor) -> Memory:
        """Of a tensor on the device. One from an earlier simulation counts from its first use here."""
        storage = inner(tensor).untyped_storage()
        self._bury()
        if storage._cdata not in self._memory:
            self._track(storage, self.streams[0])
        return self._memory[storage._cdata]

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Remember its storage as pinned."""
        with self.lock:
            self._bury()
            self._track(tensor.untyped_storage(), None)
        return tensor

    def is_pinned(self, tensor: torch.Tensor, device: Any = None) -> bool:
        with self.lock:
            self._bury()
            memory = self._memory.get(tensor.untyped_storage()._cdata)
            return memory is not None and memory.home is None

    def pinned(self, tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
        """Tensor.pin_memory."""
        return tensor if self.is_pinned(tensor) else self.pin(tensor.clone())

    def memory_allocated(self, device: Any = None) -> int:
        with self.lock:
            self._bury()
            return self.allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return self.max_allocated

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self.max_allocated = self.memory_allocated()

    def reserve(self, nbytes: int) -> None:
        """Raise what the device raises when it has no `nbytes` more."""
        if (free := self.memory_nbytes - self.memory_allocated()) < nbytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes; {free} are free.")

    def new(self, value: torch.Tensor, stream: SimulatedStream, index: int) -> SimulatedTensor:
        """`value` as a tensor on the device, made by an operation; a view when its storage is there."""
        self._bury()
        storage = value.untyped_storage()
        if storage._cdata not in self._memory:
            self.reserve(storage.nbytes())
            self._give_away(stream)
            self._track(storage, stream)
            self.touch(value, stream, index, is_write=True)
        return SimulatedTensor(value)

    def _track(self, storage: torch.UntypedStorage, home: SimulatedStream | None) -> None:
        self._memory[storage._cdata] = Memory(storage.nbytes(), home)
        weakref.finalize(storage, self._dead.append, storage._cdata).atexit = False
        if home is not None:
            self.allocated += storage.nbytes()
            self.max_allocated = max(self.max_allocated, self.allocated)

    def _bury(self) -> None:
        while self._dead:
            memory = self._memory.pop(self._dead.pop())
            if memory.home is not None:
                self.allocated -= memory.nbytes
                self._freed.append(memory)

    def _give_away(self, stream: SimulatedStream) -> None:
        """Memory that `stream` freed goes to a new tensor of it: nobody else may be using it."""
        freed, self._freed = self._freed, []
        for memory in freed:
            users = [access for access in memory.accesses if access.stream not in memory.recorded]
            used = [access for access in users if not covers(memory.home.clock, access.stream, access.index)]
            used = [access for access in used if not covers(self.host, access.stream, access.index)]
            if used and memory.home is stream:
                user = f"{used[0].stream}, which uses it at {used[0].place}"
                self.race(f"memory is freed without waiting for {user} (record_stream), and may be new at {place()}")
            if used:
                self._freed.append(memory)

    def touch(self, tensor: torch.Tensor, stream: SimulatedStream, index: int, *, is_write: bool) -> None:
        """An operation's access to the bytes of a tensor, on the device or pinned."""
        if tensor.numel() == 0:
            return
        memory, value = self.memory_of(tensor), inner(tensor)
        first = value.storage_offset() * value.itemsize
        steps = ((size - 1) * stride for size, stride in zip(value.size(), value.stride(), strict=True))
        new = Access(first, first + (sum(steps) + 1) * value.itemsize, stream, index, is_write, place())
        for old in memory.accesses:
            conflicts = old.first < new.end and new.first < old.end and (is_write or old.is_write)
            if conflicts and not covers(stream.clock, old.stream, old.index):
                does, did = ("writes" if access.is_write else "reads" for access in (new, old))
                self.race(f"{stream} {does} at {new.place} what {old.stream} {did} at {old.place}, without waiting")
        memory.accesses = [old for old in memory.accesses if not follows(new, old)] + [new]

    # -- operations

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation with at least one tensor of the device."""
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        device = kwargs.get("device")
        if func is aten.copy_.default and not (is_there(args[0]) and is_there(args[1])):
            return self._copy(*args, **kwargs)
        if device is not None and device.type == "cpu":
            return self._to_host(func, args, kwargs)
        if device is not None:
            check_device(device)
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("non_blocking", None)
        tensors = list(tensors_of(func, args, kwargs))
        self._check_devices(func, tensors, args, kwargs)
        stream = self.current_stream()
        index = stream.advance()
        if not func.is_view:
            for tensor, is_write in tensors:
                if is_there(tensor):
                    self.touch(tensor, stream, index, is_write=is_write)
        result = func(*tree_map_only(SimulatedTensor, inner, args), **tree_map_only(SimulatedTensor, inner, kwargs))
        known = {id(inner(tensor)): tensor for tensor, is_write in tensors if is_write}
        for tensor in known.values():
            if tensor.shape != inner(tensor).shape:
                raise NotImplementedError(f"{func} resizes a tensor, which is not simulated")
        if kind := waits(func, args, kwargs):
            self.wait(kind, stream.clock)
        return tree_map_only(
            torch.Tensor, lambda t: known[id(t)] if id(t) in known else self.new(t, stream, index), result
        )

    def make(self, func: Any, *args: Any, **kwargs: Any) -> SimulatedTensor:
        """A factory function's tensor."""
        check_device(kwargs.pop("device"))
        if kwargs.pop("pin_memory", None):
            raise RuntimeError("Only dense CPU tensors can be pinned")
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        with self.lock:
            stream = self.current_stream()
            return self.new(func(*args, **kwargs, device="cpu"), stream, stream.advance())

    def launch(self, run: Callable[..., None], executor: Any, *args: Any, **kwargs: Any) -> None:
        """A kernel in Triton's interpreter, which is not made for threads. It writes where bytes have changed."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        with self.lock:
            if not any(map(is_there, tensors)):
                return run(executor, *args, **kwargs)
            if not all(map(is_there, tensors)):
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            stream = self.current_stream()
            index, before = stream.advance(), [inner(tensor).clone() for tensor in tensors]
            run(executor, *map(inner, args), **{name: inner(value) for name, value in kwargs.items()})
            for tensor, old in zip(tensors, before, strict=True):
                is_write = not torch.equal(bytes_of(inner(tensor)), bytes_of(old))
                self.touch(tensor, stream, index, is_write=is_write)

    def _to_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """`.to("cpu")`, and new_empty and its like with the CPU as device, which do not read the device."""
        is_async = kwargs.pop("non_blocking", False)
        made = func(*tree_map_only(SimulatedTensor, inner, args), **kwargs)
        if func is aten._to_copy.default:
            made = self.pin(made) if is_async else made  # as torch has it
            self._copy(made, args[0], is_async)
        return made

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """Between the host and the device. What is converted or gathered by the host is not pinned on its way."""
        host, to_host = (source, False) if is_there(target) else (target, True)
        is_pinned = self.is_pinned(host)
        is_async = is_pinned and non_blocking and host.is_contiguous()
        if not to_host:
            is_async = is_async and source.dtype == target.dtype and source.shape == target.shape
        stream = self.current_stream()
        index = stream.advance()
        for tensor in (source, target):
            if is_there(tensor) or is_pinned:
                self.touch(tensor, stream, index, is_write=tensor is target)
        if is_pinned:  # copies that this one follows on the device
            self._land(lambda copy: same_storage(copy.host, host) and covers(stream.clock, copy.stream, copy.index))
            if to_host:
                self._give_back(lambda copy: same_storage(copy.host, host))
        value = torch.empty(host.shape, dtype=host.dtype).copy_(inner(source)) if to_host else source.clone()
        if is_async and to_host:
            bytes_of(host).fill_(0xFF)
            self._landings.append(PendingCopy(stream, index, host, value, place()))
        else:
            inner(target).copy_(value)
        if is_async and not to_host:
            self._loans.append(PendingCopy(stream, index, host, value, place()))
        if not is_async:
            kind = "copy to host" if to_host else "blocking copy" if is_pinned else "pageable copy"
            is_late = non_blocking and not to_host  # from a buffer of the driver's: only what came before is done
            self.wait(kind, stream.clock | {stream: index - 1} if is_late else stream.clock)
        return target

    def _check_devices(self, func: Any, tensors: list[tuple[torch.Tensor, bool]], args: Any, kwargs: Any) -> None:
        for value in kwargs.values():
            if isinstance(value, torch.Generator):
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        is_index = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
        indices = {id(index) for index in args[1]} if is_index and is_there(args[0]) else set()
        for tensor, is_write in tensors:
            if is_there(tensor) or (tensor.dim() == 0 and not is_write):
                continue
            if id(tensor) not in indices:
                found = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
                raise RuntimeError(f"{found} (in {func})")
            self.wait("pageable copy", self.current_stream().clock)


def gpu() -> SimulatedGpu:
    """The one of the block that this runs in."""
    if _active is None:
        raise RuntimeError("there is no simulated GPU")
    return _active


def merge(clock: dict[SimulatedStream, int], other: dict[SimulatedStream, int]) -> None:
    clock.update({stream: index for stream, index in list(other.items()) if index > clock.get(stream, 0)})


def covers(clock: dict[SimulatedStream, int], stream: SimulatedStream, index: int) -> bool:
    return clock.get(stream, 0) >= index


def follows(new: Access, old: Access) -> bool:
    """Whether who is ordered after `new` is ordered after `old` too, and need not ask."""
    is_inside = new.first <= old.first and old.end <= new.end
    return is_inside and (new.is_write or (not old.is_write and old.stream is new.stream))


def is_there(value: Any) -> bool:
    return isinstance(value, SimulatedTensor)


def inner(value: Any) -> Any:
    return value.inner if is_there(value) else value


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Of a contiguous tensor: the same memory."""
    return tensor.reshape(-1).view(torch.uint8)


def same_storage(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.untyped_storage()._cdata == second.untyped_storage()._cdata


def check_device(device: torch.device) -> None:
    if device.type != "cuda" or device.index not in (None, 0):
        raise RuntimeError(f"invalid device ordinal: {device}")


def tensors_of(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[torch.Tensor, bool]]:
    """The tensors among an operation's arguments, and whether it writes to them."""
    named = {argument.name: argument for argument in func._schema.arguments}
    for argument, value in [*zip(named.values(), args, strict=False), *((named[n], v) for n, v in kwargs.items())]:
        is_write = argument.alias_info is not None and argument.alias_info.is_write
        yield from ((leaf, is_write) for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor))


def waits(func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """What to call the host's wait for this operation, if it waits."""
    name = func._schema.name.removeprefix("aten::")
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return name
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        is_fill = name != "index" and args[2].numel() == 1 and not is_there(args[2])
        return "boolean index" if any(map(is_there, masks)) and not is_fill else None
    return "linalg error check" if kwargs.get("check_errors") else _WAITING.get(name)


def place() -> str:
    """Where in loftq_cli we are, as "file.py:line"; outside of it, where in the caller's file."""
    frame: Any = sys._getframe(1)
    outside = None
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] == "loftq_cli":
            break
        if outside is None and module != __name__ and module.partition(".")[0] not in _NOT_CALLERS:
            outside = frame
        frame = frame.f_back
    frame = frame or outside
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}" if frame else "?"


_NOT_CALLERS = frozenset({"torch", "triton", "contextlib", "threading", "weakref"})


@contextmanager
def simulated_gpu(memory_nbytes: int = 1 << 34) -> Iterator[SimulatedGpu]:
    """The device, for the length of the block and in every thread. A race that was caught on its way fails the block.

    Skips the test where there is a real one: kernels are compiled for that.
    """
    global _active
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if _active is not None:
        raise RuntimeError("one simulated GPU at a time")
    device = SimulatedGpu(memory_nbytes)
    with ExitStack() as stack:
        _active = device
        stack.callback(_deactivate)
        SimulatedStream()  # the default one
        _set_device_guard()
        stack.callback(_make_factories(device)._destroy)
        _device_constructors()  # remembers for good what it finds in torch
        for target, name, replacement in _replacements(device):
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield device
        device._give_back(lambda copy: True)
    assert not device.races, device.races


def _set_device_guard() -> None:
    """What C++ calls to change the device does nothing from now on, as fake tensors of torch have it.

    Torch replaces a guard that counts no device. A build without CUDA has none, so it gets one that answers 0 to all.
    """
    c10 = ctypes.CDLL(f"{torch.__path__[0]}/lib/libc10.so")
    guards = (ctypes.c_void_p * 2).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    if guards[1] is None:
        zero = ctypes.CFUNCTYPE(ctypes.c_int64)(int)
        methods = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
        guard = ctypes.c_void_p(ctypes.addressof(methods))
        guards[1] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]


def _deactivate() -> None:
    global _active
    _active = None


def _make_factories(device: SimulatedGpu) -> torch.library.Library:
    """Functions that make a tensor from none are CUDA kernels to torch: it finds them in any thread, from C++ too."""
    library = torch.library.Library("aten", "IMPL", "CUDA")
    library.impl("copy_", lambda *args: device.run(aten.copy_.default, args, {}))  # torch.tensor skips our class
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a build with CUDA has kernels of its own, until the end of the block
        for schema in torch._C._jit_get_all_schemas():
            has_tensor = any("Tensor" in str(argument.type) for argument in schema.arguments)
            has_device = any(argument.name == "device" for argument in schema.arguments)
            if has_tensor or not has_device or not schema.name.startswith("aten::"):
                continue
            name = f"{schema.name}.{schema.overload_name}".removesuffix(".").removeprefix("aten::")
            if _is_kernel(f"aten::{name}"):
                packet = getattr(aten, schema.name.removeprefix("aten::"))
                library.impl(name, partial(device.make, getattr(packet, schema.overload_name or "default")))
    return library


def _is_kernel(name: str) -> bool:
    """Whether the dispatcher knows it, and not as a function that calls others."""
    try:
        return not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    except RuntimeError:
        return False


def _replacements(device: SimulatedGpu) -> Iterator[tuple[Any, str, Any]]:
    """What of torch and Triton is another thing in the block."""
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=device.memory_nbytes, multi_processor_count=132, warp_size=32
    )
    of_cuda = {
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "_exchange_device": lambda index: index if index < 0 else 0,
        "_maybe_exchange_device": lambda index: index if index < 0 else 0,
        "get_device_name": lambda _=None: NAME,
        "get_device_capability": lambda _=None: (9, 0),
        "get_device_properties": lambda _=None: properties,
        "mem_get_info": lambda _=None: (memory_nbytes_free(device), device.memory_nbytes),
        "memory_allocated": device.memory_allocated,
        "memory_reserved": device.memory_allocated,
        "max_memory_allocated": device.max_memory_allocated,
        "max_memory_reserved": device.max_memory_allocated,
        "reset_peak_memory_stats": device.reset_peak_memory_stats,
        "empty_cache": lambda: None,
        "synchronize": device.synchronize,
        "Stream": SimulatedStream,
        "Event": SimulatedEvent,
        "stream": device.stream,
        "set_stream": device.set_stream,
        "current_stream": device.current_stream,
        "default_stream": lambda _=None: device.streams[0],
    }
    yield from ((torch.cuda, name, replacement) for name, replacement in of_cuda.items())
    yield torch.Tensor, "is_pinned", lambda tensor, device_=None: device.is_pinned(tensor)
    yield torch.Tensor, "pin_memory", lambda tensor, device_=None: device.pinned(tensor)
    for name in ("empty", "zeros", "ones", "full", "tensor", "empty_strided", "empty_like", "zeros_like"):
        yield torch, name, _pinning(device, getattr(torch, name))
    if has_triton():
        from triton.runtime.interpreter import GridExecutor

        call = GridExecutor.__call__
        yield GridExecutor, "__call__", lambda *args, **kwargs: device.launch(call, *args, **kwargs)


def memory_nbytes_free(device: SimulatedGpu) -> int:
    return device.memory_nbytes - device.memory_allocated()


def _pinning(device: SimulatedGpu, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(function)
    def pinning(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = function(*args, **kwargs)
        if pin_memory and is_there(made):
            raise RuntimeError("Only dense CPU tensors can be pinned")
        return device.pin(made) if pin_memory else made

    return pinning
