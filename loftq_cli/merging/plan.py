"""What a merge will write: a job for every tensor of the base and of the adapter, from headers alone. Everything that
does not fit is refused here, by name, before a number is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loftq_cli.adapter.config import CONFIG_NAME
from loftq_cli.adapter.source import AdapterSource, LoraTensors, open_adapter
from loftq_cli.errors import MismatchError, UsageError, printable
from loftq_cli.layouts.layout import DENSE_HINT, LAYOUTS, ModelFacts, StoredMatrix, common_spec, load_layout
from loftq_cli.merging.form import MergeForm, MergeOptions, choose_form
from loftq_cli.merging.provenance import Provenance, check_provenance
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import kind_of, module_of
from loftq_cli.output.records import TOOL, source_name
from loftq_cli.output.staging import check_apart
from loftq_cli.planning.jobs import Shard, pack_shards
from loftq_cli.planning.settings import decoded_dtype
from loftq_cli.planning.sizes import parse_size
from loftq_cli.quant.formats import QuantSpec, requantized_spec
from loftq_cli.tensors.headers import WEIGHT_DTYPES, OutTensor
from loftq_cli.tensors.specs import Pooling

# The output layer over the vocabulary, and classes that have none: only the former can share the embedding's weight.
_VOCABULARY_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|cls\.predictions\.decoder)$")
_HEADLESS_CLASS = re.compile(r"For\w*(?:Classification|QuestionAnswering|MultipleChoice)$|(?<!Head)(?<!Heads)Model$")
_MAX_NAMES = 3  # more hide the sentence around them
_TIED = "belongs to a weight that embedding and head share"


@dataclass(frozen=True, slots=True)
class MergeJob:
    """One tensor of the base (or a new one), and what becomes of it.

    name          of the base's tensor; for a weight that is stored quantized, all its parts together
    lora          the adapter to add, if any
    lora_bias     the adapter whose bias is added to this bias, if any
    replacement   the adapter's tensor that takes its place first, if any
    matrix        how it is stored quantized, if it is
    keeps_codes   what is stored are the base's codes with other offsets
    outputs       what is written
    note          why it is not quantized, where that was asked for
    is_copied     what is written are the base's bytes, or its numbers in another dtype
    """

    name: str
    lora: LoraTensors | None = None
    lora_bias: LoraTensors | None = None
    replacement: str | None = None
    matrix: StoredMatrix | None = None
    keeps_codes: bool = False
    outputs: tuple[OutTensor, ...] = ()
    is_copied: bool = False
    note: str | None = None

    @property
    def is_touched(self) -> bool:
        """Whether the adapter changes it."""
        return self.lora is not None or self.lora_bias is not None or self.replacement is not None


@dataclass(frozen=True)
class Merge:
    """A merge that is ready to run: base and adapter fit together as far as their headers tell.

    notes   what has to be said about how they do
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
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(t.nbytes for job in self.jobs for t in job.outputs)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the bytes of the result, other than the numbers in the inputs."""
        refs = [*self.base.checkpoint.tensors.values(), *self.adapter.weights.tensors.values()]
        headers = [[ref.name, ref.dtype, ref.shape] for ref in refs]
        options = {name: value for name, value in asdict(self.options).items() if name != "force"}
        sources = [source_name(self.base.path), source_name(self.adapter.path)]
        configs = [dict(self.base.config), dict(self.adapter.config), self.base.layout.name]
        values = [TOOL, version("torch"), options, self.dtype, sources, configs, headers]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def unties(self) -> bool:
        """Whether the head gets a weight of its own, in a model that shares the embedding's."""
        return self.base.family.ties_embeddings() and any(
            job.replacement is not None and _is_vocabulary_head(module_of(job.name)) for job in self.jobs
        )

    def model_config(self) -> dict[str, Any]:
        """The base's config, true of what is written: its dtype, whether the head is tied, how it is quantized.

        Raises UsageError for a model that the container's loaders do not read.
        """
        dtype = {"dtype": self.dtype}
        config = {key: value for key, value in self.base.config.items() if key != "torch_dtype"} | dtype
        nested = config.get("text_config")
        if isinstance(nested, dict):
            named = dtype if "dtype" in nested or "torch_dtype" in nested else {}
            config["text_config"] = {key: value for key, value in nested.items() if key != "torch_dtype"} | named
        if self.unties:
            for part in (config, config.get("text_config")):
                if isinstance(part, dict) and "tie_word_embeddings" in part:
                    part["tie_word_embeddings"] = False
        matrices = [job.matrix for job in self.jobs if job.matrix is not None]
        if not matrices:
            return config
        loaded, refs = self.base.loaded_names(), self.base.tensors
        kept = [
            job.name
            for job in self.jobs
            if job.matrix is None and job.name.endswith(".weight") and len(job.outputs[0].shape) == 2
        ]
        specs = {module_of(loaded[matrix.name]): matrix.spec for matrix in matrices}
        spec, others = common_spec(specs)
        facts = ModelFacts(
            self.dtype,
            spec,
            list(specs),
            [module_of(loaded.get(name, name)) for name in kept],
            has_experts=any(name in refs and kind_of(refs[name], self.base.family) == "expert" for name in kept),
            other_specs=others,
            refused_by=self.base.family.row.refused_by,
        )
        return load_layout(self.form.layout).model_config(config, facts)


