"""A model directory with dense or quantized linear weights, written by this tool or by another tool: each weight is
read as the matrix that a loader computes with. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint import source
from loftq_cli.checkpoint.source import Checkpoint, open_checkpoint, open_files
from loftq_cli.errors import InputError, LoftqError
from loftq_cli.layouts.layout import CONFIG_KEYS, DENSE, LAYOUTS, Layout, StoredMatrix, load_layout
from loftq_cli.layouts.stored_tensors import StoredTensors
from loftq_cli.model.family import Family, check_types
from loftq_cli.model.targets import module_of
from loftq_cli.tensors.headers import TensorRef, config_file_beside
from loftq_cli.tensors.rows import Rows, TensorRows, stored_rows

if TYPE_CHECKING:
    import torch

    from loftq_cli.quant.formats import QuantizedTensor


@dataclass(frozen=True)
class BaseModel:
    """A model as a loader sees the model.

    tensors     every tensor in order; a quantized weight is a tensor in the dtype and orientation of a dense file
    quantized   the quantized weights by name
    layout      the container of the quantized weights; the container of decoded values for a model without any
    config      config.json without the keys about quantization
    """

    path: Path
    tensors: dict[str, TensorRef]
    quantized: dict[str, StoredMatrix]
    layout: Layout
    family: Family
    config: dict[str, Any]
    checkpoint: Checkpoint
    stored: StoredTensors

    @classmethod
    def open(cls, path: Path) -> BaseModel:
        """Any model that `open_checkpoint` opens; the container of quantized weights is recognized.

        Raises InputError for a quantized model in another container, and for a weight whose parts do not fit together.
        """
        checkpoint = open_checkpoint(path)
        return cls._of(path, checkpoint, checkpoint.config())

    @classmethod
    def of_shards(cls, directory: Path, names: Sequence[str], config: Mapping[str, Any]) -> BaseModel:
        """The weight files called `names` in an unfinished directory; `config` is the content of config.json."""
        return cls._of(directory, open_files(directory, names), config)

    @classmethod
    def _of(cls, path: Path, checkpoint: Checkpoint, config: Mapping[str, Any]) -> BaseModel:
        plain, refs = _without_container(config), checkpoint.tensors
        file, stored = config_file_beside(refs.values()), _stored(path, checkpoint, config)
        family = Family(plain, file)
        layout, names = _container(stored)
        if not names:
            return cls(path, dict(refs), {}, layout, Family(config, file), plain, checkpoint, stored)
        quantized = {
            name: layout.stored_matrix(name, stored, transposed=family.is_transposed(module_of(name))) for name in names
        }
        for error in _orphans(stored, layout, names):
            raise error
        owner = {part: name for name in names for part in layout.parts(name)}
        tensors: dict[str, TensorRef] = {}
        for part, ref in refs.items():
            matrix = quantized.get(owner.get(part, part))
            if matrix is None:
                tensors[part] = ref
            elif matrix.name not in tensors:
                shape = matrix.shape[::-1] if matrix.transposed else matrix.shape
                tensors[matrix.name] = TensorRef(matrix.name, matrix.dtype, shape, ref.file)
        return cls(path, tensors, quantized, layout, family, plain, checkpoint, stored)

    @property
    def folder(self) -> Path:
        """The directory of the model; the parent directory for a path of a weight file."""
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

    def quantized_tensor(self, name: str) -> QuantizedTensor:
        """The quantized weight called `name`, unpacked. Raises InputError for numbers that no quantizer writes."""
        return self.layout.unpack(self.quantized[name], self.stored)

    def check_constants(self, name: str) -> None:
        """Raises InputError for a quantized weight called `name` with constants that no quantizer writes."""
        self.layout.unpack(self.quantized[name], self.stored, has_codes=False)

    def matrix_shape(self, name: str) -> tuple[int, ...]:
        """The shape [out, in] of `matrix(name)`; the shape of the tensor for anything but a matrix."""
        shape = self.tensors[name].shape
        return shape[::-1] if self.family.is_transposed(module_of(name)) else shape

    def loaded_names(self) -> dict[str, str]:
        """Name in the files -> name in the loaded model, for each tensor."""
        modules = [module_of(name) for name in self.tensors]
        return {name: self.family.loaded_name(name, modules) for name in self.tensors}

    def matrix(self, name: str) -> torch.Tensor:
        """The weight called `name` as float32 [out, in], decoded from quantized codes."""
        return self.rows(name).rows(slice(0, self.matrix_shape(name)[0])).float()

    def rows(self, name: str) -> Rows:
        """The weight called `name` by rows [out, in]. Rows are read from the file on demand, unless the file stores the
        matrix in another order. Raises InputError for anything but a matrix.
        """
        if name in self.quantized:
            return self._decoded(self.quantized[name])
        if self.family.is_transposed(module_of(name)):
            return self._loaded(name)
        ref = self._matrix_ref(name)
        return stored_rows(self.checkpoint.load_rows, name, (ref.shape[0], ref.shape[1]))

    def whole(self, name: str) -> QuantizedTensor | TensorRows:
        """The whole weight called `name` in the stored form. Raises InputError for anything but a matrix."""
        return self.quantized_tensor(name) if name in self.quantized else self._loaded(name)

    def _loaded(self, name: str) -> TensorRows:
        self._matrix_ref(name)
        return TensorRows(self.load(name), self.family.is_transposed(module_of(name)))

    def _matrix_ref(self, name: str) -> TensorRef:
        ref = self.tensors[name]
        if len(ref.shape) != 2:
            raise InputError("is not a matrix", file=ref.file, tensor=name)
        return ref

    def _decoded(self, matrix: StoredMatrix) -> Rows:
        code_rows, refs = self.layout.code_rows(matrix), self.checkpoint.tensors
        # Some store [1, n] for [n, 1].
        if code_rows is None or refs[code_rows.name].shape[0] < code_rows.span(slice(0, matrix.shape[0])).stop:
            return self.quantized_tensor(matrix.name).decoded()
        constants = self.layout.unpack(matrix, self.stored, has_codes=False)
        return constants.decoded(code_rows.reader(self.checkpoint.load_rows))

    def parts(self, name: str) -> list[TensorRef]:
        """The headers of all stored tensors of the weight called `name`."""
        refs = self.checkpoint.tensors
        if name not in self.quantized:
            return [refs[name]]
        return [refs[part] for part in self.layout.parts(name) if part in refs]


def faults(path: Path) -> Iterator[LoftqError]:
    """All errors for which `BaseModel.open` refuses `path`; `open` itself stops at the first error. All weight files
    are checked, and, if the files are intact, all quantized weights.
    """
    are_files_right = True
    for error in source.faults(path):
        are_files_right = False
        yield error
    if not are_files_right:
        return
    try:
        checkpoint = open_checkpoint(path)
        config = checkpoint.config()
        stored = _stored(path, checkpoint, config)
        layout, names = _container(stored)
    except LoftqError as error:
        yield error
        return
    family = Family(_without_container(config))
    for name in names:
        try:
            layout.stored_matrix(name, stored, transposed=family.is_transposed(module_of(name)))
        except LoftqError as error:
            yield error
    yield from _orphans(stored, layout, names)


def _without_container(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in CONFIG_KEYS}


def _stored(path: Path, checkpoint: Checkpoint, config: Mapping[str, Any]) -> StoredTensors:
    refs = checkpoint.tensors
    file = config_file_beside(refs.values())
    check_types(config, file)
    family = Family(_without_container(config), file)
    load, load_rows, raw = checkpoint.load, checkpoint.load_rows, checkpoint.raw
    dtype = family.dtype(refs.values())
    return StoredTensors(refs, config, dtype, load, load_rows, raw, path, lambda name: family.loaded_name(name, refs))


def _orphans(stored: StoredTensors, layout: Layout, names: Sequence[str]) -> Iterator[InputError]:
    """An error for each part of a quantized weight without codes; `names` are the weights with codes."""
    owned = {part for name in names for part in layout.parts(name)}
    for part, ref in stored.refs.items():
        name = f"{part.rpartition('.')[0]}.weight"
        if part not in owned and part != name and part in layout.parts(name):
            what = "is part of a quantized weight, and its codes are missing"
            yield InputError(what, file=ref.file, tensor=part)


def _container(stored: StoredTensors) -> tuple[Layout, list[str]]:
    """The container of quantized weights and their names; the container of decoded values and no names, where nothing
    is quantized.
    """
    for layout in map(load_layout, LAYOUTS):
        names = layout.quantized_names(stored)
        if names:
            return layout, names
    return load_layout(DENSE), []
