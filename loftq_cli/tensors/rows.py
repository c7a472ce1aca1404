"""A matrix that is read a few rows at a time: in memory, on a GPU, or wherever its rows come from. No formats here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from loftq_cli.errors import NumericError

if TYPE_CHECKING:
    import torch

SLAB_NUMEL = 1 << 21  # weights taken at once: large enough for matrix products at full speed, 8 MB in float32
STREAMED_NUMEL = 1 << 19  # weights of a matrix that is not in memory: 2 MB in float32, a few times for each thread


class Rows(Protocol):
    """A matrix of `shape` [out, in], read in parts that are multiples of `multiple` rows, up to the last."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def multiple(self) -> int: ...

    @property
    def device(self) -> torch.device | str:
        """Where its rows come to lie; everything that is computed from them lies there too."""
        ...

    @property
    def slab_numel(self) -> int:
        """How many weights at least are best taken at once; 0 where a processor's caches decide it."""
        ...

    def rows(self, part: slice) -> torch.Tensor:
        """Rows [part.start, part.stop), contiguous, in a dtype that `plain` leaves alone."""
        ...


@dataclass(frozen=True, slots=True)
class TensorRows:
    """A floating-point tensor [out, in], or [in, out] if `transposed`."""

    tensor: torch.Tensor
    transposed: bool = False
    multiple: int = 1
    slab_numel: int = 0

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.tensor.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def rows(self, part: slice) -> torch.Tensor:
        return plain(self.tensor[:, part].T if self.transposed else self.tensor[part])


@dataclass(frozen=True, slots=True)
class UploadedRows:
    """Rows of a matrix in the processor's memory, on a device that does not hold all of it."""

    matrix: TensorRows
    device: torch.device
    slab_numel: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    @property
    def multiple(self) -> int:
        return self.matrix.multiple

    def rows(self, part: slice) -> torch.Tensor:
        return self.matrix.rows(part).to(self.device)


@dataclass(frozen=True, slots=True)
class ComputedRows:
    """A matrix whose rows a function gives."""

    shape: tuple[int, int]
    compute: Callable[[slice], torch.Tensor]
    multiple: int = 1
    device: torch.device | str = "cpu"
    slab_numel: int = 0

    def rows(self, part: slice) -> torch.Tensor:
        return self.compute(part)


def stored_rows(load_rows: Callable[[str, int, int], torch.Tensor], name: str, shape: tuple[int, int]) -> Rows:
    """A matrix whose rows are read when they are asked for; `load_rows` gives some of the tensor called `name`."""
    return ComputedRows(shape, lambda part: plain(load_rows(name, part.start, part.stop)))


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as contiguous float32 or bfloat16, which is what kernels read.

    Raises NumericError for float64 numbers that only become infinite here.
    """
    import torch

    if tensor.dtype in (torch.float32, torch.bfloat16):
        return tensor.contiguous()
    narrow = tensor.float().contiguous()
    if tensor.dtype == torch.float64 and bool((narrow.isinf() & tensor.isfinite()).any()):
        raise NumericError("has numbers too large for float32", hint="quantize --exclude keeps it as it is")
    return narrow


def not_finite(weight: Rows) -> NumericError:
    """The error of a matrix, or of it minus something, that was found not to be finite: which of the two it is."""
    for part in slabs_of(weight, numel=STREAMED_NUMEL):
        if not bool(weight.rows(part).isfinite().all()):
            return NumericError("holds NaN or infinite values")
    return NumericError(
        "is too large for float32 without what its adapter holds", hint="--iterations 1, or --exclude it"
    )


def slabs(shape: tuple[int, int], multiple: int = 1, numel: int = SLAB_NUMEL) -> list[slice]:
    """The rows of a matrix in parts of about `numel` weights, each but the last a multiple of `multiple` rows.

    They depend on nothing else, so that sums over them are the same on every machine.
    """
    rows, columns = shape
    step = max(numel // max(columns, 1) // multiple, 1) * multiple
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def slabs_of(weight: Rows, multiple: int = 1, numel: int = SLAB_NUMEL) -> list[slice]:
    """`slabs` of a matrix, of which as much is taken at once as suits the device that it is on."""
    return slabs(weight.shape, math.lcm(weight.multiple, multiple), max(numel, weight.slab_numel))


def row_multiple(columns: int, block_size: int) -> int:
    """The fewest rows that are whole blocks of `block_size` weights of the flattened matrix."""
    return block_size // math.gcd(block_size, max(columns, 1))
