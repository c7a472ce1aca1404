"""The experts of a layer: matrices of equal shape, read, fitted and written one after the other, or side by side where
a matrix is small. Memory holds a few matrices, whatever the number of experts; the factors of the adapters are joined
in the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from loftq_cli.adapter.expert_factors import Factors, join_experts, turned
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.conversion.measuring import Measured, measure_layer
from loftq_cli.conversion.report import LayerResult, make_layer_result, root_mean_square, total_plain_error
from loftq_cli.errors import InputError
from loftq_cli.layouts.layout import load_layout
from loftq_cli.output.checksums import fingerprint_of
from loftq_cli.output.writer import OutputFiles, TensorPlace, tensor_bytes
from loftq_cli.planning.jobs import ExpertMatrix, LayerJob
from loftq_cli.quant.formats import QuantizedTensor, as_affine_tensor
from loftq_cli.runtime.schedule import SMALL_NUMEL
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.metrics import is_finite, total_error
from loftq_cli.tensors.rows import TensorRows

if TYPE_CHECKING:
    import torch

    from loftq_cli.methods.weighting import Weighting


@dataclass(frozen=True, slots=True)
class WrittenExperts:
    """The experts of a layer, after the base is written.

    adapter        tensors of the adapter to write, by name
    sums           sha256 of each tensor of the base in a file, by name
    input_sha256   hash of the stored bytes of all tensors with the experts, see `input_sha256`
    result         errors, for the report
    """

    adapter: Mapping[str, torch.Tensor]
    sums: Mapping[str, str]
    input_sha256: str
    result: LayerResult


@dataclass(frozen=True, slots=True)
class _Fitted:
    """An expert after the fit: tensors of the base by name or the values of all rows, lora_A, lora_B, and errors."""

    tensors: Mapping[str, torch.Tensor]
    values: torch.Tensor | None
    factors: Factors
    measured: Measured


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises InputError naming a tensor of the output, by name, with numbers that are not finite."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise InputError(
                f"{name} would not be finite in {str(tensor.dtype).removeprefix('torch.')}",
                hint="--adapter-dtype float32 holds more" if "lora_" in name else "--exclude it",
            )


class ExpertReader:
    """The matrices of experts in the original, read in order; the bytes are hashed on the way."""

    def __init__(self, checkpoint: Checkpoint, experts: Sequence[ExpertMatrix]) -> None:
        """Arguments:

        checkpoint   the original
        experts      the experts of a layer, in order
        """
        self._checkpoint, self._experts = checkpoint, experts
        self._digests: dict[str, Any] = {}

    def read(self, expert: ExpertMatrix) -> torch.Tensor:
        """Read the matrix of an expert, [out, in], in the stored dtype; of a tensor of all experts, the rows of the
        expert.
        """
        import torch

        parts = []
        for part in expert.parts:
            if part.index is None:
                stored = self._checkpoint.load(part.tensor)
            else:
                stored = self._checkpoint.load_rows(part.tensor, part.index, part.index + 1)[0]
            self._digests.setdefault(part.tensor, hashlib.sha256()).update(tensor_bytes(stored))
            matrix = stored.T if part.transposed else stored
            parts.append(matrix if part.rows is None else matrix[part.rows[0] : part.rows[1]])
        return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()

    def matrices(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield number and matrix of each expert. A matrix is read when the caller asks."""
        for number, expert in enumerate(self._experts):
            yield number, self.read(expert)

    @property
    def sha256(self) -> str:
        """The hash of all tensors, as from `input_sha256`, after the last matrix."""
        return fingerprint_of({name: digest.hexdigest() for name, digest in self._digests.items()})