def prepare_merge(base_path: Path, adapter_path: Path, output: Path, options: MergeOptions) -> Merge:
    """Open both inputs and plan. Reads no numbers and writes nothing.

    Raises MismatchError when the adapter does not fit the base, naming the tensor.
    """
    base = BaseModel.open(base_path)
    adapter = open_adapter(adapter_path)
    check_apart(output, [base.folder, *base.checkpoint.files, adapter.path])
    provenance = check_provenance(base, adapter.path, adapter.config, force=options.force)
    is_pooled = _is_pooled(base, adapter, options)
    if options.pooling is not None and not is_pooled:
        what = "--pooling is for a QA-LoRA adapter, and this one reads every input"
        raise UsageError(what, file=adapter.path, hint="leave it out")
    form = choose_form(options, base, is_pooled=is_pooled)
    dtype = form.model_dtype(options.dtype or base.family.dtype(base.tensors.values()))
    if options.dtype not in (None, dtype):
        what = f"--layout {form.layout} needs one dtype for scales and model, and --dtype is {options.dtype}"
        raise UsageError(what, hint=f"--scale-dtype {options.dtype}")
    jobs = tuple(_Planner(base, adapter, options, form, dtype).jobs())
    unfit = next((job for job in jobs if job.note), None)
    if unfit is not None and not any(job.matrix for job in jobs):
        raise UsageError(f"no weight to quantize: {unfit.note}", tensor=unfit.name, hint="another --group-size")
    shards = pack_shards([job.outputs for job in jobs], parse_size(options.max_shard_size))
    merge = Merge(
        base, adapter, output, options, form, dtype, jobs, shards, provenance, _untrained_notes(base, adapter)
    )
    merge.model_config()  # refuses a model that the container's loaders do not read
    return merge


def _untrained_notes(base: BaseModel, adapter: AdapterSource) -> tuple[str, ...]:
    untrained = adapter.untrained_in(base)
    if not untrained:
        return ()
    shown = ", ".join(printable(name, 80) for name in untrained[:_MAX_NAMES])
    more = f" and {len(untrained) - _MAX_NAMES} more" if len(untrained) > _MAX_NAMES else ""
    return (f"the adapter's target_modules name layers of which it holds nothing, merged as they are: {shown}{more}",)


