"""The base classes of containers of group-wise integers: fitting shapes, checks of a config, and a container of float
offsets without the config.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from loftq_cli.errors import InputError
from loftq_cli.layouts.layout import SMALLER_GROUPS, Fit, Layout, ModelFacts, StoredMatrix, kept_modules
from loftq_cli.layouts.stored_parts import check_part, file_of, whole_number
from loftq_cli.layouts.stored_tensors import CodeRows, StoredTensors
from loftq_cli.quant.formats import FORMATS, QuantizedTensor, QuantSpec, as_affine, as_affine_tensor
from loftq_cli.tensors.headers import MODEL_DTYPES, OutTensor
from loftq_cli.tensors.matrices import AffineTensor
from loftq_cli.tensors.specs import AffineSpec

if TYPE_CHECKING:
    import torch


class IntegerLayout(Layout):
    """A container of group-wise integers.

    label               the container's name in sentences
    row_multiple        the number of output features is a multiple of `row_multiple`
    needs_whole_words   whether the codes of a row fill whole 32-bit words
    """

    label: ClassVar[str]
    row_multiple: ClassVar[int] = 1
    needs_whole_words: ClassVar[bool] = True

    def fit(self, spec: QuantSpec, shape: tuple[int, int], *, transposed: bool) -> Fit:
        """Accept linears with whole groups in every row. No fallback exists: a config describes a single format."""
        integers, (out_features, in_features) = as_affine(spec), shape
        if transposed:
            return Fit(None, f"{self.label} holds no layers that are stored [in, out]")
        if in_features % integers.group_size:
            reason = f"rows of {in_features} are not whole groups of {integers.group_size}"
            return Fit(None, reason, SMALLER_GROUPS)
        if self.needs_whole_words and in_features * integers.bits % 32:
            return Fit(None, f"rows of {in_features} are not whole 32-bit words of {integers.bits}-bit codes")
        if out_features % self.row_multiple:
            return Fit(None, f"{out_features} rows are not a multiple of {self.row_multiple}, which {self.label} needs")
        return Fit(integers)


def checked_bits(values: Mapping[str, Any], key: str, stored: StoredTensors) -> int:
    """Read the bits of a code from a config.

    values   the object of the config with the bits
    key      the key of the bits
    stored   the stored tensors, for errors

    Raises InputError for anything but the bits of an integer format: 2, 3, 4 or 8.
    """
    bits = whole_number(values, key, stored)
    readable = sorted(row.bits for row in FORMATS.values() if row.is_affine)
    if bits not in readable:
        raise InputError(
            f"is quantized to {bits} bits, of which we read {', '.join(map(str, readable))}", file=stored.config_file
        )
    return bits


def scale_dtype(name: str, stored: StoredTensors) -> str:
    """Read the dtype of stored scales: "float32", "bfloat16" or "float16".

    name     tensor name of the scales
    stored   the stored tensors

    Raises InputError for absent scales, and for scales of a different dtype.
    """
    ref = stored.refs.get(name)
    if ref is None or ref.dtype not in MODEL_DTYPES:
        problem = "missing" if ref is None else ref.dtype
        raise InputError(f"is {problem}, and its codes are there", file=file_of(name, stored), tensor=name)
    return ref.dtype


def kept_names(facts: ModelFacts) -> list[str]:
    """List the modules of `kept_modules` without patterns, for loaders of plain names.

    >>> facts = ModelFacts("float32", AffineSpec(4, 64, symmetric=True), ["h.0.fc"], ["score"])
    >>> kept_names(facts)[:2]
    ['score', 'lm_head']
    """
    return [name for name in kept_modules(facts) if not name.startswith("^")]


def word_rows(name: str, matrix: StoredMatrix, *, is_unsigned: bool = False) -> CodeRows:
    """Locate codes in 32-bit words along the row: row i of the matrix is row i of the tensor called `name`.

    name          tensor name of the words
    matrix        the matrix with integer codes, uint8 [out, in] in memory
    is_unsigned   whether words are uint32 on disk; else int32
    """
    bits, columns = as_affine(matrix.spec).bits, matrix.shape[1]

    def pack(codes: torch.Tensor) -> torch.Tensor:
        import torch

        from loftq_cli.triton_kernels.packing.contract import pack_rows

        return pack_rows(codes, bits).view(torch.uint32 if is_unsigned else torch.int32)

    def unpack(stored: torch.Tensor) -> torch.Tensor:
        import torch

        from loftq_cli.triton_kernels.packing.contract import unpack_rows

        if not len(stored):
            return torch.empty((0, columns), dtype=torch.uint8)
        return unpack_rows(stored.view(torch.int32), bits, columns)

    return CodeRows(name, lambda part: part, pack, unpack)


class FloatOffsetLayout(IntegerLayout):
    """A container with a float offset for each group: value = code * scale + bias. A subclass handles the config.

    The codes lie in 32-bit words along the row, under the name of the weight. Scales and biases are tensors beside the
    codes.

    biases   the name of the biases on disk, beside "weight" and "scales"
    """

    biases: ClassVar[str]

    @abstractmethod
    def settings(self, stored: StoredTensors, module: str | None) -> Mapping[str, Any]:
        """Find the object of config.json with bits and group_size of a module; empty for the config of a different
        container.

        stored   the stored tensors and the config
        module   name of the module in the files; None for the object of the model
        """

    def planned(self, matrix: StoredMatrix) -> tuple[OutTensor, ...]:
        """Plan weight uint32 [out, in * bits / 32], scales and biases [out, in / group_size]."""
        spec, (out_features, in_features) = as_affine(matrix.spec), matrix.shape
        _, scales, biases = self.parts(matrix.name)
        shape = (out_features, in_features // spec.group_size)
        return (
            OutTensor(matrix.name, "uint32", (out_features, in_features * spec.bits // 32)),
            OutTensor(scales, spec.scale_dtype, shape),
            OutTensor(biases, spec.scale_dtype, shape),
        )

    def pack(self, matrix: StoredMatrix, quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Pack the codes and constants into the tensors of `planned`."""
        affine = as_affine_tensor(quantized)
        assert affine.biases is not None  # a row with float offsets in LAYOUTS
        codes, scales, biases = self.parts(matrix.name)
        tensors = {scales: affine.scales, biases: affine.biases}
        return {codes: self.code_rows(matrix).pack(affine.codes), **tensors} if len(affine.codes) else tensors

    def code_rows(self, matrix: StoredMatrix) -> CodeRows:
        """Locate the codes: a row of words for each row of the matrix."""
        return word_rows(matrix.name, matrix, is_unsigned=True)

    def quantized_names(self, stored: StoredTensors) -> list[str]:
        """List the weights with biases beside the codes."""
        if not self.settings(stored, None):
            return []
        ending = f".{self.biases}"
        modules = [name.removesuffix(ending) for name in stored.refs if name.endswith(ending)]
        return [f"{module}.weight" for module in modules]

    def stored_matrix(self, name: str, stored: StoredTensors, *, transposed: bool) -> StoredMatrix:
        """Read shape and format of the matrix called `name` from headers and the config. Raises InputError for
        contradictory parts.
        """
        del transposed
        settings, (_, scales, _) = self.settings(stored, name.removesuffix(".weight")), self.parts(name)
        bits, group_size = checked_bits(settings, "bits", stored), whole_number(settings, "group_size", stored)
        dtype, shape = scale_dtype(scales, stored), stored.refs[scales].shape
        if len(shape) != 2 or 0 in shape:
            raise InputError(f"is {shape}, not a matrix", file=file_of(scales, stored), tensor=scales)
        spec = AffineSpec(bits, group_size, symmetric=False, zero_point="float", scale_dtype=dtype)
        matrix = StoredMatrix(name, (shape[0], shape[1] * group_size), spec, dtype, transposed=False)
        for part in self.planned(matrix):
            check_part(part, stored, file_of(name, stored), asks=f"its {bits} bits and group size {group_size}")
        return matrix

    def parts(self, name: str) -> tuple[str, str, str]:
        """List the tensor names of the codes, the scales and the biases of the weight called `name`."""
        module = name.removesuffix("weight")
        return name, f"{module}scales", module + self.biases

    def unpack(self, matrix: StoredMatrix, stored: StoredTensors, *, has_codes: bool = True) -> QuantizedTensor:
        """Unpack a checked `matrix`, the inverse of `pack`."""
        import torch

        spec, (words, scales, biases) = as_affine(matrix.spec), self.parts(matrix.name)
        packed = stored.load(words) if has_codes else torch.empty((0, 0), dtype=torch.uint32)
        codes = self.code_rows(matrix).unpack(packed)
        return AffineTensor(codes, stored.load(scales), None, stored.load(biases), spec, matrix.dtype)
