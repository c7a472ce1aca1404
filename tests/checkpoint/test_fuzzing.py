"""Every parser under mutated input, with the program that runs it on any number of inputs (tests/fuzzing)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def fuzz(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzzing", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_only_our_own_errors_escape_from_20_000_inputs() -> None:
    run = fuzz("--inputs", 20_000, "--seed", 0)

    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_only_our_own_errors_escape_from_a_million_inputs() -> None:
    run = fuzz("--inputs", 1_000_000, "--seed", 1, "--processes", 2)

    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stdout)


def test_what_escapes_is_shown_with_how_to_make_it_again() -> None:
    """With a parser that is broken on purpose, in a process of its own."""
    code = (
        "import sys; from tests.fuzzing import results, __main__; "
        "results.read_report = lambda path: 1 // 0; "
        "sys.argv = ['fuzzing', '--inputs', '100', '--seed', '7', '--only', 'report']; "
        "sys.exit(__main__.main())"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert run.returncode == 1
    assert "report: input 0 (--only report --seed 7 --number 0)" in run.stdout
    assert "ZeroDivisionError" in run.stdout
