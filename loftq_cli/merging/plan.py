"""The plan of a merge: jobs, files and config, from headers alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loftq_cli.adapter.config import CONFIG_NAME
from loftq_cli.adapter.source import AdapterSource
from loftq_cli.adapter.spelling import wrappers_in
from loftq_cli.checkpoint.quantized_source import describe
from loftq_cli.checkpoint.source import WeightsFile
from loftq_cli.errors import UsageError, printable
from loftq_cli.layouts.layout import DENSE_HINT, ModelFacts, load_layout
from loftq_cli.merging.adapters.placed import Placed, additions, join
from loftq_cli.merging.adapters.placing import place
from loftq_cli.merging.adapters.tasks import NewHead, settle_head
from loftq_cli.merging.adapters.tied import settle_tied
from loftq_cli.merging.adapters.weighted import WeightedAdapter, joined_weights, open_adapters, weight_notes
from loftq_cli.merging.form import MergeForm, MergeOptions, choose_form
from loftq_cli.merging.planner import MergeJob, MergePlanner
from loftq_cli.merging.provenance import Provenance, check_provenance, join_provenance
from loftq_cli.merging.restacked import restack
from loftq_cli.merging.tokenizer import TokenizerChoice, choose_tokenizer
from loftq_cli.merging.vocabulary import Growth, is_vocabulary_head
from loftq_cli.model.foreign import check_read
from loftq_cli.model.stored import BaseModel, check_names
from loftq_cli.model.targets import kind_of, module_of
from loftq_cli.output.checksums import CHECKSUMS
from loftq_cli.output.records import (
    MERGE_REPORT_NAME,
    PROVENANCE_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    TOOL,
    source_name,
)
from loftq_cli.output.side_files import code_in, code_note, side_file_copies, without_code
from loftq_cli.output.staged_run import PlannedResult
from loftq_cli.output.staging import check_apart
from loftq_cli.planning.format_options import check_library
from loftq_cli.planning.jobs import Shard, pack_shards
from loftq_cli.planning.sizes import parse_size
from loftq_cli.quant.formats import common_spec

_MAX_NAMES = 3  # more names hide the sentence around them

# Files about the base, false about a merged model; transformers would take an adapter_config.json for an adapter.
_NOT_COPIED = {REPORT_NAME, RECIPE_NAME, PROVENANCE_NAME, MERGE_REPORT_NAME, CHECKSUMS, CONFIG_NAME}


@dataclass(frozen=True)
class Merge:
    """A merge ready to run: base and adapter fit together as far as headers tell.

    base         the model under the adapter, quantized or in full precision
    adapters     the PEFT directories, each with a weight
    output       the directory to write
    form         container and number format of the merged weights
    dtype        dtype of every tensor in full precision
    jobs         a job for each tensor of base and adapter, in the order of the output
    shards       the weight files
    provenance   the evidence whether the adapter belongs to the base
    unused       adapter tensor without a job -> the reason
    notes        remarks about how base and adapter fit together
    tokenizer    the files of the tokenizer, of base or adapter
    growth       the growth of the vocabulary; None for the vocabulary of the base
    head         the head of another task than the base's; None for the base's class
    """

    base: BaseModel
    adapters: tuple[WeightedAdapter, ...]
    output: Path
    options: MergeOptions
    form: MergeForm
    dtype: str
    jobs: tuple[MergeJob, ...]
    shards: tuple[Shard, ...]
    provenance: Provenance
    unused: dict[str, str]
    notes: tuple[str, ...]
    tokenizer: TokenizerChoice = field(default_factory=TokenizerChoice)
    growth: Growth | None = None
    head: NewHead | None = None

    @property
    def adapter(self) -> AdapterSource:
        """The first adapter."""
        return self.adapters[0].source

    @cached_property
    def weights(self) -> WeightsFile:
        """The tensors of all adapters."""
        return self.adapter.weights if len(self.adapters) == 1 else joined_weights(self.adapters)

    @property
    def nbytes(self) -> int:
        """Bytes of all output tensors together."""
        return sum(t.nbytes for job in self.jobs for t in job.outputs)

    @property
    def fingerprint(self) -> str:
        """The sha256 over headers, configs, source names, options and versions; the numbers of the inputs are hashed
        apart.
        """
        refs = [*self.base.checkpoint.tensors.values(), *self.weights.tensors.values()]
        headers = [[ref.name, ref.dtype, ref.shape] for ref in refs]
        options = {name: value for name, value in asdict(self.options).items() if name != "force"}
        if options.pop("remote_code") is False:
            options["remote_code"] = False
        if options["tokenizer"] is None:
            del options["tokenizer"]
        sources = [source_name(self.base.path), *(source_name(adapter.source.path) for adapter in self.adapters)]
        configs = [dict(self.base.config), *(dict(adapter.source.config) for adapter in self.adapters)]
        values: list[object] = [
            TOOL,
            version("torch"),
            options,
            self.dtype,
            sources,
            [*configs, self.base.layout.name],
            headers,
        ]
        if any(adapter.weight != 1.0 for adapter in self.adapters):
            values.append([adapter.weight for adapter in self.adapters])
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def side_files(self) -> dict[str, Path]:
        """The small files to copy, of base and adapter's tokenizer: relative name of the copy -> source file."""
        card = {"README.md"} if (self.base.folder / REPORT_NAME).is_file() else set()
        directory, remote_code = self.base.checkpoint.directory, self.options.remote_code
        part, leave = self.base.checkpoint.part, _NOT_COPIED | card
        copies = side_file_copies(directory, leave=leave, remote_code=remote_code, part=part)
        return self.tokenizer.apply(copies)

    @property
    def code_files(self) -> list[str]:
        """Names of the result's files with code of the base, see `code_in`."""
        return code_in(self.side_files, self.base.config) if self.options.remote_code else []

    @property
    def result(self) -> PlannedResult:
        """The planned output directory, for `run_staged`."""
        return PlannedResult(
            output=self.output,
            fingerprint=self.fingerprint,
            units=tuple(job.name for job in self.jobs),
            files={shard.file: shard.tensors for shard in self.shards},
            side_files=self.side_files,
            remote_code=self.options.remote_code,
        )

    @property
    def unties(self) -> bool:
        """True when a head gets a separate weight in a model whose head shares the weight of the embedding."""
        return self.base.family.ties_embeddings() and any(
            (job.replacement is not None or job.source is not None) and is_vocabulary_head(module_of(job.name))
            for job in self.jobs
        )

    def model_config(self) -> dict[str, Any]:
        """The config.json of the merged model: the base's keys with changed dtype, tied head and quantization.

        Raises UsageError for a model unknown to the loaders of the container.
        """
        dtype = {"dtype": self.dtype} if self.base.family.library.states_dtype else {}
        config = {key: value for key, value in self._kept_config().items() if key != "torch_dtype"} | dtype
        nested = config.get("text_config")
        if isinstance(nested, dict):
            nested_dtype = dtype if "dtype" in nested or "torch_dtype" in nested else {}
            config["text_config"] = {key: value for key, value in nested.items() if key != "torch_dtype"} | nested_dtype
        if self.unties:
            for part in (config, config.get("text_config")):
                if isinstance(part, dict) and "tie_word_embeddings" in part:
                    part["tie_word_embeddings"] = False
        if self.growth is not None:
            config = self.growth.change(config)
        if self.head is not None:
            config = self.head.change(config)
        if not any(job.matrix for job in self.jobs):
            return config
        return load_layout(self.form.layout).model_config(config, self._model_facts())

    def _kept_config(self) -> dict[str, Any]:
        """The config of the base; without the names of custom code where the user wants no such code."""
        return self.base.config if self.options.remote_code else without_code(self.base.config)

    def _model_facts(self) -> ModelFacts:
        matrices = [job.matrix for job in self.jobs if job.matrix is not None]
        loaded, refs = self.base.loaded_names(), self.base.tensors
        dense = [
            job.name
            for job in self.jobs
            if job.matrix is None and job.name.endswith(".weight") and len(job.outputs[0].shape) == 2
        ]
        specs = {module_of(loaded[matrix.name]): matrix.spec for matrix in matrices}
        spec, other_specs = common_spec(specs)
        return ModelFacts(
            self.dtype,
            spec,
            list(specs),
            [module_of(loaded.get(name, name)) for name in dense],
            library=self.base.family.library,
            has_experts=any(name in refs and kind_of(refs[name], self.base.family) == "expert" for name in dense),
            other_specs=other_specs,
            refused_by=self.base.family.row.refused_by,
        )


