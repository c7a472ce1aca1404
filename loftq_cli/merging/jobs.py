"""One job of a merge: tensors of base and adapter come in, output tensors go to their places."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from loftq_cli.adapter.sorting import LoraTensors
from loftq_cli.errors import InputError, NumericError
from loftq_cli.layouts.layout import DENSE_HINT, StoredMatrix, load_layout
from loftq_cli.merging.plan import Merge
from loftq_cli.merging.planner import MergeJob
from loftq_cli.merging.report import MergedLayer
from loftq_cli.model.targets import module_of
from loftq_cli.output.copies import NOT_FINITE, WatchedChunks, recast_chunks
from loftq_cli.output.writer import OutputFiles, tensor_bytes
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.quant.gpu_matrix import WholeMatrix, merge_on, requantize, requantize_on
from loftq_cli.runtime.gpu import SharedDevice
from loftq_cli.runtime.workers import Workers
from loftq_cli.tensors.matrices import LoraPair, lora_pair
from loftq_cli.tensors.metrics import delta_rows, is_finite
from loftq_cli.tensors.rows import STREAMED_NUMEL, Rows, TensorRows, slabs

if TYPE_CHECKING:
    import torch

    from loftq_cli.triton_kernels.error_stats.contract import ErrorSums


Weight = TypeVar("Weight", Rows, WholeMatrix)
EXACT = 1e-6  # of the largest weight: float32 offsets may differ from float64 offsets by so much


def is_for_gpu(merge: Merge, job: MergeJob) -> bool:
    """Whether the job computes with a matrix: copies, and offsets that move, stay on the processor."""
    is_matrix = job.lora is not None or job.matrix is not None or job.name in merge.base.quantized
    return is_matrix and not job.is_copied and not job.keeps_codes


def is_recast(merge: Merge, job: MergeJob) -> bool:
    """Whether a copying job writes another dtype than the base has."""
    return any(output.dtype != merge.base.checkpoint.tensors[output.name].dtype for output in job.outputs)


@dataclass(frozen=True, slots=True)
class WrittenJob:
    """A job whose tensors are written.

    sums     output tensor -> sha256 of the tensor's bytes
    result   what the journal lists: a MergedLayer as JSON values, NOT_FINITE, or nothing
    """

    sums: dict[str, str]
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeJobRunner:
    """Runs the jobs of a merge: reads base and adapter, writes to `files`; matrices go to `gpu`, where there is one."""

    merge: Merge
    files: OutputFiles
    gpu: SharedDevice | None = None

    def run(self, job: MergeJob, workers: Workers) -> WrittenJob:
        """Write the outputs of `job`.

        Raises InputError naming the tensor for numbers that are not finite, before or after merging, NumericError
        where offsets cannot hold the adapter exactly.
        """
        if job.is_copied:
            return self._copy(job)
        if job.lora is None and job.matrix is None and job.name not in self.merge.base.quantized:
            return self._write_vector(job)
        try:
            if job.keeps_codes:
                return self._move_offsets(job, workers)
            if job.matrix is not None:
                return self._quantize_again(job, job.matrix, workers)
            return self._write_merged_weight(job, workers)
        except NumericError as error:
            hint = error.hint if job.keeps_codes else None if job.matrix is None else "leave out --requantize"
            raise NumericError(error.message, file=self.merge.base.path, tensor=job.name, hint=hint) from None

    def _copy(self, job: MergeJob) -> WrittenJob:
        """Write the base's bytes, or the base's numbers in another dtype."""
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
        """Write the replacement from the adapter, or the base's own tensor, plus the trained bias of an adapter."""
        loaded = self._load_adapter_tensor(job.replacement) if job.replacement else self.merge.base.load(job.name)
        value = loaded.float()
        if job.lora_bias is not None and job.lora_bias.lora_bias is not None:
            bias = self._load_adapter_tensor(job.lora_bias.lora_bias)
            value = value + bias.float() * job.lora_bias.scaling
        return self._write(job, {job.outputs[0].name: self._cast(job, value)})

    def _write_merged_weight(self, job: MergeJob, workers: Workers) -> WrittenJob:
        """Write the merged weight in full precision, a few rows at a time.

        Where the file holds the matrix transposed, or a GPU merges, the whole weight is in memory.
        """
        output, is_turned = job.outputs[0], self._is_turned(job)
        pair = None if job.lora is None else self._load_pair(job.lora)
        if self.gpu is not None:
            read = partial(self._read_weight, job, self.merge.base.whole)
            merged = merge_on(self.gpu, read, job.numel, pair, output.dtype, turned=is_turned)
            if merged is not None:
                sha256 = self.files[output.name].write(output.name, merged.tensor)
                layer = _merged_layer(job, pair, merged.squared_weight, merged.squared_delta)
                return _written({output.name: sha256}, layer)
        squares: list[ErrorSums] = []
        rows = self._merged_rows(job, pair, squares, workers)
        if is_turned:
            import torch

            sha256 = self.files[output.name].write(output.name, torch.cat(list(rows)).T.contiguous())
        else:
            sha256 = self.files[output.name].write_chunks(output.name, map(tensor_bytes, rows))
        squared_weight = math.fsum(sums.squared_weight for sums in squares)
        squared_delta = math.fsum(sums.squared_delta for sums in squares)
        return _written({output.name: sha256}, _merged_layer(job, pair, squared_weight, squared_delta))

    def _merged_rows(
        self, job: MergeJob, pair: LoraPair | None, squares: list[ErrorSums], workers: Workers
    ) -> Iterator[torch.Tensor]:
        """Slabs of rows of the merged weight in the output's dtype; the sums of each slab are added to `squares`."""
        from loftq_cli.triton_kernels.error_stats.contract import error_stats

        weight = self._read_weight(job, self.merge.base.rows)
        delta = None if pair is None else delta_rows(pair)

        def merge_rows(part: slice) -> tuple[torch.Tensor, ErrorSums]:
            rows = weight.rows(part).float()
            added = None if delta is None else delta(part)
            sums = error_stats(rows, rows, added)
            if not math.isfinite(sums.squared_weight):
                raise NumericError("holds NaN or infinite values")
            return self._cast(job, rows if added is None else rows + added), sums

        for rows, sums in workers.map(merge_rows, slabs(weight.shape, weight.multiple, STREAMED_NUMEL)):
            squares.append(sums)
            yield rows

    def _quantize_again(self, job: MergeJob, matrix: StoredMatrix, workers: Workers) -> WrittenJob:
        """Write the merged weight quantized as `matrix` says. Peak memory: the quantized matrix; where a GPU computes,
        the base's as well.
        """
        pair = None if job.lora is None else self._load_pair(job.lora)
        quantizer = make_quantizer(matrix.spec, matrix.dtype)
        requantized = None
        if self.gpu is not None:
            read = partial(self._read_weight, job, self.merge.base.whole)
            requantized = requantize_on(self.gpu, read, job.numel, pair, quantizer)
        if requantized is None:
            requantized = requantize(self._read_weight(job, self.merge.base.rows), pair, quantizer, workers)
        tensors = load_layout(self.merge.form.layout).pack(matrix, requantized.quantized)
        squares = requantized.squared_weight, requantized.squared_delta
        return self._write(job, tensors, _merged_layer(job, pair, *squares, requantized.retained))

    def _move_offsets(self, job: MergeJob, workers: Workers) -> WrittenJob:
        """Write the base's codes with the adapter in the offsets, and measure the distance from the exact sum.

        Raises NumericError where float32 offsets are not exact.
        """
        from loftq_cli.quant.affine import merge_into_offsets

        base, matrix = self.merge.base.quantized_tensor(job.name), job.matrix
        assert matrix is not None  # a job that keeps codes stores a quantized matrix
        pair = None if job.lora is None else self._load_pair(job.lora)
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
        if pair is None:
            return self._write(job, tensors)
        layer = _merged_layer(job, pair, merged.squared_weight, merged.squared_delta)
        assert layer is not None
        return self._write(job, tensors, replace(layer, difference=difference))

    def _write(self, job: MergeJob, tensors: dict[str, torch.Tensor], layer: MergedLayer | None = None) -> WrittenJob:
        """Write `tensors` into their places. Raises InputError for a tensor that is not finite."""
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                message = f"merged, {name} would not be finite in {str(tensor.dtype).removeprefix('torch.')}"
                raise InputError(message, file=self.merge.base.path, tensor=job.name, hint=DENSE_HINT)
        return _written({name: self.files[name].write(name, tensor) for name, tensor in tensors.items()}, layer)

    def _load_pair(self, lora: LoraTensors) -> LoraPair:
        lora_A, lora_B = self._load_adapter_tensor(lora.lora_A), self._load_adapter_tensor(lora.lora_B)
        return lora_pair(lora_A, lora_B, lora.scaling, lora.pooling)

    def _load_adapter_tensor(self, name: str) -> torch.Tensor:
        """A tensor of the adapter. Raises InputError for NaN and infinite values."""
        weights = self.merge.adapter.weights
        tensor = weights.load(name)
        if not is_finite(tensor):
            raise InputError("holds NaN or infinite values", file=weights.path, tensor=name)
        return tensor

    def _read_weight(self, job: MergeJob, read: Callable[[str], Weight]) -> Weight | TensorRows:
        """The weight that the adapter is added to, [out, in] as the adapter counts; `read` gives matrices of the
        base.
        """
        is_turned = self._is_turned(job)
        if job.replacement is not None:
            return TensorRows(self._load_adapter_tensor(job.replacement), is_turned)
        if job.lora is not None and job.lora.is_embedding:
            return TensorRows(self.merge.base.load(job.name), is_turned)
        return read(job.name)

    def _is_turned(self, job: MergeJob) -> bool:
        """Whether the model's file holds [in, out]: Conv1D, and embeddings as PEFT adapts embeddings."""
        is_embedding = job.lora is not None and job.lora.is_embedding
        return self.merge.base.family.is_transposed(module_of(job.name)) or is_embedding

    def _cast(self, job: MergeJob, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` in the dtype of the output. Raises InputError for numbers that are not finite in that dtype."""
        import torch

        dtype = job.outputs[0].dtype
        cast = tensor.to(getattr(torch, dtype)).contiguous()
        if not is_finite(cast):
            hint = None if dtype == "float32" else "--dtype float32"
            message = f"merged, it is not finite in {dtype}"
            raise InputError(message, file=self.merge.base.path, tensor=job.name, hint=hint)
        return cast


def _written(sums: dict[str, str], layer: MergedLayer | None) -> WrittenJob:
    return WrittenJob(sums, {} if layer is None else layer.to_json())


def _merged_layer(
    job: MergeJob, pair: LoraPair | None, squared_weight: float, squared_delta: float, retained: float | None = None
) -> MergedLayer | None:
    """The measured effect of merging; None where there is no adapter."""
    if pair is None:
        return None
    return MergedLayer(job.name, pair.lora_A.shape[0], pair.scaling, squared_weight, squared_delta, retained)
