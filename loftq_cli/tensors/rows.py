"""A matrix read a few rows at a time. The matrix lies in memory, on a GPU, or in a file; number formats are left to
quant/.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from loftq_cli.errors import NumericError

if TYPE_CHECKING:
    import torch

SLAB_NUMEL = 1 << 21  # weights of a slab: enough for matrix products at full speed, 8 MB in float32
STREAMED_NUMEL = 1 << 19  # weights of a slab of a matrix outside memory: 2 MB in float32, a few slabs a thread


class Rows(Protocol):
    """A matrix of `shape` [out, in], read in parts of a multiple of `multiple` rows (the last part may be shorter)."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def multiple(self) -> int: ...

    @property
    def device(self) -> torch.device | str:
        """The device of the rows, and of all results computed from the rows."""
        ...

    @property
    def slab_numel(self) -> int:
        """The least number of weights of a slab; 0 leaves the size to the caches of a processor."""
        ...

    def rows(self, part: slice) -> torch.Tensor:
        """Rows [part.start, part.stop), contiguous, float32 or bfloat16."""
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
    """Rows of a matrix in host memory, copied to a device too small for the whole matrix."""

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
    """A matrix whose rows a function computes."""

    shape: tuple[int, int]
    compute: Callable[[slice], torch.Tensor]
    multiple: int = 1
    device: torch.device | str = "cpu"
    slab_numel: int = 0

    def rows(self, part: slice) -> torch.Tensor:
        return self.compute(part)


def stored_rows(load_rows: Callable[[str, int, int], torch.Tensor], name: str, shape: tuple[int, int]) -> Rows:
    """A matrix of `shape` [out, in] in a file. `load_rows(name, start, stop)` reads rows [start, stop) of the tensor
    `name` on request.

    >>> import torch
    >>> rows = stored_rows(lambda name, start, stop: torch.ones(4, 8)[start:stop], "lm_head.weight", (4, 8))
    >>> rows.rows(slice(1, 3)).shape
    torch.Size([2, 8])
    """
    return ComputedRows(shape, lambda part: plain(load_rows(name, part.start, part.stop)))


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to contiguous float32 or bfloat16, the dtypes of kernels. Memory is shared where nothing changes.

    Raises NumericError for float64 numbers beyond the range of float32.

    >>> import torch
    >>> plain(torch.ones(2, dtype=torch.float16)).dtype, plain(torch.ones(2, dtype=torch.bfloat16)).dtype
    (torch.float32, torch.bfloat16)
    """
    import torch

    if tensor.dtype in (torch.float32, torch.bfloat16):
        return tensor.contiguous()
    narrow = tensor.float().contiguous()
    if tensor.dtype == torch.float64 and bool((narrow.isinf() & tensor.isfinite()).any()):
        raise NumericError("has numbers too large for float32", hint="quantize --exclude keeps it as it is")
    return narrow


def not_finite(weight: Rows) -> NumericError:
    """The error for a matrix minus an update with NaN or infinity. `weight` is the matrix alone: the message blames the
    matrix or the update.

    >>> import torch
    >>> not_finite(TensorRows(torch.tensor([[torch.nan]])))
    NumericError('holds NaN or infinite values')
    """
    for part in slabs_of(weight, numel=STREAMED_NUMEL):
        if not bool(weight.rows(part).isfinite().all()):
            return NumericError("holds NaN or infinite values")
    return NumericError(
        "is too large for float32 without what its adapter holds", hint="--iterations 1, or --exclude it"
    )


def slabs(shape: tuple[int, int], multiple: int = 1, numel: int = SLAB_NUMEL) -> list[slice]:
    """Split the rows of a matrix into parts of about `numel` weights, each but the last a multiple of `multiple` rows.

    The split depends on the arguments alone, so sums over parts are equal on every machine.

    >>> slabs((5, 10), multiple=2, numel=20)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    rows, columns = shape
    step = max(numel // max(columns, 1) // multiple, 1) * multiple
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def slabs_of(weight: Rows, multiple: int = 1, numel: int = SLAB_NUMEL) -> list[slice]:
    """`slabs` of a matrix, in a good size for the device of the matrix.

    >>> import torch
    >>> slabs_of(TensorRows(torch.ones(5, 10), slab_numel=40), numel=20)
    [slice(0, 4, None), slice(4, 5, None)]
    """
    return slabs(weight.shape, math.lcm(weight.multiple, multiple), max(numel, weight.slab_numel))


def row_multiple(columns: int, block_size: int) -> int:
    """The fewest rows of whole blocks of `block_size` weights of the flattened matrix.

    >>> row_multiple(columns=96, block_size=64)
    2
    """
    return block_size // math.gcd(block_size, max(columns, 1))
