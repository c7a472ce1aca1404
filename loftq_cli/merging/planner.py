"""A job for every tensor of base and adapter, from headers alone.

An error refuses a misfit by name before any number is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from loftq_cli.adapter.config import CONFIG_NAME
from loftq_cli.adapter.experts.planned import plan_expert_loras
from loftq_cli.adapter.sorting import GATHER_SLICES, LoraTensors
from loftq_cli.adapter.source import AdapterSource
from loftq_cli.adapter.spelling import nearest_name
from loftq_cli.errors import MismatchError, UsageError
from loftq_cli.layouts.layout import DENSE_HINT, LAYOUTS, StoredMatrix, load_layout
from loftq_cli.merging.form import MergeForm, MergeOptions
from loftq_cli.merging.vocabulary import Growth, find_growth, is_vocabulary_head, vocabulary_size
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import kind_of, module_of
from loftq_cli.planning.settings import decoded_dtype
from loftq_cli.quant.formats import QuantSpec, requantized_spec
from loftq_cli.tensors.headers import WEIGHT_DTYPES, OutTensor
from loftq_cli.tensors.specs import Pooling

# Model classes without an output layer over the vocabulary.
_HEADLESS_CLASS = re.compile(r"For\w*(?:Classification|QuestionAnswering|MultipleChoice)$|(?<!Head)(?<!Heads)Model$")
_RESIZE = "save embedding and head both, with modules_to_save; or resize the base's embeddings first"
_TIED = "belongs to a weight that embedding and head share"


@dataclass(frozen=True, slots=True)
class MergeJob:
    """The work on a tensor of the base, or on a new tensor from the adapter.

    name          tensor name in the base; a quantized weight with all stored parts is a single job
    lora          the adapter to add; None for a weight without an adapter
    lora_bias     the adapter with a bias to add to the tensor, a bias; None without
    replacement   name of the adapter's tensor to read in place of the base's; None without
    matrix        the quantized matrix to store; None for a dense result
    keeps_codes   whether the codes of the base are written, with changed offsets
    outputs       the tensors to write
    is_copied     whether the numbers of the base are written, as bytes or in a changed dtype
    note          the reason why the weight is not quantized in spite of --requantize; None without
    experts       for each expert in a tensor of all experts, the adapters to add; empty for any other tensor
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
    experts: tuple[tuple[LoraTensors, ...], ...] = ()

    @property
    def is_touched(self) -> bool:
        """True when the adapter changes the tensor."""
        has_lora = self.lora is not None or self.lora_bias is not None or bool(self.experts)
        return has_lora or self.replacement is not None

    @property
    def numel(self) -> int:
        """Number of elements of the merged tensor."""
        return math.prod(self.matrix.shape if self.matrix else self.outputs[0].shape)


