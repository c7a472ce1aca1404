"""Everything about a conversion that headers and configs alone decide. Needs no torch, and writes nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from loftq_cli.activations.text_sources import TextSource, open_text
from loftq_cli.activations.transformers_models import check_installed, library_versions, model_directory
from loftq_cli.activations.weight_statistics import has_known_blocks
from loftq_cli.adapter.config import WEIGHTS_NAME
from loftq_cli.adapter.library_adapter import metadata_of
from loftq_cli.allocation.allocation import Allocation, allocate
from loftq_cli.allocation.candidates import Budget, Options
from loftq_cli.checkpoint.quantized_source import describe
from loftq_cli.checkpoint.safetensors_file import is_tensor_name
from loftq_cli.checkpoint.source import Checkpoint, open_checkpoint
from loftq_cli.checkpoint.statistics import Statistics, open_statistics
from loftq_cli.conversion.head_tensors import input_hash
from loftq_cli.errors import MismatchError, UsageError, printable
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.model.builtin import resolve_model
from loftq_cli.model.experts import find_experts
from loftq_cli.model.family import Family
from loftq_cli.output.checksums import CHECKSUMS, file_sha256, fingerprint_of
from loftq_cli.output.records import PROVENANCE_NAME, RECIPE_NAME, REPORT_NAME, source_name
from loftq_cli.output.side_files import code_in, code_note, side_file_copies, without_code
from loftq_cli.output.staged_run import PlannedResult, is_result_complete
from loftq_cli.output.staging import check_apart
from loftq_cli.planning.jobs import CopyJob, LayerJob, input_sha256
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.planner import build_plan
from loftq_cli.planning.recipe import NONE, RANDOM, SELF, WEIGHTS, Recipe, TextOptions
from loftq_cli.tensors.headers import OutTensor, config_file_beside
from loftq_cli.tensors.libraries import DEFAULT_LIBRARY

_UNKNOWN_BLOCKS = "the blocks of the model have an unknown structure, so the errors of all weights count alike"
_TEXT_HINT = ": --text names a text for the model to read"
_OWN_FILES = {RECIPE_NAME, REPORT_NAME, PROVENANCE_NAME, CHECKSUMS}  # stay behind when the original is itself a result


@dataclass(frozen=True)
class Conversion:
    """A conversion ready to run: headers and configs passed every check.

    checkpoint   the original
    config       config.json of the original
    plan         the jobs
    output       directory of the result
    base_model   name of the base in the adapter's config
    statistics   of the layers' inputs; None without a calibration
    text         the text that the model reads during the conversion; None without a text
    allocation   the choice of formats and ranks; None where the recipe sets formats and ranks
    remote_code  whether the result keeps the original's code for loaders
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    plan: Plan
    output: Path
    base_model: str
    statistics: Statistics | None = None
    allocation: Allocation | None = None
    text: TextSource | None = None
    remote_code: bool = True

    @property
    def side_files(self) -> dict[str, Path]:
        """Name of each copy -> small file of the original to copy; records of this tool are left out."""
        return _side_files(self.checkpoint, remote_code=self.remote_code)

    @property
    def code_files(self) -> list[str]:
        """Names of the result's files with code of the original, see `code_in`."""
        return code_in(self.side_files, self.config) if self.remote_code else []

    def hash_input(self, unit: str) -> str:
        """Hash of the stored bytes that the job called `unit` reads."""
        return input_sha256(self.checkpoint.sha256, self._jobs[unit])

    @cached_property
    def _jobs(self) -> dict[str, LayerJob | CopyJob]:
        return {job.name: job for job in self.plan.jobs}

    @property
    def published_plan(self) -> Plan:
        """The plan as a result tells strangers: calibration and text have a name, and no path of this machine."""
        recipe = self.plan.recipe
        calibration = None if recipe.calibration is None else _last_part(recipe.calibration)
        text = recipe.text and replace(recipe.text, names=tuple(map(_last_part, recipe.text.names)))
        return replace(self.plan, recipe=replace(recipe, calibration=calibration, text=text))

    @property
    def fingerprint(self) -> str:
        """Hash of headers and options, see `Plan.fingerprint`."""
        statistics = None if self.statistics is None else self.statistics.sha256
        if self.text is not None:
            # Tokens depend on the tokenizer, which is among the side files, and on the libraries.
            parts = [self.text.sha256, *map(file_sha256, self.side_files.values()), library_versions()]
            statistics = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        fingerprint = self.plan.fingerprint(self.checkpoint.tensors, self.base_model, statistics)
        return fingerprint if self.remote_code else fingerprint_of({"without remote code": fingerprint})

    @property
    def _library_files(self) -> dict[str, tuple[OutTensor, ...]]:
        """Relative name of the adapter in the library's own file -> the file's tensors; empty without the file."""
        tensors, name = self.plan.library_tensors, self.plan.family.library.adapter_weights
        return {f"{self.plan.adapter_dir}/{name}": tensors} if tensors else {}

    @property
    def result(self) -> PlannedResult:
        """The planned output directory, for `run_staged`."""
        plan = self.plan
        files = {shard.file: shard.tensors for shard in plan.shards}
        return PlannedResult(
            output=self.output,
            fingerprint=self.fingerprint,
            units=(*(job.name for job in plan.jobs), *(tensor.name for tensor in plan.head_tensors.values())),
            files={**files, f"{plan.adapter_dir}/{WEIGHTS_NAME}": plan.adapter_tensors, **self._library_files},
            side_files=self.side_files,
            remote_code=self.remote_code,
            metadata={name: metadata_of(plan.adapter_config(""), plan.family) for name in self._library_files},
        )