def prepare_merge(
    base_path: Path, adapters: Path | Sequence[tuple[Path, float]], output: Path, options: MergeOptions
) -> Merge:
    """Open base and adapters, and plan the merge. Only headers and configs are read, and nothing is written.

    base_path   a converted directory or a full-precision checkpoint
    adapters    a PEFT LoRA directory, or several with weights
    output      the directory to write later

    Raises MismatchError naming the tensor when an adapter does not fit the base; InputError for a damaged input;
    UsageError for options in conflict with base, adapter or container.
    """
    base = BaseModel.open(base_path)
    check_read(base.tensors)
    several = [(adapters, 1.0)] if isinstance(adapters, Path) else adapters
    check_apart(output, [base.folder, *base.checkpoint.files, *(path for path, _ in several)])
    opened = open_adapters(several, base, force=options.force)
    sources = [adapter.source for adapter in opened]
    records = [check_provenance(base, source.path, source.config, force=options.force) for source in sources]
    placed = join([place(adapter, base) for adapter in opened])
    head = settle_head(placed, base)
    settle_tied(placed, base, [head.architecture] if head else base.family.architectures)
    form = choose_form(options, base, is_pooled=_check_pooled(base, placed, options))
    check_library(form.layout, base.family.library)
    dtype = form.model_dtype(options.dtype or base.family.dtype(base.tensors.values()))
    if options.dtype not in (None, dtype):
        message = f"--layout {form.layout} needs one dtype for scales and model, and --dtype is {options.dtype}"
        raise UsageError(message, hint=f"--scale-dtype {options.dtype}")
    planner = MergePlanner(base, placed, options, form, dtype)
    jobs = restack(planner.plan_jobs(), base.family)
    _check_names(base, options, form, jobs)
    merge = Merge(
        base=base,
        adapters=opened,
        output=output,
        options=options,
        form=form,
        dtype=dtype,
        jobs=jobs,
        shards=pack_shards([job.outputs for job in jobs], parse_size(options.max_shard_size), _stem_of(base)),
        provenance=join_provenance(records),
        unused=placed.unused,
        growth=planner.growth,
        head=head,
        notes=(*_notes(base, opened, placed, planner.growth, head), *_expert_notes(jobs, form)),
    )
    merge.model_config()  # refuses a model unknown to the container's loaders
    return _with_tokenizer(merge)


