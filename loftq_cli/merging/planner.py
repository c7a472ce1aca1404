"""A job for every tensor of base and adapter, from headers alone.

An error refuses a misfit by name before any number is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from loftq_cli.adapter.config import CONFIG_NAME
from loftq_cli.adapter.sorting import GATHER_SLICES, LoraTensors
from loftq_cli.adapter.source import AdapterSource
from loftq_cli.errors import MismatchError, UsageError
from loftq_cli.layouts.layout import DENSE_HINT, LAYOUTS, StoredMatrix, load_layout
from loftq_cli.merging.adapters.placed import Addition, Placed, Replacement, Rows
from loftq_cli.merging.adapters.weighted import mismatch
from loftq_cli.merging.form import MergeForm, MergeOptions
from loftq_cli.merging.vocabulary import Growth, find_growth, is_vocabulary_head, vocabulary_size
from loftq_cli.model.stored import BaseModel
from loftq_cli.model.targets import kind_of, module_of
from loftq_cli.planning.settings import decoded_dtype
from loftq_cli.quant.formats import QuantSpec, requantized_spec
from loftq_cli.tensors.headers import WEIGHT_DTYPES, OutTensor
from loftq_cli.tensors.specs import Pooling

_RESIZE = "save embedding and head both, with modules_to_save; or resize the base's embeddings first"


@dataclass(frozen=True, slots=True)
class MergeJob:
    """The work on a tensor of the base, or on a new tensor from the adapter.

    name          tensor name in the base; a quantized weight with all stored parts is a single job
    lora          the adapters' factors to add; empty for a weight without an adapter
    biases        the adapters with a bias to add to the tensor, a bias
    tokens        the adapters' rows in place of rows of the tensor
    experts       for each expert in a tensor of all experts, the factors to add; empty for any other tensor
    stacked       the jobs of single experts whose results make the tensor; empty for any other tensor
    replacement   name of the adapter's tensor to read in place of the base's; None without
    source        name of the base's tensor to read in place of `name`; None to read `name`
    matrix        the quantized matrix to store; None for a dense result
    keeps_codes   whether the codes of the base are written, with changed offsets
    outputs       the tensors to write
    is_copied     whether the numbers of the base are written, as bytes or in a changed dtype
    note          the reason why the weight is not quantized in spite of --requantize; None without
    """

    name: str
    lora: tuple[Addition, ...] = ()
    biases: tuple[Addition, ...] = ()
    tokens: tuple[Rows, ...] = ()
    experts: tuple[tuple[Addition, ...], ...] = ()
    stacked: tuple[MergeJob, ...] = ()
    replacement: str | None = None
    source: str | None = None
    matrix: StoredMatrix | None = None
    keeps_codes: bool = False
    outputs: tuple[OutTensor, ...] = ()
    is_copied: bool = False
    note: str | None = None

    @property
    def is_touched(self) -> bool:
        """True when the adapter changes the tensor."""
        return bool(self.lora or self.biases or self.tokens or self.experts) or self.replacement is not None

    @property
    def additions(self) -> list[Addition]:
        """All factors to add, of the tensor and of experts in the tensor."""
        own = [*self.lora, *(item for expert in self.experts for item in expert)]
        return [*own, *(item for job in self.stacked for item in job.additions)]

    @property
    def is_matrix(self) -> bool:
        """True when the job adds to a matrix, or reads rows of a matrix."""
        reads_matrix = self.source is not None and len(self.outputs[0].shape) == 2
        return bool(self.lora or self.tokens) or self.matrix is not None or reads_matrix

    @property
    def is_embedding(self) -> bool:
        """True for the factors of an embedding, which PEFT stores turned."""
        return any(addition.lora.is_embedding for addition in self.lora)

    @property
    def numel(self) -> int:
        """Number of elements of the merged tensor."""
        return math.prod(self.matrix.shape if self.matrix else self.outputs[0].shape)


class MergePlanner:
    """Gives every tensor of base and adapters a job. `growth` is the growth of the vocabulary, once planned."""

    def __init__(self, base: BaseModel, placed: Placed, options: MergeOptions, form: MergeForm, dtype: str) -> None:
        """Raises UsageError for a quantized `form` when transformers cannot load the model from quantized tensors."""
        self._base, self._placed, self._options, self._form, self._dtype = base, placed, options, form, dtype
        self._unfit: dict[str, str] = {}
        self.growth: Growth | None = None
        if form.is_quantized and not base.family.loads_in_4_bit():
            message = f"transformers cannot load {base.family.model_type} from quantized tensors"
            raise UsageError(message, hint=DENSE_HINT)

    def plan_jobs(self) -> Iterator[MergeJob]:
        """Yield a job for every base tensor of the merged model, in order, then for every new tensor.

        Raises MismatchError naming an adapter tensor of a wrong shape or without a place.
        """
        placed = self._placed
        tensors = {head.tensor: head.source.weights.tensors[head.tensor] for head in placed.whole.values()}
        self.growth = find_growth(self._base, placed.replaced(), tensors, placed.left)
        for name, ref in self._base.tensors.items():
            is_tied = ref.alias_of is not None and self._base.family.ties_embeddings()
            if name not in placed.left and (not is_tied or name in placed.whole):
                yield self._plan_job(name)
        yield from (self._plan_new_tensor(name, replacement) for name, replacement in placed.new.items())
        for name, source in placed.copies.items():
            yield self._plan_new_weight(MergeJob(name, source=source), self._file_shape(source))

    def _plan_job(self, name: str) -> MergeJob:
        placed, replacement = self._placed, self._placed.whole.get(name)
        job = self._with_additions(
            MergeJob(name, replacement=None if replacement is None else replacement.tensor), name
        )
        if replacement is not None:
            self._check_shape(replacement.source, replacement.tensor, name, self._file_shape(name), hint=_RESIZE)
        biases = placed.biases.get(name, ())
        for bias in biases:
            shape = self._grown(name, self._base.tensors[name].shape)
            rows = shape if bias.part is None else (bias.part.count, *shape[1:])
            self._check_shape(bias.source, str(bias.lora.lora_bias), name, rows)
        experts = placed.experts.get(name, ())
        if experts and replacement is not None:
            message = f"replaces {name}, and an adapter of all experts changes it as well"
            raise mismatch(replacement.source, message, replacement.tensor)
        job = replace(job, biases=biases, experts=experts)
        return self._store_quantized(job) or replace(self._store_dense(job), note=self._unfit.get(name))

    def _with_additions(self, job: MergeJob, like: str) -> MergeJob:
        """`job` with the changes of adapters, checked; `like` is the base's tensor of equal shape."""
        lora = tuple(self._fit_lora(like, addition) for addition in self._placed.lora.get(job.name, ()))
        tokens = self._placed.tokens.get(job.name, ())
        if tokens and lora:
            raise mismatch(tokens[0].source, "trains rows of a matrix under an adapter", tokens[0].tokens.tensor)
        for trained in tokens:
            rows, *width = self._file_shape(like)
            self._check_shape(trained.source, trained.tokens.tensor, like, (len(trained.tokens.indices), *width))
            if max(trained.tokens.indices, default=-1) >= rows:
                message = f"trains the row {max(trained.tokens.indices)}, and {like} of the base has {rows}"
                raise mismatch(trained.source, message, trained.tokens.tensor, _RESIZE)
        return replace(job, lora=lora, tokens=tokens)

    def _plan_new_tensor(self, loaded: str, new: Replacement) -> MergeJob:
        ref, source = new.source.weights.tensors[new.tensor], new.source
        is_untied = self._base.family.ties_embeddings() and is_vocabulary_head(module_of(loaded))
        trained_copies = source.config.get("modules_to_save") or []
        is_trained_copy = any(f".{module}." in f".{loaded}" for module in trained_copies)
        is_known = loaded in self._base.tensors and loaded not in self._placed.left
        if is_known or not (is_untied or is_trained_copy):
            raise mismatch(source, "is left over: the base has no such tensor", new.tensor)
        size = self.growth.rows if self.growth else vocabulary_size(self._base)
        if is_untied and loaded.endswith(".weight") and size not in (None, ref.shape[0]):
            raise mismatch(source, f"is {ref.shape}, and the vocabulary has {size} rows", new.tensor, _RESIZE)
        return self._plan_new_weight(MergeJob(loaded, replacement=new.tensor), ref.shape)

    def _plan_new_weight(self, job: MergeJob, shape: tuple[int, ...]) -> MergeJob:
        """Complete the job of a tensor that the base does not have, changed like a tied weight of the base."""
        like = next((n for n in self._base.tensors if self._file_shape(n) == shape), None)
        if like is not None and self._placed.touches(job.name):
            job = self._with_additions(job, job.source or like)
        return replace(job, outputs=(OutTensor(job.name, self._dtype, shape),))

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
        elif not job.lora or kind_of(self._base.tensors[job.name], self._base.family) not in ("linear", "head"):
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
        for addition in job.lora:
            pooling, group_size = addition.lora.pooling, stored.spec.group_size_or_none
            message = None
            if pooling is None:
                message = f"has no pooled input, so no zero point of {job.name} can hold it"
            elif pooling.group_size != (job.lora[0].lora.pooling or pooling).group_size:
                message = f"pools groups of {pooling.group_size}, and another adapter of {job.name} other groups"
            elif not stored.spec.has_whole_groups_in(pooling.group_size):
                message = (
                    f"pools groups of {pooling.group_size}, which are not unions of the groups of {group_size} of "
                    f"{job.name}"
                )
            if message is not None:
                raise mismatch(addition.source, message, addition.lora.lora_A, DENSE_HINT)
        layout, spec = load_layout(self._form.layout), self._form.spec_for(stored.spec)
        fit = layout.fit(spec, stored.shape, transposed=stored.transposed)
        if fit.spec is None:
            raise UsageError(f"--layout {self._form.layout}: {fit.reason}", tensor=job.name, hint=fit.hint)
        matrix = self._stored_matrix(job.name, stored.shape, spec, transposed=False)
        return replace(job, matrix=matrix, keeps_codes=True, outputs=layout.planned(matrix))

    def _stored_matrix(self, name: str, shape: tuple[int, int], spec: QuantSpec, *, transposed: bool) -> StoredMatrix:
        return StoredMatrix(name, shape, spec, decoded_dtype(self._form.layout, spec, self._dtype), transposed)

    def _fit_lora(self, name: str, addition: Addition) -> Addition:
        """`addition` with the pooling settled by shape, config and options.

        Raises MismatchError when the adapter does not fit the base weight `name`.
        """
        source, lora = addition.source, addition.lora
        if lora.part is not None:  # of an expert: fitted where the place was found
            return addition
        ref, tensors = self._base.tensors[name], source.weights.tensors
        is_dense = name not in self._base.quantized
        if is_dense and ref.dtype not in WEIGHT_DTYPES:
            raise mismatch(source, f"adapts {name}, which is {ref.dtype}", lora.lora_B)
        transposed = self._base.family.is_transposed(module_of(name))
        if source.config.get("fan_in_fan_out") and is_dense and not transposed and not lora.is_embedding:
            raise MismatchError(
                f"fan_in_fan_out: weights are stored [in, out], and by the base's config {name} is [out, in]",
                file=source.path / CONFIG_NAME,
                hint="is config.json beside the base's weights?",
            )
        shape = self._grown(name, ref.shape if lora.is_embedding else self._base.matrix_shape(name))
        shape = shape[::-1] if lora.is_embedding else shape
        if addition.part is not None:
            shape = (addition.part.count, *shape[1:])
        inputs = tensors[lora.lora_A].shape[1]
        lora = self._settle_pooling(name, addition, inputs, shape[-1])
        in_features = inputs * (lora.pooling.group_size if lora.pooling else 1)
        hint = None
        if lora.pooling is None and inputs and shape[-1] % inputs == 0 and not lora.is_embedding:
            hint = "a QA-LoRA adapter whose config does not say so? --pooling peft, paper or repo"
        self._check_shape(source, lora.lora_B, name, shape, (tensors[lora.lora_B].shape[0], in_features), hint=hint)
        return replace(addition, lora=lora)

    def _settle_pooling(self, name: str, addition: Addition, inputs: int, in_features: int) -> LoraTensors:
        """The tensors of `addition` with the pooling of a lora_A [rank, inputs] over a weight of `in_features` columns.

        --pooling wins over the config.

        Raises MismatchError when --pooling is set and `inputs` does not divide `in_features` into equal groups.
        """
        lora = addition.lora
        pooling = lora.pooling_for(in_features, inputs)
        if inputs == in_features or lora.is_embedding or self._options.pooling is None:
            return replace(lora, pooling=pooling)
        group_size = pooling.group_size if pooling else in_features // max(inputs, 1)
        if inputs * group_size != in_features:
            message = f"reads {inputs} inputs, which are no equal groups of the {in_features} of {name}"
            raise mismatch(addition.source, message, lora.lora_A)
        return replace(lora, pooling=Pooling(self._options.pooling, group_size))

    def _check_shape(
        self,
        source: AdapterSource,
        tensor: str,
        name: str,
        expected: tuple[int, ...],
        actual: tuple[int, ...] | None = None,
        *,
        hint: str | None = None,
    ) -> None:
        actual = source.weights.tensors[tensor].shape if actual is None else actual
        if actual != expected:
            message = f"is for {actual}, and {name} of the base is {expected}"
            raise mismatch(source, message, tensor, _slice_hint(actual, expected, hint))


def _slice_hint(actual: tuple[int, ...], expected: tuple[int, ...], hint: str | None) -> str | None:
    """`hint`, after the remedy for shapes that sharding leaves: a flat tensor, or fewer rows of equal width."""
    is_flat = len(actual) == 1 < len(expected)
    is_part = len(actual) == len(expected) and actual[1:] == expected[1:] and actual[0] < expected[0]
    if not (is_flat or is_part):
        return hint
    return f"{GATHER_SLICES}; or {hint}" if hint else GATHER_SLICES
