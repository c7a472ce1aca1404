"""Statistics from `loftq calibrate`: the mean of x·xᵀ over tokens for the input x of each linear. Names and reads the
files; computes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from loftq_cli.checkpoint.json_files import MAX_JSON_NBYTES, parse_json_object
from loftq_cli.checkpoint.record_schema import PositiveInt, RecordError, Sha256, read_record
from loftq_cli.checkpoint.safetensors_file import SafetensorsFile
from loftq_cli.checkpoint.watched_file import WatchedFile
from loftq_cli.errors import InputError

if TYPE_CHECKING:
    import torch

CALIBRATION_NAME, STATISTICS_NAME = "calibration.json", "statistics.safetensors"
SQUARES, FORMAT = 1, 2  # format 1 stores a full statistic as a square, format 2 as a triangle
_AGAIN = "run loftq calibrate again"


class InputStatistics(Protocol):
    """Statistics of the inputs of layers, in files or in memory."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the weights with a statistic."""
        ...

    @property
    def is_measured(self) -> bool:
        """Whether the inputs are inputs of the model on a text, so that errors of outputs are worth a report."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """The statistic of the weight called `name`, float32 [in, in] or [in]; any thread may ask."""
        ...


@dataclass(frozen=True)
class Statistics:
    """The result of `loftq calibrate`. For a weight [out, in], "full" is H = E[x·xᵀ] [in, in] and "diagonal" the
    diagonal of H [in], float32. Files hold the upper triangle of H.

    path     the directory
    sha256   of calibration.json; the file lists the sha256 of the numbers, so the hash covers all numbers
    kind     "full" or "diagonal"
    tokens   number of tokens under the mean
    inputs   tensor names of the source -> names of the statistics; layers with a common input share a statistic
    """

    path: Path
    sha256: str
    kind: str
    tokens: int
    inputs: Mapping[str, str]
    _file: SafetensorsFile = field(repr=False, compare=False)
    _calibration: WatchedFile = field(repr=False, compare=False)
    _has_triangles: bool = field(repr=False, compare=False)

    @property
    def is_measured(self) -> bool:
        """True: the inputs are inputs of the model on a text."""
        return True

    @property
    def names(self) -> frozenset[str]:
        """Names of the source's tensors with a statistic."""
        return frozenset(self.inputs)

    def in_features(self, name: str) -> int:
        """Number of inputs of the weight called `name`. Raises KeyError for a weight without a statistic."""
        stored = self._file.tensors[self.inputs[name]].shape[-1]
        return triangle_side(stored) if self._has_triangles else stored

    def load(self, name: str) -> torch.Tensor:
        """The statistic of the weight called `name`, float32 [in, in] or [in]; any thread may ask.

        Raises KeyError for a weight without a statistic, InputError for NaN and infinite numbers, StorageError when the
        file changed.
        """
        import torch

        stored = self.inputs[name]
        statistic = self._file.load(stored)
        if not bool(torch.isfinite(statistic).all()):
            raise InputError("holds NaN or infinite values", file=self._file.path, tensor=stored, hint=_AGAIN)
        return unpack_triangle(statistic) if self._has_triangles else statistic

    def check_unchanged(self) -> None:
        """Raises StorageError when a file of the statistics was replaced or rewritten since opening."""
        self._file.check_unchanged()
        self._calibration.check_unchanged()


