"""A job of a merge: tensors of base and adapter come in, output tensors go into the planned files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from loftq_cli.adapter.experts.factors import FactorReader
from loftq_cli.adapter.experts.stacked import expert_retentions, merged_experts
from loftq_cli.adapter.fused import FusedRows
from loftq_cli.errors import InputError, NumericError
from loftq_cli.layouts.layout import DENSE_HINT, StoredMatrix, load_layout
from loftq_cli.merging.adapters.placed import Addition
from loftq_cli.merging.plan import Merge
from loftq_cli.merging.planner import MergeJob
from loftq_cli.merging.report import MergedLayer
from loftq_cli.merging.restacked import rows_of_parts
from loftq_cli.model.targets import module_of
from loftq_cli.output.copies import NOT_FINITE, WatchedChunks, recast_chunks
from loftq_cli.output.writer import OutputFiles, tensor_bytes
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.quant.gpu_matrix import WholeMatrix, merge_on, requantize, requantize_on
from loftq_cli.runtime.gpu import SharedDevice
from loftq_cli.runtime.workers import Workers
from loftq_cli.tensors.matrices import LoraPair, lora_pair
from loftq_cli.tensors.metrics import MergeSums, is_finite, merge_sums
from loftq_cli.tensors.rows import STREAMED_NUMEL, ComputedRows, Rows, TensorRows, slabs
from loftq_cli.tensors.updates import Term, Update, spread_rows

if TYPE_CHECKING:
    import torch


Weight = TypeVar("Weight", Rows, WholeMatrix)
EXACT = 1e-6  # share of the largest weight: float32 offsets may differ from float64 offsets by so much


def is_for_gpu(merge: Merge, job: MergeJob) -> bool:
    """True when the job computes with a whole matrix. Copies and changed offsets stay on the processor."""
    is_matrix = job.is_matrix or job.name in merge.base.quantized
    return is_matrix and not job.is_copied and not job.keeps_codes and not job.tokens


def is_recast(merge: Merge, job: MergeJob) -> bool:
    """True when a copying job changes the dtype of a base tensor."""
    return any(output.dtype != merge.base.checkpoint.tensors[output.name].dtype for output in job.outputs)


@dataclass(frozen=True, slots=True)
class WrittenJob:
    """The record of a finished job.

    sums     output tensor -> sha256 of the tensor's bytes
    result   for the journal: a MergedLayer as JSON values, {NOT_FINITE: True}, or nothing
    """

    sums: dict[str, str]
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeJobRunner:
    """Runs the jobs of a merge.

    merge     the plan: base, adapter and jobs
    files     the open output files
    factors   reads the factors of the adapters
    gpu       the GPU for whole matrices; None for the processor
    """

    merge: Merge
    files: OutputFiles
    factors: FactorReader
    gpu: SharedDevice | None = None

    def run(self, job: MergeJob, workers: Workers) -> WrittenJob:
        """Write the outputs of `job`, and return the sums.

        Raises InputError naming the tensor for NaN or infinite values, before or after merging; NumericError when
        offsets cannot hold the adapter exactly.
        """
        if job.is_copied:
            return self._copy(job)
        is_of_experts = bool(job.experts or job.stacked)
        if not job.is_matrix and not is_of_experts and job.name not in self.merge.base.quantized:
            return self._write_vector(job)
        try:
            if is_of_experts:
                return self._write_experts(job, workers)
            if job.keeps_codes:
                return self._move_offsets(job, workers)
            if job.matrix is not None:
                return self._quantize_again(job, job.matrix, workers)
            return self._write_merged_weight(job, workers)
        except NumericError as error:
            hint = error.hint if job.keeps_codes else None if job.matrix is None else "leave out --requantize"
            raise NumericError(error.message, file=self.merge.base.path, tensor=job.name, hint=hint) from None

    def _copy(self, job: MergeJob) -> WrittenJob:
        """Write the bytes of the base, or the numbers of the base in the dtype of the output."""
        checkpoint = self.merge.base.checkpoint
        sums, are_finite = {}, True
        for output in job.outputs:
            if output.dtype == checkpoint.tensors[output.name].dtype:
                chunks = checkpoint.chunks(output.name)
            else:
                chunks = recast_chunks(checkpoint, output.name, output.dtype, hashlib.sha256())
            watched = WatchedChunks(chunks, output.dtype)
            sums[output.name] = self.files[output.name].write_chunks(output.name, watched)
            are_finite = are_finite and watched.are_finite
        return WrittenJob(sums, {} if are_finite else {NOT_FINITE: True})

    def _write_vector(self, job: MergeJob) -> WrittenJob:
        """Write the adapter's replacement, or else the base tensor, plus the trained bias of the adapter."""
        loaded = (
            self._load_adapter_tensor(job.replacement)
            if job.replacement
            else self.merge.base.load(job.source or job.name)
        )
        value = loaded.float()
        for addition in job.biases:
            bias = self._load_adapter_tensor(str(addition.lora.lora_bias)).float()
            added = bias * (addition.lora.scaling * addition.weight)
            value = value + (added if addition.part is None else _spread(added, addition.part))
        return self._write(job, {job.outputs[0].name: self._cast(job, value)})

    def _write_merged_weight(self, job: MergeJob, workers: Workers) -> WrittenJob:
        """Write the merged weight in full precision, a few rows at a time.

        The whole weight is in memory when a GPU merges, and when the model's file holds the matrix transposed.
        """
        output, is_turned = job.outputs[0], self._is_turned(job)
        update = self._load_update(job)
        if self.gpu is not None and not job.tokens:
            read = partial(self._read_weight, job, self.merge.base.whole)
            merged = merge_on(self.gpu, read, job.numel, update, output.dtype, turned=is_turned)
            if merged is not None:
                sha256 = self.files[output.name].write(output.name, merged.tensor)
                return _finish_job({output.name: sha256}, _rounded_layer(job, update, merged.sums))
        sums: list[MergeSums] = []
        rows = self._merged_rows(job, update, sums, workers)
        if is_turned:
            import torch

            sha256 = self.files[output.name].write(output.name, torch.cat(list(rows)).T.contiguous())
        else:
            sha256 = self.files[output.name].write_chunks(output.name, map(tensor_bytes, rows))
        return _finish_job({output.name: sha256}, _rounded_layer(job, update, MergeSums.total(sums)))

    def _write_experts(self, job: MergeJob, workers: Workers) -> WrittenJob:
        """Write a tensor of all experts, merged one expert at a time."""
        sums, output = list[MergeSums](), job.outputs[0]
        matrices = self._stacked(job, sums, workers) if job.stacked else self._experts(job, sums, workers)
        sha256 = self.files[output.name].write_chunks(output.name, map(tensor_bytes, matrices))
        if not job.additions:
            return _finish_job({output.name: sha256}, None)
        total, lora = MergeSums.total(sums), job.additions[0].lora
        squares = total.squared_weight, total.squared_delta
        layer = MergedLayer(job.name, lora.rank, lora.scaling, *squares, total.retained)
        layer = replace(layer, squared_rounding=total.squared_rounding, experts=expert_retentions(sums))
        return _finish_job({output.name: sha256}, layer)

    def _stacked(self, job: MergeJob, sums: list[MergeSums], workers: Workers) -> Iterator[torch.Tensor]:
        """Yield the matrix [in, out] of each expert that the base holds alone; append the sums of each to `sums`."""
        import torch

        rows = rows_of_parts(job, self.merge.base.family)
        _, in_features, out_features = job.outputs[0].shape
        for start in range(0, len(job.stacked), len(rows)):
            parts, of_parts = job.stacked[start : start + len(rows)], list[MergeSums]()
            whole = torch.empty(out_features, in_features, dtype=getattr(torch, job.outputs[0].dtype))
            for place, part in zip(rows, parts, strict=True):
                whole[place] = torch.cat(list(self._merged_rows(part, self._load_update(part), of_parts, workers)))
            sums.append(MergeSums.total(of_parts))
            yield whole.T.contiguous()

    def _experts(self, job: MergeJob, sums: list[MergeSums], workers: Workers) -> Iterator[torch.Tensor]:
        """Yield the matrix of each expert in a tensor of the base; append each expert's sums to `sums`."""

        def pairs(expert: int) -> list[LoraPair]:
            loaded = ((self.factors.pair(item.lora), item.weight) for item in job.experts[expert])
            return [replace(pair, scaling=pair.scaling * weight) for pair, weight in loaded]

        cast, count = partial(self._cast, job), len(job.experts)
        return merged_experts(self.merge.base, job.name, count, pairs, cast, sums, workers)

    def _merged_rows(
        self, job: MergeJob, update: Update | None, sums: list[MergeSums], workers: Workers
    ) -> Iterator[torch.Tensor]:
        """Yield slabs of the merged weight, [rows, in] in the dtype of the output; append the sums of each slab to
        `sums`.
        """
        import torch

        dtype = getattr(torch, job.outputs[0].dtype)
        weight = self._with_trained_rows(job, self._read_weight(job, self.merge.base.rows))
        delta = None if update is None else update.reader()

        def merge_rows(part: slice) -> tuple[torch.Tensor, MergeSums]:
            rows = weight.rows(part).float()
            delta_slab = None if delta is None else delta(part, rows)
            merged = (rows if delta_slab is None else rows + delta_slab).to(dtype)
            slab_sums = merge_sums(rows, merged, delta_slab)
            if not math.isfinite(slab_sums.squared_weight):
                raise NumericError("holds NaN or infinite values")
            return self._cast(job, merged), slab_sums

        for rows, slab_sums in workers.map(merge_rows, slabs(weight.shape, weight.multiple, STREAMED_NUMEL)):
            sums.append(slab_sums)
            yield rows

    def _quantize_again(self, job: MergeJob, matrix: StoredMatrix, workers: Workers) -> WrittenJob:
        """Quantize the merged weight to the number format of `matrix`, and write the result.

        Peak memory: the quantized matrix. A GPU also needs the base's stored matrix in memory.
        """
        update, quantizer = self._load_update(job), make_quantizer(matrix.spec, matrix.dtype)
        requantized = None
        if self.gpu is not None and not job.tokens:
            read = partial(self._read_weight, job, self.merge.base.whole)
            requantized = requantize_on(self.gpu, read, job.numel, update, quantizer)
        if requantized is None:
            weight = self._with_trained_rows(job, self._read_weight(job, self.merge.base.rows))
            requantized = requantize(weight, update, quantizer, workers)
        tensors = load_layout(self.merge.form.layout).pack(matrix, requantized.quantized)
        squares = requantized.squared_weight, requantized.squared_delta
        return self._write(job, tensors, _merged_layer(job, update, *squares, requantized.retained))

    def _move_offsets(self, job: MergeJob, workers: Workers) -> WrittenJob:
        """Write the codes of the base with the adapter in the offsets; measure the distance from the exact sum.

        Raises NumericError when float32 offsets are not exact.
        """
        from loftq_cli.quant.affine import merge_into_offsets

        base, matrix = self.merge.base.quantized_tensor(job.name), job.matrix
        assert matrix is not None  # kept codes need a quantized matrix
        update = self._load_update(job)
        pair = None if update is None else update.plain
        assert update is None or pair is not None  # the form of the merge keeps no codes under DoRA
        try:
            merged = merge_into_offsets(base, pair, matrix.spec, matrix.dtype, workers=workers)
        except NumericError as error:
            hint = f"{error.hint}, or {DENSE_HINT}" if error.hint else None
            raise NumericError(error.message, hint=hint) from None
        difference = merged.difference
        is_exact = difference.max_difference <= EXACT * difference.max_weight
        if matrix.spec.scale_dtype == "float32" and matrix.spec.zero_point_kind == "float" and not is_exact:
            message = f"merged, it differs by {difference.max_difference:g} from the exact sum"
            raise NumericError(message, hint=DENSE_HINT)
        tensors = load_layout(self.merge.form.layout).pack(matrix, merged.quantized)
        if update is None:
            return self._write(job, tensors)
        layer = _merged_layer(job, update, merged.squared_weight, merged.squared_delta)
        assert layer is not None
        return self._write(job, tensors, replace(layer, difference=difference))

    def _write(self, job: MergeJob, tensors: dict[str, torch.Tensor], layer: MergedLayer | None = None) -> WrittenJob:
        """Write each tensor into the planned file. Raises InputError for NaN and infinite values."""
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                message = f"merged, {name} would not be finite in {str(tensor.dtype).removeprefix('torch.')}"
                raise InputError(message, file=self.merge.base.path, tensor=job.name, hint=DENSE_HINT)
        return _finish_job({name: self.files[name].write(name, tensor) for name, tensor in tensors.items()}, layer)

    def _load_update(self, job: MergeJob) -> Update | None:
        """Load what the adapters add to a weight; None for a weight without an adapter."""
        return Update(tuple(map(self._load_term, job.lora))) if job.lora else None

    def _load_term(self, addition: Addition) -> Term:
        lora = addition.lora
        if lora.part is not None:
            return Term(self.factors.pair(lora), None, addition.weight)
        lora_A, lora_B = self._load_adapter_tensor(lora.lora_A), self._load_adapter_tensor(lora.lora_B)
        magnitude = None if lora.magnitude is None else self._load_adapter_tensor(lora.magnitude)
        if addition.part is not None:
            lora_B = _spread(lora_B, addition.part)
            magnitude = None if magnitude is None else _spread(magnitude, addition.part, math.nan)
        return Term(lora_pair(lora_A, lora_B, lora.scaling, lora.pooling), magnitude, addition.weight)

    def _with_trained_rows(self, job: MergeJob, weight: Rows) -> Rows:
        """`weight` [vocabulary, width] with the adapters' rows of single tokens, of which the rows are few."""
        if not job.tokens:
            return weight
        import torch

        changed: dict[int, torch.Tensor] = {}
        for trained in job.tokens:
            values = self._load_adapter_tensor(trained.tokens.tensor).float()
            for index, value in zip(trained.tokens.indices, values, strict=True):
                row = weight.rows(slice(index, index + 1))[0].float()
                change = value - row if trained.weight == 1.0 else (value - row) * trained.weight
                # A single whole row is copied, so that the numbers are the adapter's to the last bit.
                is_whole = index not in changed and trained.weight == 1.0
                changed[index] = value if is_whole else changed.get(index, row) + change

        def rows(part: slice) -> torch.Tensor:
            values = weight.rows(part).float()
            inside = [index for index in changed if part.start <= index < part.stop]
            if inside:
                values = values.clone()
                values[[index - part.start for index in inside]] = torch.stack([changed[index] for index in inside])
            return values

        return ComputedRows(weight.shape, rows, weight.multiple, weight.device, weight.slab_numel)

    def _load_adapter_tensor(self, name: str) -> torch.Tensor:
        """Load the adapter tensor `name`. Raises InputError for NaN and infinite values."""
        return self.factors.load(name)

    def _read_weight(self, job: MergeJob, read: Callable[[str], Weight]) -> Weight | TensorRows:
        """Read the weight under the adapter, [out, in] in the adapter's orientation. `read` reads a base matrix."""
        is_turned = self._is_turned(job)
        if job.replacement is not None:
            return TensorRows(self._load_adapter_tensor(job.replacement), is_turned)
        name = job.source or job.name
        return TensorRows(self.merge.base.load(name), is_turned) if job.is_embedding else read(name)

    def _is_turned(self, job: MergeJob) -> bool:
        """True when the model's file holds [in, out]: a Conv1D, or an embedding in PEFT's orientation."""
        return self.merge.base.family.is_transposed(module_of(job.name)) or job.is_embedding

    def _cast(self, job: MergeJob, tensor: torch.Tensor) -> torch.Tensor:
        """Convert `tensor` to the dtype of the output. Raises InputError for numbers not finite in the dtype."""
        import torch

        dtype = job.outputs[0].dtype
        cast = tensor.to(getattr(torch, dtype)).contiguous()
        if not is_finite(cast):
            hint = None if dtype == "float32" else "--dtype float32"
            message = f"merged, it is not finite in {dtype}"
            raise InputError(message, file=self.merge.base.path, tensor=job.name, hint=hint)
        return cast


def _finish_job(sums: dict[str, str], layer: MergedLayer | None) -> WrittenJob:
    return WrittenJob(sums, {} if layer is None else layer.to_json())


def _spread(tensor: torch.Tensor, part: FusedRows, fill: float = 0.0) -> torch.Tensor:
    """The rows of a module in a fused matrix; `fill` in the rows of the other modules."""
    import torch

    return spread_rows(tensor, part.total, torch.tensor(part.places()), fill)


def _merged_layer(
    job: MergeJob, update: Update | None, squared_weight: float, squared_delta: float, retained: float | None = None
) -> MergedLayer | None:
    """The measured effect of merging; None without an adapter."""
    if update is None:
        return None
    return MergedLayer(job.name, update.rank, update.scaling, squared_weight, squared_delta, retained)


def _rounded_layer(job: MergeJob, update: Update | None, sums: MergeSums) -> MergedLayer | None:
    """The measured effect of merging into a weight in full precision; None without an adapter."""
    layer = _merged_layer(job, update, sums.squared_weight, sums.squared_delta, sums.retained)
    return None if layer is None else replace(layer, squared_rounding=sums.squared_rounding)
