"""A full-precision checkpoint, looked at: what each tensor would become, and with which error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loftq_cli.errors import NumericError, UsageError
from loftq_cli.inspecting.converted import check_sort_key
from loftq_cli.inspecting.devices import check_idle_device, chosen_device, loaded_rows, small_numel
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
    """One tensor of a full-precision checkpoint: what it would become, and its error by quant type."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    becomes: str
    errors: dict[str, LayerError]


def inspect_checkpoint(
    base: BaseModel, quant_types: Sequence[str], threads: int = 1, device: str = "cpu"
) -> Iterator[TensorRow]:
    """Every tensor of a full-precision checkpoint, in file order; each of `quant_types` is tried on what would be
    quantized, on a GPU where it fits that: see `open_device`.
    """
    for quant_type in quant_types:
        if quant_type not in FORMATS:
            raise UsageError(f"--try {quant_type!r} does not exist", hint=f"one of {', '.join(FORMATS)}")
    formats = {quant_type: _matrices(base, quant_type) for quant_type in quant_types}
    jobs = quantizable_matrices(base.tensors, base.config)
    if not formats:
        check_idle_device(device, "--try nf4")
        yield from (_tensor_row(base, job, {}) for job in jobs)
        return
    gpu = chosen_device(device, sum(job.numel * len(formats) for job in jobs if isinstance(job, QuantizableMatrix)))

    def look(job: QuantizableMatrix | CopyJob, sharing: Workers) -> TensorRow:
        matrices = {t: found[job.name] for t, found in formats.items() if job.name in found}
        return _tensor_row(base, job, _tried(base, job.name, matrices, sharing, gpu) if matrices else {})

    with started(threads) as workers:
        yield from in_turn(jobs, look, lambda job: job.numel, workers, small_numel(gpu))


def _tensor_row(base: BaseModel, job: QuantizableMatrix | CopyJob, errors: dict[str, LayerError]) -> TensorRow:
    ref = base.tensors[job.name]
    becomes = f"copied: {job.reason}" if isinstance(job, CopyJob) else job.matrix.spec.quant_type
    if isinstance(job, QuantizableMatrix):
        becomes += f", {job.matrix.spec.size_text}"
    return TensorRow(job.name, ref.shape, ref.dtype, becomes, errors)


def sorted_tensors(rows: Sequence[TensorRow], key: str) -> list[TensorRow]:
    """The same for a full-precision checkpoint; by error of the first quant type that was tried."""
    check_sort_key(key)
    if key == "name":
        return sorted(rows, key=lambda row: row.name)
    if key == "numel":
        return sorted(rows, key=lambda row: -math.prod(row.shape))
    if not any(row.errors for row in rows):
        raise UsageError(f"--sort {key} needs errors", hint="--try nf4 computes them")
    return sorted(rows, key=lambda row: -max((getattr(e, key) for e in [*row.errors.values()][:1]), default=-1.0))


def _matrices(base: BaseModel, quant_type: str) -> dict[str, StoredMatrix]:
    """What a format with its default options would hold, by name; integers as any container could hold them."""
    layout = DENSE if FORMATS[quant_type].is_affine else None
    jobs = quantizable_matrices(base.tensors, base.config, quant_type=quant_type, layout=layout)
    return {job.name: job.matrix for job in jobs if isinstance(job, QuantizableMatrix)}


def _tried(
    base: BaseModel, name: str, matrices: Mapping[str, StoredMatrix], workers: Workers, gpu: SharedDevice | None
) -> dict[str, LayerError]:
    """The error that a weight would have as each of `matrices`."""
    from loftq_cli.tensors.metrics import layer_error

    quantizers = {t: make_quantizer(matrix.spec, matrix.dtype) for t, matrix in matrices.items()}
    numel = math.prod(base.tensors[name].shape)
    found = None if gpu is None else tries_on(gpu, lambda: loaded_rows(base, name), numel, quantizers)
    if found is not None:
        return found
    weight, errors = base.rows(name), {}
    for quant_type, quantizer in quantizers.items():
        try:
            quantized = quantizer.quantize(weight, workers=workers)
            errors[quant_type] = layer_error(weight, quantizer.decoded(quantized), None, workers)
        except NumericError as error:
            raise error.at(file=base.tensors[name].file, tensor=name) from None
    return errors
