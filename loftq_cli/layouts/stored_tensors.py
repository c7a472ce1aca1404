"""The input of reading a container: stored tensors with a config, and the place of codes that lie row after row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.tensors.headers import TensorRef, config_file_beside

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The input of a container's reading methods.

    refs         every stored tensor, as the headers have it
    config       config.json, its quantization_config included; empty where there is no config
    dtype        the dtype that the model computes in
    load         a stored tensor by its name
    load_rows    some rows of a stored tensor: name, first row, last row + 1
    raw          the bytes of a small stored tensor, read without torch
    path         the path that an error about the whole names
    loaded       the name of a module in the loaded model, by which configs know the module
    """

    refs: Mapping[str, TensorRef]
    config: Mapping[str, Any]
    dtype: str
    load: Callable[[str], torch.Tensor]
    load_rows: Callable[[str, int, int], torch.Tensor]
    raw: Callable[[str], bytes]
    path: Path
    loaded: Callable[[str], str] = str

    @property
    def config_file(self) -> Path:
        """The file that an error about the config names."""
        return config_file_beside(self.refs.values()) or self.path


@dataclass(frozen=True, slots=True)
class CodeRows:
    """Where a container holds the codes of a matrix row after row, so that a few rows can be written and read alone.

    name     name of the stored tensor that holds the codes
    span     rows of the matrix -> rows of the stored tensor
    pack     codes as a quantizer gives them -> rows of the stored tensor
    unpack   the inverse of `pack`
    """

    name: str
    span: Callable[[slice], slice]
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor], torch.Tensor]

    def reader(self, load_rows: Callable[[str, int, int], torch.Tensor]) -> Callable[[slice], torch.Tensor]:
        """A function that returns the codes of some rows; `load_rows` returns rows of a stored tensor by its name."""

        def codes(part: slice) -> torch.Tensor:
            span = self.span(part)
            return self.unpack(load_rows(self.name, span.start, span.stop))

        return codes
