"""The order that a simulated GPU is bound to: streams, events and the host, and what each may do with memory when.

Time is vector clocks: each stream counts its operations, and knows how far it has waited for every other; so does the
host. Tensors here are those of the CPU that hold what is on the device, or pinned ones.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch

DEVICE = torch.device("cuda", 0)
_NOT_CALLERS = frozenset(
    {"torch", "triton", "contextlib", "threading", "weakref", __name__, f"{__package__}.simulated_gpu"}
)
_active: Timeline | None = None


class Sync(NamedTuple):
    """A wait of the host: "item", "copy to host", "pageable copy", "blocking copy", "stream.synchronize",
    "event.synchronize", "device.synchronize" or the operation; and "file.py:line".
    """

    kind: str
    place: str


class Access(NamedTuple):
    """What operation `index` of `stream` did with the bytes from one address to another."""

    first: int
    end: int
    stream: SimulatedStream
    index: int
    is_write: bool
    place: str


@dataclass
class Memory:
    """A storage of the device, or a pinned one (`home` is None): what was done with it that may still matter."""

    first: int
    end: int
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


class SimulatedStream:
    """torch.cuda.Stream. `clock` is how far it has come, and how far it has waited for others."""

    device, device_index, device_type, priority = DEVICE, 0, 1, 0

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.timeline = active()
        self.clock: dict[SimulatedStream, int] = {self: 0}
        self.timeline.streams.append(self)
        self.stream_id = self.cuda_stream = len(self.timeline.streams) - 1

    def __repr__(self) -> str:
        return f"stream {self.stream_id}"

    def advance(self) -> int:
        """The index of a new operation on it, which comes after all that the host has waited for."""
        merge(self.clock, self.timeline.host)
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
        self.timeline.wait("stream.synchronize", self.clock)

    def query(self) -> bool:
        return self.record_event().query()


class SimulatedEvent:
    """torch.cuda.Event. Asked whether the device has reached it, it says no the first time, and yes the second."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.timeline = active()
        self.clock: dict[SimulatedStream, int] = {}
        self.was_asked = False

    def record(self, stream: SimulatedStream | None = None) -> None:
        stream = stream or self.timeline.current_stream()
        self.clock, self.was_asked = dict(stream.clock), False

    def wait(self, stream: SimulatedStream | None = None) -> None:
        (stream or self.timeline.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        self.timeline.wait("event.synchronize", self.clock)

    def query(self) -> bool:
        was_asked, self.was_asked = self.was_asked, True
        is_known = all(covers(self.timeline.host, stream, index) for stream, index in self.clock.items())
        if was_asked and not is_known:
            self.timeline.reach(self.clock)
        return was_asked or is_known

    def elapsed_time(self, end: SimulatedEvent) -> float:
        return 1.0


class Timeline:
    """What happened on the device, and what of it the host knows."""

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
        self.landings: list[PendingCopy] = []
        self.loans: list[PendingCopy] = []
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
            self.land(lambda copy: covers(self.host, copy.stream, copy.index))
            self.give_back(lambda copy: covers(self.host, copy.stream, copy.index))

    def land(self, is_due: Callable[[PendingCopy], bool]) -> None:
        """Buffers of the host have what was copied to them from now on."""
        due = [copy for copy in self.landings if is_due(copy)]
        self.landings = [copy for copy in self.landings if not is_due(copy)]
        for copy in due:
            copy.host.copy_(copy.value)
        for copy in self.landings:  # on its way to the same place
            if any(overlap(copy.host, landed.host) for landed in due):
                bytes_of(copy.host).fill_(0xFF)

    def give_back(self, is_due: Callable[[PendingCopy], bool]) -> None:
        """Sources of copies may change from now on."""
        returned = [copy for copy in self.loans if is_due(copy)]
        self.loans = [copy for copy in self.loans if not is_due(copy)]
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
        """One that is not known is on the device since an earlier simulation, and counts from now on."""
        self._bury()
        storage = tensor.untyped_storage()
        pinned = [memory for memory in self._memory.values() if memory.home is None and lies_in(tensor, memory)]
        if not pinned and storage._cdata not in self._memory:
            self._track(storage, self.streams[0])
        return pinned[0] if pinned else self._memory[storage._cdata]

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Remember its storage as pinned."""
        with self.lock:
            self._bury()
            if tensor.untyped_storage()._cdata not in self._memory:
                self._track(tensor.untyped_storage(), None)
        return tensor

    def is_pinned(self, tensor: torch.Tensor, device: Any = None) -> bool:
        with self.lock:
            self._bury()
            return any(memory.home is None and lies_in(tensor, memory) for memory in self._memory.values())

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

    def allocate(self, made: torch.Tensor, stream: SimulatedStream, index: int) -> None:
        """Memory for what an operation made, unless that is a view."""
        self._bury()
        storage = made.untyped_storage()
        if storage._cdata not in self._memory:
            self.reserve(storage.nbytes())
            self._give_away(stream)
            self._track(storage, stream)
            self.touch(made, stream, index, is_write=True)

    def _track(self, storage: torch.UntypedStorage, home: SimulatedStream | None) -> None:
        self._memory[storage._cdata] = Memory(storage.data_ptr(), storage.data_ptr() + storage.nbytes(), home)
        weakref.finalize(storage, self._dead.append, storage._cdata).atexit = False
        if home is not None:
            self.allocated += storage.nbytes()
            self.max_allocated = max(self.max_allocated, self.allocated)

    def _bury(self) -> None:
        while self._dead:
            memory = self._memory.pop(self._dead.pop())
            if memory.home is not None:
                self.allocated -= memory.end - memory.first
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
        memory = self.memory_of(tensor)
        new = Access(*addresses(tensor), stream, index, is_write, place())
        for old in memory.accesses:
            conflicts = old.first < new.end and new.first < old.end and (is_write or old.is_write)
            if conflicts and not covers(stream.clock, old.stream, old.index):
                does, did = ("writes" if access.is_write else "reads" for access in (new, old))
                self.race(f"{stream} {does} at {new.place} what {old.stream} {did} at {old.place}, without waiting")
        memory.accesses = [old for old in memory.accesses if not follows(new, old)] + [new]


def activate(timeline: Timeline | None) -> None:
    """What streams, events and tensors belong to from now on."""
    global _active
    _active = timeline


def active() -> Any:
    if _active is None:
        raise RuntimeError("there is no simulated GPU, or no longer")
    return _active


def merge(clock: dict[SimulatedStream, int], other: dict[SimulatedStream, int]) -> None:
    clock.update({stream: index for stream, index in list(other.items()) if index > clock.get(stream, 0)})


def covers(clock: dict[SimulatedStream, int], stream: SimulatedStream, index: int) -> bool:
    return clock.get(stream, 0) >= index


def follows(new: Access, old: Access) -> bool:
    """Whether who is ordered after `new` is ordered after `old` too, and need not ask."""
    is_inside = new.first <= old.first and old.end <= new.end
    return is_inside and (new.is_write or (not old.is_write and old.stream is new.stream))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Of a contiguous tensor: the same memory."""
    return tensor.reshape(-1).view(torch.uint8)


def addresses(tensor: torch.Tensor) -> tuple[int, int]:
    """Of the first byte of a tensor of the CPU that is not empty, and of what comes after its last."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (sum(steps) + 1) * tensor.itemsize


def lies_in(tensor: torch.Tensor, memory: Memory) -> bool:
    """Whether memory of the host is the tensor's, whichever way the tensor came to it."""
    return memory.first <= tensor.data_ptr() < memory.end


def overlap(first: torch.Tensor, second: torch.Tensor) -> bool:
    (start, end), (other_start, other_end) = addresses(first), addresses(second)
    return start < other_end and other_start < end


def place() -> str:
    """Where in loftq_cli we are, as "file.py:line"; outside of it, where in the caller's file."""
    frame: Any = sys._getframe(1)
    outside = None
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] == "loftq_cli":
            break
        if outside is None and not {module, module.partition(".")[0]} & _NOT_CALLERS:
            outside = frame
        frame = frame.f_back
    frame = frame or outside
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}" if frame else "?"
