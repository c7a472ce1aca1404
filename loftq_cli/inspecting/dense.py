"""The tensors of a full-precision checkpoint: the work of `quantize` on each tensor, and the error by number format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loftq_cli.errors import NumericError, UsageError
from loftq_cli.inspecting.converted import check_sort_key
from loftq_cli.inspecting.devices import load_weight, open_inspection_device, small_numel
from loftq_cli.layouts.layout import DENSE, StoredMatrix
from loftq_cli.model.stored import BaseModel
from loftq_cli.planning.jobs import CopyJob, QuantizableMatrix
from loftq_cli.planning.matrices import quantizable_matrices
from loftq_cli.quant.formats import FORMATS, make_quantizer
from loftq_cli.quant.gpu_matrix import tries_on
from loftq_cli.runtime.gpu import SharedDevice
from loftq_cli.runtime.schedule import in_turn
from loftq_cli.runtime.workers import Workers, started
from loftq_cli.tensors.metrics import LayerError


@dataclass(frozen=True, slots=True)
class TensorRow:
    """A tensor of a full-precision checkpoint.

    shape     shape in the file
    dtype     dtype in the file
    becomes   the result of `quantize` with defaults: number format and block or group size, or "copied: REASON"
    errors    quant type -> error of the quantized matrix without an adapter; empty for copied tensors
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    becomes: str
    errors: dict[str, LayerError]


def inspect_checkpoint(
    base: BaseModel, quant_types: Sequence[str], threads: int = 1, device: str = "cpu"
) -> Iterator[TensorRow]:
    """Yield every tensor of a full-precision checkpoint, in file order, with an error for each quant type.

    base          the checkpoint
    quant_types   number formats to try on every quantizable matrix; none reads headers only
    threads       number of threads to compute with
    device        see `open_device`; the processor takes a matrix too large for the GPU

    Raises UsageError for an unknown number format, and for an absent or idle GPU; NumericError naming the tensor for a
    matrix with NaN or infinite values.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> rows = inspect_checkpoint(BaseModel.open(resolve_model("builtin:tiny-llama")), ())
    >>> next(row.becomes for row in rows if row.name.endswith("q_proj.weight"))
    'nf4, block 64'
    """
    for quant_type in quant_types:
        if quant_type not in FORMATS:
            raise UsageError(f"--try {quant_type!r} does not exist", hint=f"one of {', '.join(FORMATS)}")
    formats = {quant_type: _matrices(base, quant_type) for quant_type in quant_types}
    jobs = quantizable_matrices(base.tensors, base.config)
    if not formats:
        yield from (_tensor_row(base, job, {}) for job in jobs)
        return
    work = sum(job.numel * len(formats) for job in jobs if isinstance(job, QuantizableMatrix))
    gpu = open_inspection_device(device, work)

    def try_formats(job: QuantizableMatrix | CopyJob, sharing: Workers) -> TensorRow:
        matrices = {t: by_name[job.name] for t, by_name in formats.items() if job.name in by_name}
        return _tensor_row(base, job, _errors_by_format(base, job.name, matrices, sharing, gpu) if matrices else {})

    with started(threads) as workers:
        yield from in_turn(jobs, try_formats, lambda job: job.numel, workers, small_numel(gpu))


def _tensor_row(base: BaseModel, job: QuantizableMatrix | CopyJob, errors: dict[str, LayerError]) -> TensorRow:
    ref = base.tensors[job.name]
    becomes = f"copied: {job.reason}" if isinstance(job, CopyJob) else job.matrix.spec.quant_type
    if isinstance(job, QuantizableMatrix):
        becomes += f", {job.matrix.spec.size_text}"
    return TensorRow(job.name, ref.shape, ref.dtype, becomes, errors)


def sorted_tensors(rows: Sequence[TensorRow], key: str) -> list[TensorRow]:
    """Sort `rows` by name, by "numel", or by "error" or "base_error" of the first quant type, with the largest first.

    Copied tensors have no error and come last. Raises UsageError for a key outside SORT_KEYS, and for a sort by error
    when no row has an error.

    >>> rows = [TensorRow(name, (4, width), "bfloat16", "nf4, block 64", {}) for name, width in (("b", 8), ("a", 4))]
    >>> [row.name for row in sorted_tensors(rows, "name")], [row.name for row in sorted_tensors(rows, "numel")]
    (['a', 'b'], ['b', 'a'])
    """
    check_sort_key(key)
    if key == "name":
        return sorted(rows, key=lambda row: row.name)
    if key == "numel":
        return sorted(rows, key=lambda row: -math.prod(row.shape))
    if not any(row.errors for row in rows):
        raise UsageError(f"--sort {key} needs errors", hint="--try nf4 computes them")
    return sorted(rows, key=lambda row: -max((getattr(e, key) for e in [*row.errors.values()][:1]), default=-1.0))


def _matrices(base: BaseModel, quant_type: str) -> dict[str, StoredMatrix]:
    """Map the name of each quantizable matrix to the matrix in a number format with default options.

    Integer formats take the container of decoded values, which holds every shape.
    """
    layout = DENSE if FORMATS[quant_type].is_affine else None
    jobs = quantizable_matrices(base.tensors, base.config, quant_type=quant_type, layout=layout)
    return {job.name: job.matrix for job in jobs if isinstance(job, QuantizableMatrix)}


def _errors_by_format(
    base: BaseModel, name: str, matrices: Mapping[str, StoredMatrix], workers: Workers, gpu: SharedDevice | None
) -> dict[str, LayerError]:
    """Map each quant type to the error of the weight `name` as the matrix in `matrices`."""
    from loftq_cli.tensors.metrics import layer_error

    quantizers = {t: make_quantizer(matrix.spec, matrix.dtype) for t, matrix in matrices.items()}
    numel = math.prod(base.tensors[name].shape)
    gpu_errors = None if gpu is None else tries_on(gpu, lambda: load_weight(base, name), numel, quantizers)
    if gpu_errors is not None:
        return gpu_errors
    weight, errors = base.rows(name), {}
    for quant_type, quantizer in quantizers.items():
        try:
            quantized = quantizer.quantize(weight, workers=workers)
            errors[quant_type] = layer_error(weight, quantizer.decoded(quantized), None, workers)
        except NumericError as error:
            raise error.at(file=base.tensors[name].file, tensor=name) from None
    return errors
