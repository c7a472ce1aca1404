"""The GPU of a conversion: the choice of a device, a bound on memory, and copies that run while the GPU computes. Knows
tensors, no jobs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from loftq_cli.errors import NumericError, UsageError

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")
Inputs = TypeVar("Inputs")

DEVICES = "auto|cpu|cuda|cuda:N"

# The least number of weights times passes for "auto" to take a GPU: a GPU needs ten seconds to start and to compile
# kernels, and a processor does about 1 << 31 weights times passes meanwhile.
_WORTH_STARTING = 1 << 31

_FREE_SHARE = 0.8  # share of the memory free at the start; torch and libraries take from the remaining share


def check_device_name(name: str, max_nbytes: int | None = None) -> None:
    """Check the options --device and --max-memory.

    name         "auto", "cpu", "cuda", or "cuda:N"
    max_nbytes   bound on the memory of a GPU in bytes; None without the option

    Raises UsageError for another name, and for "cpu" with a bound.

    >>> check_device_name("cuda:1", 8_000_000_000)
    >>> check_device_name("gpu")
    Traceback (most recent call last):
    loftq_cli.errors.UsageError: --device 'gpu' does not exist (one of auto|cpu|cuda|cuda:N)
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise UsageError(f"--device {name!r} does not exist", hint=f"one of {DEVICES}")
    if name == "cpu" and max_nbytes is not None:
        message = "--max-memory bounds the memory of a GPU, and --device cpu computes on none"
        raise UsageError(message, hint="--device cuda, or leave --max-memory out")


def open_device(name: str, work: int, max_nbytes: int | None = None) -> Device | None:
    """Open the device called `name`. Returns None for the processor.

    name         see `check_device_name`; "auto" is the first GPU of a machine with a GPU, for work worth a start
    work         the number of weights times the number of passes over the weights
    max_nbytes   most bytes of the GPU's memory to use; None for 80 % of the free memory

    Raises UsageError for an unknown name, and for a GPU that torch does not find.

    >>> open_device("cpu", work=1 << 40) is None
    True
    """
    check_device_name(name, max_nbytes)
    if name == "cpu" or (name == "auto" and work < _WORTH_STARTING):
        return None
    import torch

    if not torch.cuda.is_available():
        if name == "auto":
            return None
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise UsageError(f"--device {name} cannot be used: {reason}", hint="--device cpu")
    index = int(name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise UsageError(f"--device {name} is not there: torch finds {torch.cuda.device_count()}", hint="--device cuda")
    return Device(torch.device("cuda", index), max_nbytes)


@dataclass(frozen=True, slots=True)
class Download(Generic[Value]):
    """A value whose tensors are on the way to the processor's memory.

    value     dataclasses, tuples and dicts of pinned tensors; the numbers are valid after `wait`
    arrived   recorded after the last copy
    """

    value: Value
    arrived: torch.cuda.Event

    def wait(self) -> Value:
        """The value, after the last copy has arrived."""
        self.arrived.synchronize()
        return self.value


class Device:
    """A GPU with three streams: copies up, computing, copies down. A single thread uses a Device; other threads may
    wait for a Download.

    device       the device of torch
    max_nbytes   most bytes of the GPU's memory to use: at most 80 % of the memory free at the start
    """

    def __init__(self, device: torch.device, max_nbytes: int | None = None) -> None:
        import torch

        self.device = device
        free, _ = torch.cuda.mem_get_info(device)
        self.max_nbytes = min(max_nbytes or free, int(free * _FREE_SHARE))
        self._up, self._compute, self._down = (torch.cuda.Stream(device) for _ in range(3))  # type: ignore[no-untyped-call]

    def __str__(self) -> str:
        import torch

        return f"{self.device} ({torch.cuda.get_device_name(self.device)})"

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Kernels launched in the context run in the computing stream."""
        import torch

        with torch.cuda.device(self.device), torch.cuda.stream(self._compute):
            yield

    def upload(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of pinned tensors on the GPU, for use in `computing`. Does not wait."""
        import torch

        with torch.cuda.device(self.device), torch.cuda.stream(self._up):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._compute.wait_event(arrived)
        for copy in copies:
            copy.record_stream(self._compute)
        return copies

    def download(self, value: Value) -> Download[Value]:
        """`value` with copies in pinned memory in place of all GPU tensors; see `map_tensors`. The copies begin after
        the work launched in `computing` so far. Does not wait.
        """
        import torch

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_cpu:
                return tensor
            tensor.record_stream(self._down)
            target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return target.copy_(tensor, non_blocking=True)

        computed, arrived = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        computed.record(self._compute)
        with torch.cuda.device(self.device), torch.cuda.stream(self._down):
            self._down.wait_event(computed)
            copied = map_tensors(value, copy)
            arrived.record()
        return Download(copied, arrived)

    def drain(self) -> None:
        """Wait for all launched work, and give unused memory back to the GPU."""
        import torch

        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


class SharedDevice:
    """A GPU for threads that take turns: a thread computes alone and has all memory of the GPU meanwhile, copies
    included.
    """

    def __init__(self, device: Device) -> None:
        self._device, self._turn = device, Lock()

    def __str__(self) -> str:
        return str(self._device)

    @property
    def kind(self) -> str:
        """The kind of the device, like "cuda"."""
        return self._device.device.type

    def run(self, work: Callable[[Inputs], Value], read: Callable[[], Inputs], nbytes: int) -> Value | None:
        """Compute `work` on the GPU. Returns the result in the processor's memory, or None for the caller to compute on
        the processor.

        work     takes the inputs with tensors on the GPU, see `map_tensors`
        read     loads the inputs; not called when `nbytes` exceeds the memory bound
        nbytes   about the memory of the GPU that `work` takes, inputs included

        Returns None when the memory of the GPU does not suffice, and when `work` raises NumericError: the caller's
        computation on the processor then raises the error with the complete message.
        """
        import torch

        if nbytes > self._device.max_nbytes:
            return None
        host = map_tensors(read(), pinned)
        with self._turn:
            try:
                return self._run(work, host)
            except (torch.OutOfMemoryError, NumericError):
                pass
            self._device.drain()
        return None

    def _run(self, work: Callable[[Inputs], Value], host: Inputs) -> Value:
        with self._device.computing():
            result = work(map_tensors(host, lambda tensor: self._device.upload([tensor])[0]))
        return self._device.download(result).wait()


def map_tensors(value: Value, change: Callable[[torch.Tensor], torch.Tensor]) -> Value:
    """`value` with `change(tensor)` in place of every tensor inside dataclasses, tuples and dicts. Other values stay.

    >>> import torch
    >>> map_tensors({"scale": torch.ones(2), "rank": 8}, torch.neg)
    {'scale': tensor([-1., -1.]), 'rank': 8}
    """
    import torch

    changed: Any = value
    if isinstance(value, torch.Tensor):
        changed = change(value)
    elif isinstance(value, tuple):
        changed = tuple(map_tensors(item, change) for item in value)
    elif isinstance(value, dict):
        changed = {key: map_tensors(item, change) for key, item in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        changed = replace(value, **{f.name: map_tensors(getattr(value, f.name), change) for f in fields(value)})
    return changed  # type: ignore[no-any-return]


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in pinned memory, copied if need be: a GPU copies from pinned memory while the GPU computes. Torch
    reuses freed pinned memory. Needs a GPU.
    """
    return tensor.pin_memory()
