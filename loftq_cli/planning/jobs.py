"""The units of a plan: a weight to quantize, a tensor to copy, and the shards of the base."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loftq_cli.adapter.config import PREFIX
from loftq_cli.adapter.expert_factors import DOWN
from loftq_cli.layouts.layout import StoredMatrix
from loftq_cli.methods.method import Fitting, Initialization, load_method
from loftq_cli.model.experts import ExpertPart
from loftq_cli.output.checksums import fingerprint_of
from loftq_cli.quant.formats import Quantizer, make_quantizer
from loftq_cli.tensors.headers import FLOAT_PREFIXES, ITEMSIZE, OutTensor
from loftq_cli.tensors.libraries import DEFAULT_LIBRARY
from loftq_cli.tensors.specs import LoraSpec

if TYPE_CHECKING:
    import torch

    from loftq_cli.methods.weighting import Weighting
    from loftq_cli.runtime.workers import Workers
    from loftq_cli.tensors.rows import Rows


@dataclass(frozen=True, slots=True)
class Procedure:
    """The way of computing base and adapter of a layer.

    method          a key of METHODS
    fitting         the method's search for base and adapter
    scales          the choice of block and group constants, a member of SCALES
    seed            start of all random draws, together with the tensor's name
    is_calibrated   whether statistics of the layer's inputs weight the errors
    """

    method: str
    fitting: Fitting
    scales: str
    seed: int
    is_calibrated: bool


@dataclass(frozen=True, slots=True)
class QuantizableMatrix:
    """A weight with a place in a container.

    matrix   shape and number format in the container; `matrix.name` is the tensor's name in the original
    module   name of the linear in the loaded model
    note     the difference from the requested format and the reason; None for a matrix in the requested format
    """

    matrix: StoredMatrix
    module: str
    note: str | None

    @property
    def name(self) -> str:
        """The tensor's name in the original."""
        return self.matrix.name

    @property
    def input_module(self) -> str:
        """The module of the loaded model whose input is the input of the matrix."""
        return self.module

    @property
    def numel(self) -> int:
        """Weights in the matrix."""
        return math.prod(self.matrix.shape)


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """The matrix of an expert among the experts of a layer.

    parts           where the rows of the matrix lie in the original, one part below the other
    stored          for each part the form in the container; empty where the container keeps a tensor for all experts
    adapter_names   names of lora_A and lora_B of the expert alone; None where the experts share tensors
    """

    parts: tuple[ExpertPart, ...]
    stored: tuple[StoredMatrix, ...]
    adapter_names: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class LayerJob:
    """One weight to quantize, or the equal matrices of all experts of a layer.

    matrix            shape and number format in the base; `matrix.name` is the tensor's name in the original. For
                      experts, shape and format of an expert's matrix, and the name of the parameter in the loaded model
    module            name of the linear in the loaded model, and in the adapter; for experts, of the parameter
    lora              rank, alpha, dtype and pooling of the adapter
    layout            the container of the base, a key of LAYOUTS
    procedure         the way of computing base and adapter
    base_tensors      the layer's tensors in the base
    adapter_tensors   the layer's tensors in the adapter
    library_tensors   the adapter's tensors once more, in the same order, under the names of the library's own adapter
                      file; empty where the library reads PEFT's file
    note              the difference from the recipe and the reason; None for a layer in the recipe's format
    experts           the matrices of the experts; empty for a weight alone
    is_parameter      whether PEFT adapts a parameter (`target_parameters`) and no module
    is_turned         whether PEFT reads the matrices of the experts as [in, out]
    """

    matrix: StoredMatrix
    module: str
    lora: LoraSpec
    layout: str
    procedure: Procedure
    base_tensors: tuple[OutTensor, ...]
    adapter_tensors: tuple[OutTensor, ...]
    note: str | None
    library_tensors: tuple[OutTensor, ...] = ()
    experts: tuple[ExpertMatrix, ...] = ()
    is_parameter: bool = False
    is_turned: bool = False

    @property
    def name(self) -> str:
        """The tensor's name in the original; for experts, the name of the parameter in the loaded model."""
        return self.matrix.name

    @property
    def numel(self) -> int:
        """Weights in the matrix, or in the matrices of all experts."""
        return math.prod(self.matrix.shape) * max(len(self.experts), 1)

    @property
    def input_module(self) -> str:
        """The module of the loaded model whose input is the input of the weight. For gate and up of experts, the module
        of all experts, whose input has the tokens of every expert. For down, the name of the parameter, no module.
        """
        is_first = self.is_parameter and bool(self.experts) and not self.module.endswith(DOWN)
        return self.module.rpartition(".")[0] if is_first else self.module

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the tensors of the original with the weights."""
        names = (part.tensor for expert in self.experts for part in expert.parts)
        return tuple(dict.fromkeys(names)) or (self.name,)

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Names of the weights in the base, "....weight"; for experts in a tensor, the name of the tensor."""
        names = tuple(matrix.name for expert in self.experts for matrix in expert.stored)
        return names or (self.sources if self.experts else (self.name,))

    @property
    def adapted(self) -> tuple[tuple[str, LoraSpec, bool], ...]:
        """For each entry of the adapter's config: name, adapter, and whether the name is that of a parameter."""
        if self.is_parameter and not self.experts:
            return ((f"{self.module}.weight", self.lora, True),)
        own = [expert.adapter_names for expert in self.experts if expert.adapter_names is not None]
        modules = tuple(name_A.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name_A, _ in own)
        return tuple((name, self.lora, self.is_parameter) for name in modules or (self.module,))

    def of_expert(self, number: int) -> LayerJob:
        """The job of one expert's matrix alone, with a name and random draws of its own."""
        name = f"{self.name}.{number}"
        return replace(self, matrix=replace(self.matrix, name=name), experts=(), base_tensors=(), adapter_tensors=())

    @property
    def bits_per_weight(self) -> float:
        """Bits of the stored base for each weight, constants included."""
        return 8 * sum(t.nbytes for t in self.base_tensors) / self.numel

    def quantizer(self, weighting: Weighting | None = None) -> Quantizer:
        """Make the quantizer of the layer. A `weighting` gives the columns of the matrix different importance."""
        importance = None if weighting is None else weighting.importance
        return make_quantizer(self.matrix.spec, self.matrix.dtype, self.procedure.scales, importance)

    def generator(self) -> torch.Generator:
        """Make a generator for the layer alone, seeded by the recipe's seed and the tensor's name: the order of the
        jobs cannot change the draws.
        """
        import torch

        digest = hashlib.sha256(f"{self.procedure.seed}:{self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def initialize(
        self,
        weight: Rows,
        weighting: Weighting | None,
        sink: Callable[[slice, torch.Tensor], None] | None,
        workers: Workers,
    ) -> Initialization:
        """Compute base and adapter of a matrix [out, in] by the method of the recipe.

        weighting   the importance of the inputs; None without statistics
        sink        takes the codes of some rows of a streamed matrix; None keeps the codes
        workers     threads to share the work among
        """
        return load_method(self.procedure.method)(
            weight,
            self.quantizer(weighting),
            self.lora,
            self.procedure.fitting,
            generator=self.generator(),
            weighting=weighting,
            sink=sink,
            workers=workers,
        )


