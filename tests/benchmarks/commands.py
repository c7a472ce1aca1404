"""What `loftq quantize --method qlora`, `loftq merge` and `loftq inspect --against` do, without a command line around
them. Not measured here.
"""

from __future__ import annotations

from pathlib import Path

from loftq_cli.conversion.prepare import prepare_conversion
from loftq_cli.conversion.run import convert_checkpoint
from loftq_cli.inspecting.converted import inspect_converted
from loftq_cli.merging.form import MergeOptions
from loftq_cli.merging.plan import prepare_merge
from loftq_cli.merging.run import merge_adapter
from loftq_cli.model.stored import BaseModel
from loftq_cli.planning.settle import make_recipe
from tests.support.conversions import Silent


def run_convert(source: Path, output: Path, threads: int = 1, *, verify: bool = True, method: str = "qlora") -> None:
    """Into an `output` that is not there yet."""
    prepared = prepare_conversion(str(source), output, make_recipe(method=method))
    convert_checkpoint(prepared, Silent(), overwrite=False, restart=False, verify=verify, threads=threads)


def run_merge(base: Path, output: Path, threads: int) -> None:
    """A converted directory and the adapter in it."""
    prepared = prepare_merge(base, base / "qlora_init", output, MergeOptions())
    merge_adapter(prepared, Silent(), overwrite=False, restart=False, threads=threads)


def run_inspect(base: Path, original: Path, threads: int) -> None:
    """A converted directory and what it was made of."""
    with BaseModel.open(base) as opened:
        inspect_converted(opened, original, threads)