class MergePlanner:
    """Gives every tensor of the adapter a place. `unused` maps an adapter tensor without a job to the reason, and
    `growth` is the growth of the vocabulary, once planned.
    """

    def __init__(
        self, base: BaseModel, adapter: AdapterSource, options: MergeOptions, form: MergeForm, dtype: str
    ) -> None:
        """Raises UsageError for a quantized `form` when transformers cannot load the model from quantized tensors."""
        self.unused = dict(adapter.unused)
        self._base, self._adapter, self._options, self._form, self._dtype = base, adapter, options, form, dtype
        self._file = adapter.weights.path
        self._loaded_names = adapter.names_in(base)
        # Adapter tensors without a place so far.
        self._experts = plan_expert_loras(base, adapter, map(module_of, self._loaded_names.values()))
        self._lora = {module: lora for module, lora in adapter.lora.items() if module not in self._experts.placed}
        self._whole = dict(adapter.whole)
        self._biases = {f"{module}.bias": lora for module, lora in self._lora.items() if lora.lora_bias}
        self._unfit: dict[str, str] = {}
        self.growth: Growth | None = None
        if form.is_quantized and not base.family.loads_in_4_bit():
            message = f"transformers cannot load {base.family.model_type} from quantized tensors"
            raise UsageError(message, hint=DENSE_HINT)

    def plan_jobs(self) -> Iterator[MergeJob]:
        """Yield a job for every base tensor, in order, then for every new tensor.

        Raises MismatchError naming an adapter tensor of a wrong shape or without a place.
        """
        self._check_tied()
        self.growth = find_growth(self._base, self._loaded_names, self._whole, self._adapter.weights.tensors)
        for name, ref in self._base.tensors.items():
            is_tied = ref.alias_of is not None and self._base.family.ties_embeddings()
            if not (is_tied and self._loaded_names[name] not in self._whole):
                yield self._plan_job(name)
        self._check_leftovers()
        yield from (self._plan_new_tensor(loaded, name) for loaded, name in self._whole.items())

    def _check_leftovers(self) -> None:
        for lora in self._lora.values():
            modules = [module_of(name) for name in self._loaded_names.values() if name.endswith(".weight")]
            hint = f"the base's modules are called like {nearest_name(lora.module, modules) or 'none'}"
            raise self._mismatch("its module is not in the base", lora.lora_A, hint)
        for lora in self._biases.values():
            raise self._mismatch("its module has no bias in the base", str(lora.lora_bias))

    def _plan_job(self, name: str) -> MergeJob:
        loaded = self._loaded_names[name]
        lora = self._lora.pop(module_of(loaded), None) if name.endswith(".weight") else None
        lora_bias, replacement = self._biases.pop(loaded, None), self._whole.pop(loaded, None)
        if lora is not None:
            lora = self._fit_lora(name, lora)
        experts = self._experts.stacks.get(name, ())
        if name in self._experts.single or experts:
            lora = self._only(name, self._experts.single.get(name), lora, replacement)
        if replacement is not None:
            self._check_shape(replacement, name, self._file_shape(name), hint=_RESIZE)
        if lora_bias is not None and lora_bias.lora_bias is not None:
            self._check_shape(lora_bias.lora_bias, name, self._grown(name, self._base.tensors[name].shape))
        job = MergeJob(name, lora, lora_bias, replacement, experts=experts)
        return self._store_quantized(job) or replace(self._store_dense(job), note=self._unfit.get(name))

    def _only(
        self, name: str, expert: LoraTensors | None, lora: LoraTensors | None, replacement: str | None
    ) -> LoraTensors | None:
        """`expert`, the factors of an expert. Raises MismatchError for a weight that the adapter changes twice."""
        twice = lora.lora_A if lora is not None else replacement
        if twice is not None:
            raise self._mismatch(f"changes {name}, which an adapter of all experts changes as well", twice)
        return expert

    def _plan_new_tensor(self, loaded: str, name: str) -> MergeJob:
        ref, trained_copies = self._adapter.weights.tensors[name], self._adapter.config.get("modules_to_save") or []
        is_untied = self._base.family.ties_embeddings() and is_vocabulary_head(module_of(loaded))
        is_trained_copy = any(f".{module}." in f".{loaded}" for module in trained_copies)
        if loaded in self._base.tensors or not (is_untied or is_trained_copy):
            raise self._mismatch("is left over: the base has no such tensor", name)
        size = self.growth.rows if self.growth else vocabulary_size(self._base)
        if is_untied and loaded.endswith(".weight") and size not in (None, ref.shape[0]):
            raise self._mismatch(f"is {ref.shape}, and the vocabulary has {size} rows", name, _RESIZE)
        return MergeJob(loaded, replacement=name, outputs=(OutTensor(loaded, self._dtype, ref.shape),))

    def _store_dense(self, job: MergeJob) -> MergeJob:
        """Complete `job` to store the tensor in full precision, in the orientation of the model's files."""
        ref = self._base.tensors[job.name]
        if job.name in self._base.quantized:
            return replace(job, outputs=(OutTensor(job.name, self._dtype, self._file_shape(job.name)),))
        has_one_dtype = self._options.dtype is not None or LAYOUTS[self._form.layout].one_dtype
        is_recast = ref.dtype in WEIGHT_DTYPES and (job.is_touched or has_one_dtype)
        shape = self._grown(job.name, ref.shape)
        output = OutTensor(job.name, self._dtype if is_recast else ref.dtype, shape)
        return replace(job, outputs=(output,), is_copied=not job.is_touched)

    def _file_shape(self, name: str) -> tuple[int, ...]:
        shape = self._grown(name, self._base.matrix_shape(name))
        return shape[::-1] if self._base.family.is_transposed(module_of(name)) else shape

    def _grown(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.growth.shape_of(name, shape) if self.growth else shape

    def _store_quantized(self, job: MergeJob) -> MergeJob | None:
        """Complete `job` to store the weight quantized; None for a weight to store dense."""
        stored, form = self._base.quantized.get(job.name), self._form
        if form.keeps_codes:
            # A replaced weight has no codes to keep.
            return self._move_offsets(job, stored) if stored is not None and job.replacement is None else None
        return None if form.spec is None else self._quantize_again(job, stored, form.spec)

    def _quantize_again(self, job: MergeJob, stored: StoredMatrix | None, spec: QuantSpec) -> MergeJob | None:
        if stored is not None:
            spec = requantized_spec(stored.spec, spec)
            (out_features, in_features), transposed = self._grown(job.name, stored.shape), stored.transposed
        elif job.lora is None or kind_of(self._base.tensors[job.name], self._base.family) not in ("linear", "head"):
            return None
        else:
            out_features, in_features = self._grown(job.name, self._base.matrix_shape(job.name))
            transposed = self._base.family.is_transposed(module_of(job.name))
        shape = (out_features, in_features)
        layout = load_layout(self._form.layout)
        fit = layout.fit(spec, shape, transposed=transposed)
        if fit.spec is None:
            self._unfit[job.name] = fit.reason or "does not fit the container"
            return None
        matrix = self._stored_matrix(job.name, shape, fit.spec, transposed=transposed)
        if not job.is_touched and matrix == stored and self._base.layout.name == self._form.layout:
            # The values lie on the grid already; encoding the values again would change some.
            outputs = tuple(OutTensor(ref.name, ref.dtype, ref.shape) for ref in self._base.parts(job.name))
            return replace(job, matrix=matrix, outputs=outputs, is_copied=True)
        return replace(job, matrix=matrix, outputs=layout.planned(matrix))

    def _move_offsets(self, job: MergeJob, stored: StoredMatrix) -> MergeJob:
        """Complete `job` to change the offsets of a quantized weight.

        Raises MismatchError when the offsets of the groups cannot hold the adapter, UsageError when the container
        cannot hold the matrix.
        """
        if job.lora is not None:
            pooling, group_size = job.lora.pooling, stored.spec.group_size_or_none
            message = None
            if pooling is None:
                message = f"has no pooled input, so no zero point of {job.name} can hold it"
            elif not stored.spec.has_whole_groups_in(pooling.group_size):
                message = (
                    f"pools groups of {pooling.group_size}, which are not unions of the groups of {group_size} of "
                    f"{job.name}"
                )
            if message is not None:
                raise self._mismatch(message, job.lora.lora_A, DENSE_HINT)
        layout, spec = load_layout(self._form.layout), self._form.spec_for(stored.spec)
        fit = layout.fit(spec, stored.shape, transposed=stored.transposed)
        if fit.spec is None:
            raise UsageError(f"--layout {self._form.layout}: {fit.reason}", tensor=job.name, hint=fit.hint)
        matrix = self._stored_matrix(job.name, stored.shape, spec, transposed=False)
        return replace(job, matrix=matrix, keeps_codes=True, outputs=layout.planned(matrix))

    def _stored_matrix(self, name: str, shape: tuple[int, int], spec: QuantSpec, *, transposed: bool) -> StoredMatrix:
        return StoredMatrix(name, shape, spec, decoded_dtype(self._form.layout, spec, self._dtype), transposed)

    def _fit_lora(self, name: str, lora: LoraTensors) -> LoraTensors:
        """`lora` with the pooling settled by shape, config and options.

        Raises MismatchError when the adapter does not fit the base weight `name`.
        """
        ref, tensors = self._base.tensors[name], self._adapter.weights.tensors
        is_dense = name not in self._base.quantized
        if is_dense and ref.dtype not in WEIGHT_DTYPES:
            raise self._mismatch(f"adapts {name}, which is {ref.dtype}", lora.lora_B)
        transposed = self._base.family.is_transposed(module_of(name))
        if self._adapter.config.get("fan_in_fan_out") and is_dense and not transposed and not lora.is_embedding:
            raise MismatchError(
                f"fan_in_fan_out: weights are stored [in, out], and by the base's config {name} is [out, in]",
                file=self._adapter.path / CONFIG_NAME,
                hint="is config.json beside the base's weights?",
            )
        shape = self._grown(name, ref.shape if lora.is_embedding else self._base.matrix_shape(name))
        shape = shape[::-1] if lora.is_embedding else shape
        inputs = tensors[lora.lora_A].shape[1]
        lora = self._settle_pooling(name, lora, inputs, shape[-1])
        in_features = inputs * (lora.pooling.group_size if lora.pooling else 1)
        hint = None
        if lora.pooling is None and inputs and shape[-1] % inputs == 0 and not lora.is_embedding:
            hint = "a QA-LoRA adapter whose config does not say so? --pooling peft, paper or repo"
        self._check_shape(lora.lora_B, name, shape, (tensors[lora.lora_B].shape[0], in_features), hint=hint)
        return lora

    def _settle_pooling(self, name: str, lora: LoraTensors, inputs: int, in_features: int) -> LoraTensors:
        """`lora` with the pooling of a lora_A [rank, inputs] over a weight of `in_features` columns.

        --pooling wins over the config.

        Raises MismatchError when --pooling is set and `inputs` does not divide `in_features` into equal groups.
        """
        pooling = lora.pooling_for(in_features, inputs)
        if inputs == in_features or lora.is_embedding or self._options.pooling is None:
            return replace(lora, pooling=pooling)
        group_size = pooling.group_size if pooling else in_features // max(inputs, 1)
        if inputs * group_size != in_features:
            message = f"reads {inputs} inputs, which are no equal groups of the {in_features} of {name}"
            raise self._mismatch(message, lora.lora_A)
        return replace(lora, pooling=Pooling(self._options.pooling, group_size))

    def _check_shape(
        self,
        tensor: str,
        name: str,
        expected: tuple[int, ...],
        actual: tuple[int, ...] | None = None,
        *,
        hint: str | None = None,
    ) -> None:
        actual = self._adapter.weights.tensors[tensor].shape if actual is None else actual
        if actual != expected:
            message = f"is for {actual}, and {name} of the base is {expected}"
            raise self._mismatch(message, tensor, _slice_hint(actual, expected, hint))

    def _check_tied(self) -> None:
        """Raises MismatchError when head and embedding share a weight, and a merge for the head would change the
        embedding too, or a merge for the embedding the head.
        """
        family = self._base.family
        if not family.ties_embeddings() or any(map(_HEADLESS_CLASS.search, family.architectures[:1])):
            return
        shared = {
            self._loaded_names[name]
            for name, ref in self._base.tensors.items()
            if kind_of(ref, family) == "embedding" and ref.shape[0] == self._base.config.get("vocab_size", ref.shape[0])
        }
        heads = [name for loaded, name in self._whole.items() if is_vocabulary_head(module_of(loaded))]
        adapted = {f"{module}.weight": lora.lora_B for module, lora in self._lora.items()}
        for loaded, name in (self._whole | adapted).items():
            if loaded in adapted and is_vocabulary_head(module_of(loaded)):
                raise self._mismatch(f"{_TIED}: merged, it would change the embedding too", name)
            if loaded in shared and not heads:
                raise self._mismatch(f"{_TIED}: merged, it would change the head too", name)
            if loaded in shared and all(self._adapter.is_same(name, head) for head in heads):
                # PEFT saves head and embedding together; an untied file would hold equal numbers twice.
                self._whole = {key: tensor for key, tensor in self._whole.items() if tensor not in heads}
                self.unused.update(dict.fromkeys(heads, f"it equals {name}, whose weight the head shares"))

    def _mismatch(self, message: str, tensor: str, hint: str | None = None) -> MismatchError:
        return MismatchError(message, file=self._file, tensor=tensor, hint=hint)


def _slice_hint(actual: tuple[int, ...], expected: tuple[int, ...], hint: str | None) -> str | None:
    """`hint`, after the remedy for shapes that sharding leaves: a flat tensor, or fewer rows of equal width."""
    is_flat = len(actual) == 1 < len(expected)
    is_part = len(actual) == len(expected) and actual[1:] == expected[1:] and actual[0] < expected[0]
    if not (is_flat or is_part):
        return hint
    return f"{GATHER_SLICES}; or {hint}" if hint else GATHER_SLICES
