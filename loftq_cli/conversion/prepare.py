"""Everything about a conversion that headers and configs alone decide. Needs no torch, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loftq_cli.adapter.config import WEIGHTS_NAME
from loftq_cli.allocation.allocation import Allocation, allocate
from loftq_cli.allocation.candidates import Budget, Options
from loftq_cli.checkpoint.safetensors_file import is_tensor_name
from loftq_cli.checkpoint.source import Checkpoint, open_checkpoint
from loftq_cli.checkpoint.statistics import Statistics, open_statistics
from loftq_cli.errors import MismatchError, UsageError
from loftq_cli.model.builtin import resolve_model
from loftq_cli.output.checksums import CHECKSUMS
from loftq_cli.output.records import PROVENANCE_NAME, RECIPE_NAME, REPORT_NAME
from loftq_cli.output.side_files import side_file_copies
from loftq_cli.output.staged_run import PlannedResult, is_result_complete
from loftq_cli.output.staging import check_apart
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.planner import build_plan
from loftq_cli.planning.recipe import Recipe

_OWN_FILES = {RECIPE_NAME, REPORT_NAME, PROVENANCE_NAME, CHECKSUMS}  # of a source that is a result itself


@dataclass(frozen=True)
class Conversion:
    """A conversion that is ready to run: nothing that its headers can tell is wrong with it. `allocation` says how its
    formats and ranks were chosen, where they were.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    plan: Plan
    output: Path
    base_model: str
    statistics: Statistics | None = None
    allocation: Allocation | None = None

    @property
    def side_files(self) -> dict[str, Path]:
        """The small files that are copied, by the names of their copies; what the result has of its own is not."""
        return side_file_copies(self.checkpoint.directory, leave=_OWN_FILES)

    @property
    def fingerprint(self) -> str:
        """See `Plan.fingerprint`."""
        statistics = None if self.statistics is None else self.statistics.sha256
        return self.plan.fingerprint(self.checkpoint.tensors, self.base_model, statistics)

    @property
    def result(self) -> PlannedResult:
        """The output directory of this conversion, for `run_staged`."""
        plan = self.plan
        files = {shard.file: shard.tensors for shard in plan.shards}
        return PlannedResult(
            output=self.output,
            fingerprint=self.fingerprint,
            units=tuple(job.name for job in plan.jobs),
            files={**files, f"{plan.adapter_dir}/{WEIGHTS_NAME}": plan.adapter_tensors},
            side_files=self.side_files,
        )


def prepare_conversion(model: str, output: Path, recipe: Recipe) -> Conversion:
    """Open the source, read its headers and plan. Writes nothing; needs no torch.

    Raises LoftqError for everything that can be known to go wrong before the first number is read.
    """
    checkpoint = _opened(model, output)
    plan, statistics = _planned(checkpoint, recipe)
    return Conversion(checkpoint, checkpoint.config(), plan, output, output.as_posix(), statistics)


def prepare_within_target(
    model: str,
    output: Path,
    recipe: Recipe,
    target: Budget,
    *,
    threads: int = 1,
    observe: Callable[[str, int, int], None],
) -> Conversion:
    """The same with number formats and ranks chosen within a target; see `allocate`. Reads every weight, on the
    processor.
    """
    checkpoint = _opened(model, output)
    statistics = None
    if recipe.calibration is not None:  # of this model, before any weight is read
        widest = build_plan(checkpoint.tensors, checkpoint.config(), Options(recipe, target).widest)
        statistics, _ = _statistics(Path(recipe.calibration), widest)
    found = allocate(checkpoint, recipe, target, statistics, threads=threads, observe=observe)
    plan, statistics = _planned(checkpoint, found.recipe)
    return Conversion(checkpoint, checkpoint.config(), plan, output, output.as_posix(), statistics, found)


def _opened(model: str, output: Path) -> Checkpoint:
    path = resolve_model(model)
    if not is_tensor_name(str(output)):  # the adapter's config has the name of its base
        raise UsageError("is not a name that can be written as text (UTF-8)", file=output, hint="choose another output")
    checkpoint = open_checkpoint(path)
    check_apart(output, [checkpoint.directory or path, *checkpoint.files])
    return checkpoint


def _planned(checkpoint: Checkpoint, recipe: Recipe) -> tuple[Plan, Statistics | None]:
    """The plan, and the statistics that its recipe names."""
    plan = build_plan(checkpoint.tensors, checkpoint.config(), recipe)
    if recipe.calibration is None:
        return plan, None
    statistics, notes = _statistics(Path(recipe.calibration), plan)
    return replace(plan, notes=(*plan.notes, *notes)), statistics


def _statistics(path: Path, plan: Plan) -> tuple[Statistics, list[str]]:
    """The statistics of the layers' inputs, and what has to be said of layers that text does not reach, as those of
    images. Raises MismatchError for statistics of another model.
    """
    statistics = open_statistics(path)
    missing = [job.name for job in plan.layers if job.name not in statistics.names]
    hint = "loftq calibrate this model"
    if len(missing) == len(plan.layers):
        raise MismatchError("has no statistics there", file=path, tensor=missing[0], hint=hint)
    for job in plan.layers:
        found = job.matrix.shape[1] if job.name in missing else statistics.in_features(job.name)
        if found != job.matrix.shape[1]:
            what = f"has {job.matrix.shape[1]} inputs, and statistics of {found}"
            raise MismatchError(what, file=path, tensor=job.name, hint=hint)
    if not missing:
        return statistics, []
    return statistics, [f"{len(missing)} layers have no statistics, and all of their weights count the same"]


def is_conversion_done(conversion: Conversion, *, overwrite: bool) -> bool:
    """Whether the output is the complete, undamaged result of this very conversion, and nobody wants a replacement.

    Raises UsageError when something else stands under the output's name.
    """
    return is_result_complete(conversion.result, conversion.checkpoint.sha256, overwrite=overwrite)
