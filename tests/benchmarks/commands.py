"""What `loftq quantize --method qlora`, `loftq merge` and `loftq inspect --against` do, without a command line around
them. Not measured here.
"""

from __future__ import annotations

from pathlib import Path

from loftq_cli import convert, inspection, merge, merge_plan
from loftq_cli.base_model import BaseModel
from loftq_cli.merge_form import MergeOptions
from loftq_cli.recipe import Recipe
from tests.conversions import Silent


def run_convert(source: Path, output: Path, threads: int = 1, *, verify: bool = True, method: str = "qlora") -> None:
    """Into an `output` that is not there yet."""
    prepared = convert.prepare(str(source), output, Recipe(method=method))
    convert.run(prepared, Silent(), overwrite=False, restart=False, verify=verify, threads=threads)


def run_merge(base: Path, output: Path, threads: int) -> None:
    """A converted directory and the adapter in it."""
    prepared = merge_plan.prepare(base, base / "qlora_init", output, MergeOptions())
    merge.run(prepared, Silent(), overwrite=False, restart=False, threads=threads)


def run_inspect(base: Path, original: Path, threads: int) -> None:
    """A converted directory and what it was made of."""
    with BaseModel.open(base) as opened:
        inspection.inspect_converted(opened, original, threads)
