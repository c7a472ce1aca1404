"""Base plus adapter to a deployment checkpoint: dequant(Q) + s·B·A in float32, one tensor at a time; or, of a pooled
adapter, into the offsets of the base's groups. Every adapter tensor is merged, copied or refused; nothing is dropped.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from loftq_cli.adapter_source import LoraTensors
from loftq_cli.checkpoint.journal import JournalEntry, outputs_of
from loftq_cli.checkpoint.side_files import are_copied, nbytes_of
from loftq_cli.checkpoint.staging import Staging, check_output, check_space, finished_mark
from loftq_cli.checkpoint.writer import OutputFiles, tensor_bytes
from loftq_cli.device import SharedDevice, open_device
from loftq_cli.device_matrix import BESIDE_NUMEL, WholeMatrix, merge_on, requantize, requantize_on
from loftq_cli.errors import InputError, LoftqError, NumericError, QualityError, StorageError
from loftq_cli.jobs import NOT_FINITE, WatchedChunks, not_finite_note, recast_chunks
from loftq_cli.kernels import choose_kernels
from loftq_cli.layouts.layout import StoredMatrix, load_layout
from loftq_cli.layouts.peft_adapter import pooling_of
from loftq_cli.merge_plan import Merge, MergeJob
from loftq_cli.merge_report import (
    MergedLayer,
    MergeOutcome,
    largest_difference,
    side_files,
    total_lost,
    total_retention,
    write_side_files,
)
from loftq_cli.metrics import delta_rows, group_delta, is_finite, layer_error
from loftq_cli.provenance import check_contents
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.report import TOOL, fingerprint_of
from loftq_cli.rows import STREAMED_NUMEL, Rows, TensorRows, slabs
from loftq_cli.schedule import SMALL_NUMEL, in_turn
from loftq_cli.targets import module_of
from loftq_cli.tensors import AffineSpec, AffineTensor, LoraPair, OutTensor, lora_pair
from loftq_cli.workers import Workers, started

if TYPE_CHECKING:
    import torch

    from loftq_cli.triton_kernels.error_stats import ErrorSums

Weight = TypeVar("Weight", Rows, WholeMatrix)

LEAST_RETENTION = 0.5  # below this, most of what was trained would be gone from the deployed model
EXACT = 1e-6  # of the largest weight: what float32 offsets may differ by from float64 ones


class Observer(Protocol):
    """Who is told how a merge goes on."""

    def note(self, text: str) -> None: ...

    def layer_merged(self, layer: MergedLayer) -> None: ...


def already_done(merge: Merge, *, overwrite: bool) -> bool:
    """Whether the output is the complete, undamaged result of this very merge, and nobody wants it replaced.

    Raises UsageError when something else stands there.
    """
    mark = finished_mark(merge.output, merge.fingerprint, overwrite=overwrite)
    if mark is not None and mark.input_sha256 == _InputSums(merge).all() and are_copied(side_files(merge), mark.files):
        return True
    check_output(merge.output, overwrite=overwrite)
    return False


def run(
    merge: Merge, observer: Observer, *, overwrite: bool, restart: bool, threads: int = 1, device: str = "cpu"
) -> MergeOutcome:
    """Merge, check, publish. Continues an interrupted run of the same merge; the bytes are the same, with any number of
    threads.

    On a GPU, see `open_device`, matrices are merged with their adapters and quantized again, those that fit it; its
    sums are taken in another order, so that a weight may be rounded to its neighbour. Vectors, copies and adapters that
    go into the offsets of groups stay on the processor.

    Raises UsageError for a GPU that is not there, QualityError when quantizing again, or rounding zero points, erases
    more than half of the adapter, unless forced. What is refused leaves nothing behind; what the disk or the user
    stopped can be continued.
    """
    for_gpu = [job for job in merge.jobs if _is_for_gpu(merge, job)]
    found_gpu = open_device(device, sum(_numel(job) for job in for_gpu))
    gpu = SharedDevice(found_gpu) if found_gpu and for_gpu else None
    sums = _InputSums(merge)
    contents = check_contents(merge.base, merge.provenance, sums.base, force=merge.options.force)
    found = [contents] if contents else []
    notes = (*merge.provenance.notes, *found, *merge.notes, *_unused_notes(merge), *_other_notes(merge))
    rest = [job for job in merge.jobs if gpu is None or not _is_for_gpu(merge, job)]
    missing = choose_kernels(sum(_numel(job) for job in rest if job.is_touched or job.matrix is not None))
    used = (
        f"computing on {gpu}" if gpu else f"nothing here is for a GPU, and {found_gpu} not used" if found_gpu else None
    )
    for note in (*notes, missing, used):
        if note is not None:
            observer.note(note)
    check_space(merge.output, merge.nbytes + nbytes_of(side_files(merge)))
    staging = Staging(merge.output, fingerprint=merge.fingerprint, overwrite=overwrite, restart=restart)
    try:
        if staging.entries:
            observer.note(f"continuing: {len(staging.entries)} of {len(merge.jobs)} tensors are finished; hashing them")
        with started(threads) as workers, OutputFiles(staging.path, _files(merge)) as files:
            layers, entries = _run_jobs(_Runner(merge, files, sums, staging.entries, gpu), staging, observer, workers)
        _check_retention(merge, layers)
        outcome = MergeOutcome(layers, (*notes, *_not_finite_notes(entries)))
        written = files.sums_by_file(outputs_of(entries))
        staging.keep_only(written)
        write_side_files(merge, staging.path, outcome)
        merge.base.checkpoint.check_unchanged()
        merge.adapter.weights.check_unchanged()
        staging.publish(TOOL, written, sums.all())
    except LoftqError as error:
        if not isinstance(error, StorageError):
            staging.discard()
        raise
    finally:
        staging.close()
    return outcome


def _unused_notes(merge: Merge) -> list[str]:
    return [f"adapter tensor {name} is not needed: {why}" for name, why in merge.adapter.unused.items()]


def _other_notes(merge: Merge) -> list[str]:
    notes = [f"{job.name} is kept in full precision: {job.note}" for job in merge.jobs if job.note]
    named, asked = pooling_of(merge.adapter.config), merge.options.pooling
    if named is not None and asked not in (None, named.convention):
        notes.append(f"merged as pooled by {asked}, and the adapter's config says {named.convention}")
    return notes


def _not_finite_notes(entries: Sequence[JournalEntry]) -> list[str]:
    return [not_finite_note(entry.unit) for entry in entries if NOT_FINITE in entry.result]


def _files(merge: Merge) -> dict[str, Sequence[OutTensor]]:
    return {shard.file: shard.tensors for shard in merge.shards}


@dataclass
class _InputSums:
    """The sha256 of the tensors of base and adapter, each hashed once."""

    merge: Merge
    _known: dict[tuple[str, str], str] = field(default_factory=dict)

    def base(self, name: str) -> str:
        """Of a stored tensor of the base."""
        return self._of("base", self.merge.base.checkpoint.sha256, name)

    def of(self, job: MergeJob) -> str:
        """Of everything that a job reads."""
        base, adapter = self.merge.base, self.merge.adapter.weights
        parts = base.parts(job.name) if job.name in base.tensors else []
        factors = [] if job.lora is None else [job.lora.lora_A, job.lora.lora_B]
        bias = None if job.lora_bias is None else job.lora_bias.lora_bias
        read = [name for name in (*factors, bias, job.replacement) if name is not None]
        sums = {f"base {part.name}": self.base(part.name) for part in parts}
        return fingerprint_of(sums | {f"adapter {name}": self._of("adapter", adapter.sha256, name) for name in read})

    def all(self) -> str:
        """Of everything that the merge reads."""
        return fingerprint_of({job.name: self.of(job) for job in self.merge.jobs})

    def remember(self, name: str, sha256: str) -> None:
        """What is known of a tensor of the base that was copied byte by byte."""
        self._known["base", name] = sha256

    def _of(self, side: str, sha256: Callable[[str], str], name: str) -> str:
        if (side, name) not in self._known:
            self._known[side, name] = sha256(name)
        return self._known[side, name]


@dataclass(frozen=True)
class _Runner:
    """Does the jobs of a merge, or keeps what a journal says of them once input and output have been hashed."""

    merge: Merge
    files: OutputFiles
    sums: _InputSums
    entries: Mapping[str, JournalEntry]
    gpu: SharedDevice | None = None

    def run(self, job: MergeJob, workers: Workers) -> tuple[JournalEntry, bool]:
        """What the journal is to say of a job, and whether it said so before."""
        entry = self.entries.get(job.name)
        if entry is not None and entry.input_sha256 == self.sums.of(job) and self.files.hold(entry.outputs):
            return entry, True
        written, result = _run_job(self.merge, job, self.files, workers, self.gpu)
        if job.is_copied and not _is_recast(self.merge, job):
            for name, sha256 in written.items():
                self.sums.remember(name, sha256)
        return JournalEntry(job.name, self.sums.of(job), written, result), False


def _run_jobs(
    runner: _Runner, staging: Staging, observer: Observer, workers: Workers
) -> tuple[tuple[MergedLayer, ...], list[JournalEntry]]:
    layers: list[MergedLayer] = []
    entries: list[JournalEntry] = []
    small_numel = SMALL_NUMEL if runner.gpu is None else BESIDE_NUMEL
    # The jobs end before the recording does: by then nothing is being written any more.
    with (
        staging.recording(runner.files.sync) as record,
        closing(in_turn(runner.merge.jobs, runner.run, _numel, workers, small_numel)) as done,
    ):
        for entry, kept in done:
            if not kept:
                record(entry)
            entries.append(entry)
            if NOT_FINITE in entry.result:
                observer.note(not_finite_note(entry.unit))
            elif entry.result:
                layers.append(MergedLayer.from_json(entry.result))
                observer.layer_merged(layers[-1])
    return tuple(layers), entries


def _numel(job: MergeJob) -> int:
    return math.prod(job.matrix.shape if job.matrix else job.outputs[0].shape)


def _is_for_gpu(merge: Merge, job: MergeJob) -> bool:
    """Whether it is a matrix that more is done to than to copy it or to move its offsets."""
    is_matrix = job.lora is not None or job.matrix is not None or job.name in merge.base.quantized
    return is_matrix and not job.is_copied and not job.keeps_codes


def _run_job(
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
            raise InputError(what, file=merge.base.path, tensor=job.name, hint="--layout dense")
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


def _is_recast(merge: Merge, job: MergeJob) -> bool:
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

    from loftq_cli.triton_kernels.error_stats import error_stats

    output, is_turned = job.outputs[0], _is_turned(merge, job)
    pair = None if job.lora is None else _pair(merge, job.lora)
    if gpu is not None:
        made = merge_on(
            gpu, partial(_weight, merge, job, merge.base.whole), _numel(job), pair, output.dtype, turned=is_turned
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
        made = requantize_on(gpu, partial(_weight, merge, job, merge.base.whole), _numel(job), pair, quantizer)
    if made is None:
        made = requantize(_weight(merge, job, merge.base.rows), pair, quantizer, workers)
    tensors = load_layout(merge.form.layout).pack(matrix, made.quantized)
    return tensors, _layer(job, pair, made.squared_weight, made.squared_delta, made.retained)


def _moved(merge: Merge, job: MergeJob, workers: Workers) -> tuple[dict[str, torch.Tensor], MergedLayer | None]:
    """The base's codes with the adapter in their offsets, and how far that is from the exact sum, measured.

    Raises NumericError where float32 offsets are not exact.
    """
    from loftq_cli.quant.affine import move_offsets, offset_difference

    base, matrix = merge.base.quantized_tensor(job.name), job.matrix
    assert isinstance(base, AffineTensor) and matrix is not None and isinstance(matrix.spec, AffineSpec)
    size = base.spec.group_size
    delta, pair = base.scales.new_zeros(base.scales.shape).double(), None
    if job.lora is not None:
        pair = _pair(merge, job.lora)
        delta = group_delta(pair).repeat_interleave(pair.group_size // size, dim=1)
    moved = move_offsets(base, delta, matrix.spec, matrix.dtype)
    found = offset_difference(moved, base, delta)
    is_exact = found.max_difference <= EXACT * found.max_weight
    if matrix.spec.scale_dtype == "float32" and matrix.spec.zero_point == "float" and not is_exact:
        what = f"merged, it differs by {found.max_difference:g} from the exact sum"
        raise NumericError(what, hint="--layout dense")
    tensors = load_layout(merge.form.layout).pack(matrix, moved)
    if pair is None:
        return tensors, None
    values = make_quantizer(base.spec, base.dtype).decoded(base)
    squared_weight = layer_error(values, values, None, workers).squared_weight
    squared_delta = size * float(delta.double().square().sum())
    layer = MergedLayer(job.name, pair.lora_A.shape[0], pair.scaling, squared_weight, squared_delta)
    return tensors, replace(layer, difference=found)


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


def _check_retention(merge: Merge, layers: Sequence[MergedLayer]) -> None:
    retained, lost = total_retention(layers), total_lost(layers)
    if merge.options.force:
        return
    if retained is not None and retained < LEAST_RETENTION:
        raise QualityError(
            f"quantized again to {merge.options.requantize}, {retained:.1%} of the adapter would survive",
            file=merge.base.path,
            hint="merge without --requantize, which keeps all of it; or keep base and adapter apart; or --force",
        )
    difference = largest_difference(layers)
    # What float32 itself cannot hold of a tiny update is no loss that other options would spare.
    if lost is None or difference is None or difference[1] <= EXACT or lost <= 1 - LEAST_RETENTION:
        return
    rounded = "with rounded zero points" if merge.options.round_zeros else "with such offsets"
    what = f"{lost:.1%} of the update would be lost"
    if math.isinf(lost):
        what = f"the base itself would change, by up to {difference[1]:.1e} of its largest weight"
    instead = "leave out --round-zeros" if merge.options.round_zeros else "leave out --scale-dtype"
    hint = f"float32 offsets keep all of it: {instead}; or --force"
    raise QualityError(f"{rounded}, {what}", file=merge.base.path, hint=hint)
