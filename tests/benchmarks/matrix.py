"""LoftQ of single matrices and of a real model's linears: CPU time, wall time and error beside PEFT's `loftq_init` and
`torch.svd_lowrank`. What a conversion costs around it is in conversion.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from tests.benchmarks.contenders import Approximation, Contender, ours, peft, svd_lowrank
from tests.benchmarks.measuring import Settings, Table, Timed, interleaved, median_cpu, median_wall, ratio, timed
from tests.benchmarks.weights import MATRICES, encoder_linears

PEFT = "PEFT, 5"
LOW_RANK = {5: "svd_lowrank, 5", 8: "svd_lowrank, 8"}
OURS = {"fast, 8": 8, "faithful, 5": 5, "exact, 5": 5}
CONTENDERS: dict[str, Contender] = {
    PEFT: peft,
    **{name: svd_lowrank(iterations) for iterations, name in LOW_RANK.items()},
    **{name: ours(name.partition(",")[0], iterations) for name, iterations in OURS.items()},
}
LARGEST_EXACT = 1024  # from here on its float64 eigenvectors take longer than all others together
LARGEST_PEER = 2048  # PEFT takes minutes beyond: one kind of weight is enough
_NOTES = (
    "PEFT / and svd_lowrank /: how many times less this takes; svd_lowrank with the same number of iterations.",
    "error: ||W − Q − s·B·A|| as a ratio, below 1 is better; Frobenius, and the largest singular value.",
    "PEFT has float32 constants and values; all others double-quantized constants and bfloat16 values, which is harder.",
)


def run(settings: Settings) -> Iterator[Table]:
    """Square matrices of two kinds."""
    sizes, ranks = ((384, 768), (16,)) if settings.quick else ((384, 1024, 2048, 4096), (16, 64))
    rows = []
    for size in sizes:
        for kind, matrix in MATRICES.items():
            weight = matrix(size)
            for rank in ranks:
                names = [
                    name
                    for name in CONTENDERS
                    if (name != PEFT or size <= LARGEST_PEER or matrix is next(iter(MATRICES.values())))
                    and (name != "exact, 5" or size <= LARGEST_EXACT)
                ]
                about = {"weights": kind, "size": size, "rank": rank}
                rows += [about | row for row in compared([weight], rank, names, settings)]
    yield Table("matrix: LoftQ of one matrix", rows, _NOTES)


def run_minilm(settings: Settings) -> Iterator[Table]:
    """The encoder of all-MiniLM-L6-v2 as one piece of work."""
    linears = {n: w for n, w in encoder_linears().items() if not settings.quick or "layer.0." in n}
    rows = []
    for rank in (16,) if settings.quick else (16, 64):
        found = compared(list(linears.values()), rank, [PEFT, "fast, 8", "faithful, 5"], settings)
        unused = ("svd_lowrank", "spectral")
        rows += [{"rank": rank} | {k: v for k, v in row.items() if not k.startswith(unused)} for row in found]
    yield Table(f"minilm: LoftQ of {len(linears)} linears of all-MiniLM-L6-v2", rows, _NOTES)


def compared(
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
    wall = {name: median_wall(runs[name, settings.threads]) for name in names}
    left = {name: [a.residual(w) for a, w in zip(_found(runs[name, 1]), weights, strict=True)] for name in names}
    norms = {name: [float(r.double().norm()) for r in residuals] for name, residuals in left.items()}
    spectral = {name: max(map(spectral_norm, residuals)) for name, residuals in left.items()}
    total = {name: sum(norm**2 for norm in values) ** 0.5 for name, values in norms.items()}
    for name in names:
        low_rank = LOW_RANK[OURS[name]] if name in OURS else name if name in LOW_RANK.values() else ""
        in_wall = f"wall, {settings.threads} threads"
        yield {
            "solver": name,
            "CPU s": cpu[name],
            "PEFT / this, CPU": ratio(cpu.get(PEFT), cpu[name]),
            "svd_lowrank / this, CPU": ratio(cpu.get(low_rank), cpu[name]),
            f"PEFT / this, {in_wall}": ratio(wall.get(PEFT), wall[name]),
            f"svd_lowrank / this, {in_wall}": ratio(wall.get(low_rank), wall[name]),
            "error / PEFT's": ratio(total[name], total.get(PEFT)),
            "svd_lowrank's: error / its": ratio(total[name], total.get(low_rank)),
            "spectral / PEFT's": ratio(spectral[name], spectral.get(PEFT)),
            **_worst(norms, name, len(weights)),
            "n": len(runs[name, 1]),
        }


def spectral_norm(matrix: torch.Tensor) -> float:
    """The largest singular value: exact up to 1024 × 1024, and by 30 power iterations of 8 vectors above."""
    if max(matrix.shape) <= 1024:
        return float(torch.linalg.matrix_norm(matrix, ord=2))
    torch.manual_seed(0)
    return float(torch.svd_lowrank(matrix, q=8, niter=30)[1][0])


def _found(runs: Sequence[Timed[list[Approximation]]]) -> list[Approximation]:
    return runs[-1].result


def _worst(norms: Mapping[str, Sequence[float]], name: str, layers: int) -> dict[str, object]:
    if layers == 1:
        return {}
    if PEFT not in norms:
        return {"worst layer / PEFT's": None}
    return {"worst layer / PEFT's": max(a / b for a, b in zip(norms[name], norms[PEFT], strict=True))}