def open_statistics(path: Path) -> Statistics:
    """The statistics in the directory `path`, read once to the end: the sha256 of the numbers has to be the sha256 in
    calibration.json, so a run that continues has the numbers of the run's beginning. `Statistics.load` reads a file
    under watch.

    Raises InputError with the file, and the tensor, of anything unlike the files of `loftq calibrate`; StorageError
    when a file changes meanwhile.
    """
    file = WatchedFile.open(path / CALIBRATION_NAME)
    values = parse_json_object(file.read_whole(MAX_JSON_NBYTES, hint=_AGAIN), file=file.path)
    calibration = _check_calibration(values, file.path)
    kind, inputs = calibration.kind, calibration.inputs
    numbers = SafetensorsFile(path / STATISTICS_NAME)
    for name, stored in inputs.items():
        ref = numbers.tensors.get(stored)
        if ref is None:
            message = f"is not in {STATISTICS_NAME}, and {name} needs it"
            raise InputError(message, file=file.path, tensor=stored, hint=_AGAIN)
        if ref.dtype != "float32" or not _is_form(ref.shape, kind, calibration.format):
            message = f"is {ref.dtype} {list(ref.shape)}, which is no {kind} statistic"
            raise InputError(message, file=numbers.path, tensor=stored, hint=_AGAIN)
    if numbers.file_sha256() != calibration.statistics_sha256:
        message = f"does not hold the numbers of {CALIBRATION_NAME}: its sha256 is not the one recorded there"
        raise InputError(message, file=numbers.path, hint=_AGAIN)
    has_triangles = kind == "full" and calibration.format != SQUARES
    sha256 = file.sha256(0, file.nbytes)
    return Statistics(path, sha256, kind, calibration.tokens, inputs, numbers, file, has_triangles)


def _is_form(shape: tuple[int, ...], kind: str, number: int) -> bool:
    """Whether `shape` is the shape of a statistic of `kind` in files of format `number`."""
    if 0 in shape:
        return False
    if kind == "full" and number == SQUARES:
        return len(shape) == 2 and shape[0] == shape[1]
    return len(shape) == 1 and (kind == "diagonal" or triangle_numel(triangle_side(shape[0])) == shape[0])


def triangle_numel(side: int) -> int:
    """Entries in the upper triangle of a matrix [side, side], with the diagonal.

    >>> triangle_numel(3)
    6
    """
    return side * (side + 1) // 2


def triangle_side(numel: int) -> int:
    """The side of the matrix with an upper triangle of `numel` entries; rounded down for another number of entries.

    >>> triangle_side(6)
    3
    """
    return (math.isqrt(8 * numel + 1) - 1) // 2


def pack_triangle(matrix: torch.Tensor) -> torch.Tensor:
    """The upper triangle of a symmetric matrix [in, in], row after row: [in · (in + 1) / 2].

    >>> import torch
    >>> pack_triangle(torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
    tensor([1., 2., 3.])
    """
    import torch

    return torch.cat([row[place:] for place, row in enumerate(matrix)])


def unpack_triangle(triangle: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix of an upper triangle: the inverse of `pack_triangle`.

    >>> import torch
    >>> unpack_triangle(torch.tensor([1.0, 2.0, 3.0]))
    tensor([[1., 2.],
            [2., 3.]])
    """
    side, start = triangle_side(len(triangle)), 0
    matrix = triangle.new_empty(side, side)
    for place in range(side):
        row = triangle[start : start + side - place]
        matrix[place, place:] = row
        matrix[place:, place] = row
        start += side - place
    return matrix


@dataclass(frozen=True, slots=True)
class _Calibration:
    """The checked values of calibration.json; `inputs` as in Statistics."""

    format: PositiveInt
    kind: Literal["full", "diagonal"]
    tokens: PositiveInt
    inputs: dict[str, str]
    statistics_sha256: Sha256


def _check_calibration(values: Mapping[str, Any], file: Path) -> _Calibration:
    if values.get("tool") != "loftq-cli" or "format" not in values:
        raise InputError("is not of a calibration of this tool", file=file, hint=_AGAIN)
    if values["format"] not in (SQUARES, FORMAT) or isinstance(values["format"], bool):
        message = f"is of format {values['format']!r}, and {SQUARES} and {FORMAT} are read here"
        raise InputError(message, file=file, hint=_AGAIN)
    message = "lacks kind, tokens, inputs or statistics_sha256, or has wrong ones"
    try:
        calibration = read_record(_Calibration, values)
    except RecordError as error:
        raise InputError(f"{message}: {error}", file=file, hint=_AGAIN) from None
    if not calibration.inputs:
        raise InputError(f"{message}: inputs is empty", file=file, hint=_AGAIN)
    return calibration
