"""`python -m tests.fuzzing`: every parser on as many mutated inputs as asked for; a table of what came of them.

Ends with status 1 after the first input that anything but our own error escaped from, and when a target accepted all
of its inputs or none: then it tests nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict

from tests.fuzzing.engine import Chunk, Tally, divided, run
from tests.fuzzing.targets import TARGETS

_FEW = 50  # of fewer inputs, all may be accepted or none


def main() -> int:
    """The exit status."""
    options = _options()
    # Read before torch computes anything, here and in the processes that are started.
    os.environ["OMP_NUM_THREADS"] = "1"
    targets = {name: target for name, target in TARGETS.items() if not options.only or name in options.only}
    tallies: dict[str, list[Tally]] = defaultdict(list)
    chunks = divided(targets, options.inputs, options.seed)
    if options.number is not None:
        chunks = [Chunk(name, options.seed, options.number, options.number + 1) for name in targets]
    for tally in run(chunks, options.processes):
        tallies[tally.target].append(tally)
        if tally.failure is not None:
            print(tally.failure)
            return 1
    print(f"{'target':20} {'inputs':>9} {'accepted':>9} {'seconds':>8}")
    rows = [_row(name, tallies[name]) for name in targets]
    print(*rows, _row("all", [tally for group in tallies.values() for tally in group]), sep="\n")
    blind = [name for name, group in tallies.items() if _is_blind(group)]
    if blind:
        print(f"no check was ever passed, or none ever failed: {', '.join(blind)}")
    return 1 if blind else 0


def _row(name: str, tallies: list[Tally]) -> str:
    inputs = sum(tally.inputs for tally in tallies)
    accepted = sum(tally.accepted for tally in tallies) / max(1, inputs)
    return f"{name:20} {inputs:9} {accepted:9.1%} {sum(tally.seconds for tally in tallies):8.1f}"


def _is_blind(tallies: list[Tally]) -> bool:
    inputs, accepted = sum(tally.inputs for tally in tallies), sum(tally.accepted for tally in tallies)
    return inputs >= _FEW and accepted in (0, inputs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", action="append", choices=list(TARGETS), metavar="NAME", help=", ".join(TARGETS))
    parser.add_argument("--number", type=int, metavar="N", help="this input alone")
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
