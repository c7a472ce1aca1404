"""A model directory with dense or quantized linear weights, from any tool: each weight becomes the matrix of a loader's
computations. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint import source
from loftq_cli.checkpoint.source import Checkpoint, open_checkpoint, open_files
from loftq_cli.errors import InputError, LoftqError, UnreadFormat, UsageError, printable
from loftq_cli.layouts.layout import CONFIG_KEYS, DENSE, DENSE_HINT, LAYOUTS, Layout, StoredMatrix, load_layout
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
    """A model in the view of a loader.

    path         the directory, or the path of a weight file
    tensors      every tensor in order; a quantized weight has the dtype and orientation of a dense file
    quantized    the quantized weights by name
    layout       the container of the quantized weights; the container of decoded values for a model without quantized
                 weights
    family       the config and the facts about the family
    config       config.json without the keys about quantization
    checkpoint   the stored tensors; closed at the end of a `with` block
    stored       the stored tensors as input of the container
    unread       the reason why the weights are not read, for a model opened in any format; None for weights that are
    """

    path: Path
    tensors: dict[str, TensorRef]
    quantized: dict[str, StoredMatrix]
    layout: Layout
    family: Family
    config: dict[str, Any]
    checkpoint: Checkpoint
    stored: StoredTensors
    unread: str | None = None

    @classmethod
    def open(cls, path: Path, *, any_format: bool = False) -> BaseModel:
        """Open a model and recognize the container of quantized weights.

        path         a path for `open_checkpoint`
        any_format   whether a format that is not read is no error: codes and scales are then tensors of the model

        Raises InputError for a quantized model in an unknown container, and for a weight with contradictory parts; all
        errors of `open_checkpoint`.
        """
        checkpoint = open_checkpoint(path)
        if not any_format:
            return cls._assemble(path, checkpoint, checkpoint.config())
        try:
            return cls._assemble(path, checkpoint, checkpoint.config())
        except UnreadFormat as error:
            config = _drop_container_keys(checkpoint.config())
            return replace(cls._assemble(path, checkpoint, config), unread=error.message)

    @classmethod
    def of_shards(cls, directory: Path, names: Sequence[str], config: Mapping[str, Any]) -> BaseModel:
        """Open the weight files called `names` in an unfinished directory.

        config   the content of config.json

        Raises InputError like `open`.
        """
        return cls._assemble(directory, open_files(directory, names), config)

    @classmethod
    def _assemble(cls, path: Path, checkpoint: Checkpoint, config: Mapping[str, Any]) -> BaseModel:
        plain, refs = _drop_container_keys(config), checkpoint.tensors
        file, stored = config_file_beside(refs.values()), _make_stored_tensors(path, checkpoint, config)
        family = Family(plain, file)
        layout, names = _recognize_container(stored)
        if not names:
            return cls(path, dict(refs), {}, layout, Family(config, file), plain, checkpoint, stored)
        quantized = {
            name: layout.stored_matrix(name, stored, transposed=family.is_transposed(module_of(name))) for name in names
        }
        for error in _find_orphans(stored, layout, names):
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
        """Load a stored tensor in the stored dtype and orientation."""
        return self.checkpoint.load(name)

    def quantized_tensor(self, name: str) -> QuantizedTensor:
        """Unpack the quantized weight called `name`. Raises InputError for numbers that no quantizer writes."""
        return self.layout.unpack(self.quantized[name], self.stored)

    def check_constants(self, name: str) -> None:
        """Raises InputError if the quantized weight called `name` has constants that no quantizer writes."""
        self.layout.unpack(self.quantized[name], self.stored, has_codes=False)

    def matrix_shape(self, name: str) -> tuple[int, ...]:
        """The shape [out, in] of `matrix(name)`; the stored shape of a tensor that is no matrix."""
        shape = self.tensors[name].shape
        return shape[::-1] if self.family.is_transposed(module_of(name)) else shape

    def loaded_names(self) -> dict[str, str]:
        """Name in the files -> name in the loaded model, for each tensor in `tensors`."""
        modules = [module_of(name) for name in self.tensors]
        return {name: self.family.loaded_name(name, modules) for name in self.tensors}

    def matrix(self, name: str) -> torch.Tensor:
        """Read the weight called `name` as float32 [out, in]; quantized codes are decoded."""
        return self.rows(name).rows(slice(0, self.matrix_shape(name)[0])).float()

    def rows(self, name: str) -> Rows:
        """Open the weight called `name` by rows [out, in]. Rows are read from the file on demand, unless the file has
        the codes or values in column order. Raises InputError for a tensor that is no matrix.
        """
        if name in self.quantized:
            return self._decode_rows(self.quantized[name])
        if self.family.is_transposed(module_of(name)):
            return self._load_matrix(name)
        ref = self._check_matrix(name)
        return stored_rows(self.checkpoint.load_rows, name, (ref.shape[0], ref.shape[1]))

    def whole(self, name: str) -> QuantizedTensor | TensorRows:
        """Load the complete weight called `name`, as codes if quantized. Raises InputError for no matrix."""
        return self.quantized_tensor(name) if name in self.quantized else self._load_matrix(name)

    def _load_matrix(self, name: str) -> TensorRows:
        self._check_matrix(name)
        return TensorRows(self.load(name), self.family.is_transposed(module_of(name)))

    def _check_matrix(self, name: str) -> TensorRef:
        ref = self.tensors[name]
        if len(ref.shape) != 2:
            raise InputError("is not a matrix", file=ref.file, tensor=name)
        return ref

    def _decode_rows(self, matrix: StoredMatrix) -> Rows:
        code_rows, refs = self.layout.code_rows(matrix), self.checkpoint.tensors
        # Some tools store the codes as [1, n] in place of [n, 1].
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
    """Yield every error of `BaseModel.open`; `open` stops at the first error.

    path   the directory, or the path of a weight file

    All weight files are checked, and, if the files are intact, all quantized weights.

    >>> from loftq_cli.model.builtin import resolve_model
    >>> list(faults(resolve_model("builtin:tiny-llama")))
    []
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
        stored = _make_stored_tensors(path, checkpoint, config)
        layout, names = _recognize_container(stored)
    except LoftqError as error:
        yield error
        return
    family = Family(_drop_container_keys(config))
    for name in names:
        try:
            layout.stored_matrix(name, stored, transposed=family.is_transposed(module_of(name)))
        except LoftqError as error:
            yield error
    yield from _find_orphans(stored, layout, names)


