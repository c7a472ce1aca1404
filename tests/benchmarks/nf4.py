"""NF4 of one matrix, there and back: millions of weights a second beside bitsandbytes on the CPU, and whether the bytes
are the same. No adapters here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from loftq_cli.quant.formats import make_quantizer
from loftq_cli.runtime.workers import started
from loftq_cli.tensors.matrices import CodebookTensor, NestedAbsmax
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import CodebookSpec
from tests.benchmarks.measuring import Settings, Table, Timed, best_wall, interleaved, median_cpu, timed
from tests.benchmarks.weights import normal_matrix

_NOTES = (
    "M/s: millions of weights a second of CPU time, in one thread; wall: with one thread or all, the faster of each.",
    "× bitsandbytes: how many times longer it takes. Block size 64.",
    "double: with double-quantized constants. same bytes: codes and constants, or decoded values.",
)


def run(settings: Settings) -> Iterator[Table]:
    """Encode and decode, of both dtypes and with both kinds of constants."""
    _keep_freed_memory()
    cases = product((1024,) if settings.quick else (1024, 4096), ("float32", "bfloat16"), (False, True))
    yield Table("nf4: encode and decode", [row for case in cases for row in _compared(*case, settings)], _NOTES)


def _keep_freed_memory() -> None:
    """Never give memory back to the system (glibc: M_MMAP_MAX, M_TRIM_THRESHOLD). Getting new pages takes longer than
    decoding into them, and whose turn that would be is chance.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)
    libc.mallopt(-1, 2**31 - 1)


def _compared(size: int, dtype: str, double_quant: bool, settings: Settings) -> Iterator[dict[str, object]]:
    import bitsandbytes.functional as peer

    weight = normal_matrix(size, getattr(torch, dtype))
    quantizer = make_quantizer(CodebookSpec(double_quant=double_quant), dtype)

    def encode(threads: int) -> Any:
        with started(threads) as workers:
            return quantizer.quantize(TensorRows(weight), workers=workers)

    def encode_peer(threads: int) -> Any:
        torch.set_num_threads(threads)
        return peer.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant)

    ours, (packed, state) = encode(1), encode_peer(1)

    def decode(threads: int) -> Any:
        return quantizer.decoded(ours).rows(slice(0, size))

    def decode_peer(threads: int) -> Any:
        torch.set_num_threads(threads)
        return peer.dequantize_4bit(packed, state)

    about = {"size": size, "dtype": dtype, "constants": "double" if double_quant else "float32"}
    both = {"ours": encode, "bitsandbytes": encode_peer}
    same = torch.equal(ours.packed, packed.view(-1)) and _same_constants(ours, state)
    yield about | {"step": "encode"} | _speeds(both, weight.numel(), {1, settings.threads}, settings, same)
    both = {"ours": decode, "bitsandbytes": decode_peer}
    same = torch.equal(decode(1), decode_peer(1))
    yield about | {"step": "decode"} | _speeds(both, weight.numel(), {1}, settings, same)


def _same_constants(ours: CodebookTensor, state: Any) -> bool:
    if not isinstance(ours.absmax, NestedAbsmax):
        return torch.equal(ours.absmax, state.absmax)
    pairs = ((ours.absmax.codes, state.absmax.view(-1)), (ours.absmax.absmax, state.state2.absmax))
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def _seconds(call: Callable[[], Any]) -> Timed:
    """`timed`, and what the call gave is gone: its memory is the next one's."""
    return replace(timed(call), result=None)


def _speeds(
    both: Mapping[str, Callable[[int], Any]], numel: int, threads: set[int], settings: Settings, same: bool
) -> dict[str, object]:
    calls = {(who, n): partial(_seconds, partial(call, n)) for who, call in both.items() for n in sorted(threads)}
    runs = interleaved(calls, settings)
    cpu = {who: median_cpu(runs[who, 1]) for who in both}
    wall = {who: best_wall(runs, who) for who in both}
    return {
        "M/s": numel / cpu["ours"] / 1e6,
        "bitsandbytes M/s": numel / cpu["bitsandbytes"] / 1e6,
        "× bitsandbytes": cpu["bitsandbytes"] / cpu["ours"],
        "M/s, wall": numel / wall["ours"] / 1e6,
        "× bitsandbytes, wall": wall["bitsandbytes"] / wall["ours"],
        "same bytes": same,
    }
