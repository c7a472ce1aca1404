"""Copies of tensors, unchanged or cast to a dtype, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.errors import InputError
from loftq_cli.output.journal import JournalEntry
from loftq_cli.output.writer import OutputFiles, tensor_bytes
from loftq_cli.tensors.headers import FLOAT_PREFIXES
from loftq_cli.tensors.metrics import is_finite

if TYPE_CHECKING:
    pass


NOT_FINITE = "not_finite"  # key in the result of a copied tensor with NaN or infinite values
_SLAB_NUMEL = 1 << 22  # elements converted at once when a copy changes dtype: 16 MB of float32


def not_finite_note(name: str) -> str:
    """The note about the copied tensor `name` with NaN or infinite values.

    >>> not_finite_note("model.norm.weight")
    'model.norm.weight holds NaN or infinite values, and is copied as it is'
    """
    return f"{name} holds NaN or infinite values, and is copied as it is"


class WatchedChunks:
    """Pass the bytes of a tensor on; `are_finite` tells whether every number so far was finite."""

    def __init__(self, chunks: Iterable[memoryview], dtype: str) -> None:
        self._chunks, self._dtype = chunks, dtype
        self.are_finite = True

    def __iter__(self) -> Iterator[memoryview]:
        import torch

        for chunk in self._chunks:
            if chunk and self.are_finite and self._dtype.startswith(FLOAT_PREFIXES):
                self.are_finite = is_finite(torch.frombuffer(chunk, dtype=getattr(torch, self._dtype)))
            yield chunk


def recast_chunks(checkpoint: Checkpoint, name: str, dtype: str, digest: Any) -> Iterator[memoryview]:
    """Yield the bytes of the floating-point tensor `name` cast to `dtype`, a slab of rows at a time.

    `digest` is a hash of hashlib; the function updates the hash with the bytes before the cast.
    Raises InputError when a finite number becomes infinite.
    """
    import torch

    ref = checkpoint.tensors[name]
    rows = ref.shape[0] if ref.shape else 1
    step = max(1, _SLAB_NUMEL * rows // max(ref.numel, 1))
    for start in range(0, rows, step):
        slab = checkpoint.load_rows(name, start, min(start + step, rows)) if ref.shape else checkpoint.load(name)
        digest.update(tensor_bytes(slab))
        cast = slab.to(getattr(torch, dtype))
        if not is_finite(cast) and not torch.equal(torch.isfinite(cast), torch.isfinite(slab)):
            raise InputError(f"has numbers too large for {dtype}", file=ref.file, tensor=name)
        yield tensor_bytes(cast)


def is_intact(hash_input: Callable[[], str], entry: JournalEntry, files: OutputFiles) -> bool:
    """True if a finished unit can be kept: input and output are hashed again, because existence proves nothing.

    hash_input   gives the sha256 of the input numbers of the unit
    """
    if hash_input() != entry.input_sha256:
        return False
    return files.hold(entry.outputs)
