"""What the low-rank solver costs LoftQ: CPU time and error of each `--svd`, exact beside the others, on one thread.

`python -m tests.benchmarks.lowrank` prints the table; sizes and ranks are options. Random normal matrices, whose
residuals have the flat spectra that are hardest for iteration.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass

import torch

from loftq_cli.methods.method import load_method
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.tensors import CodebookSpec, LoraSpec

RUNS = (("exact", 5), ("faithful", 5), ("fast", 5), ("fast", 8))  # --svd and --iterations; the first is the peer


@dataclass(frozen=True, slots=True)
class Row:
    """One matrix and one solver: relative error of the result, CPU seconds."""

    size: int
    rank: int
    svd: str
    iterations: int
    error: float
    seconds: float


def measure(size: int, rank: int, svd: str, iterations: int) -> Row:
    """LoftQ of one matrix, NF4 with block size 64."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) * 0.02
    quantizer = make_quantizer(CodebookSpec(), "float32")
    options = {"iterations": iterations, "svd": svd, "init": None, "generator": torch.Generator().manual_seed(0)}
    start = time.process_time()
    made = load_method("loftq")(weight, quantizer, LoraSpec(rank, rank), **options)
    return Row(size, rank, svd, iterations, min(made.iteration_errors), time.process_time() - start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.lowrank", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}, one thread")
    print("| matrix | rank | solver | CPU s | times faster | error | of exact's |")
    print("|--:|--:|---|--:|--:|--:|--:|")
    for size in options.sizes:
        for rank in options.ranks:
            rows = [measure(size, rank, *run) for run in RUNS]
            for row in rows:
                solver = f"{row.svd}, {row.iterations} alternations"
                faster, ratio = rows[0].seconds / row.seconds, row.error / rows[0].error
                cells = (f"{row.seconds:.2f}", f"{faster:.1f}", f"{row.error:.5f}", f"{ratio:.4f}")
                print(f"| {size}² | {rank} | {solver} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
