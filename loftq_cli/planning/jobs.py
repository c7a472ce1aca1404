"""The units of a plan: a weight to quantize, a tensor to copy, and the files that hold their outputs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loftq_cli.layouts.layout import StoredMatrix
from loftq_cli.methods.method import Fitting
from loftq_cli.quant.formats import Quantizer, make_quantizer
from loftq_cli.tensors.headers import OutTensor
from loftq_cli.tensors.specs import LoraSpec

if TYPE_CHECKING:
    import torch

    from loftq_cli.methods.weighting import Weighting


@dataclass(frozen=True, slots=True)
class Procedure:
    """How base and adapter of a layer are computed.

    method          a key of METHODS
    fitting         how the method looks for base and adapter
    scales          how constants of blocks and groups are chosen, see SCALES
    seed            where random draws begin, together with the tensor's name
    is_calibrated   whether statistics of the layer's inputs say what errors cost
    """

    method: str
    fitting: Fitting
    scales: str
    seed: int
    is_calibrated: bool


@dataclass(frozen=True, slots=True)
class QuantizableMatrix:
    """A weight that fits a container.

    matrix   shape and number format in the container; `matrix.name` is the tensor's name in the source
    module   name of the linear in the loaded model
    note     the difference from the wanted format and the reason; None where the matrix has the wanted format
    """

    matrix: StoredMatrix
    module: str
    note: str | None

    @property
    def name(self) -> str:
        """The tensor's name in the source."""
        return self.matrix.name

    @property
    def numel(self) -> int:
        """Weights in the matrix."""
        return math.prod(self.matrix.shape)


@dataclass(frozen=True, slots=True)
class LayerJob:
    """One weight to quantize.

    matrix            shape and number format in the base; `matrix.name` is the tensor's name in the source
    module            name of the linear in the loaded model, and in the adapter
    layout            the container of the base
    procedure         how base and adapter are computed
    base_tensors      the tensors in the base
    adapter_tensors   the tensors in the adapter
    note              the difference from the recipe and the reason; None where the recipe is followed
    """

    matrix: StoredMatrix
    module: str
    lora: LoraSpec
    layout: str
    procedure: Procedure
    base_tensors: tuple[OutTensor, ...]
    adapter_tensors: tuple[OutTensor, ...]
    note: str | None

    @property
    def name(self) -> str:
        """The tensor's name in the source."""
        return self.matrix.name

    @property
    def numel(self) -> int:
        """Weights in the matrix."""
        return math.prod(self.matrix.shape)

    @property
    def bits_per_weight(self) -> float:
        """True bits of the stored base, constants included."""
        return 8 * sum(t.nbytes for t in self.base_tensors) / self.numel

    def quantizer(self, weighting: Weighting | None = None) -> Quantizer:
        """The quantizer of the layer. A `weighting` gives the columns of the matrix different importance."""
        importance = None if weighting is None else weighting.importance
        return make_quantizer(self.matrix.spec, self.matrix.dtype, self.procedure.scales, importance)

    def generator(self) -> torch.Generator:
        """A generator for the layer alone, seeded by the recipe's seed and the tensor's name: the order of the jobs
        cannot change the draws.
        """
        import torch

        digest = hashlib.sha256(f"{self.procedure.seed}:{self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True, slots=True)
class CopyJob:
    """One tensor that is copied, in the stored dtype or in the model's.

    reason   why the tensor is not quantized
    note     a sentence for the user, beside the reason
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


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file of the base, and the tensors in the file."""

    file: str
    tensors: tuple[OutTensor, ...]


def pack_shards(units: Sequence[Sequence[OutTensor]], max_nbytes: int) -> tuple[Shard, ...]:
    """Files for the tensors of `units`, in order, each file as full as `max_nbytes` allows. Tensors of one unit stay
    together, even where the unit is larger than `max_nbytes`.

    >>> [shard.file for shard in pack_shards([[], []], 10)]
    ['model.safetensors']
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
        return (Shard("model.safetensors", tuple(groups[0])),)
    return tuple(
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)
    )
