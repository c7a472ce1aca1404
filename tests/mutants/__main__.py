"""`python -m tests.mutants`: change `output`, `checkpoint` and `merging` in one place at a time; tests must notice.

Prints a table and the survivors without a reason in survivors.toml. Ends with status 1 where more than 5 % of the tried
mutants have none. Verdicts are kept in .mutants/: a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from fnmatch import fnmatch

from tests.mutants.making import PACKAGES, TREE, WORK, Mutant, all_mutants, copy_tree, refused_by_mypy
from tests.mutants.survivors import reasons

_SURVIVAL = {"survived", "unreached"}  # verdicts; no test runs the line of an unreached one
_ALLOWED = 0.05  # of the tried mutants may survive without a reason


def main() -> int:
    """The exit status."""
    options = _options()
    WORK.mkdir(exist_ok=True)
    mutants = [mutant for mutant in all_mutants() if not mutant.is_wording and _is_meant(mutant, options.only)]
    refused = refused_by_mypy(mutants)
    chosen = _sample([mutant for mutant in mutants if mutant.key not in refused], options.sample, options.seed)
    verdicts = _verdicts(mutants)
    again = {"all": {*verdicts.values()}, "survivors": _SURVIVAL, None: set()}[options.again]
    left = [mutant for mutant in chosen if mutant.key not in verdicts or verdicts[mutant.key] in again]
    if left and not options.report:
        _try(sorted(left, key=lambda mutant: mutant.key not in verdicts), options)
        verdicts = _verdicts(mutants)
    return _report(mutants, refused, {mutant.key: verdicts[mutant.key] for mutant in chosen if mutant.key in verdicts})


def _is_meant(mutant: Mutant, patterns: list[str]) -> bool:
    return not patterns or any(fnmatch(mutant.key, f"*{pattern}*") for pattern in patterns)


def _sample(mutants: list[Mutant], size: int | None, seed: int) -> list[Mutant]:
    """`size` mutants of each file, and at least one of each function; all without a size."""
    if size is None:
        return mutants
    chosen = []
    files: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        files[mutant.file].append(mutant)
    for file, group in files.items():
        order = random.Random(f"{seed} {file}").sample(group, len(group))
        firsts = {mutant.function: mutant for mutant in reversed(order)}
        rest = [mutant for mutant in order if mutant is not firsts[mutant.function]]
        chosen += [*firsts.values(), *rest[: max(0, size - len(firsts))]]
    return random.Random(seed).sample(chosen, len(chosen))  # whoever stops the command has tried some of each file


def _verdicts(mutants: list[Mutant]) -> dict[str, str]:
    """The last verdict about every mutant whose function is still the same."""
    path = WORK / "verdicts.jsonl"
    texts = {mutant.key: hashlib.sha256(mutant.text.encode()).hexdigest()[:12] for mutant in mutants}
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {record["key"]: record["verdict"] for record in records if texts.get(record["key"]) == record["text"]}


def _try(mutants: list[Mutant], options: argparse.Namespace) -> None:
    copy_tree()
    until = time.time() + 60 * options.minutes
    plan = {"work": str(WORK), "seconds": options.seconds, "until": until, "mutants": [asdict(m) for m in mutants]}
    (WORK / "plan.json").write_text(json.dumps(plan))
    environment = {**os.environ, "PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.mutants.trying", str(WORK / "plan.json")]
    subprocess.run(command, cwd=TREE, env=environment, check=True)


def _report(mutants: list[Mutant], refused: set[str], verdicts: dict[str, str]) -> int:
    """Print the table and what has no reason: 1 where that is more than allowed."""
    listed = reasons()
    columns = ("mutants", "mypy", "tried", "noticed", "survived", "no reason")
    table = {package: dict.fromkeys(columns, 0) for package in (*PACKAGES, "all")}
    for mutant in mutants:
        verdict = verdicts.get(mutant.key)
        has_survived = verdict in _SURVIVAL
        is_unexplained = has_survived and mutant.key not in listed
        values = (True, mutant.key in refused, verdict, verdict and not has_survived, has_survived, is_unexplained)
        for package in (mutant.file.split("/")[1], "all"):
            for column, value in zip(columns, values, strict=True):
                table[package][column] += bool(value)
        if is_unexplained:
            print(f"{verdict:9} {mutant.file}:{mutant.line}  {mutant.key}")
    print(f"{'':12}", *(f"{column:>9}" for column in columns))
    for package, row in table.items():
        print(f"{package:12}", *(f"{row[column]:9}" for column in columns))
    stale = [key for key in listed if verdicts.get(key) not in (None, *_SURVIVAL)]
    print(*(f"listed, and noticed now: {key}" for key in stale), sep="\n")
    return 1 if stale or table["all"]["no reason"] > _ALLOWED * table["all"]["tried"] else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("only", nargs="*", metavar="PATTERN", help="mutants whose file, function or change matches")
    parser.add_argument("--sample", type=int, metavar="N", help="N mutants a file and one a function (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="of tests for one mutant at most")
    parser.add_argument("--minutes", type=float, default=24 * 60.0, metavar="M", help="stop after M minutes")
    parser.add_argument("--again", choices=["survivors", "all"], help="try what has a verdict once more")
    parser.add_argument("--report", action="store_true", help="only print what is known")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
