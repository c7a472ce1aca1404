"""The input of reading a container: stored tensors with a config, and the place of codes in row order."""

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

    refs         header of every stored tensor, by name
    config       config.json, quantization_config included; empty for a model without a config
    dtype        dtype of the model's computations
    load         tensor name -> stored tensor
    load_rows    tensor name, first row, last row + 1 -> some rows of a stored tensor
    raw          tensor name -> bytes of a small stored tensor, read without torch
    path         the path of the model, for errors
    loaded       module name in the files -> name in the loaded model, the key of the module in configs
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
        """The path of config.json, for errors; the path of the model without tensors."""
        return config_file_beside(self.refs.values()) or self.path


@dataclass(frozen=True, slots=True)
class CodeRows:
    """The place of a matrix's codes in row order: a container with row order can write and read a few rows alone.

    name     name of the stored tensor with the codes
    span     rows of the matrix -> rows of the stored tensor
    pack     codes from a quantizer -> rows of the stored tensor
    unpack   the inverse of `pack`
    """

    name: str
    span: Callable[[slice], slice]
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor], torch.Tensor]

    def reader(self, load_rows: Callable[[str, int, int], torch.Tensor]) -> Callable[[slice], torch.Tensor]:
        """Make a function that returns the codes of some rows of the matrix.

        load_rows   tensor name, first row, last row + 1 -> some rows of a stored tensor
        """

        def codes(part: slice) -> torch.Tensor:
            span = self.span(part)
            return self.unpack(load_rows(self.name, span.start, span.stop))

        return codes