@dataclass(frozen=True, slots=True)
class CopyJob:
    """One tensor to copy, in the stored dtype or in the dtype of the model.

    name     the tensor's name in the original
    output   name, dtype and shape in the base
    reason   the reason against quantizing the tensor
    note     a sentence for the user about the reason; None for an expected copy
    """

    name: str
    output: OutTensor
    reason: str
    note: str | None = None

    @property
    def base_tensors(self) -> tuple[OutTensor, ...]:
        """The tensor, as a tuple."""
        return (self.output,)

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.output.shape)


def input_sha256(hash_tensor: Callable[[str], str], job: LayerJob | CopyJob) -> str:
    """Hash of the stored bytes that a job reads: the sha256 of a tensor, and a hash of all sums for experts.

    hash_tensor   gives the sha256 of a tensor of the original

    >>> import loftq_cli as loftq
    >>> input_sha256(str.upper, loftq.quantize("builtin:tiny-llama", "base", rank=8, dry_run=True).jobs[0])
    'LM_HEAD.WEIGHT'
    """
    if isinstance(job, LayerJob) and job.experts:
        return fingerprint_of({name: hash_tensor(name) for name in job.sources})
    return hash_tensor(job.name)


@dataclass(frozen=True, slots=True)
class ModelShares:
    """How much of a model is quantized: counts of parameters, and the bits of the base over all parameters.

    parameters          floating-point numbers of the original
    quantized           numbers that the base holds quantized
    experts             numbers in the matrices of experts
    quantized_experts   numbers in the matrices of quantized experts
    bits                bits of the base for each parameter
    """

    parameters: int
    quantized: int
    experts: int
    quantized_experts: int
    bits: float

    @classmethod
    def of(cls, jobs: Sequence[LayerJob | CopyJob]) -> ModelShares:
        """Count the parameters of all jobs of a plan.

        >>> import loftq_cli as loftq
        >>> shares = ModelShares.of(loftq.quantize("builtin:tiny-llama", "base", rank=8, dry_run=True).jobs)
        >>> shares.parameters, shares.quantized, round(shares.bits, 2)
        (1734336, 1622016, 5.06)
        """
        layers = [job for job in jobs if isinstance(job, LayerJob)]
        copies = [job for job in jobs if isinstance(job, CopyJob) and job.output.dtype.startswith(FLOAT_PREFIXES)]
        quantized, experts = sum(job.numel for job in layers), sum(job.numel for job in layers if job.experts)
        kept = sum(job.numel for job in copies if job.reason == "expert")
        parameters = quantized + sum(job.numel for job in copies)
        nbytes = sum(tensor.nbytes for job in jobs for tensor in job.base_tensors)
        return cls(parameters, quantized, experts + kept, experts, 8 * nbytes / max(parameters, 1))

    def describe(self, dtype: str) -> str:
        """The shares as words; `dtype` is the dtype of the parameters in full precision.

        >>> ModelShares(200, 150, 100, 100, 6.5).describe("bfloat16")
        '6.50 bits over all 200 parameters, 75 % quantized (experts 100 %), 25 % left in 16 bits'
        """
        share = 100 * self.quantized / max(self.parameters, 1)
        of_experts = f" (experts {100 * self.quantized_experts / self.experts:.0f} %)" if self.experts else ""
        return (
            f"{self.bits:.2f} bits over all {_count(self.parameters)} parameters, {share:.0f} % quantized{of_experts}, "
            f"{100 - round(share)} % left in {8 * ITEMSIZE[dtype]} bits"
        )

    def to_json(self) -> dict[str, int | float]:
        """JSON values for reports and plans."""
        return {
            "parameters": self.parameters,
            "quantized_parameters": self.quantized,
            "expert_parameters": self.experts,
            "quantized_expert_parameters": self.quantized_experts,
            "bits_per_parameter": round(self.bits, 4),
        }


