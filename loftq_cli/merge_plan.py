"""What a merge will write: a job for every tensor of the base and of the adapter, from headers alone. Everything that
does not fit is refused here, by name, before a number is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from loftq_cli.adapter_source import AdapterSource, LoraTensors, open_adapter
from loftq_cli.base_model import BaseModel
from loftq_cli.checkpoint.staging import check_apart, check_output
from loftq_cli.errors import MismatchError, UsageError
from loftq_cli.layouts import bitsandbytes
from loftq_cli.layouts.layout import StoredMatrix
from loftq_cli.layouts.peft_adapter import CONFIG_NAME
from loftq_cli.plan import Shard, pack_shards
from loftq_cli.provenance import Provenance, check_provenance
from loftq_cli.quant.formats import FORMATS
from loftq_cli.recipe import parse_size
from loftq_cli.report import TOOL
from loftq_cli.targets import kind_of, module_of
from loftq_cli.tensors import MODEL_DTYPES, WEIGHT_DTYPES, CodebookSpec, OutTensor

# The output layer over the vocabulary, and classes that have none: only the former can share the embedding's weight.
_VOCABULARY_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|cls\.predictions\.decoder)$")
_HEADLESS_CLASS = re.compile(r"For\w*(?:Classification|QuestionAnswering|MultipleChoice)$|(?<!Head)(?<!Heads)Model$")
_TIED = "belongs to a weight that embedding and head share"


@dataclass(frozen=True, slots=True)
class MergeJob:
    """One tensor of the base (or a new one), and what becomes of it.

    name          of the base's tensor; for a weight that is stored quantized, all its parts together
    lora          the adapter to add, if any
    lora_bias     the adapter whose bias is added to this bias, if any
    replacement   the adapter's tensor that takes its place first, if any
    matrix        how it is stored quantized, if it is
    outputs       what is written
    is_copied     what is written are the base's bytes, or its numbers in another dtype
    """

    name: str
    lora: LoraTensors | None = None
    lora_bias: LoraTensors | None = None
    replacement: str | None = None
    matrix: StoredMatrix | None = None
    outputs: tuple[OutTensor, ...] = ()
    is_copied: bool = False

    @property
    def is_touched(self) -> bool:
        """Whether the adapter changes it."""
        return self.lora is not None or self.lora_bias is not None or self.replacement is not None


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How to merge. `dtype` of None is the model's own."""

    dtype: str | None = None
    requantize: str | None = None
    max_shard_size: str = "5GB"
    force: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in MODEL_DTYPES:
            raise UsageError(f"--dtype {self.dtype!r} does not exist", hint=f"one of {', '.join(MODEL_DTYPES)}")
        if self.requantize is not None and self.requantize not in FORMATS:
            raise UsageError(f"--requantize {self.requantize!r} does not exist", hint=f"one of {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Merge:
    """A merge that is ready to run: base and adapter fit together as far as their headers tell."""

    base: BaseModel
    adapter: AdapterSource
    output: Path
    options: MergeOptions
    dtype: str
    jobs: tuple[MergeJob, ...]
    shards: tuple[Shard, ...]
    provenance: Provenance

    @property
    def nbytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(t.nbytes for job in self.jobs for t in job.outputs)

    @property
    def fingerprint(self) -> str:
        """A hash of the options and of both inputs' headers."""
        refs = [*self.base.tensors.values(), *self.adapter.weights.tensors.values()]
        headers = [[ref.name, ref.dtype, ref.shape] for ref in refs]
        options = [self.options.dtype, self.options.requantize, self.options.max_shard_size]
        values = [TOOL, options, self.dtype, dict(self.adapter.config), headers]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def unties(self) -> bool:
        """Whether the head gets a weight of its own, in a model that shares the embedding's."""
        return self.base.family.ties_embeddings() and any(
            job.replacement is not None and _is_vocabulary_head(module_of(job.name)) for job in self.jobs
        )


def prepare(base_path: Path, adapter_path: Path, output: Path, options: MergeOptions, *, overwrite: bool) -> Merge:
    """Open both inputs and plan. Reads no numbers and writes nothing.

    Raises MismatchError when the adapter does not fit the base, naming the tensor.
    """
    base = BaseModel.open(base_path)
    adapter = open_adapter(adapter_path)
    check_apart(output, [base.folder, adapter.path])
    check_output(output, overwrite=overwrite)
    provenance = check_provenance(base, adapter.path, adapter.config, force=options.force)
    dtype = options.dtype or base.family.dtype(base.tensors.values())
    jobs = tuple(_Planner(base, adapter, options, dtype).jobs())
    shards = pack_shards([job.outputs for job in jobs], parse_size(options.max_shard_size))
    return Merge(base, adapter, output, options, dtype, jobs, shards, provenance)


def _is_vocabulary_head(module: str) -> bool:
    return bool(_VOCABULARY_HEAD.search(module))


class _Planner:
    """Gives every tensor of the adapter its place; `lora`, `biases` and `whole` hold those that have none yet."""

    def __init__(self, base: BaseModel, adapter: AdapterSource, options: MergeOptions, dtype: str) -> None:
        self.base, self.adapter, self.options, self.dtype = base, adapter, options, dtype
        self.file = adapter.weights.path
        self.loaded = adapter.names_in(base)
        self.lora, self.whole = dict(adapter.lora), dict(adapter.whole)
        self.biases = {f"{module}.bias": entry for module, entry in self.lora.items() if entry.lora_bias}
        if options.requantize and not base.family.loads_in_4_bit():
            what = f"transformers cannot load {base.family.model_type} from 4-bit tensors"
            raise UsageError(what, hint="merge without --requantize")

    def jobs(self) -> Iterator[MergeJob]:
        """A job for every base tensor, in order, then for every new one. Raises MismatchError for leftovers."""
        self._check_tied()
        parts = {part for name in self.base.quantized for part in self.base.parts(name)} - self.base.quantized
        for name, ref in self.base.tensors.items():
            is_tied = ref.alias_of is not None and self.base.family.ties_embeddings()
            if name not in parts and not (is_tied and self.loaded[name] not in self.whole):
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
            self._check_lora(name, lora)
        if replacement is not None:
            self._check_replacement(name, replacement)
        if lora_bias is not None and lora_bias.lora_bias is not None:
            self._check_shape(lora_bias.lora_bias, name, self.base.tensors[name].shape)
        job = MergeJob(name, lora, lora_bias, replacement)
        return self._quantized(job) or self._dense(job)

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
        recast = ref.dtype in WEIGHT_DTYPES and (job.is_touched or self.options.dtype is not None)
        output = OutTensor(job.name, self.dtype if recast else ref.dtype, ref.shape)
        return replace(job, outputs=(output,), is_copied=not job.is_touched)

    def _file_shape(self, name: str) -> tuple[int, ...]:
        shape = self.base.matrix_shape(name)
        return shape[::-1] if self.base.family.is_transposed(module_of(name)) else shape

    def _quantized(self, job: MergeJob) -> MergeJob | None:
        """The job that stores its weight quantized again; None for one that is not, or that no loader would read."""
        name, codebook = job.name, self.options.requantize
        if codebook is None:
            return None
        if name in self.base.quantized:
            stored = self.base.stored_matrix(name)
            if not job.is_touched and stored.spec.codebook == codebook and stored.dtype == self.dtype:
                # Its values lie on the grid already, and encoding them again would move some.
                refs = [self.base.tensors[part] for part in self.base.parts(name)]
                outputs = tuple(OutTensor(ref.name, ref.dtype, ref.shape) for ref in refs)
                return replace(job, matrix=stored, outputs=outputs, is_copied=True)
        elif job.lora is None or kind_of(self.base.tensors[name], self.base.family) not in ("linear", "head"):
            return None
        else:
            out_features, in_features = self.base.matrix_shape(name)
            transposed = self.base.family.is_transposed(module_of(name))
            stored = StoredMatrix(name, (out_features, in_features), CodebookSpec(), self.dtype, transposed)
        spec = bitsandbytes.fit(replace(stored.spec, codebook=codebook), stored.shape).spec
        if spec is None:
            return None
        matrix = replace(stored, spec=spec, dtype=self.dtype)
        return replace(job, matrix=matrix, outputs=bitsandbytes.planned(matrix))

    def _check_lora(self, name: str, lora: LoraTensors) -> None:
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
        self._check_shape(lora.lora_B, name, shape, (tensors[lora.lora_B].shape[0], tensors[lora.lora_A].shape[1]))

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
