"""The jobs of a plan on a GPU: equal matrices in stacks, without waiting for the GPU where that is possible, and one by
one where it is not. What the GPU made is checked, described and written on the processor, as jobs.py does it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from loftq_cli.conversion.jobs import Converted, JobRunner, LoadedMatrix
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

STACK_NUMEL = 1 << 27  # weights of several matrices that are made at once: 256 MB in bfloat16
IN_FLIGHT = 3  # stacks on the device at once: one arrives, one is made, one leaves

# Bytes of device memory for each weight: of a stack, its weights in float32 at most, its codes twice and what is small
# beside them; of a matrix by itself, the peak of jobs.py's methods, most of it a residual and codes before packing.
_STACKED_NBYTES, _SINGLE_NBYTES = 8, 16
_SLAB_NBYTES = 32  # for each weight of those that are taken at once of a matrix by itself
_COPYING_THREADS = 2  # for tensors that are only copied; most of their bytes are one table of embeddings or two
_WINDOW = 1024  # jobs among which equal matrices are looked for


@dataclass(frozen=True, slots=True)
class DeviceWeight:
    """A weight in pinned memory, what its adapter starts from, and the sha256 of the stored bytes."""

    stored: torch.Tensor
    start: torch.Tensor | None
    sha256: str


@dataclass(frozen=True, slots=True)
class StackOnDevice:
    """What is made of some of the jobs of a stack, those at `places` in it, on its way back."""

    download: Download[StackedInitialization]
    places: tuple[int, ...]


# What has become of a job when `compute` is through with it.
Made: TypeAlias = "Converted | StackOnDevice | Download[Converted]"


@dataclass(frozen=True, slots=True)
class _Way:
    """How a matrix by itself is laid before the code of a processor: how many of its weights are taken at once, and
    whether all of them are on the device meanwhile.
    """

    slab_numel: int
    is_whole: bool = False

    def nbytes(self, numel: int) -> int:
        """About how much memory of the device it takes."""
        weights = _SINGLE_NBYTES if self.is_whole else _SINGLE_NBYTES - 4
        return numel * weights + min(self.slab_numel, numel) * _SLAB_NBYTES

    def rows(self, matrix: TensorRows, device: torch.device) -> Rows:
        if not self.is_whole:
            return UploadedRows(matrix, device, self.slab_numel)
        return TensorRows(matrix.tensor.to(device, non_blocking=True), matrix.transposed, slab_numel=self.slab_numel)


_WAYS = (_Way(1 << 26, is_whole=True), _Way(1 << 22, is_whole=True), _Way(1 << 22), _Way(1 << 19))


class DeviceRunner:
    """The steps of the jobs of a plan on a device: `load` and `write` for threads of their own, `compute` for one."""

    def __init__(self, runner: JobRunner, device: Device) -> None:
        self._runner, self._device = runner, device

    def stacks(self, jobs: Sequence[LayerJob | CopyJob]) -> list[list[int]]:
        """The places of the layers in the order in which they are to run: those of a list are made at once.

        Equal matrices are looked for among the next few jobs: the experts of a layer, of which there may be hundreds.
        """
        most = min(STACK_NUMEL, self._device.max_nbytes // (IN_FLIGHT * _STACKED_NBYTES))
        stacks: list[list[int]] = []
        open_stacks: dict[object, tuple[int, list[int]]] = {}
        for place, job in enumerate(jobs):
            if isinstance(job, CopyJob):
                continue
            key = self._key(job)
            numel, stack = open_stacks.get(key, (most + 1, []))
            if key is None or numel + job.numel > most or place - stack[0] > _WINDOW:
                numel, stack = 0, []
                stacks.append(stack)
            stack.append(place)
            open_stacks[key] = (numel + job.numel, stack)
        return stacks

    def copy(self, job: CopyJob) -> tuple[JournalEntry, bool]:
        """A tensor that is only copied, from start to end. See `JobRunner.write`."""
        return self._runner.write(job, self._runner.compute(job, self._runner.load(job), SERIAL))

    def load(self, job: LayerJob) -> DeviceWeight | JournalEntry:
        """A weight ready to be copied to the device."""
        found = self._runner.load(job, for_gpu=True)
        if isinstance(found, JournalEntry):
            return found
        assert found.stored is not None
        return DeviceWeight(found.stored, self._start(job), found.sha256)

    def compute(self, jobs: Sequence[LayerJob], found: Sequence[DeviceWeight | JournalEntry]) -> list[Made]:
        """What is made of each job of a stack. Does not wait for the device where they are made together.

        Raises InputError naming the tensor when its numbers cannot be quantized or stored.
        """
        made: list[Made] = [Converted({}, entry=entry if isinstance(entry, JournalEntry) else None) for entry in found]
        work = {
            place: (job, weight)
            for place, (job, weight) in enumerate(zip(jobs, found, strict=True))
            if isinstance(weight, DeviceWeight)
        }
        together = self._together(work) if work and self._key(jobs[0]) is not None else None
        for place, (job, weight) in work.items():
            made[place] = together or self._alone(job, weight)
        return made

    def write(
        self, job: LayerJob, weight: DeviceWeight | JournalEntry, made: Made, place: int
    ) -> tuple[JournalEntry, bool]:
        """Put what became of a job into its places, when it has arrived. See `JobRunner.write`."""
        if isinstance(made, StackOnDevice):
            assert isinstance(weight, DeviceWeight)
            made = self._arrived(job, weight, made, place)
        elif isinstance(made, Download):
            made = made.wait()
        return self._runner.write(job, made)

    def _key(self, job: LayerJob) -> object:
        """Equal for matrices that can be made together; None for those that have to be made alone."""
        if not job.matrix.spec.has_code_kernels:
            return None
        if job.numel * _STACKED_NBYTES * IN_FLIGHT > self._device.max_nbytes:
            return None
        procedure, shape, lora = job.procedure, job.matrix.shape, job.lora
        entry, fitting = METHODS[procedure.method], procedure.fitting
        if fitting.fit not in entry.stacks or fitting.start != STARTS[0]:
            return None
        if procedure.scales != SCALES[0] or procedure.is_calibrated:
            return None
        if entry.is_fitted(fitting.init):
            is_iterated = fitting.svd == "fast" and not is_exact(fitting.svd, lora.rank, shape)
            if not is_iterated or lora.dtype != "float32":
                return None
        return shape, job.matrix.spec, job.matrix.dtype, job.matrix.transposed, lora

    def _start(self, job: LayerJob) -> torch.Tensor | None:
        """Random vectors [in, rank] that an alternation of this matrix starts from, the same on any device."""
        import torch

        is_fitted = METHODS[job.procedure.method].is_fitted(job.procedure.fitting.init)
        if not is_fitted or self._key(job) is None:
            return None
        return pinned(torch.randn(job.matrix.shape[1], job.lora.rank, generator=job.generator()))

    def _together(self, work: Mapping[int, tuple[LayerJob, DeviceWeight]]) -> StackOnDevice | None:
        """The stack on its way back; None where the device's memory is not enough for it."""
        import torch

        try:
            with self._device.computing():
                made = self._stacked([job for job, _ in work.values()], [weight for _, weight in work.values()])
            return StackOnDevice(self._device.download(made), tuple(work))
        except torch.OutOfMemoryError:
            pass
        self._device.drain()
        return None

    def _stacked(self, jobs: Sequence[LayerJob], weights: Sequence[DeviceWeight]) -> StackedInitialization:
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

    def _alone(self, job: LayerJob, weight: DeviceWeight) -> Download[Converted]:
        """One matrix by the code of a processor: wholly on the device, or else a few rows at a time, or fewer.

        Raises MemoryShortage where not even those fit.
        """
        for way in _WAYS:
            if way.nbytes(job.numel) <= self._device.max_nbytes or way is _WAYS[-1]:
                made = self._tried(way, job, weight)
                if made is not None:
                    return made
        shortage = MemoryShortage("the GPU has not enough memory for this matrix", hint="--device cpu")
        raise self._runner.named(shortage, job)

    def _tried(self, way: _Way, job: LayerJob, weight: DeviceWeight) -> Download[Converted] | None:
        """One matrix, made in this way; None where the device's memory is not enough for it."""
        import torch

        try:
            with self._device.computing():
                rows = way.rows(TensorRows(weight.stored, job.matrix.transposed), self._device.device)
                made = self._runner.converted(job, rows, weight.sha256, SERIAL)
            return self._device.download(made)
        except torch.OutOfMemoryError:
            pass
        except (LoftqError, RuntimeError) as error:
            raise self._runner.named(error, job) from None
        self._device.drain()
        return None

    def _arrived(self, job: LayerJob, weight: DeviceWeight, made: StackOnDevice, place: int) -> Converted:
        """A matrix of a stack, described as jobs.py does it. What is unusual is left to jobs.py, on the processor."""
        host, i = made.download.wait(), made.places.index(place)
        if not bool(host.is_ordinary[i]):
            choose_kernels(job.numel * job.procedure.fitting.iterations)
            return self._runner.compute(job, LoadedMatrix(weight.stored, weight.sha256), SERIAL)
        quantized = unstacked(host.packed, host.constants, job.matrix.spec, job.matrix.shape, job.matrix.dtype, i)
        error = LayerError(*host.sums[i, :5].tolist())
        if host.alternation is None:
            rows = TensorRows(weight.stored, job.matrix.transposed)
            initial = Initialization(quantized, zero_adapter(rows, job.lora, job.generator()))
        else:
            initial = _initialization(quantized, host.alternation, i, job.lora.scaling, error.squared_weight)
        return self._runner.described(job, initial, error, weight.sha256)