def _count(number: int) -> str:
    """A number with three digits and the unit of large numbers: 30.5 B, 1.92 M or 200."""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file of the base.

    file      the file's name
    tensors   the tensors in the file, in order
    """

    file: str
    tensors: tuple[OutTensor, ...]


def pack_shards(
    units: Sequence[Sequence[OutTensor]], max_nbytes: int, stem: str = DEFAULT_LIBRARY.weights
) -> tuple[Shard, ...]:
    """Pack the tensors of `units` into shards, in order, each shard as full as `max_nbytes` allows.

    units        tensors to keep in a common shard, for each job
    max_nbytes   the largest size of a shard in bytes; a larger unit gets a shard alone
    stem         the files' names without number and ending

    >>> units = [[OutTensor(name, "uint8", (6,))] for name in "abc"]
    >>> [shard.file for shard in pack_shards(units, max_nbytes=12)]
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    groups: list[list[OutTensor]] = [[]]
    filled = 0
    for unit in units:
        nbytes = sum(t.nbytes for t in unit)
        if groups[-1] and filled + nbytes > max_nbytes:
            groups.append([])
            filled = 0
        groups[-1].extend(unit)
        filled += nbytes
    if len(groups) == 1:
        return (Shard(f"{stem}.safetensors", tuple(groups[0])),)
    return tuple(
        Shard(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)
    )
