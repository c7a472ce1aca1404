"""One job of a merge: the tensors of base and adapter become output tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from loftq_cli.adapter.source import LoraTensors
from loftq_cli.errors import InputError, NumericError
from loftq_cli.layouts.layout import DENSE_HINT, StoredMatrix, load_layout
from loftq_cli.merging.plan import Merge, MergeJob
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
EXACT = 1e-6  # of the largest weight: what float32 offsets may differ by from float64 ones


def numel_of(job: MergeJob) -> int:
    return math.prod(job.matrix.shape if job.matrix else job.outputs[0].shape)


def is_for_gpu(merge: Merge, job: MergeJob) -> bool:
    """Whether it is a matrix that more is done to than to copy it or to move its offsets."""
    is_matrix = job.lora is not None or job.matrix is not None or job.name in merge.base.quantized
    return is_matrix and not job.is_copied and not job.keeps_codes


def run_job(
    merge: Merge, job: MergeJob, files: OutputFiles, workers: Workers, gpu: SharedDevice | None
) -> tuple[dict[str, str], dict[str, Any]]:
    """Write what becomes of a tensor; the sha256 of each that was written, and what is to be said of it."""
    if job.is_copied:
        return _copy(merge, job, files)
    output = job.outputs[0]
    if job.lora is None and job.matrix is None and job.name not in merge.base.quantized:
        tensors, layer = {output.name: _finite(merge, job, _vector(merge, job))}, None
    else:
        try:
            if job.keeps_codes:
                tensors, layer = _moved(merge, job, workers)
            elif job.matrix is not None:
                tensors, layer = _requantized(merge, job, job.matrix, workers, gpu)
            else:
                sha256, layer = _merged(merge, job, files, workers, gpu)
                return {output.name: sha256}, {} if layer is None else layer.to_json()
        except NumericError as error:
            hint = error.hint if job.keeps_codes else None if job.matrix is None else "leave out --requantize"
            raise NumericError(error.message, file=merge.base.path, tensor=job.name, hint=hint) from None
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            what = f"merged, {name} would not be finite in {str(tensor.dtype).removeprefix('torch.')}"
            raise InputError(what, file=merge.base.path, tensor=job.name, hint=DENSE_HINT)
    written = {name: files[name].write(name, tensor) for name, tensor in tensors.items()}
    return written, {} if layer is None else layer.to_json()


def _copy(merge: Merge, job: MergeJob, files: OutputFiles) -> tuple[dict[str, str], dict[str, Any]]:
    checkpoint = merge.base.checkpoint
    written, are_finite = {}, True
    for output in job.outputs:
        if output.dtype == checkpoint.tensors[output.name].dtype:
            chunks = checkpoint.chunks(output.name)
        else:
            chunks = recast_chunks(checkpoint, output.name, output.dtype, hashlib.sha256())
        watched = WatchedChunks(chunks, output.dtype)
        written[output.name] = files[output.name].write_chunks(output.name, watched)
        are_finite = are_finite and watched.are_finite
    return written, {} if are_finite else {NOT_FINITE: True}


def is_recast(merge: Merge, job: MergeJob) -> bool:
    return any(output.dtype != merge.base.checkpoint.tensors[output.name].dtype for output in job.outputs)


def _vector(merge: Merge, job: MergeJob) -> torch.Tensor:
    """A tensor that takes the place of the base's, or the base's own, plus what the adapter adds to a bias."""
    loaded = _adapter_tensor(merge, job.replacement) if job.replacement else merge.base.load(job.name)
    value = loaded.float()
    if job.lora_bias is not None and job.lora_bias.lora_bias is not None:
        value = value + _adapter_tensor(merge, job.lora_bias.lora_bias).float() * job.lora_bias.scaling
    return value


def _merged(
    merge: Merge, job: MergeJob, files: OutputFiles, workers: Workers, gpu: SharedDevice | None
) -> tuple[str, MergedLayer | None]:
    """Write the merged weight in full precision, a few rows at a time; its sha256, and what merging it did.

    Where the file holds the matrix transposed, or a GPU makes it, all of it is in memory.
    """
    import torch

    from loftq_cli.triton_kernels.error_stats.contract import error_stats

    output, is_turned = job.outputs[0], _is_turned(merge, job)
    pair = None if job.lora is None else _pair(merge, job.lora)
    if gpu is not None:
        made = merge_on(
            gpu, partial(_weight, merge, job, merge.base.whole), numel_of(job), pair, output.dtype, turned=is_turned
        )
        if made is not None:
            sha256 = files[output.name].write(output.name, made.tensor)
            return sha256, _layer(job, pair, made.squared_weight, made.squared_delta)
    weight = _weight(merge, job, merge.base.rows)
    delta = None if pair is None else delta_rows(pair)
    squares: list[ErrorSums] = []

    def merge_rows(part: slice) -> tuple[torch.Tensor, ErrorSums]:
        rows = weight.rows(part).float()
        added = None if delta is None else delta(part)
        sums = error_stats(rows, rows, added)
        if not math.isfinite(sums.squared_weight):
            raise NumericError("holds NaN or infinite values")
        return _finite(merge, job, rows if added is None else rows + added), sums

    def merged() -> Iterator[torch.Tensor]:
        parts = slabs(weight.shape, weight.multiple, STREAMED_NUMEL)
        for rows, sums in workers.map(merge_rows, parts):
            squares.append(sums)
            yield rows

    if is_turned:
        sha256 = files[output.name].write(output.name, torch.cat(list(merged())).T.contiguous())
    else:
        sha256 = files[output.name].write_chunks(output.name, (tensor_bytes(rows) for rows in merged()))
    squared_weight = math.fsum(sums.squared_weight for sums in squares)
    return sha256, _layer(job, pair, squared_weight, math.fsum(sums.squared_delta for sums in squares))


def _layer(
    job: MergeJob, pair: LoraPair | None, squared_weight: float, squared_delta: float, retained: float | None = None
) -> MergedLayer | None:
    """What merging did; None where there was no adapter."""
    if pair is None:
        return None
    return MergedLayer(job.name, pair.lora_A.shape[0], pair.scaling, squared_weight, squared_delta, retained)


def _requantized(
    merge: Merge, job: MergeJob, matrix: StoredMatrix, workers: Workers, gpu: SharedDevice | None
) -> tuple[dict[str, torch.Tensor], MergedLayer | None]:
    """The tensors of a merged weight that is quantized again, and what that did. Peak memory: the quantized matrix; the
    base's as well where a GPU makes it.
    """
    pair = None if job.lora is None else _pair(merge, job.lora)
    quantizer = make_quantizer(matrix.spec, matrix.dtype)
    made = None
    if gpu is not None:
        made = requantize_on(gpu, partial(_weight, merge, job, merge.base.whole), numel_of(job), pair, quantizer)
    if made is None:
        made = requantize(_weight(merge, job, merge.base.rows), pair, quantizer, workers)
    tensors = load_layout(merge.form.layout).pack(matrix, made.quantized)
    return tensors, _layer(job, pair, made.squared_weight, made.squared_delta, made.retained)


def _moved(merge: Merge, job: MergeJob, workers: Workers) -> tuple[dict[str, torch.Tensor], MergedLayer | None]:
    """The base's codes with the adapter in their offsets, and how far that is from the exact sum, measured.

    Raises NumericError where float32 offsets are not exact.
    """
    from loftq_cli.quant.affine import merge_into_offsets

    base, matrix = merge.base.quantized_tensor(job.name), job.matrix
    assert matrix is not None  # codes are kept of what is stored quantized
    pair = None if job.lora is None else _pair(merge, job.lora)
    try:
        merged = merge_into_offsets(base, pair, matrix.spec, matrix.dtype, workers=workers)
    except NumericError as error:
        hint = f"{error.hint}, or {DENSE_HINT}" if error.hint else None
        raise NumericError(error.message, hint=hint) from None
    difference = merged.difference
    is_exact = difference.max_difference <= EXACT * difference.max_weight
    if matrix.spec.scale_dtype == "float32" and matrix.spec.zero_point_kind == "float" and not is_exact:
        what = f"merged, it differs by {difference.max_difference:g} from the exact sum"
        raise NumericError(what, hint=DENSE_HINT)
    tensors = load_layout(merge.form.layout).pack(matrix, merged.quantized)
    if pair is None:
        return tensors, None
    layer = MergedLayer(job.name, pair.lora_A.shape[0], pair.scaling, merged.squared_weight, merged.squared_delta)
    return tensors, replace(layer, difference=difference)


def _pair(merge: Merge, lora: LoraTensors) -> LoraPair:
    lora_A, lora_B = _adapter_tensor(merge, lora.lora_A), _adapter_tensor(merge, lora.lora_B)
    return lora_pair(lora_A, lora_B, lora.scaling, lora.pooling)


def _weight(merge: Merge, job: MergeJob, read: Callable[[str], Weight]) -> Weight | TensorRows:
    """The weight that the adapter is added to, [out, in] as the adapter counts; `read` gives matrices of the base."""
    turned = _is_turned(merge, job)
    if job.replacement is not None:
        return TensorRows(_adapter_tensor(merge, job.replacement), turned)
    if job.lora is not None and job.lora.is_embedding:
        return TensorRows(merge.base.load(job.name), turned)
    return read(job.name)


def _is_turned(merge: Merge, job: MergeJob) -> bool:
    """Whether the model's file holds [in, out]: Conv1D, and embeddings as PEFT adapts them."""
    return merge.base.family.is_transposed(module_of(job.name)) or (job.lora is not None and job.lora.is_embedding)


def _adapter_tensor(merge: Merge, name: str) -> torch.Tensor:
    """A tensor of the adapter. Raises InputError when it holds NaN or infinite values."""

    tensor = merge.adapter.weights.load(name)
    if not is_finite(tensor):
        raise InputError("holds NaN or infinite values", file=merge.adapter.weights.path, tensor=name)
    return tensor


def _finite(merge: Merge, job: MergeJob, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the dtype it is written in. Raises InputError when it is not finite there."""
    import torch

    dtype = job.outputs[0].dtype
    cast = tensor.to(getattr(torch, dtype)).contiguous()
    if not is_finite(cast):
        hint = None if dtype == "float32" else "--dtype float32"
        raise InputError(f"merged, it is not finite in {dtype}", file=merge.base.path, tensor=job.name, hint=hint)
    return cast