def _initialization(
    quantized: QuantizedTensor, found: StackedAlternation, i: int, scaling: float, squared_weight: float
) -> Initialization:
    from loftq_cli.methods.loftq import balanced_pair

    return Initialization(
        quantized,
        balanced_pair(LoraPair(found.lora_A[i], found.lora_B[i], scaling)),
        relative(float(found.squared_base[i]), squared_weight),
        tuple(relative(squared, squared_weight) for squared in found.squared_errors[:, i].tolist()),
        int(found.best_iteration[i]),
    )


def run_on_device(
    runner: DeviceRunner,
    jobs: Sequence[LayerJob | CopyJob],
    threads: int,
    started: Callable[[LayerJob], None],
) -> Generator[tuple[JournalEntry, bool]]:
    """What `JobRunner.write` says of each job, in their order, although layers run in that of `DeviceRunner.stacks`.
    What is only copied runs beside them: the device need not wait for it.
    """
    stacks = runner.stacks(jobs)
    layers = [[job for job in (jobs[i] for i in stack) if isinstance(job, LayerJob)] for stack in stacks]
    steps = StackSteps(runner.load, runner.compute, runner.write)
    copier = Workers(_COPYING_THREADS, inline=False)
    copies = {i: copier.submit(partial(runner.copy, job)) for i, job in enumerate(jobs) if isinstance(job, CopyJob)}
    made: dict[int, tuple[JournalEntry, bool]] = {}
    due = 0
    try:
        with closing(in_stacks(layers, steps, lambda job: job.numel, threads, started)) as done:
            for place, result in zip((place for stack in stacks for place in stack), done, strict=True):
                made[place] = result
                while due in made or (due in copies and copies[due].done()):
                    yield made.pop(due) if due in made else copies[due].result()
                    due += 1
        for place in range(due, len(jobs)):
            yield made[place] if place in made else copies[place].result()
    finally:
        copier.close()
