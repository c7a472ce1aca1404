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

    matrix   what is stored; `matrix.name` is the tensor's name in the source
    module   the linear's name in the loaded model
    note     what differs from the format that was asked for, and why
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

    matrix            what is stored; `matrix.name` is the tensor's name in the source
    module            the linear's name in the loaded model, by which the adapter knows it
    layout            the container of the base
    procedure         how base and adapter are computed
    base_tensors      what goes into the base; adapter_tensors what goes into the adapter
    note              what differs from the recipe, and why
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
        """The quantizer of the layer; a `weighting` says what the errors of its columns count."""
        importance = None if weighting is None else weighting.importance
        return make_quantizer(self.matrix.spec, self.matrix.dtype, self.procedure.scales, importance)

    def generator(self) -> torch.Generator:
        """A generator for this layer alone: the order of the jobs cannot change what is drawn."""
        import torch

        digest = hashlib.sha256(f"{self.procedure.seed}:{self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True, slots=True)
class CopyJob:
    """One tensor that is written as it is, or in the model's dtype; and why it is not quantized.

    note   what has to be said about it, beside its reason
    """

    name: str
    output: OutTensor
    reason: str
    note: str | None = None

    @property
    def base_tensors(self) -> tuple[OutTensor, ...]:
        """What goes into the base."""
        return (self.output,)

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.output.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file of the base, and its tensors."""

    file: str
    tensors: tuple[OutTensor, ...]


def pack_shards(units: Sequence[Sequence[OutTensor]], max_nbytes: int) -> tuple[Shard, ...]:
    """Files for `units` in their order, each as full as `max_nbytes` allows; the tensors of one unit stay together."""
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