def prepare_conversion(
    model: str, output: Path, recipe: Recipe, *, remote_code: bool = True, base_name: str | None = None
) -> Conversion:
    """Open the original, read headers and plan. Writes nothing; needs no torch.

    model         a directory, a file, or "builtin:" and a name
    output        directory of the result
    recipe        all options
    remote_code   whether the result keeps the original's code for loaders
    base_name     name of the base in the adapter's config; None for the output as typed, or for the last part of an
                  absolute output: no path of the machine is published

    Raises LoftqError for every error that shows before the first weight is read.

    >>> from loftq_cli.planning.settle import make_recipe
    >>> conversion = prepare_conversion("builtin:tiny-llama", Path("base"), make_recipe(rank=8))
    >>> len(conversion.plan.layers), conversion.base_model
    (28, 'base')
    """
    checkpoint = _open_original(model, output, recipe)
    plan, statistics = _build_plan(checkpoint, recipe)
    text = None if recipe.text is None else _open_model_text(checkpoint, recipe.text)
    base_model = _name_base(output, base_name)
    return _conversion(checkpoint, plan, output, base_model, statistics, None, text, remote_code=remote_code)


def expert_rows(model: str, layout: str) -> frozenset[int]:
    """The input features of the experts of a model that loaders of packed weights read; empty for no such experts.

    model    as for `prepare_conversion`
    layout   a container of packed weights, a key of LAYOUTS

    Raises LoftqError for a model that cannot be opened.

    >>> expert_rows("builtin:tiny-llama", "compressed-tensors")
    frozenset()
    """
    with open_checkpoint(resolve_model(model)) as checkpoint:
        family = Family(checkpoint.config(), config_file_beside(checkpoint.tensors.values()))
        groups = find_experts(checkpoint.tensors, family, packed=LAYOUTS[layout].stores_codes)
    return frozenset(g.shape[1] for g in groups if all(p.stored for parts in g.experts for p in parts))


def prepare_within_target(
    model: str,
    output: Path,
    recipe: Recipe,
    target: Budget,
    *,
    threads: int = 1,
    observe: Callable[[str, int, int], None],
    remote_code: bool = True,
    base_name: str | None = None,
) -> Conversion:
    """Prepare a conversion with number formats and ranks chosen within `target`, see `allocate`. Reads every weight to
    quantize, and computes on the processor. Statistics from the weights alone do not count in the choice.

    model, output   as for `prepare_conversion`
    recipe          all remaining options
    target          bounds on the size of the result
    threads         number of threads
    observe         receives the name of each measured layer, the number of measured layers, and the number of all
                    layers
    remote_code     as for `prepare_conversion`
    base_name       as for `prepare_conversion`

    Raises LoftqError in the cases of `prepare_conversion` and of `allocate`.
    """
    if recipe.text is not None:
        hint = "loftq calibrate, and --calibration in place of --text"
        raise UsageError("a bound on the size needs the statistics of all layers before the choice", hint=hint)
    checkpoint = _open_original(model, output, recipe)
    statistics = None
    if recipe.calibration not in (None, WEIGHTS):  # statistics of a wrong model stop the run before a weight is read
        widest = build_plan(checkpoint.tensors, checkpoint.config(), Options(recipe, target).widest)
        statistics, _ = _open_model_statistics(Path(str(recipe.calibration)), widest)
    allocation = allocate(checkpoint, recipe, target, statistics, threads=threads, observe=observe)
    plan, statistics = _build_plan(checkpoint, allocation.recipe, statistics)
    base_model = _name_base(output, base_name)
    return _conversion(checkpoint, plan, output, base_model, statistics, allocation, None, remote_code=remote_code)


def _last_part(path: str) -> str:
    """The last part of a path; a file or folder called like a word of an option keeps a "./" before the name."""
    name, words = source_name(Path(path)), (SELF, RANDOM, WEIGHTS, NONE)
    return f"./{name}" if name in words and path not in words else name


def _name_base(output: Path, base_name: str | None) -> str:
    """The name of the base in the adapter's config. Raises UsageError for a name that loaders cannot take."""
    if base_name is None:
        return output.name if output.is_absolute() else output.as_posix()
    if not base_name.strip() or not is_tensor_name(base_name) or Path(base_name).is_absolute():
        hint = "a hub id such as you/model-nf4, or a relative path"
        raise UsageError(f"--base-name {printable(base_name)} cannot name a base that travels", hint=hint)
    return base_name


