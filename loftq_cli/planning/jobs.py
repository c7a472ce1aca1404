"""The units of a plan: a weight to quantize, a tensor to copy, and the shards of the base."""

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
from loftq_cli.tensors.libraries import DEFAULT_LIBRARY
from loftq_cli.tensors.specs import LoraSpec

if TYPE_CHECKING:
    import torch

    from loftq_cli.methods.weighting import Weighting


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
    def numel(self) -> int:
        """Weights in the matrix."""
        return math.prod(self.matrix.shape)


@dataclass(frozen=True, slots=True)
class LayerJob:
    """One weight to quantize.

    matrix            shape and number format in the base; `matrix.name` is the tensor's name in the original
    module            name of the linear in the loaded model, and in the adapter
    lora              rank, alpha, dtype and pooling of the adapter
    layout            the container of the base, a key of LAYOUTS
    procedure         the way of computing base and adapter
    base_tensors      the layer's tensors in the base
    adapter_tensors   the layer's tensors in the adapter
    library_tensors   the adapter's tensors once more, in the same order, under the names of the library's own adapter
                      file; empty where the library reads PEFT's file
    note              the difference from the recipe and the reason; None for a layer in the recipe's format
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

    @property
    def name(self) -> str:
        """The tensor's name in the original."""
        return self.matrix.name

    @property
    def numel(self) -> int:
        """Weights in the matrix."""
        return math.prod(self.matrix.shape)

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
