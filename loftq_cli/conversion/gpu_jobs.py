"""The jobs of a plan on a GPU: equal matrices in stacks, if possible, without waiting for the GPU; matrices alone
otherwise. The processor checks, describes and writes the outputs, with jobs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from loftq_cli.conversion.jobs import Converted, JobRunner, LoadedMatrix
from loftq_cli.conversion.measuring import Measured, known_plain_error
from loftq_cli.errors import LoftqError, MemoryShortage
from loftq_cli.methods.lowrank import is_exact
from loftq_cli.methods.method import METHODS, STARTS, Initialization, zero_adapter
from loftq_cli.output.journal import JournalEntry
from loftq_cli.planning.jobs import CopyJob, LayerJob
from loftq_cli.quant.codebook_stack import unstacked
from loftq_cli.quant.formats import SCALES, QuantizedTensor
from loftq_cli.runtime.gpu import Device, Download, pinned
from loftq_cli.runtime.kernel_choice import choose_kernels
from loftq_cli.runtime.schedule import StackSteps, in_stacks
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.metrics import LayerError, relative
from loftq_cli.tensors.rows import Rows, TensorRows, UploadedRows

if TYPE_CHECKING:
    import torch

    from loftq_cli.methods.stacked import StackedAlternation, StackedInitialization

STACK_NUMEL = 1 << 27  # weights in a stack: 256 MB in bfloat16
IN_FLIGHT = 3  # stacks on the device at once: an upload, a computation and a download

# Bytes of device memory for each weight. A stack holds weights in float32 at most, codes twice, and small tensors. A
# matrix alone takes the peak of a method in jobs.py, most of all a residual and codes before packing.
_STACKED_NBYTES, _SINGLE_NBYTES = 8, 16
_SLAB_NBYTES = 32  # for each weight in a slab of a matrix alone
_COPYING_THREADS = 2  # for copied tensors; most bytes are in a table of embeddings or two
_WINDOW = 1024  # jobs to search for equal matrices


@dataclass(frozen=True, slots=True)
class DeviceWeight:
    """A weight ready for the device.

    stored   the weight as stored in the original, in pinned memory
    start    float32 [in, rank], random vectors that start the alternation, in pinned memory; None without a stacked fit
    sha256   hash of the stored bytes
    """

    stored: torch.Tensor
    start: torch.Tensor | None
    sha256: str


@dataclass(frozen=True, slots=True)
class StackOnDevice:
    """Base and adapter of matrices in a stack, on the way to the processor.

    download   the outputs, with a first dimension for the matrices
    places     place in the stack of each matrix in the outputs: finished jobs of the stack have no outputs
    """

    download: Download[StackedInitialization]
    places: tuple[int, ...]


# The output of `compute` for a job.
JobOutput: TypeAlias = "Converted | StackOnDevice | Download[Converted]"


@dataclass(frozen=True, slots=True)
class _Placement:
    """How the code of a processor sees a matrix alone on the device.

    slab_numel   weights in work at once
    is_whole     whether the device holds the whole matrix; otherwise rows are uploaded as needed
    """

    slab_numel: int
    is_whole: bool = False

    def nbytes(self, numel: int) -> int:
        """About how many bytes of device memory a matrix of `numel` weights takes."""
        weights = _SINGLE_NBYTES if self.is_whole else _SINGLE_NBYTES - 4
        return numel * weights + min(self.slab_numel, numel) * _SLAB_NBYTES

    def rows(self, matrix: TensorRows, device: torch.device) -> Rows:
        if not self.is_whole:
            return UploadedRows(matrix, device, self.slab_numel)
        return TensorRows(matrix.tensor.to(device, non_blocking=True), matrix.transposed, slab_numel=self.slab_numel)


# Descending by memory.
_PLACEMENTS = (
    _Placement(1 << 26, is_whole=True),
    _Placement(1 << 22, is_whole=True),
    _Placement(1 << 22),
    _Placement(1 << 19),
)


class DeviceRunner:
    """The steps of the jobs of a plan on a device. Many threads may call `load`, `write` and `copy`, a single thread
    calls `compute`.
    """

    def __init__(self, runner: JobRunner, device: Device) -> None:
        self._runner, self._device = runner, device

    def stacks(self, jobs: Sequence[LayerJob | CopyJob]) -> list[list[int]]:
        """Group the layers among `jobs` into stacks, in the order to run. A stack lists indices of `jobs`, computed at
        once.

        Equal matrices are sought among the next _WINDOW jobs: a layer may have hundreds of experts.
        """
        most = min(STACK_NUMEL, self._device.max_nbytes // (IN_FLIGHT * _STACKED_NBYTES))
        stacks: list[list[int]] = []
        open_stacks: dict[object, tuple[int, list[int]]] = {}
        for place, job in enumerate(jobs):
            if isinstance(job, CopyJob):
                continue
            key = self._make_stack_key(job)
            numel, stack = open_stacks.get(key, (most + 1, []))
            if key is None or numel + job.numel > most or place - stack[0] > _WINDOW:
                numel, stack = 0, []
                stacks.append(stack)
            stack.append(place)
            open_stacks[key] = (numel + job.numel, stack)
        return stacks

    def copy(self, job: CopyJob) -> tuple[JournalEntry, bool]:
        """Copy a tensor from the original into the result. Returns the result of `JobRunner.write`."""
        return self._runner.write(job, self._runner.compute(job, self._runner.load(job), SERIAL))

    def load(self, job: LayerJob) -> DeviceWeight | LoadedMatrix | JournalEntry:
        """Read a weight into pinned memory. Returns the journal entry of a finished job, and an empty LoadedMatrix for
        experts, which `compute` reads.

        Raises MemoryShortage naming the tensor when the weight does not fit memory.
        """
        loaded = self._runner.load(job, for_gpu=True)
        if isinstance(loaded, JournalEntry) or loaded.stored is None:
            return loaded
        return DeviceWeight(loaded.stored, self._draw_start(job), loaded.sha256)

    def compute(
        self, jobs: Sequence[LayerJob], weights: Sequence[DeviceWeight | LoadedMatrix | JournalEntry]
    ) -> list[JobOutput]:
        """Compute the outputs of each job of a stack; `weights` come from `load`. Does not wait for the device where
        the device computes the whole stack at once.

        Raises InputError naming the tensor when numbers cannot be quantized or stored, MemoryShortage when a matrix
        does not fit the device.
        """
        outputs: list[JobOutput] = [
            Converted({}, entry=weight if isinstance(weight, JournalEntry) else None) for weight in weights
        ]
        work = {
            place: (job, weight)
            for place, (job, weight) in enumerate(zip(jobs, weights, strict=True))
            if isinstance(weight, DeviceWeight)
        }
        stack = self._compute_stack(work) if work and self._make_stack_key(jobs[0]) is not None else None
        for place, (job, weight) in work.items():
            outputs[place] = stack or self._compute_alone(job, weight)
        for place, (job, loaded) in enumerate(zip(jobs, weights, strict=True)):
            if isinstance(loaded, LoadedMatrix):
                outputs[place] = self._compute_experts(job)
        return outputs

    def _compute_experts(self, job: LayerJob) -> Converted:
        """Convert the experts of a layer, one after the other, and wait for the device."""
        try:
            with self._device.computing():
                return self._runner.convert_experts(job, SERIAL, self._device.device)
        except (LoftqError, RuntimeError) as error:
            raise self._runner.name_error(error, job) from None

    def write(
        self, job: LayerJob, weight: DeviceWeight | LoadedMatrix | JournalEntry, output: JobOutput, place: int
    ) -> tuple[JournalEntry, bool]:
        """Write the outputs of a job, at `place` in the stack, after the download; see `JobRunner.write`."""
        if isinstance(output, StackOnDevice):
            assert isinstance(weight, DeviceWeight)
            output = self._describe_matrix(job, weight, output, place)
        elif isinstance(output, Download):
            output = output.wait()
        return self._runner.write(job, output)

    def _make_stack_key(self, job: LayerJob) -> object:
        """Return a key, equal for matrices that fit a stack together; None for a matrix to compute alone."""
        if job.experts or not job.matrix.spec.has_code_kernels:
            return None
        if job.numel * _STACKED_NBYTES * IN_FLIGHT > self._device.max_nbytes:
            return None
        procedure, shape, lora = job.procedure, job.matrix.shape, job.lora
        entry, fitting = METHODS[procedure.method], procedure.fitting
        if fitting.fit not in entry.stacks or fitting.start != STARTS[0] or fitting.keep_base:
            return None
        if procedure.scales != SCALES[0] or procedure.is_calibrated:
            return None
        if entry.is_fitted(fitting.init):
            is_iterated = fitting.svd == "fast" and not is_exact(fitting.svd, lora.rank, shape)
            if not is_iterated or lora.dtype != "float32":
                return None
        return shape, job.matrix.spec, job.matrix.dtype, job.matrix.transposed, lora

    def _draw_start(self, job: LayerJob) -> torch.Tensor | None:
        """Draw random vectors, float32 [in, rank], that start the alternation of a matrix in a stack. The processor
        draws, so every device gets equal vectors. None for a matrix alone, and for an adapter without a fit.
        """
        import torch

        is_fitted = METHODS[job.procedure.method].is_fitted(job.procedure.fitting.init)
        if not is_fitted or self._make_stack_key(job) is None:
            return None
        return pinned(torch.randn(job.matrix.shape[1], job.lora.rank, generator=job.generator(), dtype=torch.float32))

    def _compute_stack(self, work: Mapping[int, tuple[LayerJob, DeviceWeight]]) -> StackOnDevice | None:
        """Launch the computation and the download of a stack. `work` has job and weight by place in the stack. None
        when the stack does not fit the device.
        """
        import torch

        try:
            with self._device.computing():
                initial = self._initialize_stack(
                    [job for job, _ in work.values()], [weight for _, weight in work.values()]
                )
            return StackOnDevice(self._device.download(initial), tuple(work))
        except torch.OutOfMemoryError:
            pass
        self._device.drain()
        return None

    def _initialize_stack(self, jobs: Sequence[LayerJob], weights: Sequence[DeviceWeight]) -> StackedInitialization:
        import torch

        from loftq_cli.methods.stacked import alternate_stack, quantize_once
        from loftq_cli.triton_kernels.codebook.contract import FLOATS

        matrix, lora = jobs[0].matrix, jobs[0].lora
        stored = self._device.upload([weight.stored for weight in weights])
        starts = self._device.upload([weight.start for weight in weights if weight.start is not None])
        turned = [tensor.T if matrix.transposed else tensor for tensor in stored]
        weight = torch.stack(turned) if len(turned) > 1 else turned[0][None].contiguous()
        del stored, turned
        if weight.dtype not in FLOATS:
            weight = weight.float()
        if not starts:
            return quantize_once(weight, matrix.spec, matrix.dtype)
        iterations = jobs[0].procedure.fitting.iterations
        return alternate_stack(weight, matrix.spec, matrix.dtype, lora, iterations, torch.stack(starts))

    def _compute_alone(self, job: LayerJob, weight: DeviceWeight) -> Download[Converted]:
        """Convert a matrix alone, with the code of a processor, in the largest placement that fits the device.

        Raises MemoryShortage when no placement fits.
        """
        for placement in _PLACEMENTS:
            if placement.nbytes(job.numel) <= self._device.max_nbytes or placement is _PLACEMENTS[-1]:
                download = self._try_placement(placement, job, weight)
                if download is not None:
                    return download
        shortage = MemoryShortage("the GPU has not enough memory for this matrix", hint="--device cpu")
        raise self._runner.name_error(shortage, job)

    def _try_placement(self, placement: _Placement, job: LayerJob, weight: DeviceWeight) -> Download[Converted] | None:
        """Convert a matrix in a placement. None when the placement does not fit the device."""
        import torch

        try:
            with self._device.computing():
                rows = placement.rows(TensorRows(weight.stored, job.matrix.transposed), self._device.device)
                converted = self._runner.convert_layer(job, rows, weight.sha256, SERIAL)
            return self._device.download(converted)
        except torch.OutOfMemoryError:
            pass
        except (LoftqError, RuntimeError) as error:
            raise self._runner.name_error(error, job) from None
        self._device.drain()
        return None

    def _describe_matrix(self, job: LayerJob, weight: DeviceWeight, stack: StackOnDevice, place: int) -> Converted:
        """Wait for the stack; describe the matrix at `place`. jobs.py converts unusual matrices, on the processor."""
        host, i = stack.download.wait(), stack.places.index(place)
        if not bool(host.is_ordinary[i]):
            choose_kernels(job.numel * job.procedure.fitting.iterations)
            return self._runner.compute(job, LoadedMatrix(weight.stored, weight.sha256), SERIAL)
        quantized = unstacked(host.packed, host.constants, job.matrix.spec, job.matrix.shape, job.matrix.dtype, i)
        error = LayerError(*host.sums[i, :5].tolist())
        if host.alternation is None:
            rows = TensorRows(weight.stored, job.matrix.transposed)
            initial = Initialization(quantized, zero_adapter(rows, job.lora, job.generator()))
        else:
            initial = _make_initialization(quantized, host.alternation, i, job.lora.scaling, error.squared_weight)
        # The matrices of a stack are quantized with plain constants first, so plain rounding costs nothing.
        measured = Measured(error, known_plain_error(job, initial, error))
        return self._runner.describe_layer(job, initial, measured, weight.sha256)


def _make_initialization(
    quantized: QuantizedTensor, alternation: StackedAlternation, i: int, scaling: float, squared_weight: float
) -> Initialization:
    from loftq_cli.methods.loftq import balanced_pair

    return Initialization(
        quantized,
        balanced_pair(LoraPair(alternation.lora_A[i], alternation.lora_B[i], scaling)),
        relative(float(alternation.squared_base[i]), squared_weight),
        tuple(relative(squared, squared_weight) for squared in alternation.squared_errors[:, i].tolist()),
        int(alternation.best_iteration[i]),
    )


def run_on_device(
    runner: DeviceRunner,
    jobs: Sequence[LayerJob | CopyJob],
    threads: int,
    started: Callable[[LayerJob], None],
) -> Generator[tuple[JournalEntry, bool]]:
    """Run all jobs. Yields the result of `JobRunner.write` for each of `jobs`, in order.

    runner    the steps of a job
    jobs      the jobs of a plan
    threads   number of threads for reading, and for writing
    started   receives each layer before the computation

    Layers run in the order of `DeviceRunner.stacks`. Copies run beside the layers, so the device need not wait. Raises
    LoftqError naming the tensor when a job fails.
    """
    stacks = runner.stacks(jobs)
    layers = [[job for job in (jobs[i] for i in stack) if isinstance(job, LayerJob)] for stack in stacks]
    steps = StackSteps(runner.load, runner.compute, runner.write)
    copier = Workers(_COPYING_THREADS, inline=False)
    copies = {i: copier.submit(partial(runner.copy, job)) for i, job in enumerate(jobs) if isinstance(job, CopyJob)}
    results: dict[int, tuple[JournalEntry, bool]] = {}
    due = 0
    try:
        with closing(in_stacks(layers, steps, lambda job: job.numel, threads, started)) as done:
            for place, result in zip((place for stack in stacks for place in stack), done, strict=True):
                results[place] = result
                while due in results or (due in copies and copies[due].done()):
                    yield results.pop(due) if due in results else copies[due].result()
                    due += 1
        for place in range(due, len(jobs)):
            yield results[place] if place in results else copies[place].result()
    finally:
        copier.close()
