"""On a GPU: each kernel against the card's measured rates, bitsandbytes and torch; whole conversions against reading
the checkpoint, with a timeline. `python -m tests.benchmarks.gpu`, or `--only gpu` of the others; with no GPU, nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from tests.benchmarks.gpu_card import Effort, description, failure, measured_card
from tests.benchmarks.gpu_checkpoint import LlamaShape
from tests.benchmarks.gpu_conversion import conversion_tables
from tests.benchmarks.gpu_kernels import Sizes, kernel_tables, summary
from tests.benchmarks.measuring import Settings, Table

_KERNELS_S, _ALL_S = 210.0, 400.0  # after which nothing more is begun: all of it in 8 minutes
_QUICK = Sizes(((4096, 4096),), (64,), (1,), ((4096, 4096),), 8)
_QUICK_GB = 2.0
RECIPE = {"rank": 64, "fit": "loftq", "iterations": 8}


def run(settings: Settings) -> Iterator[Table]:
    """In 8 minutes; with `quick` in 2."""
    if not torch.cuda.is_available():
        print("gpu: there is no CUDA device, and nothing is measured")
        return
    gb = min(settings.checkpoint_gb, _QUICK_GB) if settings.quick else settings.checkpoint_gb
    sizes, effort = (_QUICK, Effort(5, 20)) if settings.quick else (Sizes(), Effort())
    yield from tables(settings, sizes, effort, LlamaShape.of_gb(gb), RECIPE)


def tables(
    settings: Settings,
    sizes: Sizes,
    effort: Effort,
    shape: LlamaShape,
    recipe: dict[str, Any],
    *,
    copy_nbytes: int = 1 << 31,
    product_size: int = 8192,
) -> Iterator[Table]:
    """The card, its kernels, conversions, and at the end what of it there are goals for."""
    begun, about = time.perf_counter(), description()
    card = measured_card(copy_nbytes, product_size, effort)
    rates: dict[str, object] = {"copy TB/s": card.copy_rate / 1e12}
    rates |= {f"{dtype} TFLOP/s": rate / 1e12 for dtype, rate in card.product_rates.items()}
    yield Table("gpu: the card", [about | rates | {"L2 MB": card.l2_nbytes / 1e6}])

    def later_than(seconds: float) -> bool:
        return time.perf_counter() - begun > seconds

    kernels, conversions = [], []
    for table in kernel_tables(card, sizes, effort, lambda: later_than(_KERNELS_S)):
        kernels.append(table)
        yield table
    try:
        for table in conversion_tables(settings, shape, recipe, lambda: later_than(_ALL_S)):
            conversions += [table] if "× reading" in table.rows[0] else []
            yield table
    except OSError as error:  # the disk is too small, for one: what was measured before counts
        yield Table("gpu: whole conversions", [{"note": failure(error)}])
    yield summary(kernels, conversions, about | rates)


if __name__ == "__main__":
    from tests.benchmarks.__main__ import main

    if torch.cuda.is_available():
        main("gpu")
    else:
        print("gpu: there is no CUDA device, and nothing is measured")