class ExpertConversion:
    """The conversion of the experts of a layer."""

    def __init__(
        self,
        job: LayerJob,
        checkpoint: Checkpoint,
        files: OutputFiles,
        weighting: Weighting | None,
        statistic: torch.Tensor | None,
        device: torch.device | str,
    ) -> None:
        """Arguments:

        job          the experts
        checkpoint   the original
        files        the files of the result, by tensor name
        weighting    the importance of the inputs, common to the experts; None without statistics
        statistic    the mean of x·xᵀ over inputs of a text, common to the experts; None without a text
        device       the device of the computation
        """
        self._job, self._files, self._device = job, files, device
        self._weighting, self._statistic = weighting, statistic
        self._reader = ExpertReader(checkpoint, job.experts)
        self._layout = load_layout(job.layout)

    def run(self, workers: Workers) -> WrittenExperts:
        """Fit and write all experts. Small matrices share the threads of `workers`, a matrix each; large matrices are
        fitted in turn. The numbers are the same with any number of threads.

        Raises LoftqError naming a tensor of the output when numbers cannot be quantized or stored.
        """
        is_small = self._job.of_expert(0).numel <= SMALL_NUMEL
        matrices = self._reader.matrices()
        if is_small:
            fitted = workers.map(lambda item: self._fit(*item, SERIAL), matrices)
        else:
            fitted = (self._fit(number, matrix, workers) for number, matrix in matrices)
        sums, factors, measured = dict[str, str](), list[Factors](), list[Measured]()
        whole = None if self._job.experts[0].stored else self._open_place()
        for expert in fitted:
            sums |= {name: self._files[name].write(name, tensor) for name, tensor in expert.tensors.items()}
            if whole is not None and expert.values is not None:
                whole.append(tensor_bytes(expert.values))
            factors.append(expert.factors)
            measured.append(expert.measured)
        if whole is not None:
            sums[self._job.base_tensors[0].name] = whole.close()
        adapter = self._name_factors(factors)
        check_finite(adapter)
        return WrittenExperts(adapter, sums, self._reader.sha256, _describe(self._job, measured))

    def _open_place(self) -> TensorPlace:
        name = self._job.base_tensors[0].name
        return self._files[name].place(name)

    def _fit(self, number: int, stored: torch.Tensor, workers: Workers) -> _Fitted:
        job, weight = self._job.of_expert(number), TensorRows(stored.to(self._device))
        initial = job.initialize(weight, self._weighting, None, workers)
        decoded = job.quantizer().decoded(initial.quantized)
        measured = measure_layer(job, weight, initial, decoded, self._statistic, workers)
        tensors, values = self._pack(self._job.experts[number], initial.quantized)
        factors = Factors(initial.lora.lora_A.cpu(), initial.lora.lora_B.cpu())
        return _Fitted(tensors, values, factors, measured)

    def _pack(
        self, expert: ExpertMatrix, quantized: QuantizedTensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Pack the base of an expert into tensors of the container. Without tensors of the expert alone, return the
        decoded values as the tensor of all experts holds the values.
        """
        import torch

        tensors: dict[str, torch.Tensor] = {}
        if not self._layout.row.stores_codes:
            values = quantized.dequantize().to(getattr(torch, self._job.matrix.dtype)).cpu()
        start = 0
        for matrix in expert.stored:
            rows = slice(start, start + matrix.shape[0])
            if self._layout.row.stores_codes:
                packed = self._layout.pack(matrix, as_affine_tensor(quantized).part(rows))
                tensors |= {name: tensor.cpu() for name, tensor in packed.items()}
            else:
                tensors[matrix.name] = values[rows].clone()
            start = rows.stop
        check_finite(tensors)
        if expert.stored:
            return tensors, None
        values = (values.T if expert.parts[0].transposed else values).contiguous()
        check_finite({self._job.base_tensors[0].name: values})
        return {}, values

    def _name_factors(self, factors: Sequence[Factors]) -> dict[str, torch.Tensor]:
        """The tensors of the adapter by name: joined as PEFT joins experts, or those of each module."""
        job = self._job
        if job.is_parameter:
            joined = join_experts([turned(pair) for pair in factors] if job.is_turned else factors)
            lora_A, lora_B = (tensor.name for tensor in job.adapter_tensors)
            return {lora_A: joined.lora_A.contiguous(), lora_B: joined.lora_B.contiguous()}
        named: dict[str, torch.Tensor] = {}
        for expert, pair in zip(job.experts, factors, strict=True):
            assert expert.adapter_names is not None  # every expert is a module
            named |= dict(zip(expert.adapter_names, pair, strict=True))
        return named


def _describe(job: LayerJob, measured: Sequence[Measured]) -> LayerResult:
    """Return the result of the experts of a layer; `measured` has the errors of each expert, in order.

    Raises NumericError when an error is not finite: JSON holds finite numbers only.
    """
    plain = total_plain_error((expert.plain_error, expert.error) for expert in measured)
    together = Measured(total_error(expert.error for expert in measured), plain)
    outputs = [asdict(expert.outputs) for expert in measured if expert.outputs is not None]
    names = outputs[0] if outputs else ()
    together_outputs: dict[str, Any] = {name: root_mean_square([errors[name] for errors in outputs]) for name in names}
    result = make_layer_result(job, None, together)
    return replace(
        result,
        experts=len(measured),
        expert_errors=tuple(expert.error.error for expert in measured),
        weights=job.stored_names,
        **together_outputs,
    )
