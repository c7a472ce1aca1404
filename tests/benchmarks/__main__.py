"""`python -m tests.benchmarks`: every benchmark beside its peers, one table each on stdout, all of them in a JSON file.

Asserts no time. The built-in model's training and scores have programs of their own beside this one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import gettempdir

import torch

from loftq_cli.runtime.workers import available_threads
from tests.benchmarks import ceiling, conversion, durability, experts, gpu, growth, joint, matrix, nf4, scratch
from tests.benchmarks.contenders import warm_up_kernels
from tests.benchmarks.measuring import Settings, Table, machine, rendered

BENCHMARKS: dict[str, Callable[[Settings], Iterator[Table]]] = {
    "ceiling": ceiling.run,
    "matrix": matrix.run,
    "minilm": matrix.run_minilm,
    "joint": joint.run,
    "nf4": nf4.run,
    "convert": conversion.run_convert,
    "merge": conversion.run_merge,
    "durability": durability.run,
    "scratch": scratch.run,
    "growth": growth.run,
    "experts": experts.run,
    "gpu": gpu.run,
}


def main(*only: str) -> None:
    """Run what was asked for, `only` these by default. The JSON file is written after every table: an interrupted run
    keeps what it has.
    """
    options = _options(list(only or BENCHMARKS))
    settings = Settings(
        options.quick,
        options.threads,
        options.directory,
        rounds=1 if options.quick else 5,
        checkpoint_gb=options.checkpoint_gb,
    )
    torch.set_num_threads(1)
    missing = warm_up_kernels()
    about = machine() | {"threads": settings.threads, "quick": settings.quick, "kernels": missing or "compiled"}
    tables: list[Table] = []
    for name in options.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        for table in BENCHMARKS[name](settings):
            tables.append(table)
            values = {"machine": about, "tables": [asdict(table) for table in tables]}
            options.json.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print("\n".join(f"{key}: {value}" for key, value in about.items()), end="\n\n")
    print("\n".join(map(rendered, tables)))


def _options(only: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    known = ", ".join(BENCHMARKS)
    parser.add_argument("--only", type=_names, default=only, metavar="NAME,...", help=f"of {known}")
    parser.add_argument("--quick", action="store_true", help="small sizes, in two minutes")
    parser.add_argument("--threads", type=int, default=available_threads(), metavar="N", help='what "all threads" are')
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), metavar="FILE")
    parser.add_argument("--directory", type=Path, default=Path(gettempdir()), help="where 6 GB of checkpoints fit")
    help_gb = "of the checkpoint that a GPU converts, which must fit in --directory one and a half times"
    parser.add_argument("--checkpoint-gb", type=float, default=13.5, metavar="N", help=help_gb)
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise argparse.ArgumentTypeError(f"no benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    return names


if __name__ == "__main__":
    main()
