"""Codes, block constants and adapter found together without data, beside LoftQ: error and CPU time at the same bits,
rank and file format. A prototype of the method; what converts is elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from loftq_cli.lowrank import Factors, SubspaceSolver, _orthonormal
from loftq_cli.methods.method import load_method
from loftq_cli.metrics import adapter_delta
from loftq_cli.quant.formats import QuantizedTensor, Quantizer, make_quantizer
from loftq_cli.rows import TensorRows
from loftq_cli.tensors import AffineSpec, CodebookSpec, LoraPair, LoraSpec
from loftq_cli.triton_kernels.codebook import codebook_table
from loftq_cli.triton_kernels.refinement import Blocks, Levels, codebook_levels, refine, residual, search_scales
from tests.benchmarks.contenders import warm_up
from tests.benchmarks.measuring import Settings, Table, interleaved, median_cpu, ratio, timed
from tests.benchmarks.weights import encoder_linears, heavy_tailed_matrix, normal_matrix, real_matrix

RANK, BLOCK_SIZE = 16, 64
FORMATS = {
    "nf4": (CodebookSpec(double_quant=False), codebook_levels(codebook_table("nf4"))),
    "int4": (AffineSpec(4, BLOCK_SIZE, symmetric=False), Levels(None, 4, "int", torch.bfloat16)),
    "int2": (AffineSpec(2, BLOCK_SIZE, symmetric=False), Levels(None, 2, "int", torch.bfloat16)),
}


# The base and the adapter of each of some weights.
Made = list[tuple[Blocks | QuantizedTensor, Factors | LoraPair]]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How much a joint method does: alternations, the first with searched constants, by what share each goes on where
    the one before went, and rounds of refinement after them.
    """

    alternations: int
    momentum: float
    rounds: int


# Alternations + rounds. What momentum brings shows beside the last, which goes about as low as rounds alone do.
SCHEDULES = {
    f"joint, {alternations} + {rounds}": Schedule(alternations, 1.0, rounds)
    for alternations, rounds in ((11, 0), (12, 1), (16, 4))
} | {"joint, 5 + 8, no momentum": Schedule(5, 0.0, 8)}


def joint(weight: torch.Tensor, levels: Levels, schedule: Schedule, rank: int = RANK) -> tuple[Blocks, Factors]:
    """The codes and constants of float32 [out, in], and the factors of its adapter."""
    error, target = torch.empty_like(weight), torch.empty_like(weight)
    found = SubspaceSolver(rank, torch.Generator().manual_seed(0))(weight, balances=False)
    vectors, blocks = _orthonormal(found.right.T.contiguous()), None
    previous = found
    for place in range(schedule.alternations):
        # The principal part is no step of the alternation: nothing goes on from there.
        momentum = schedule.momentum if place > 1 else 0.0
        left, right = found.left, found.right * (-1.0 - momentum)
        if momentum:
            left, right = torch.cat((left, previous.left), dim=1), torch.cat((right, previous.right * momentum))
        torch.addmm(weight, left, right, out=target)
        blocks = search_scales(target, BLOCK_SIZE, levels, blocks)
        residual(weight, blocks, BLOCK_SIZE, levels, error)
        previous = found
        found, vectors = _step(error, error @ vectors)
    assert blocks is not None
    for _ in range(schedule.rounds):
        refined = refine(weight, blocks, BLOCK_SIZE, levels, vectors, sweeps=1, fits_scales=True, out=error)
        found, vectors = _step(error, refined.projections)
    return blocks, found


def _step(error: torch.Tensor, projections: torch.Tensor) -> tuple[Factors, torch.Tensor]:
    """One step of subspace iteration, and an orthonormal basis of its right side."""
    basis = _orthonormal(projections)
    right = basis.T @ error
    return Factors(basis, right, 0.0), _orthonormal(right.T.contiguous())


def run(settings: Settings) -> Iterator[Table]:
    """The encoder of all-MiniLM-L6-v2, then single matrices."""
    warm_up(())
    linears = [w for name, w in encoder_linears().items() if not settings.quick or "layer.0" in name]
    for name in FORMATS:
        yield Table(f"joint: {name}, {len(linears)} linears of all-MiniLM-L6-v2", _compared(name, linears, settings))
    size = 384 if settings.quick else 2048
    kinds = {"MiniLM tiles": real_matrix(size), "Student t5": heavy_tailed_matrix(size)}
    for kind, matrix in (kinds | {"normal": normal_matrix(size, torch.float32)}).items():
        yield Table(f"joint: nf4, {kind} {size} × {size}", _compared("nf4", [matrix], settings))


def _compared(name: str, weights: Sequence[torch.Tensor], settings: Settings) -> list[dict[str, object]]:
    """One row for each contender: CPU seconds in one thread, and the relative Frobenius error."""
    spec, levels = FORMATS[name]
    quantizer = make_quantizer(spec, "float32")
    calls: dict[str, Callable[[], Made]] = {"LoftQ fast, 8": partial(_loftq, quantizer, "fast", 8, weights)}
    if len(weights) > 1:
        calls["LoftQ exact, 5"] = partial(_loftq, quantizer, "exact", 5, weights)
    _loftq(quantizer, "fast", 1, weights[:1])  # loads what it needs
    for label, schedule in SCHEDULES.items():
        calls[label] = partial(_joint, levels, schedule, weights)
        _joint(levels, schedule, [weights[0][:64].contiguous()])  # compiles
    runs = interleaved({label: partial(timed, call) for label, call in calls.items()}, settings)
    fast, norm = median_cpu(runs["LoftQ fast, 8"]), math.fsum(float(w.double().square().sum()) for w in weights)
    rows: list[dict[str, object]] = []
    for label, found in runs.items():
        squares = 0.0
        for weight, (base, delta) in zip(weights, found[-1].result, strict=True):
            error = torch.empty_like(weight)
            if isinstance(base, Blocks):
                residual(weight, base, BLOCK_SIZE, levels, error)
            else:
                error = weight - quantizer.dequantize(base)
            update = delta.left @ delta.right if isinstance(delta, Factors) else adapter_delta(delta)
            squares += float((error - update).double().square().sum())
        cpu = median_cpu(found)
        rows.append(
            {"method": label, "error": math.sqrt(squares / norm), "CPU s": cpu, "× LoftQ fast": ratio(cpu, fast)}
        )
    return rows


def _joint(levels: Levels, schedule: Schedule, weights: Sequence[torch.Tensor]) -> Made:
    return [joint(weight, levels, schedule) for weight in weights]


def _loftq(quantizer: Quantizer, svd: str, iterations: int, weights: Sequence[torch.Tensor]) -> Made:
    lora, method = LoraSpec(RANK, RANK), load_method("loftq")
    made: Made = []
    for weight in weights:
        generator = torch.Generator().manual_seed(0)
        rows = TensorRows(weight)
        found = method(rows, quantizer, lora, iterations=iterations, svd=svd, init=None, generator=generator)
        made.append((found.quantized, found.lora))
    return made
