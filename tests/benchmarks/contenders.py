"""LoftQ as this package does it and as its peers do, on the same weights: PEFT's `loftq_init`, and our loop around
`torch.svd_lowrank`. What it costs and how well it fits is measured elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch

from loftq_cli.methods.alternation import Adapting, alternate
from loftq_cli.methods.loftq import fit_adapter
from loftq_cli.methods.lowrank import ExactSolver, Factors
from loftq_cli.methods.method import Fitting, Initialization, load_method
from loftq_cli.methods.weighting import make_weighting
from loftq_cli.quant.formats import QuantizedTensor, make_quantizer
from loftq_cli.runtime.workers import SERIAL, Workers, started
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.metrics import adapter_delta, layer_error
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import CodebookSpec, LoraSpec
from loftq_cli.triton_kernels.backend import use_compiled_kernels

QUANTIZER = make_quantizer(CodebookSpec(), "bfloat16")

# The base, as values or as this package holds it, and the adapter, of each of some weights [out, in].
Approximations = list[tuple[torch.Tensor | QuantizedTensor, LoraPair]]


def ours(svd: str, iterations: int, weights: Sequence[torch.Tensor], rank: int, threads: int) -> Approximations:
    """`loftq quantize --svd`: the workers share one matrix, or have one of several each."""

    def one(workers: Workers, weight: torch.Tensor) -> Initialization:
        generator = torch.Generator().manual_seed(0)
        fitting = Fitting(iterations=iterations, svd=svd)
        lora = LoraSpec(rank, rank)
        return load_method("loftq")(TensorRows(weight), QUANTIZER, lora, fitting, generator=generator, workers=workers)

    with started(threads) as workers:
        found = [one(workers, *weights)] if len(weights) == 1 else list(workers.map(partial(one, SERIAL), weights))
    return [(made.quantized, made.lora) for made in found]


def svd_lowrank(iterations: int, weights: Sequence[torch.Tensor], rank: int, threads: int) -> Approximations:
    """The same loop with the same quantizer, and `torch.svd_lowrank` of a float32 residual as its solver."""

    def solve(matrix: torch.Tensor, *, balances: bool = True) -> Factors:
        del balances
        left, singular, right = torch.svd_lowrank(matrix, q=rank + 8, niter=2)
        root = singular[:rank].sqrt()
        return Factors(left[:, :rank] * root, (right[:, :rank] * root).T, gain=float(singular[:rank].square().sum()))

    def fit(residual: torch.Tensor) -> tuple[LoraPair, float]:
        return fit_adapter(residual, LoraSpec(rank, rank), solve)

    torch.manual_seed(0)
    with started(threads) as workers:
        torch.set_num_threads(threads)
        fitting, plain = Fitting(iterations=iterations), make_weighting(None, 1)
        adapting = Adapting(fit, ExactSolver(rank))
        found = [alternate(TensorRows(w), QUANTIZER, adapting, fitting, plain, torch.float32, workers) for w in weights]
    return [(made.quantized, made.lora) for made in found]


def peft(weights: Sequence[torch.Tensor], rank: int, threads: int) -> Approximations:
    """PEFT, with the 5 iterations of the paper."""
    torch.set_num_threads(threads)
    found = [_loftq_init_on_cpu()(weight, num_bits=4, reduced_rank=rank, num_iter=5) for weight in weights]
    return [(base, LoraPair(lora_A, lora_B, scaling=1.0)) for base, lora_A, lora_B in found]


@cache
def _loftq_init_on_cpu() -> Any:
    """`peft.utils.loftq_utils.loftq_init`, which names the device that it computes on in its source."""
    from peft.utils import loftq_utils

    namespace = dict(vars(loftq_utils))
    exec(inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"'), namespace)
    return namespace["loftq_init"]


# Each takes weights, a rank and a number of threads; the name ends with the number of iterations.
PEFT = "PEFT, 5"
CONTENDERS: dict[str, Callable[[Sequence[torch.Tensor], int, int], Approximations]] = {
    PEFT: peft,
    "svd_lowrank, 5": partial(svd_lowrank, 5),
    "svd_lowrank, 8": partial(svd_lowrank, 8),
    "fast, 8": partial(ours, "fast", 8),
    "faithful, 5": partial(ours, "faithful", 5),
    "exact, 5": partial(ours, "exact", 5),
}


def residual(weight: torch.Tensor, base: torch.Tensor | QuantizedTensor, lora: LoraPair) -> torch.Tensor:
    """weight - base - s·B·A, float32."""
    values = base if isinstance(base, torch.Tensor) else QUANTIZER.dequantize(base)
    return weight.float() - values.float() - adapter_delta(lora)


def warm_up_kernels() -> str | None:
    """Use compiled kernels and run each of them once, so that none is loaded or compiled in a measured call. Says why
    they cannot be used.
    """
    missing = use_compiled_kernels()
    for dtype in (torch.float32, torch.bfloat16):
        weight = TensorRows(torch.eye(64, dtype=dtype))
        lora = LoraPair(torch.ones(1, 64), torch.ones(64, 1), scaling=1.0)
        for decoded_dtype in ("float32", "bfloat16"):
            quantizer = make_quantizer(CodebookSpec(), decoded_dtype)
            for pair in (None, lora):
                layer_error(weight, quantizer.decoded(quantizer.quantize(weight)), pair)
    return missing


def warm_up(names: Iterable[str] = CONTENDERS, rank: int = 16) -> None:
    """Run contenders once: importing PEFT takes seconds, and the first product of each kind allocates."""
    warm_up_kernels()
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            CONTENDERS[name]([torch.eye(512, dtype=dtype)], rank, 1)
