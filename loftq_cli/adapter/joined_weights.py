"""Tensors of several weight files, or of a weight file under other names, as a single weight file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.source import WeightsFile
from loftq_cli.checkpoint.watched_file import CHUNK_NBYTES
from loftq_cli.tensors.headers import TensorRef

if TYPE_CHECKING:
    import torch


@dataclass(slots=True, eq=False)
class JoinedWeights:
    """Weight files under one list of names.

    path      the adapter's weight file, for errors
    tensors   name -> TensorRef
    sources   name -> the file's reader, and the name in the file
    """

    path: Path
    tensors: dict[str, TensorRef]
    sources: Mapping[str, tuple[WeightsFile, str]]

    def load(self, name: str, *, pinned: bool = False) -> torch.Tensor:
        """Load a tensor, as the file's reader does."""
        reader, inner = self.sources[name]
        return reader.load(inner, pinned=pinned)

    def load_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Load rows [start, stop) of a tensor, as the file's reader does."""
        reader, inner = self.sources[name]
        return reader.load_rows(inner, start, stop)

    def chunks(self, name: str, chunk_nbytes: int = CHUNK_NBYTES) -> Iterator[memoryview]:
        """Yield the bytes of a tensor, as the file's reader does."""
        reader, inner = self.sources[name]
        return reader.chunks(inner, chunk_nbytes)

    def sha256(self, name: str) -> str:
        """The sha256 of the bytes of a tensor."""
        reader, inner = self.sources[name]
        return reader.sha256(inner)

    def check_unchanged(self) -> None:
        """Raises StorageError when one of the files changed since opening."""
        for reader in {id(reader): reader for reader, _ in self.sources.values()}.values():
            reader.check_unchanged()
