"""What a conversion on a GPU does when: each stack is read, uploaded, computed, downloaded and written. Records, and
draws; what it means is not said here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch

from loftq_cli.conversion import gpu_jobs
from loftq_cli.conversion import run as conversion_run
from loftq_cli.conversion.gpu_jobs import DeviceRunner
from loftq_cli.runtime.gpu import Device, Download, open_device

Value = TypeVar("Value")

# In the order in which a stack passes them. "launch" is the thread that computes and asks for the results.
RESOURCES = {"read": "r", "launch": "l", "upload": "u", "compute": "C", "download": "d", "write": "w"}
_CHART_STACKS, _CHART_COLUMNS = 40, 100


class Span(NamedTuple):
    """From `start` to `end`, in seconds since recording began, `resource` worked on stack number `stack`."""

    resource: str
    stack: int
    start: float
    end: float


class Timeline:
    """Spans of the processor's threads, and pairs of events that become spans of the device."""

    def __init__(self) -> None:
        self.stack_of: dict[str, int] = {}
        self.stack = 0
        self._spans: list[Span] = []
        self._events: list[tuple[str, int, Any, Any]] = []
        torch.cuda.synchronize()
        self._first_event = event()
        torch.cuda.synchronize()
        self._first = time.perf_counter()

    @contextmanager
    def span(self, resource: str, stack: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spans.append(Span(resource, stack, start - self._first, time.perf_counter() - self._first))

    def on_device(self, resource: str, start: Any, end: Any) -> None:
        self._events.append((resource, self.stack, start, end))

    def spans(self) -> list[Span]:
        """All of them, in the order of their starts, once the device is done."""
        torch.cuda.synchronize()

        def seconds(found: Any) -> float:
            return float(self._first_event.elapsed_time(found)) / 1e3

        there = [Span(name, stack, seconds(start), seconds(end)) for name, stack, start, end in self._events]
        return sorted(self._spans + there, key=lambda span: (span.start, span.end))


class RecordedDevice(Device):
    """A device that notes when its streams reach what they are given."""

    def __init__(self, timeline: Timeline, device: torch.device, max_nbytes: int) -> None:
        super().__init__(device, max_nbytes)
        self.timeline, self._begun = timeline, None

    def upload(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        start = event(self._up)
        copies = super().upload(tensors)
        self.timeline.on_device("upload", start, event(self._up))
        self._begun = self._begun or event(self._compute)  # which has to wait for the copies
        return copies

    def download(self, value: Value) -> Download[Value]:
        if self._begun is not None:
            self.timeline.on_device("compute", self._begun, event(self._compute))
            self._begun = None
        self._down.wait_event(event(self._compute))  # so that the start is that of the copies
        start = event(self._down)
        download = super().download(value)
        self.timeline.on_device("download", start, event(self._down))
        return download


class RecordedRunner(DeviceRunner):
    """The steps of a conversion, each noted with the stack that it belongs to."""

    def __init__(self, timeline: Timeline, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._timeline = timeline

    def stacks(self, jobs: Any) -> list[list[int]]:
        stacks = super().stacks(jobs)
        self._timeline.stack_of = {jobs[i].name: number for number, stack in enumerate(stacks) for i in stack}
        return stacks

    def load(self, job: Any) -> Any:
        with self._timeline.span("read", self._timeline.stack_of[job.name]):
            return super().load(job)

    def compute(self, jobs: Any, found: Any) -> Any:
        self._timeline.stack = self._timeline.stack_of[jobs[0].name]
        with self._timeline.span("launch", self._timeline.stack):
            return super().compute(jobs, found)

    def write(self, job: Any, weight: Any, made: Any, place: int) -> Any:
        if hasattr(made, "download"):
            made.download.wait()  # which is the device's time, not the disk's
        with self._timeline.span("write", self._timeline.stack_of[job.name]):
            return super().write(job, weight, made, place)


@contextmanager
def recorded() -> Iterator[Timeline]:
    """Conversions on a device note what they do, for the length of the block."""
    timeline = Timeline()

    def opened(name: str, work: int, max_nbytes: int | None = None) -> Device | None:
        device = open_device(name, work, max_nbytes)
        return None if device is None else RecordedDevice(timeline, device.device, device.max_nbytes)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(conversion_run, "open_device", opened))
        stack.enter_context(mock.patch.object(gpu_jobs, "DeviceRunner", partial(RecordedRunner, timeline)))
        yield timeline


@dataclass(frozen=True, slots=True)
class Busy:
    """seconds from the first start to the last end, and of each resource the share of them in which it worked."""

    seconds: float
    shares: dict[str, float]


def busy(spans: Sequence[Span]) -> Busy:
    if not spans:
        return Busy(0.0, dict.fromkeys(RESOURCES, 0.0))
    seconds = max(span.end for span in spans) - min(span.start for span in spans)
    shares = {name: _covered([s for s in spans if s.resource == name]) / max(seconds, 1e-9) for name in RESOURCES}
    return Busy(seconds, shares)


def chart(spans: Sequence[Span]) -> list[str]:
    """A line for each of the first stacks that are computed: what was done with it from left to right."""
    stacks = sorted({span.stack for span in spans if span.resource == "compute"})[:_CHART_STACKS]
    shown = [span for span in spans if span.stack in stacks]
    if not shown:
        return ["nothing was computed in stacks"]
    first, last = min(span.start for span in shown), max(span.end for span in shown)
    step = max(last - first, 1e-9) / _CHART_COLUMNS
    order = list(RESOURCES)
    lines = [f"stacks by {1e3 * step:.1f} ms: {', '.join(f'{mark} {name}' for name, mark in RESOURCES.items())}"]
    for stack in stacks:
        cells = ["."] * _CHART_COLUMNS
        for span in sorted((s for s in shown if s.stack == stack), key=lambda s: order.index(s.resource)):
            begin, end = (int((moment - first) / step) for moment in (span.start, span.end))
            for column in range(begin, min(end, _CHART_COLUMNS - 1) + 1):
                cells[min(column, _CHART_COLUMNS - 1)] = RESOURCES[span.resource]
        lines.append(f"{stack:5d} {''.join(cells)}")
    return lines


def event(stream: Any = None) -> Any:
    """One that has been recorded, with its time."""
    found = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    found.record(stream) if stream is not None else found.record()
    return found


def _covered(spans: Sequence[Span]) -> float:
    """The length of their union."""
    total, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total
