"""A GPU to measure on: what it is called, how fast it copies and multiplies, and how long calls take on it. Knows no
kernel.
"""

from __future__ import annotations

import datetime
import math
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import torch

from tests.benchmarks.measuring import package_version

_ASSUMED_L2_NBYTES = 50 << 20  # an H100's, where torch does not say
_ROUND_S = 0.03  # calls of one round take about as long


@dataclass(frozen=True, slots=True)
class Effort:
    """How often a call is timed: `rounds` medians of at most `calls` calls each; over at most `most_sets` inputs."""

    rounds: int = 7
    calls: int = 40
    most_sets: int = 24


@dataclass(frozen=True, slots=True)
class Timing:
    """seconds       of the device for a call, median over rounds
    host_seconds     of the processor until a call has been launched, at best; of all of it where the call waits
    rounds           seconds of the device for a call, of each round
    """

    seconds: float
    host_seconds: float
    rounds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """copy_rate      bytes read and written a second, by a copy on the device
    product_rates     floating-point operations a second of large matrix products, by dtype
    """

    l2_nbytes: int
    copy_rate: float
    product_rates: dict[str, float]


def measured_card(copy_nbytes: int, product_size: int, effort: Effort) -> Card:
    """Its rates, measured on random numbers: products of zeros are faster."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    rates = {
        "bfloat16": _product_rate(product_size, torch.bfloat16, effort),
        "float32": _product_rate(product_size // 2, torch.float32, effort),
    }
    l2_nbytes = getattr(properties, "L2_cache_size", _ASSUMED_L2_NBYTES)
    return Card(l2_nbytes, _copy_rate(copy_nbytes // 4, effort), rates)


def _copy_rate(numel: int, effort: Effort) -> float:
    source = torch.randn(numel, device="cuda")
    calls = [partial(torch.empty_like(source).copy_, source) for _ in range(2)]
    return 2 * source.nbytes / device_time(calls, effort).seconds


def _product_rate(size: int, dtype: torch.dtype, effort: Effort) -> float:
    left, right = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return 2 * size**3 / device_time([partial(torch.matmul, left, right)], effort).seconds


def device_time(calls: Sequence[Callable[[], object]], effort: Effort) -> Timing:
    """Of `calls` in turn: the same work on different inputs, so that none is in the cache.

    A round is launched while the device waits for a clock: then gaps between launches do not count, but for calls that
    wait for the device. What the last calls gave stays in memory, so that each writes to another place.
    """
    kept: deque[object] = deque(maxlen=len(calls))
    for call in calls:  # compile, and allocate
        kept.append(call())
    torch.cuda.synchronize()
    start = time.perf_counter()
    calls[0]()
    host_seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    alone = time.perf_counter() - start
    n = max(1, min(effort.calls, int(_ROUND_S / max(alone, 1e-9))))
    rounds = effort.rounds if alone < 0.1 else min(effort.rounds, 2)
    turns, found, launching = cycle(calls), [], [host_seconds]
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        delay(2 * n * min(launching))
        first.record()
        start = time.perf_counter()
        for call in islice(turns, n):
            kept.append(call())
        launching.append((time.perf_counter() - start) / n)
        last.record()
        torch.cuda.synchronize()
        found.append(first.elapsed_time(last) / 1e3 / n)
    return Timing(statistics.median(found), min(launching), tuple(found))


def delay(seconds: float) -> None:
    """Keep the device busy for about so long, a tenth of a second at most, without memory."""
    if is_real():
        torch.cuda._sleep(int(min(seconds, 0.1) * 2e9))  # cycles, of which there are about so many in a second


def is_real() -> bool:
    """Whether there is a driver behind the device: tests simulate one."""
    return type(torch.empty(0, device="cuda")) is torch.Tensor


def n_sets(card: Card, nbytes: float, effort: Effort) -> int:
    """How many inputs of so many bytes are together four times the cache."""
    return max(2, min(effort.most_sets, math.ceil(4 * card.l2_nbytes / nbytes)))


def description() -> dict[str, object]:
    """What the numbers belong to."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": torch.cuda.get_device_name(),
        "device memory GB": properties.total_memory / 1e9,
        "processors": properties.multi_processor_count,
        "driver": _driver(),
        "CUDA": torch.version.cuda,
        **{name: package_version(name) for name in ("torch", "triton", "bitsandbytes")},
        "date": datetime.date.today().isoformat(),
    }


def failure(error: Exception) -> str:
    """What stopped a measurement, in a line, for a table."""
    return f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"[:160]


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None