def _stem_of(base: BaseModel) -> str:
    """The names of weight files without number and ending, inside the result."""
    return f"{base.checkpoint.part}{base.family.library.weights}"


def _with_tokenizer(merge: Merge) -> Merge:
    """`merge` with the tokenizer of the base, or of the first adapter with a tokenizer."""
    choice, side_files = merge.options.tokenizer, merge.side_files
    chosen = TokenizerChoice()
    for adapter in merge.adapters:
        chosen = choose_tokenizer(choice, side_files, adapter.source.path)
        if chosen.note is not None:
            break
    notes = [note for note in (chosen.note, code_note(merge.code_files)) if note is not None]
    return replace(merge, tokenizer=chosen, notes=(*merge.notes, *notes))


def _check_names(base: BaseModel, options: MergeOptions, form: MergeForm, jobs: Sequence[MergeJob]) -> None:
    """Raises UsageError when no weight fits a quantized result, and for names that the container cannot hold."""
    unfit = next((job for job in jobs if job.note), None)
    if unfit is not None and not any(job.matrix for job in jobs):
        message = f"no weight to quantize: {unfit.note}"
        raise UsageError(message, file=base.path, tensor=unfit.name, hint="another --group-size")
    quantized = [job.name for job in jobs if job.matrix is not None]
    remedy = DENSE_HINT if options.requantize is None else "leave out --requantize"
    check_names(load_layout(form.layout), quantized, [job.name for job in jobs], remedy=remedy)


