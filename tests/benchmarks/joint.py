"""The joint fit beside LoftQ at the same bits, rank and file format: CPU time in one thread, error of the weights, and
error of what the layers compute. The joint fits count base and adapter together, and
without a text start from the principal part of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from loftq_cli.checkpoint.statistics import open_statistics
from loftq_cli.methods.method import Initialization, load_method
from loftq_cli.methods.weighting import Weighting, make_weighting
from loftq_cli.planning.recipe import Recipe
from loftq_cli.planning.settings import spec_of
from loftq_cli.planning.settle import make_recipe
from loftq_cli.quant.formats import Quantizer, make_quantizer
from loftq_cli.tensors.metrics import adapter_delta
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import LoraSpec
from tests.benchmarks.contenders import warm_up
from tests.benchmarks.drift import calibrate_minilm
from tests.benchmarks.measuring import Settings, Table, interleaved, timed
from tests.benchmarks.weights import encoder_linears, heavy_tailed_matrix, real_matrix

FAST, EXACT, JOINT, CALIBRATED = "LoftQ fast, 8", "LoftQ exact, 5", "joint", "joint, calibrated"
DTYPE = "float32"  # that loaders decode to, as for MiniLM's own
LARGEST_EXACT = 1024  # beyond it, float64 eigenvectors take longer than all others together
_BUDGET_S = 20.0  # see `interleaved`: so that what takes seconds runs more than once
# Of contenders, how many times LoftQ fast's CPU time they may take.
GOALS = {JOINT: 3.0, CALIBRATED: 10.0}
_NOTES = (
    "CPU: the least of n runs that took turns, in one thread.",
    "error: of the weights, relative Frobenius. output error: √(tr(E·H·Eᵀ) / tr(W·H·Wᵀ)) with the statistics H of the",
    "inputs that the calibrated fit is given: of MiniLM on prose, and of drawn ones with variances 1/k for the rest.",
)


def recipes(quant_type: str) -> dict[str, Recipe]:
    """The contenders; `calibration` only says that there is one."""
    return {
        FAST: make_recipe(quant_type=quant_type, fit="loftq"),
        EXACT: make_recipe(quant_type=quant_type, fit="loftq", svd="exact"),
        JOINT: make_recipe(quant_type=quant_type, calibration="none", start="principal", keep_base=0.0),
        CALIBRATED: make_recipe(quant_type=quant_type, calibration="statistics", keep_base=0.0, rounds=2),
    }


def run(settings: Settings) -> Iterator[Table]:
    """The encoder of all-MiniLM-L6-v2, then single matrices."""
    warm_up(())
    linears = {n: w for n, w in encoder_linears().items() if not settings.quick or "layer.0.attention" in n}
    weights, inputs = list(linears.values()), _statistics(list(linears))
    for quant_type in ("nf4", "int4", "int2"):
        title = f"joint: {quant_type}, {len(linears)} linears of all-MiniLM-L6-v2"
        yield Table(title, _compared(quant_type, weights, inputs, settings), _NOTES)
    for size in (384,) if settings.quick else (1024, 2048):
        drawn = _drawn_statistics(size)
        for kind, matrix in {"MiniLM tiles": real_matrix, "Student t5": heavy_tailed_matrix}.items():
            rows = _compared("nf4", [matrix(size)], [drawn], settings)
            yield Table(f"joint: nf4, {kind} {size} × {size}", rows, _NOTES)


def _statistics(names: Sequence[str]) -> list[torch.Tensor]:
    """What `loftq calibrate` says of the inputs of MiniLM's linears, float32 [in, in] each."""
    with TemporaryDirectory() as directory:
        statistics = open_statistics(calibrate_minilm(Path(directory)))
        return [statistics.load(name) for name in names]


def _drawn_statistics(size: int) -> torch.Tensor:
    """Xᵀ·X / n float32 [size, size] of n = 4 · size inputs X, normal with variances 1/k along random directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    spread = torch.arange(1, size + 1).rsqrt()
    inputs = (torch.randn(4 * size, size, generator=generator) * spread) @ directions.T
    return inputs.T @ inputs / len(inputs)


def _compared(
    quant_type: str, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], settings: Settings
) -> list[dict[str, object]]:
    """One row for each contender."""
    contenders = recipes(quant_type)
    if max(weights[0].shape) > LARGEST_EXACT and len(weights) == 1:
        del contenders[EXACT]
    for recipe in contenders.values():  # compiles
        _fit(recipe, [weights[0][:64].contiguous()], inputs[:1])
    calls = {name: partial(timed, partial(_fit, recipe, weights, inputs)) for name, recipe in contenders.items()}
    runs = interleaved(calls, replace(settings, budget_s=_BUDGET_S))
    # What others do on the machine only adds to CPU time.
    cpu = {name: min(run.cpu for run in found) for name, found in runs.items()}
    errors = {name: _errors(contenders[name], weights, inputs, found[-1].result) for name, found in runs.items()}
    return [
        {
            "method": name,
            "CPU s": cpu[name],
            "× LoftQ fast": cpu[name] / cpu[FAST],
            "at most": GOALS.get(name),
            "error": errors[name][0],
            "error / fast": errors[name][0] / errors[FAST][0],
            "output error": errors[name][1],
            "output error / fast": errors[name][1] / errors[FAST][1],
            "n": len(found),
        }
        for name, found in runs.items()
    ]


def _fit(recipe: Recipe, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[Initialization]:
    """What a conversion makes of matrices that are in memory."""
    made = []
    for weight, statistic in zip(weights, inputs, strict=True):
        weighting = None if recipe.calibration is None else make_weighting(statistic, 1)
        found = load_method(recipe.method)(
            TensorRows(weight),
            _quantizer(recipe, weighting),
            LoraSpec(recipe.rank, recipe.rank),
            recipe.fitting,
            generator=torch.Generator().manual_seed(0),
            weighting=weighting,
        )
        made.append(found)
    return made


def _errors(
    recipe: Recipe,
    weights: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    made: Sequence[Initialization],
) -> tuple[float, float]:
    """The relative errors of all weights together, and of what they compute."""
    quantizer, squares = _quantizer(recipe, None), [0.0] * 4
    for weight, statistic, found in zip(weights, inputs, made, strict=True):
        left = weight.double() - quantizer.dequantize(found.quantized).double() - adapter_delta(found.lora).double()
        for kind, matrix in enumerate((left, weight.double())):
            squares[kind] += float(matrix.square().sum())
            squares[kind + 2] += float(((matrix @ statistic.double()) * matrix).sum())
    return math.sqrt(squares[0] / squares[1]), math.sqrt(squares[2] / squares[3])


def _quantizer(recipe: Recipe, weighting: Weighting | None) -> Quantizer:
    importance = None if weighting is None else weighting.importance
    return make_quantizer(spec_of(recipe.quant, recipe.layout, DTYPE), DTYPE, str(recipe.scales), importance)
