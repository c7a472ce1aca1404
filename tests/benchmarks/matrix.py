"""LoftQ of single matrices and of a real model's linears: CPU time, wall time and error beside PEFT's `loftq_init` and
`torch.svd_lowrank`. What a conversion costs around it is in conversion.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from operator import truediv

import torch

from tests.benchmarks.contenders import CONTENDERS, PEFT, residual, warm_up
from tests.benchmarks.measuring import Settings, Table, best_wall, interleaved, median_cpu, ratio, timed
from tests.benchmarks.weights import MATRICES, encoder_linears

# Beyond these sizes float64 eigenvectors take longer than all others together, and PEFT minutes: then it is measured
# with the first kind of weight and the last rank only.
LARGEST_EXACT, LARGEST_PEFT = 1024, 2048
_NOTES = (
    "× PEFT, × svd_lowrank: how many times longer the peer takes; svd_lowrank with as many iterations.",
    "CPU in one thread; wall with one thread or all, whichever is faster for each.",
    "error, spectral: Frobenius norm and largest singular value of W − Q − s·B·A, as ratios: below 1 is better.",
    "PEFT has float32 constants and values, the others double-quantized constants and bfloat16 values: that is harder.",
)


def run(settings: Settings) -> Iterator[Table]:
    """Square matrices of two kinds: MiniLM's linears tiled to the size, and heavy tails."""
    sizes, ranks = ((384,), (16,)) if settings.quick else ((384, 1024, 2048, 4096), (16, 64))
    warm_up()
    rows = []
    for size, (kind, matrix) in ((size, item) for size in sizes for item in MATRICES.items()):
        weight = matrix(size)
        for rank in ranks:
            has_peft = size <= LARGEST_PEFT or (kind, rank) == (next(iter(MATRICES)), ranks[-1])
            left_out = {"exact, 5"} if size > LARGEST_EXACT else set()
            names = [name for name in CONTENDERS if name not in left_out and (name != PEFT or has_peft)]
            about = {"weights": kind, "size": size, "rank": rank}
            rows += [about | row for row in _compared([weight], rank, names, settings)]
    yield Table("matrix: LoftQ of one matrix", rows, _NOTES)


def run_minilm(settings: Settings) -> Iterator[Table]:
    """The encoder of all-MiniLM-L6-v2 as one piece of work."""
    linears = [w for name, w in encoder_linears().items() if not settings.quick or "layer.0.attention" in name]
    names = (PEFT, "fast, 8", "faithful, 5")
    warm_up(names)
    rows = [
        {"rank": rank} | row
        for rank in ((16,) if settings.quick else (16, 64))
        for row in _compared(linears, rank, names, settings)
    ]
    yield Table(f"minilm: LoftQ of {len(linears)} linears of all-MiniLM-L6-v2", rows, _NOTES)


def _compared(
    weights: Sequence[torch.Tensor], rank: int, names: Sequence[str], settings: Settings
) -> Iterator[dict[str, object]]:
    """One row for each contender on all of `weights`."""
    calls = {
        (name, threads): partial(timed, partial(CONTENDERS[name], weights, rank, threads))
        for threads in sorted({1, settings.threads})
        for name in names
    }
    runs = interleaved(calls, settings)
    cpu = {name: median_cpu(runs[name, 1]) for name in names}
    wall = {name: best_wall(runs, name) for name in names}
    left = {
        name: [residual(w, *made) for w, made in zip(weights, runs[name, 1][-1].result, strict=True)] for name in names
    }
    norms = {name: [float(r.double().norm()) for r in residuals] for name, residuals in left.items()}
    total = {name: math.hypot(*values) for name, values in norms.items()}
    spectral = {name: max(map(_spectral_norm, residuals)) for name, residuals in left.items()}
    is_one = len(weights) == 1
    for name in names:
        row: dict[str, object] = {"solver": name, "CPU s": cpu[name]}
        peers = {"PEFT": PEFT} | ({"svd_lowrank": f"svd_lowrank,{name.partition(',')[2]}"} if is_one else {})
        for short, peer in peers.items():
            row |= {
                f"× {short}, CPU": ratio(cpu.get(peer), cpu[name]),
                f"× {short}, wall": ratio(wall.get(peer), wall[name]),
                f"error / {short}": ratio(total[name], total.get(peer)),
                f"spectral / {short}": ratio(spectral[name], spectral.get(peer)),
            }
        worst = {} if is_one else {"worst layer / PEFT": max(map(truediv, norms[name], norms[PEFT]))}
        yield row | worst | {"n": len(runs[name, 1])}


def _spectral_norm(matrix: torch.Tensor) -> float:
    """The largest singular value: exact up to 1024 × 1024, and by 30 power iterations of 8 vectors above."""
    if max(matrix.shape) <= 1024:
        return float(torch.linalg.matrix_norm(matrix, ord=2))
    torch.manual_seed(0)
    return float(torch.svd_lowrank(matrix, q=8, niter=30)[1][0])
