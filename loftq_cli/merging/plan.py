"""The plan of a merge: jobs, files and config, from headers alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loftq_cli.adapter.config import CONFIG_NAME
from loftq_cli.adapter.extras import take_extras
from loftq_cli.adapter.source import AdapterSource, open_adapter
from loftq_cli.adapter.spelling import wrappers_in
from loftq_cli.checkpoint.quantized_source import describe
from loftq_cli.errors import UsageError, printable
from loftq_cli.layouts.layout import DENSE_HINT, ModelFacts, load_layout
from loftq_cli.merging.form import MergeForm, MergeOptions, choose_form
from loftq_cli.merging.planner import MergeJob, MergePlanner
from loftq_cli.merging.provenance import Provenance, check_provenance
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
    adapter      the PEFT directory
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
    """

    base: BaseModel
    adapter: AdapterSource
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

    @property
    def nbytes(self) -> int:
        """Bytes of all output tensors together."""
        return sum(t.nbytes for job in self.jobs for t in job.outputs)

    @property
    def fingerprint(self) -> str:
        """The sha256 over headers, configs, source names, options and versions; the numbers of the inputs are hashed
        apart.
        """
        refs = [*self.base.checkpoint.tensors.values(), *self.adapter.weights.tensors.values()]
        headers = [[ref.name, ref.dtype, ref.shape] for ref in refs]
        options = {name: value for name, value in asdict(self.options).items() if name != "force"}
        if options.pop("remote_code") is False:
            options["remote_code"] = False
        if options["tokenizer"] is None:
            del options["tokenizer"]
        sources = [source_name(self.base.path), source_name(self.adapter.path)]
        configs = [dict(self.base.config), dict(self.adapter.config), self.base.layout.name]
        values = [TOOL, version("torch"), options, self.dtype, sources, configs, headers]
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
            job.replacement is not None and is_vocabulary_head(module_of(job.name)) for job in self.jobs
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


def prepare_merge(base_path: Path, adapter_path: Path, output: Path, options: MergeOptions) -> Merge:
    """Open base and adapter, and plan the merge. Only headers and configs are read, and nothing is written.

    base_path      a converted directory or a full-precision checkpoint
    adapter_path   a PEFT LoRA directory
    output         the directory to write later

    Raises MismatchError naming the tensor when the adapter does not fit the base; InputError for a damaged input;
    UsageError for options in conflict with base, adapter or container.
    """
    base = BaseModel.open(base_path)
    check_read(base.tensors)
    adapter = open_adapter(adapter_path)
    check_apart(output, [base.folder, *base.checkpoint.files, adapter.path])
    adapter, extra_notes = take_extras(adapter, base, force=options.force)
    provenance = check_provenance(base, adapter.path, adapter.config, force=options.force)
    form = choose_form(options, base, is_pooled=_check_pooled(base, adapter, options))
    check_library(form.layout, base.family.library)
    dtype = form.model_dtype(options.dtype or base.family.dtype(base.tensors.values()))
    if options.dtype not in (None, dtype):
        message = f"--layout {form.layout} needs one dtype for scales and model, and --dtype is {options.dtype}"
        raise UsageError(message, hint=f"--scale-dtype {options.dtype}")
    planner = MergePlanner(base, adapter, options, form, dtype)
    jobs = tuple(planner.plan_jobs())
    unfit = next((job for job in jobs if job.note), None)
    if unfit is not None and not any(job.matrix for job in jobs):
        message = f"no weight to quantize: {unfit.note}"
        raise UsageError(message, file=base.path, tensor=unfit.name, hint="another --group-size")
    quantized = [job.name for job in jobs if job.matrix is not None]
    remedy = DENSE_HINT if options.requantize is None else "leave out --requantize"
    check_names(load_layout(form.layout), quantized, [job.name for job in jobs], remedy=remedy)
    merge = Merge(
        base=base,
        adapter=adapter,
        output=output,
        options=options,
        form=form,
        dtype=dtype,
        jobs=jobs,
        shards=pack_shards([job.outputs for job in jobs], parse_size(options.max_shard_size), _stem_of(base)),
        provenance=provenance,
        unused=planner.unused,
        growth=planner.growth,
        notes=(*extra_notes, *_notes(base, adapter, planner.growth)),
    )
    merge.model_config()  # refuses a model unknown to the container's loaders
    merge = replace(merge, tokenizer=choose_tokenizer(options.tokenizer, merge.side_files, adapter.path))
    notes = [note for note in (merge.tokenizer.note, code_note(merge.code_files)) if note is not None]
    return replace(merge, notes=(*merge.notes, *notes))


def _stem_of(base: BaseModel) -> str:
    """The names of weight files without number and ending, inside the result."""
    return f"{base.checkpoint.part}{base.family.library.weights}"


def _notes(base: BaseModel, adapter: AdapterSource, growth: Growth | None) -> tuple[str, ...]:
    decoded = describe(base.checkpoint.scaled)
    notes = [*_growth_notes(growth), *_spelling_notes(base, adapter), *_untrained_notes(base, adapter)]
    return (*([decoded] if decoded else []), *notes)


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


def _check_pooled(base: BaseModel, adapter: AdapterSource, options: MergeOptions) -> bool:
    """True when a lora_A reads pooled inputs: config or options say so, and lora_A is narrower than the weight.

    Raises UsageError for --pooling when every lora_A reads every input.
    """
    for name, lora in adapter.lora_in(base).items():
        if lora.is_embedding or (lora.pooling is None and options.pooling is None):
            continue
        if adapter.weights.tensors[lora.lora_A].shape[1] != base.matrix_shape(name)[-1]:
            return True
    if options.pooling is not None:
        message = "--pooling is for a QA-LoRA adapter, and this one reads every input"
        raise UsageError(message, file=adapter.path, hint="leave it out")
    return False