def _drop_container_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in CONFIG_KEYS}


def _make_stored_tensors(path: Path, checkpoint: Checkpoint, config: Mapping[str, Any]) -> StoredTensors:
    refs = checkpoint.tensors
    file = config_file_beside(refs.values())
    check_types(config, file)
    family = Family(_drop_container_keys(config), file)
    load, load_rows, raw = checkpoint.load, checkpoint.load_rows, checkpoint.raw
    dtype = family.dtype(refs.values())
    return StoredTensors(refs, config, dtype, load, load_rows, raw, path, lambda name: family.loaded_name(name, refs))


def _find_orphans(stored: StoredTensors, layout: Layout, names: Sequence[str]) -> Iterator[InputError]:
    """Yield an error for each part of a quantized weight without codes; `names` are the weights with codes."""
    owned = {part for name in names for part in layout.parts(name)}
    for part, ref in stored.refs.items():
        if part not in owned and _weight_of_part(part, layout) != part:
            message = "is part of a quantized weight, and its codes are missing"
            yield InputError(message, file=ref.file, tensor=part)


def check_names(layout: Layout, quantized: Collection[str], names: Iterable[str], *, remedy: str = DENSE_HINT) -> None:
    """Raises UsageError for a tensor of a model whose name means a part of a quantized weight in the container: the
    part would be written under the same name, or readers would miss the remaining parts.

    layout      the container of the result
    quantized   names of the weights to quantize
    names       names of all tensors of the model, weights to quantize included
    remedy      an option that leads to a container without parts

    >>> weight = "h.0.fc.weight"
    >>> check_names(load_layout("bitsandbytes"), [weight], [weight, "h.0.fc.weight.absmax"])
    Traceback (most recent call last):
    loftq_cli.errors.UsageError: tensor h.0.fc.weight.absmax: is the name of a part of h.0.fc.weight in bitsandbytes \
(--layout dense, or rename the tensor in the model)
    """
    owner = {part: name for name in quantized for part in layout.parts(name)}
    containers = list(map(load_layout, LAYOUTS))
    for name in names:
        weight = owner.get(name, name)
        if weight == name and name.rpartition(".")[2] != "weight":
            weight = _weight_of_part(name, layout)
        if weight != name:
            message = f"is the name of a part of {printable(weight)} in {layout.name}"
            raise UsageError(message, tensor=name, hint=f"{remedy}, or rename the tensor in the model")
        marked = next((container.name for container in containers if container.mark and container.mark in name), None)
        if marked is not None:
            message = f"has a name by which readers take the model for one in {marked}"
            raise UsageError(message, tensor=name, hint="remove or rename the tensor in the model")


def _weight_of_part(part: str, layout: Layout) -> str:
    """The weight that readers of the container miss beside a lone `part`; `part` for a tensor that is no part."""
    name = f"{part.rpartition('.')[0]}.weight"
    return name if part in layout.parts(name) else part


def _recognize_container(stored: StoredTensors) -> tuple[Layout, list[str]]:
    """Find the container and the names of quantized weights. A model without quantized weights has the container of
    decoded values and no names.
    """
    for layout in map(load_layout, LAYOUTS):
        names = layout.quantized_names(stored)
        if names:
            return layout, names
    return load_layout(DENSE), []
