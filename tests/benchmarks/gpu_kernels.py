"""Each kernel timed on a GPU, against what the card can do at most and against its peers. What a kernel must move and
do is not decided here.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from tests.benchmarks import gpu_cases, gpu_peers
from tests.benchmarks.gpu_card import Card, Effort, Timing, device_time, failure, n_sets
from tests.benchmarks.gpu_cases import GOALS, Calls, Case, Matrix
from tests.benchmarks.measuring import Table

Row = dict[str, object]
PEERS = ("bitsandbytes", "torch")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Matrices [out, in], ranks and numbers of tokens; K alternations of `stacked` matrices."""

    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (4096, 11008), (16384, 16384))
    ranks: tuple[int, ...] = (16, 64)
    tokens: tuple[int, ...] = (1, 16, 512)
    stacked: tuple[tuple[int, int], ...] = ((1024, 1024), (4096, 11008))
    iterations: int = 8


def kernel_tables(card: Card, sizes: Sizes, effort: Effort, is_late: Callable[[], bool]) -> Iterator[Table]:
    """One table a shape. What there is no time for is said to be missing."""
    for shape in dict.fromkeys((*sizes.shapes, *sizes.stacked)):
        print(f"  kernels of {shape[0]} × {shape[1]}", file=sys.stderr, flush=True)
        rows, details = [], {}
        for case in _cases(shape, card, sizes, effort):
            row, raw = ({"kernel": case.kernel}, {}) if is_late() else _measured(case, card, effort)
            rows.append(_NOTHING | _about(case) | row)
            details[f"{case.kernel}, rank {case.rank}, tokens {case.tokens}"] = raw
        notes = (
            "GB/s and shares: of the bytes that must move; roofline: the longer of those and of the operations.",
            "host: the processor's time to launch it. × peer: how many times longer that takes on the device; of many",
            "small launches, it is the launching that takes it.",
        )
        yield Table(f"gpu: kernels of {shape[0]} × {shape[1]} bfloat16", rows, notes, details)
        gc.collect()
        torch.cuda.empty_cache()


def summary(tables: Sequence[Table], conversions: Sequence[Table], about: dict[str, object]) -> Table:
    """The figures that there are goals for: the worst of all shapes and ranks, and the best."""
    found: dict[str, list[float]] = {}
    for row in (row for table in tables for row in table.rows):
        share = row["roofline"] if row["kernel"] == "alternation" else row["copy rate"]
        if row["kernel"] in GOALS and isinstance(share, float):
            found.setdefault(f"{row['kernel']}, share", []).append(share)
        if "quantize NF4" in str(row["kernel"]) and isinstance(row["× bitsandbytes"], float):
            found.setdefault(f"{row['kernel']}, × bitsandbytes", []).append(row["× bitsandbytes"])
    goals = {f"{kernel}, share": f">= {goal}" for kernel, goal in GOALS.items()}
    goals |= {f"{kernel}, × bitsandbytes": "> 1" for kernel in GOALS}
    rows: list[Row] = [
        {"figure": name, "goal": goals[name], "worst": min(values), "best": max(values), "n": len(values)}
        for name, values in found.items()
    ]
    for row in (row for table in conversions for row in table.rows):
        if isinstance(row["× reading"], float):
            goal = {"figure": f"{row['run']}, × reading", "goal": "<= 1.25", "worst": row["× reading"]}
            rows.append(goal | {"best": row["× reading"], "n": 1})
    rows = rows or [{"figure": "nothing was measured", "goal": None, "worst": None, "best": None, "n": 0}]
    notes = ", ".join(f"{key} {value}" for key, value in about.items())
    return Table("gpu: beside the goals", rows, (notes,))


_NOTHING: Row = {
    **dict.fromkeys(("kernel", "rank", "tokens", "ms", "GB/s", "copy rate", "roofline", "goal", "host µs")),
    **{f"× {peer}": None for peer in PEERS},
    "note": "no time was left",
}


def _about(case: Case) -> Row:
    return {"kernel": case.kernel, "rank": case.rank, "tokens": case.tokens, "goal": GOALS.get(case.kernel)}


def _cases(shape: tuple[int, int], card: Card, sizes: Sizes, effort: Effort) -> Iterator[Case]:
    count = n_sets(card, gpu_cases.CODED_NBYTES * shape[0] * shape[1], effort)
    matrices = [Matrix.random(shape) for _ in range(count)]
    if shape in sizes.shapes:
        yield from gpu_cases.codebook_cases(matrices)
        yield from gpu_cases.affine_cases(matrices)
        for rank in sizes.ranks:
            yield from gpu_cases.low_rank_cases(matrices, rank)
        for tokens in sizes.tokens:
            yield from gpu_cases.product_cases(matrices, tokens)
    if shape in sizes.stacked:
        for rank in sizes.ranks:
            yield gpu_cases.loftq_case(matrices, rank, sizes.iterations)


def _measured(case: Case, card: Card, effort: Effort) -> tuple[Row, dict[str, object]]:
    ours = _timed(lambda: case.ours, effort)
    if isinstance(ours, str):
        return {"note": ours}, {"ours": ours}
    moving, floor = _floors(case, card)
    row: Row = {
        "ms": 1e3 * ours.seconds,
        "GB/s": case.nbytes / ours.seconds / 1e9,
        "copy rate": moving / ours.seconds,
        "roofline": floor / ours.seconds,
        "host µs": 1e6 * ours.host_seconds,
        "note": "",
    }
    raw: dict[str, object] = {"nbytes": case.nbytes, "flops": case.flops, "ours": asdict(ours)}
    for peer in (peer for peer in PEERS if peer in case.peers):
        prepare = case.peers[peer]
        theirs = prepare if isinstance(prepare, str) else _timed(prepare, effort)
        row[f"× {peer}"] = theirs if isinstance(theirs, str) else theirs.seconds / ours.seconds
        raw[peer] = theirs if isinstance(theirs, str) else asdict(theirs)
    if isinstance(row.get("× bitsandbytes"), float) and case.kernel == "quantize NF4":
        is_same = gpu_peers.same_codes(Matrix.random(case.shape))
        row["note"] = f"{'the same' if is_same else 'OTHER'} codes as bitsandbytes"
    return row, raw


def _floors(case: Case, card: Card) -> tuple[float, float]:
    """The seconds of moving the bytes, and of the slower of that and of the operations."""
    moving = case.nbytes / card.copy_rate
    return moving, max(moving, case.flops / card.product_rates[case.unit])


def _timed(prepare: Callable[[], Calls], effort: Effort) -> Timing | str:
    """What stops it is for the table to say: the others are measured all the same."""
    try:
        return device_time(prepare(), effort)
    except Exception as error:
        return failure(error)
