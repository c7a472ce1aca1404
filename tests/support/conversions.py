"""Running a conversion in a test, in this process or as a user would."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from loftq_cli.api.observer import Observer
from loftq_cli.conversion.prepare import prepare_conversion
from loftq_cli.conversion.report import LayerResult
from loftq_cli.conversion.run import Outcome, convert_checkpoint
from loftq_cli.merging.form import MergeOptions
from loftq_cli.merging.plan import prepare_merge
from loftq_cli.merging.run import merge_adapter
from loftq_cli.methods.method import DEFAULT_METHOD, METHODS
from loftq_cli.planning.recipe import Recipe
from loftq_cli.planning.settle import make_recipe


class Silent(Observer):
    """An observer that only remembers."""

    def __init__(self) -> None:
        self.done: list[tuple[LayerResult, bool]] = []

    def layer_converted(self, layer: LayerResult, *, resumed: bool) -> None:
        self.done.append((layer, resumed))


class StopAfter(Silent):
    """An observer that interrupts the run after some layers, as Ctrl-C would."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers

    def layer_converted(self, layer: LayerResult, *, resumed: bool) -> None:
        super().layer_converted(layer, resumed=resumed)
        if len(self.done) == self.layers:
            raise KeyboardInterrupt


def run_conversion(
    model: Path | str,
    output: Path,
    *,
    observer: Silent | None = None,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = True,
    threads: int = 1,
    device: str = "cpu",
    max_memory: int | None = None,
    **recipe: Any,
) -> Outcome:
    """Convert with the library, with what `loftq quantize` does by default, but for the fit: where the recipe does not
    say it, the paper's, which takes a fraction of the time.
    """
    conversion = prepare_conversion(str(model), output, quick_recipe(**recipe))
    return convert_checkpoint(
        conversion,
        observer or Silent(),
        overwrite=overwrite,
        restart=restart,
        verify=verify,
        threads=threads,
        device=device,
        max_memory=max_memory,
    )


def quick_recipe(**recipe: Any) -> Recipe:
    """The recipe of `run_conversion`. Tests that convert with every method say how many alternations those take that
    have some.
    """
    entry = METHODS[recipe.get("method", DEFAULT_METHOD)]
    takes = entry.inits[recipe.get("init") or next(iter(entry.inits))].takes
    if "iterations" not in takes:
        recipe = {name: value for name, value in recipe.items() if name != "iterations"}
    if "fit" in takes and "calibration" not in recipe:
        recipe = {"fit": "loftq", **recipe}
    return make_recipe(**recipe)


def run_merge(base: Path, adapter: Path, output: Path, **options: Any) -> Path:
    """Merge with the library, with what `loftq merge` does by default; gives `output`."""
    prepared = prepare_merge(base, adapter, output, MergeOptions(**options))
    merge_adapter(prepared, Silent(), overwrite=False, restart=False)
    return output


def loftq(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "loftq_cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def loftq_here(*arguments: str, cwd: Path) -> tuple[int, str]:
    """Run the command line in this process, where other tests have loaded the libraries: (status, stdout + stderr)."""
    from loftq_cli.cli.main import _run

    out, err = io.StringIO(), io.StringIO()
    with chdir(cwd), redirect_stdout(out), redirect_stderr(err):
        status = _run(list(arguments))
    return status, out.getvalue() + err.getvalue()


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`, by relative name."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def converted_files(model: Path, directory: Path, **recipe: Any) -> dict[str, bytes]:
    """Every file of a conversion that nothing happened to; in `directory` its output was typed as `out`."""
    with chdir(directory):
        run_conversion(model, Path("out"), **recipe)
    return files_of(directory / "out")