def _notes(
    base: BaseModel, adapters: Sequence[WeightedAdapter], placed: Placed, growth: Growth | None, head: NewHead | None
) -> tuple[str, ...]:
    decoded = describe(base.checkpoint.scaled)
    notes = [*([decoded] if decoded else []), *(note for adapter in adapters for note in adapter.notes)]
    notes += [*weight_notes(adapters, base), *placed.notes, *([head.note] if head else []), *_growth_notes(growth)]
    if placed.copies:
        names = ", ".join(printable(name, 80) for name in placed.copies)
        notes.append(f"embedding and head get weights of their own, as PEFT computes with two: {names}")
    for adapter in adapters:
        notes += [*_spelling_notes(base, adapter.source), *_untrained_notes(base, adapter.source)]
    return tuple(dict.fromkeys(notes))


def _expert_notes(jobs: Sequence[MergeJob], form: MergeForm) -> tuple[str, ...]:
    """A note about adapted experts in full precision in a result with codes."""
    dense = [job for job in jobs if job.matrix is None and (job.experts or any(item.lora.part for item in job.lora))]
    if not dense or not form.is_quantized:
        return ()
    name = printable(dense[0].name, 80)
    return (f"{len(dense)} tensors of experts stay in full precision, as in the base: {name} is the first",)


def _growth_notes(growth: Growth | None) -> tuple[str, ...]:
    if growth is None:
        return ()
    return (f"the vocabulary grows from {growth.before} to {growth.rows} rows, all of which are in the adapter",)


def _spelling_notes(base: BaseModel, adapter: AdapterSource) -> tuple[str, ...]:
    own = wrappers_in(base.loaded_names().values())  # a model may have a module called like a wrapper
    parts = ", ".join(printable(part, 80) for part in adapter.taken if part not in own)
    if not parts:
        return ()
    return (f"{parts} in the names of the adapter's tensors: left by training, and taken off",)


def _untrained_notes(base: BaseModel, adapter: AdapterSource) -> tuple[str, ...]:
    untrained = adapter.untrained_in(base)
    if not untrained:
        return ()
    names = ", ".join(printable(name, 80) for name in untrained[:_MAX_NAMES])
    more = f" and {len(untrained) - _MAX_NAMES} more" if len(untrained) > _MAX_NAMES else ""
    return (f"the adapter's target_modules name layers of which it holds nothing, merged as they are: {names}{more}",)


def _check_pooled(base: BaseModel, placed: Placed, options: MergeOptions) -> bool:
    """True when a lora_A reads pooled inputs: config or options say so, and lora_A is narrower than the weight. False
    under DoRA, whose rows no offset can scale.

    Raises UsageError for --pooling when every lora_A reads every input.
    """
    is_pooled = False
    for name, addition in additions(placed):
        lora, source = addition.lora, addition.source
        if lora.magnitude is not None and not is_pooled:
            return False
        may_pool = lora.pooling is not None or (options.pooling is not None and lora.part is None)
        if lora.is_embedding or not may_pool or name not in base.tensors:
            continue
        is_pooled = is_pooled or source.weights.tensors[lora.lora_A].shape[1] != base.matrix_shape(name)[-1]
    if not is_pooled and options.pooling is not None:
        message = "--pooling is for a QA-LoRA adapter, and this one reads every input"
        path = next((addition.source.path for _, addition in additions(placed)), None)
        raise UsageError(message, file=path, hint="leave it out")
    return is_pooled
