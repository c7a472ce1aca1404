"""NF4 of one matrix, there and back: millions of weights a second beside bitsandbytes on the CPU, and whether the bytes
are the same. No adapters here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from loftq_cli.quant.formats import make_quantizer
from loftq_cli.rows import TensorRows
from loftq_cli.tensors import CodebookSpec, CodebookTensor, NestedAbsmax
from loftq_cli.workers import started
from tests.benchmarks.contenders import torch_threads
from tests.benchmarks.measuring import Settings, Table, interleaved, median_cpu, median_wall, ratio, timed
from tests.benchmarks.weights import normal_matrix

_NOTES = (
    "M/s: millions of weights a second, of CPU time with one thread and of wall time with more; block size 64.",
    "double: with double-quantized constants. same bytes: codes and constants, or decoded values.",
)


def run(settings: Settings) -> Iterator[Table]:
    """Encode and decode, of both dtypes and with both kinds of constants."""
    rows = [
        row
        for size in ((1024,) if settings.quick else (1024, 4096))
        for dtype in ("float32", "bfloat16")
        for double_quant in (False, True)
        for row in _compared(size, dtype, double_quant, settings)
    ]
    yield Table("nf4: encode and decode against bitsandbytes", rows, _NOTES)


def _compared(size: int, dtype: str, double_quant: bool, settings: Settings) -> Iterator[dict[str, object]]:
    import bitsandbytes.functional as peer

    weight = normal_matrix(size, getattr(torch, dtype))
    quantizer = make_quantizer(CodebookSpec(double_quant=double_quant), dtype)
    options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": double_quant}

    def encode(threads: int) -> Any:
        with started(threads) as workers:
            return quantizer.quantize(TensorRows(weight), workers=workers)

    def encode_peer(threads: int) -> Any:
        with torch_threads(threads):
            return peer.quantize_4bit(weight, **options)

    ours, (packed, state) = encode(1), encode_peer(1)
    same = torch.equal(ours.packed, packed.view(-1)) and _same_constants(ours, state)
    about = {"size": size, "dtype": dtype, "constants": "double" if double_quant else "float32"}
    calls: dict[str, Callable[[int], Any]] = {"ours": encode, "bitsandbytes": encode_peer}
    yield about | {"step": "encode"} | _speeds(calls, weight.numel(), (1, settings.threads), settings, same)

    def decode(threads: int) -> Any:
        return quantizer.decoded(ours).rows(slice(0, size))

    def decode_peer(threads: int) -> Any:
        with torch_threads(threads):
            return peer.dequantize_4bit(packed, state)

    same = torch.equal(decode(1), decode_peer(1))
    calls = {"ours": decode, "bitsandbytes": decode_peer}
    yield about | {"step": "decode"} | _speeds(calls, weight.numel(), (1,), settings, same)


def _same_constants(ours: CodebookTensor, state: Any) -> bool:
    if not isinstance(ours.absmax, NestedAbsmax):
        return torch.equal(ours.absmax, state.absmax)
    return torch.equal(ours.absmax.codes, state.absmax.view(-1)) and torch.equal(
        ours.absmax.absmax, state.state2.absmax
    )


def _speeds(
    calls: dict[str, Callable[[int], Any]], numel: int, threads: tuple[int, ...], settings: Settings, same: bool
) -> dict[str, object]:
    for call in calls.values():
        call(1)
    todo = {(who, n): partial(timed, partial(call, n)) for who, call in calls.items() for n in threads}
    runs = interleaved(todo, settings)
    cpu = {who: median_cpu(runs[who, 1]) for who in calls}
    wall = {who: median_wall(runs[who, threads[-1]]) if len(threads) > 1 else None for who in calls}
    return {
        "M/s": numel / cpu["ours"] / 1e6,
        "bitsandbytes M/s": numel / cpu["bitsandbytes"] / 1e6,
        "times faster": cpu["bitsandbytes"] / cpu["ours"],
        f"M/s, {settings.threads} threads": None if wall["ours"] is None else numel / wall["ours"] / 1e6,
        f"times faster, {settings.threads} threads": ratio(wall["bitsandbytes"], wall["ours"]),
        "same bytes": same,
    }
