"""LoftQ as this package does it and as its peers do, on the same weights: PEFT's `loftq_init`, and our loop around
`torch.svd_lowrank`. What it costs and how well it fits is measured elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from loftq_cli.methods.alternation import alternate
from loftq_cli.methods.loftq import fit_adapter
from loftq_cli.methods.method import load_method
from loftq_cli.metrics import adapter_delta, layer_error
from loftq_cli.quant.formats import QuantizedTensor, make_quantizer
from loftq_cli.rows import TensorRows
from loftq_cli.tensors import CodebookSpec, LoraPair, LoraSpec
from loftq_cli.triton_kernels.backend import use_compiled_kernels
from loftq_cli.workers import SERIAL, Workers, started

QUANTIZER = make_quantizer(CodebookSpec(), "bfloat16")
OVERSAMPLING = 8  # of torch.svd_lowrank: the same as our own solver's
LOW_RANK_STEPS = 2  # torch's own default


@dataclass(frozen=True, slots=True)
class Approximation:
    """base + s·B·A in place of a weight; the base as values, or as this package holds it."""

    base: torch.Tensor | QuantizedTensor
    lora: LoraPair

    def residual(self, weight: torch.Tensor) -> torch.Tensor:
        """weight - base - s·B·A, float32."""
        base = self.base if isinstance(self.base, torch.Tensor) else QUANTIZER.dequantize(self.base)
        return weight.float() - base.float() - adapter_delta(self.lora)


# Of weights [out, in] and a rank, with a number of threads.
Contender = Callable[[Sequence[torch.Tensor], int, int], list[Approximation]]


def ours(svd: str, iterations: int) -> Contender:
    """`loftq quantize --svd`: the workers share one matrix, or have one of several each."""

    def one(weight: torch.Tensor, rank: int, workers: Workers) -> Approximation:
        made = load_method("loftq")(
            TensorRows(weight),
            QUANTIZER,
            LoraSpec(rank, rank),
            iterations=iterations,
            svd=svd,
            init=None,
            generator=torch.Generator().manual_seed(0),
            workers=workers,
        )
        return Approximation(made.quantized, made.lora)

    def run(weights: Sequence[torch.Tensor], rank: int, threads: int) -> list[Approximation]:
        with started(threads) as workers:
            if len(weights) == 1:
                return [one(weights[0], rank, workers)]
            return list(workers.map(lambda weight: one(weight, rank, SERIAL), weights))

    return run


def svd_lowrank(iterations: int) -> Contender:
    """The same loop with the same quantizer, and `torch.svd_lowrank` of a float32 residual as its solver."""

    def run(weights: Sequence[torch.Tensor], rank: int, threads: int) -> list[Approximation]:
        def solve(residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            left, singular, right = torch.svd_lowrank(residual, q=rank + OVERSAMPLING, niter=LOW_RANK_STEPS)
            root = singular[:rank].sqrt()
            return left[:, :rank] * root, (right[:, :rank] * root).T

        def fit(residual: torch.Tensor) -> tuple[LoraPair, float]:
            return fit_adapter(residual, LoraSpec(rank, rank), solve)

        torch.manual_seed(0)
        with started(threads) as workers, torch_threads(threads):
            found = [alternate(TensorRows(w), QUANTIZER, fit, iterations, torch.float32, workers) for w in weights]
        return [Approximation(made.quantized, made.lora) for made in found]

    return run


def peft(weights: Sequence[torch.Tensor], rank: int, threads: int) -> list[Approximation]:
    """PEFT, with the 5 iterations of the paper."""
    loftq_init = _loftq_init_on_cpu()
    with torch_threads(threads):
        found = [loftq_init(weight, num_bits=4, reduced_rank=rank, num_iter=5) for weight in weights]
    return [Approximation(base, LoraPair(lora_A, lora_B, scaling=1.0)) for base, lora_A, lora_B in found]


@cache
def _loftq_init_on_cpu() -> Any:
    """`peft.utils.loftq_utils.loftq_init`, which names the device that it computes on in its source."""
    from peft.utils import loftq_utils

    namespace = dict(vars(loftq_utils))
    exec(inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"'), namespace)
    return namespace["loftq_init"]


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch's own threads, for the length of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def warm_up(rank: int = 16) -> str | None:
    """Use compiled kernels and run each of them once, so that none is compiled in a measured call. Says why they cannot
    be used.
    """
    missing = use_compiled_kernels()
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
        for svd in ("fast", "exact"):
            found = ours(svd, 2)([weight], rank, 1)[0]
        assert not isinstance(found.base, torch.Tensor)
        for decoded in (QUANTIZER.decoded(found.base), TensorRows(weight.float())):
            layer_error(TensorRows(weight), decoded, found.lora)
    return missing