def _is_pooled(base: BaseModel, adapter: AdapterSource, options: MergeOptions) -> bool:
    """Whether a lora_A reads pooled inputs: its config or the options say so, and it is narrower than its weight."""
    for name, loaded in adapter.names_in(base).items():
        entry = adapter.lora.get(module_of(loaded)) if name.endswith(".weight") else None
        if entry is None or entry.is_embedding or (entry.pooling is None and options.pooling is None):
            continue
        if adapter.weights.tensors[entry.lora_A].shape[1] != base.matrix_shape(name)[-1]:
            return True
    return False


def _is_vocabulary_head(module: str) -> bool:
    return bool(_VOCABULARY_HEAD.search(module))


class _Planner:
    """Gives every tensor of the adapter its place; `lora`, `biases` and `whole` hold those that have none yet."""

    def __init__(
        self, base: BaseModel, adapter: AdapterSource, options: MergeOptions, form: MergeForm, dtype: str
    ) -> None:
        self.base, self.adapter, self.options, self.form, self.dtype = base, adapter, options, form, dtype
        self.file = adapter.weights.path
        self.loaded = adapter.names_in(base)
        self.lora, self.whole = dict(adapter.lora), dict(adapter.whole)
        self.biases = {f"{module}.bias": entry for module, entry in self.lora.items() if entry.lora_bias}
        self.unfit: dict[str, str] = {}
        if form.is_quantized and not base.family.loads_in_4_bit():
            what = f"transformers cannot load {base.family.model_type} from quantized tensors"
            raise UsageError(what, hint=DENSE_HINT)

    def jobs(self) -> Iterator[MergeJob]:
        """A job for every base tensor, in order, then for every new one. Raises MismatchError for leftovers."""
        self._check_tied()
        for name, ref in self.base.tensors.items():
            is_tied = ref.alias_of is not None and self.base.family.ties_embeddings()
            if not (is_tied and self.loaded[name] not in self.whole):
                yield self._job(name)
        for entry in self.lora.values():
            known = next((n for n in self.loaded.values() if n.endswith(".weight")), "none")
            hint = f"the base's modules are called like {module_of(known)}"
            raise MismatchError("its module is not in the base", file=self.file, tensor=entry.lora_A, hint=hint)
        for entry in self.biases.values():
            raise MismatchError("its module has no bias in the base", file=self.file, tensor=entry.lora_bias)
        yield from (self._new(loaded, name) for loaded, name in self.whole.items())

    def _job(self, name: str) -> MergeJob:
        loaded = self.loaded[name]
        lora = self.lora.pop(module_of(loaded), None) if name.endswith(".weight") else None
        lora_bias, replacement = self.biases.pop(loaded, None), self.whole.pop(loaded, None)
        if lora is not None:
            lora = self._checked_lora(name, lora)
        if replacement is not None:
            self._check_replacement(name, replacement)
        if lora_bias is not None and lora_bias.lora_bias is not None:
            self._check_shape(lora_bias.lora_bias, name, self.base.tensors[name].shape)
        job = MergeJob(name, lora, lora_bias, replacement)
        return self._quantized(job) or replace(self._dense(job), note=self.unfit.get(name))

    def _new(self, loaded: str, name: str) -> MergeJob:
        ref, saved = self.adapter.weights.tensors[name], self.adapter.config.get("modules_to_save") or []
        untied = self.base.family.ties_embeddings() and _is_vocabulary_head(module_of(loaded))
        if loaded in self.base.tensors or not (untied or any(f".{module}." in f".{loaded}" for module in saved)):
            raise MismatchError("is left over: the base has no such tensor", file=self.file, tensor=name)
        return MergeJob(loaded, replacement=name, outputs=(OutTensor(loaded, self.dtype, ref.shape),))

    def _dense(self, job: MergeJob) -> MergeJob:
        """The job that stores its tensor in full precision, in the orientation that the model's files have."""
        ref = self.base.tensors[job.name]
        if job.name in self.base.quantized:
            return replace(job, outputs=(OutTensor(job.name, self.dtype, self._file_shape(job.name)),))
        asked = self.options.dtype is not None or LAYOUTS[self.form.layout].one_dtype
        recast = ref.dtype in WEIGHT_DTYPES and (job.is_touched or asked)
        output = OutTensor(job.name, self.dtype if recast else ref.dtype, ref.shape)
        return replace(job, outputs=(output,), is_copied=not job.is_touched)

    def _file_shape(self, name: str) -> tuple[int, ...]:
        shape = self.base.matrix_shape(name)
        return shape[::-1] if self.base.family.is_transposed(module_of(name)) else shape

    def _quantized(self, job: MergeJob) -> MergeJob | None:
        """The job that stores its weight quantized; None for one that is not, or that no loader would read."""
        stored = self.base.quantized.get(job.name)
        if not self.form.is_quantized:
            return None
        if self.form.keeps_codes:
            # A replaced weight has no codes to keep.
            return self._with_offsets(job, stored) if stored is not None and job.replacement is None else None
        spec = self.form.spec
        assert spec is not None
        if stored is not None:
            spec = requantized_spec(stored.spec, spec)
            shape, transposed = stored.shape, stored.transposed
        elif job.lora is None or kind_of(self.base.tensors[job.name], self.base.family) not in ("linear", "head"):
            return None
        else:
            out_features, in_features = self.base.matrix_shape(job.name)
            shape, transposed = (out_features, in_features), self.base.family.is_transposed(module_of(job.name))
        fit = load_layout(self.form.layout).fit(spec, shape, transposed=transposed)
        if fit.spec is None:
            self.unfit[job.name] = fit.reason or "does not fit the container"
            return None
        matrix = self._stored(job.name, shape, fit.spec, transposed=transposed)
        if not job.is_touched and matrix == stored and self.base.layout.name == self.form.layout:
            # Its values lie on the grid already, and encoding them again would move some.
            outputs = tuple(OutTensor(ref.name, ref.dtype, ref.shape) for ref in self.base.parts(job.name))
            return replace(job, matrix=matrix, outputs=outputs, is_copied=True)
        return replace(job, matrix=matrix, outputs=load_layout(self.form.layout).planned(matrix))

    def _with_offsets(self, job: MergeJob, stored: StoredMatrix) -> MergeJob:
        """The job that moves the offsets of a quantized weight. Raises MismatchError for groups that do not fit."""
        groups, size = job.lora.pooling if job.lora else None, stored.spec.group_size_or_none
        if job.lora is not None and groups is None:
            what = f"has no pooled input, so no zero point of {job.name} can hold it"
            raise MismatchError(what, file=self.file, tensor=job.lora.lora_A, hint=DENSE_HINT)
        if job.lora is not None and groups is not None and not stored.spec.has_whole_groups_in(groups.group_size):
            what = f"pools groups of {groups.group_size}, which are not unions of the groups of {size} of {job.name}"
            raise MismatchError(what, file=self.file, tensor=job.lora.lora_A, hint=DENSE_HINT)
        layout, spec = load_layout(self.form.layout), self.form.spec_for(stored.spec)
        fit = layout.fit(spec, stored.shape, transposed=stored.transposed)
        if fit.spec is None:
            raise UsageError(f"--layout {self.form.layout}: {fit.reason}", tensor=job.name, hint=fit.hint)
        matrix = self._stored(job.name, stored.shape, spec, transposed=False)
        return replace(job, matrix=matrix, keeps_codes=True, outputs=layout.planned(matrix))

    def _stored(self, name: str, shape: tuple[int, int], spec: QuantSpec, *, transposed: bool) -> StoredMatrix:
        return StoredMatrix(name, shape, spec, decoded_dtype(self.form.layout, spec, self.dtype), transposed)

    def _checked_lora(self, name: str, lora: LoraTensors) -> LoraTensors:
        """`lora` with its pooling settled. Raises MismatchError where it does not fit the weight called `name`."""
        ref, tensors = self.base.tensors[name], self.adapter.weights.tensors
        is_dense = name not in self.base.quantized
        if is_dense and ref.dtype not in WEIGHT_DTYPES:
            raise MismatchError(f"adapts {name}, which is {ref.dtype}", file=self.file, tensor=lora.lora_B)
        transposed = self.base.family.is_transposed(module_of(name))
        if self.adapter.config.get("fan_in_fan_out") and is_dense and not transposed and not lora.is_embedding:
            raise MismatchError(
                f"fan_in_fan_out: weights are stored [in, out], and by the base's config {name} is [out, in]",
                file=self.adapter.path / CONFIG_NAME,
                hint="is config.json beside the base's weights?",
            )
        shape = ref.shape[::-1] if lora.is_embedding else self.base.matrix_shape(name)
        pooled = tensors[lora.lora_A].shape[1]
        lora = self._pooled(name, lora, pooled, shape[-1])
        in_features = pooled * (lora.pooling.group_size if lora.pooling else 1)
        hint = None
        if lora.pooling is None and pooled and shape[-1] % pooled == 0 and not lora.is_embedding:
            hint = "a QA-LoRA adapter whose config does not say so? --pooling peft, paper or repo"
        self._check_shape(lora.lora_B, name, shape, (tensors[lora.lora_B].shape[0], in_features), hint=hint)
        return lora

    def _pooled(self, name: str, lora: LoraTensors, pooled: int, in_features: int) -> LoraTensors:
        """`lora` with the pooling that its shape, its config and the options tell."""
        if pooled == in_features or lora.is_embedding:
            # PEFT pools only on GPTQ layers, and trains an ordinary adapter on every other one.
            return replace(lora, pooling=None)
        if self.options.pooling is None:
            return lora
        group_size = lora.pooling.group_size if lora.pooling else in_features // max(pooled, 1)
        if pooled * group_size != in_features:
            what = f"reads {pooled} inputs, which are no equal groups of the {in_features} of {name}"
            raise MismatchError(what, file=self.file, tensor=lora.lora_A)
        return replace(lora, pooling=Pooling(self.options.pooling, group_size))

    def _check_replacement(self, name: str, replacement: str) -> None:
        self._check_shape(replacement, name, self._file_shape(name), hint="resize the base's embeddings first")

    def _check_shape(
        self,
        tensor: str,
        name: str,
        expected: tuple[int, ...],
        found: tuple[int, ...] | None = None,
        *,
        hint: str | None = None,
    ) -> None:
        found = self.adapter.weights.tensors[tensor].shape if found is None else found
        if found != expected:
            what = f"is for {found}, and {name} of the base is {expected}"
            raise MismatchError(what, file=self.file, tensor=tensor, hint=hint)

    def _check_tied(self) -> None:
        """Refuse what would reach the head through the embedding's weight, or the embedding through the head's."""
        family = self.base.family
        if not family.ties_embeddings() or any(map(_HEADLESS_CLASS.search, family.architectures[:1])):
            return
        shared = {
            self.loaded[name]
            for name, ref in self.base.tensors.items()
            if kind_of(ref, family) == "embedding" and ref.shape[0] == self.base.config.get("vocab_size", ref.shape[0])
        }
        heads = [name for loaded, name in self.whole.items() if _is_vocabulary_head(module_of(loaded))]
        adapted = {f"{module}.weight": entry.lora_B for module, entry in self.lora.items()}
        for loaded, name in (self.whole | adapted).items():
            if loaded in adapted and _is_vocabulary_head(module_of(loaded)):
                raise MismatchError(f"{_TIED}: merged, it would change the embedding too", file=self.file, tensor=name)
            if loaded in shared and not heads:
                raise MismatchError(f"{_TIED}: merged, it would change the head too", file=self.file, tensor=name)
            if loaded in shared and all(self.adapter.is_same(name, head) for head in heads):
                # PEFT saves both where it saves one; untied, they would be the same numbers twice.
                self.whole = {key: value for key, value in self.whole.items() if value not in heads}
                self.adapter.unused.update(dict.fromkeys(heads, f"it equals {name}, whose weight the head shares"))