def _open_model_text(checkpoint: Checkpoint, options: TextOptions) -> TextSource:
    """Read the text. Raises UsageError without transformers, InputError for a model without a config or a text."""
    check_installed()
    model_directory(checkpoint)
    return open_text(options.names)


def _conversion(
    checkpoint: Checkpoint,
    plan: Plan,
    output: Path,
    base_model: str,
    statistics: Statistics | None,
    allocation: Allocation | None,
    text: TextSource | None,
    *,
    remote_code: bool,
) -> Conversion:
    """The conversion with a note about the original's code."""
    config = checkpoint.config() if remote_code else without_code(checkpoint.config())
    conversion = Conversion(checkpoint, config, plan, output, base_model, statistics, allocation, text, remote_code)
    note = code_note(conversion.code_files)
    return conversion if note is None else replace(conversion, plan=replace(plan, notes=(*plan.notes, note)))


def _open_original(model: str, output: Path, recipe: Recipe) -> Checkpoint:
    path = resolve_model(model)
    for expression in (*recipe.include, *recipe.exclude):
        if not is_tensor_name(expression):  # the recipe in the result repeats the expression
            message = f"the expression {printable(expression)} cannot be written as text (UTF-8)"
            raise UsageError(message, hint="type . for any character")
    if not is_tensor_name(str(output)):  # the adapter's config names the base
        raise UsageError("is not a name that can be written as text (UTF-8)", file=output, hint="choose another output")
    checkpoint = open_checkpoint(path)
    check_apart(output, [checkpoint.directory or path, *checkpoint.files])
    _side_files(checkpoint, remote_code=True)  # a link out of the folder is refused at once
    return checkpoint


def _side_files(checkpoint: Checkpoint, *, remote_code: bool) -> dict[str, Path]:
    return side_file_copies(checkpoint.directory, leave=_OWN_FILES, remote_code=remote_code, part=checkpoint.part)


def _build_plan(
    checkpoint: Checkpoint, recipe: Recipe, statistics: Statistics | None = None
) -> tuple[Plan, Statistics | None]:
    """Build the plan, and open the statistics of the recipe; `statistics` are open already, and hashed. A run measures
    statistics from the weights later.
    """
    plan = build_plan(checkpoint.tensors, checkpoint.config(), recipe, part=checkpoint.part)
    decoded = describe(checkpoint.scaled)
    notes = [*([decoded] if decoded else []), *plan.notes, *_note_further_models(checkpoint)]
    plan = replace(plan, notes=tuple(notes))
    if recipe.calibration == WEIGHTS and not has_known_blocks(checkpoint.tensors.keys(), plan.family):
        is_text = plan.family.library is DEFAULT_LIBRARY
        return replace(plan, notes=(*plan.notes, _UNKNOWN_BLOCKS + (_TEXT_HINT if is_text else ""))), None
    if recipe.calibration in (None, WEIGHTS):
        return plan, None
    statistics, notes = _open_model_statistics(Path(recipe.calibration), plan, statistics)
    return replace(plan, notes=(*plan.notes, *notes)), statistics


def _note_further_models(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a note about models of a pipeline that denoise too, like `transformer_2` beside `transformer`."""
    if checkpoint.part and checkpoint.directory is not None:
        part = checkpoint.part.rstrip("/")
        for folder in sorted(checkpoint.directory.glob(f"{part}_[0-9]*")):
            yield f"{folder.name} is copied as it is: loftq quantize takes the folder too"


def _open_model_statistics(
    path: Path, plan: Plan, statistics: Statistics | None = None
) -> tuple[Statistics, list[str]]:
    """Open the statistics of the layers' inputs, unless `statistics` are open. Returns the statistics, and a note about
    layers without statistics: text does not reach every layer, for example in a vision tower.

    Raises MismatchError for statistics of a wrong model.
    """
    statistics = statistics or open_statistics(path)
    unreached = [job.name for job in plan.layers if job.name not in statistics.names]
    hint = "loftq calibrate this model"
    if len(unreached) == len(plan.layers):
        raise MismatchError("has no statistics there", file=path, tensor=unreached[0], hint=hint)
    for job in plan.layers:
        in_features = job.matrix.shape[1] if job.name in unreached else statistics.in_features(job.name)
        if in_features != job.matrix.shape[1]:
            message = f"has {job.matrix.shape[1]} inputs, and statistics of {in_features}"
            raise MismatchError(message, file=path, tensor=job.name, hint=hint)
    if not unreached:
        return statistics, []
    return statistics, [f"{len(unreached)} layers have no statistics, and all of their weights count the same"]


def is_conversion_done(conversion: Conversion, *, overwrite: bool) -> bool:
    """Whether the output is already the complete, undamaged result of `conversion`. With `overwrite`, only the result
    of a run interrupted after the publication counts.

    Raises UsageError for an output that the result may not replace.

    >>> from loftq_cli.planning.settle import make_recipe
    >>> is_conversion_done(prepare_conversion("builtin:tiny-llama", Path("base"), make_recipe()), overwrite=False)
    False
    """
    hash_input = input_hash(conversion.plan, conversion.checkpoint, conversion.hash_input)
    return is_result_complete(conversion.result, hash_input, overwrite=overwrite)
