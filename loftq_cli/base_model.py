"""A model directory whose linear weights may be quantized, ours or anybody's: each weight as the matrix that a loader
computes with. Reads only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.source import Checkpoint, open_checkpoint, open_files
from loftq_cli.errors import InputError
from loftq_cli.family import Family
from loftq_cli.layouts import bitsandbytes
from loftq_cli.layouts.layout import StoredMatrix
from loftq_cli.targets import module_of
from loftq_cli.tensors import TensorRef

if TYPE_CHECKING:
    import torch

    from loftq_cli.tensors import CodebookTensor


@dataclass(frozen=True)
class BaseModel:
    """`tensors` are all stored tensors; `quantized` the names of the weights that are stored quantized."""

    path: Path
    tensors: dict[str, TensorRef]
    quantized: frozenset[str]
    family: Family
    config: dict[str, Any]
    checkpoint: Checkpoint

    @classmethod
    def open(cls, path: Path) -> BaseModel:
        """Any model that `open_checkpoint` opens; bitsandbytes 4-bit weights are recognized by their tensors.

        Raises InputError for a quantized model in another container, and for a 4-bit weight that lacks a part.
        """
        checkpoint = open_checkpoint(path)
        config = checkpoint.config()
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        quantized = frozenset(bitsandbytes.quantized_names(checkpoint.tensors))
        for name in sorted(quantized):
            for part in (name, f"{name}.absmax", f"{name}.quant_map"):
                if part not in checkpoint.tensors:
                    raise InputError("is missing, and its quant_state is there", file=path, tensor=part)
        family = Family(plain if quantized else config)
        return cls(path, checkpoint.tensors, quantized, family, plain, checkpoint)

    @classmethod
    def of_shards(cls, directory: Path, names: Sequence[str], family: Family) -> BaseModel:
        """The weight files called `names`, of a directory that is not complete yet."""
        checkpoint = open_files(directory, names)
        quantized = frozenset(bitsandbytes.quantized_names(checkpoint.tensors))
        return cls(directory, checkpoint.tensors, quantized, family, {}, checkpoint)

    @property
    def folder(self) -> Path:
        """The directory of the model, also where one weight file of it was named."""
        return self.checkpoint.directory or self.path

    def __enter__(self) -> BaseModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.checkpoint.close()

    def load(self, name: str) -> torch.Tensor:
        """A stored tensor as it is."""
        return self.checkpoint.load(name)

    def raw(self, name: str) -> bytes:
        """The bytes of a small stored tensor; needs no torch."""
        return b"".join(self.checkpoint.chunks(name))

    def codebook_tensor(self, name: str) -> CodebookTensor:
        """The quantized weight called `name`. Raises InputError where its parts do not fit together."""
        return bitsandbytes.unpack(name, self.load, self.tensors, self.tensors[name].file)

    def stored_matrix(self, name: str) -> StoredMatrix:
        """What the quantized weight called `name` is, from headers and its quant_state alone.

        Raises InputError where its parts are not those of such a matrix.
        """
        file = self.tensors[name].file
        state = bitsandbytes.read_state(name, self.raw(bitsandbytes.state_name(name, self.tensors)), file)
        shape = (state["shape"][0], state["shape"][1])
        transposed = self.family.is_transposed(module_of(name))
        matrix = StoredMatrix(name, shape, bitsandbytes.spec_of(state), state["dtype"], transposed)
        for part in bitsandbytes.planned(matrix):
            ref = self.tensors.get(part.name)
            if bitsandbytes.STATE_PREFIX in part.name:
                continue
            # Codes are stored as [n, 1], [1, n] or [n], all of which loaders flatten.
            if ref is None or ref.dtype != part.dtype or part.shape not in (ref.shape, (ref.numel, 1)):
                found = "missing" if ref is None else f"{ref.dtype} {ref.shape}"
                expected = f"its quant_state asks for {part.dtype} {part.shape}"
                raise InputError(f"is {found}, and {expected}", file=file, tensor=part.name)
        return matrix

    def matrix_shape(self, name: str) -> tuple[int, ...]:
        """The shape [out, in] that `matrix` gives; that of the tensor where it is no matrix."""
        if name in self.quantized:
            return self.stored_matrix(name).shape
        shape = self.tensors[name].shape
        return shape[::-1] if self.family.is_transposed(module_of(name)) else shape

    def loaded_names(self) -> dict[str, str]:
        """What each stored tensor is called in the loaded model."""
        modules = [module_of(name) for name in self.tensors]
        return {name: self.family.loaded_name(name, modules) for name in self.tensors}

    def matrix(self, name: str) -> torch.Tensor:
        """The weight called `name` as float32 [out, in], decoded if it is quantized."""
        from loftq_cli.quant.formats import make_quantizer

        if name in self.quantized:
            quantized = self.codebook_tensor(name)
            return make_quantizer(quantized.spec, quantized.dtype).dequantize(quantized)
        stored = self.load(name)
        if stored.dim() != 2:
            raise InputError("is not a matrix", file=self.tensors[name].file, tensor=name)
        return (stored.T if self.family.is_transposed(module_of(name)) else stored).float().contiguous()

    def parts(self, name: str) -> list[str]:
        """Names of the stored tensors that make the weight called `name`."""
        return [part for part in bitsandbytes.parts(name) if part in self.tensors] if name in self.quantized else [name]
