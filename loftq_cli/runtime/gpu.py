"""A GPU as conversions use it: which one, how much of its memory, and copies to and from it that run while it computes.
Knows tensors, no jobs.
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

# Weights times passes from which "auto" takes a GPU: starting it and compiling its kernels takes ten seconds, in which
# a processor does about as much.
_WORTH_STARTING = 1 << 31

_FREE_SHARE = 0.8  # of the memory that is free at the start; the rest is for what torch and its libraries add


def check_device_name(name: str, max_nbytes: int | None = None) -> None:
    """Raises UsageError for a name that no device has, and for a bound on the memory of a GPU where none computes."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise UsageError(f"--device {name!r} does not exist", hint=f"one of {DEVICES}")
    if name == "cpu" and max_nbytes is not None:
        message = "--max-memory bounds the memory of a GPU, and --device cpu computes on none"
        raise UsageError(message, hint="--device cuda, or leave --max-memory out")


def open_device(name: str, work: int, max_nbytes: int | None = None) -> Device | None:
    """The GPU called `name`, of whose memory `max_nbytes` at most are used; None for the processor. "auto" is the first
    GPU where there is one and `work`, weights times passes, is worth starting it.

    Raises UsageError for a GPU that is not there.
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
    """Something made of tensors that are on their way to the processor's memory."""

    value: Value
    arrived: torch.cuda.Event

    def wait(self) -> Value:
        """It, when all of it is there."""
        self.arrived.synchronize()
        return self.value


class Device:
    """One GPU with a stream for each direction and one to compute in. Used from one thread; what waits for a Download
    may be others.
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
        """What is launched in the block runs in the stream for it."""
        import torch

        with torch.cuda.device(self.device), torch.cuda.stream(self._compute):
            yield

    def upload(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of pinned tensors, for use in `computing`. Does not wait."""
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
        """`value` with copies in pinned memory of all tensors in it that were made in `computing`; see `with_tensors`.
        Does not wait.
        """
        import torch

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_cpu:
                return tensor
            tensor.record_stream(self._down)
            target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return target.copy_(tensor, non_blocking=True)

        made, arrived = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        made.record(self._compute)
        with torch.cuda.device(self.device), torch.cuda.stream(self._down):
            self._down.wait_event(made)
            copied = with_tensors(value, copy)
            arrived.record()
        return Download(copied, arrived)

    def drain(self) -> None:
        """Wait for everything, and give memory that nothing holds back."""
        import torch

        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


class SharedDevice:
    """A GPU for threads that take turns: one computes on it, and has all of its memory meanwhile, copies included."""

    def __init__(self, device: Device) -> None:
        self._device, self._turn = device, Lock()

    def __str__(self) -> str:
        return str(self._device)

    def run(self, work: Callable[[Inputs], Value], read: Callable[[], Inputs], nbytes: int) -> Value | None:
        """What `work` makes of copies on the device of what `read` gives, with all of its tensors back in the
        processor's memory; see `with_tensors`. `nbytes` is about how much memory of the device it takes, inputs
        included: nothing is read that does not fit.

        None for what the processor has to do: what does not fit, and what `work` refuses with a NumericError, which
        then comes from where the rest of its message is known.
        """
        import torch

        if nbytes > self._device.max_nbytes:
            return None
        host = with_tensors(read(), pinned)
        with self._turn:
            try:
                return self._run(work, host)
            except (torch.OutOfMemoryError, NumericError):
                pass
            self._device.drain()
        return None

    def _run(self, work: Callable[[Inputs], Value], host: Inputs) -> Value:
        with self._device.computing():
            made = work(with_tensors(host, lambda tensor: self._device.upload([tensor])[0]))
        return self._device.download(made).wait()


def with_tensors(value: Value, change: Callable[[torch.Tensor], torch.Tensor]) -> Value:
    """`value` with every tensor in it changed, through dataclasses, tuples and dicts; what has none stays as it is."""
    import torch

    changed: Any = value
    if isinstance(value, torch.Tensor):
        changed = change(value)
    elif isinstance(value, tuple):
        changed = tuple(with_tensors(item, change) for item in value)
    elif isinstance(value, dict):
        changed = {key: with_tensors(item, change) for key, item in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        changed = replace(value, **{f.name: with_tensors(getattr(value, f.name), change) for f in fields(value)})
    return changed  # type: ignore[no-any-return]


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in memory that a GPU copies from while it computes. Torch keeps such memory and gives it out again."""
    return tensor.pin_memory()
