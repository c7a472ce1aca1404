"""The table of number formats, and how a format becomes a quantizer. Names and limits need no torch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.headers import MODEL_DTYPES
from loftq_cli.tensors.matrices import AffineTensor, CodebookTensor
from loftq_cli.tensors.rows import Rows
from loftq_cli.tensors.specs import AffineSpec, CodebookSpec

if TYPE_CHECKING:
    import torch

# All kinds of specifications and of quantized matrices; a further family adds a class to each.
QuantSpec: TypeAlias = CodebookSpec | AffineSpec
QuantizedTensor: TypeAlias = CodebookTensor | AffineTensor

# The choice of the constants of a block or group: the largest weights decide, or the least squared error.
SCALES = ("absmax", "search")


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of an error E [out, in]: the sum of e·H·eᵀ over the rows e. H is either
    - diag(importance) − vectors·vectorsᵀ; `vectors` float32 [in, r], `importance` float32 [in], or None for all 1
    - or hessian, float32 [in, in]
    """

    vectors: torch.Tensor | None = None
    importance: torch.Tensor | None = None
    hessian: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Refinement:
    """A quantized matrix with refined codes and constants, and the cost of the error before and after."""

    quantized: Any
    before: float
    after: float


class Quantizer(Protocol):
    """Quantizes a matrix by rows and decodes the result. `minus` returns rows to subtract before quantizing."""

    def quantize(
        self,
        weight: Rows,
        *,
        minus: Callable[[slice], torch.Tensor] | None = None,
        start: Any | None = None,
        sink: Callable[[slice, torch.Tensor], None] | None = None,
        workers: Workers = SERIAL,
    ) -> Any:
        """The quantized form of a matrix: a QuantizedTensor. A `sink` receives the codes a few rows at a time.

        A search for constants begins with the constants of `start`, a quantized form of a nearly equal matrix.
        """
        ...

    def refine(
        self, weight: Rows, quantized: Any, cost: Cost, *, fits_scales: bool = True, workers: Workers = SERIAL
    ) -> Refinement | None:
        """Codes whose error costs at most as much as before; `fits_scales` also fits the constants. Rounding the
        constants for storage may take back a part of the gain. None for rows of broken blocks, and for a cost that
        rises.
        """
        ...

    def residual(self, weight: Rows, quantized: Any, out: torch.Tensor, *, workers: Workers = SERIAL) -> float:
        """Write weight - dequant(quantized) into `out` [out, in], float32 or bfloat16; return the sum of squares."""
        ...

    def keep_nearer(
        self,
        weight: Rows,
        minus: Callable[[slice], torch.Tensor],
        previous: Any,
        new: Any,
        *,
        workers: Workers = SERIAL,
    ) -> bool:
        """Replace parts of `new` by the parts of `previous` closer to weight - minus. Returns True if the format lets
        parts be chosen separately; otherwise `new` stays unchanged.
        """
        ...

    def decoded(self, quantized: Any, codes: Callable[[slice], torch.Tensor] | None = None) -> Rows:
        """The matrix of a loader, see `QuantizedTensor.decoded`. For a `quantized` without codes, the function `codes`
        returns the codes of some rows in the form of the argument of `sink`.
        """
        ...

    def dequantize(self, quantized: Any) -> torch.Tensor:
        """The whole of `decoded` as float32 [out, in]."""
        ...


@dataclass(frozen=True, slots=True)
class Format:
    """A row of the table.

    module        the module of the format's code
    bits          bits of a code
    summary       a line for the list of formats
    block_sizes   for a codebook format: allowed numbers of weights with a common constant
    group_sizes   for an integer format: allowed numbers of columns with a common scale
    """

    module: str
    bits: int
    summary: str
    block_sizes: tuple[int, ...] = ()
    group_sizes: tuple[int, ...] = ()

    @property
    def is_affine(self) -> bool:
        """True if codes are integers."""
        return bool(self.group_sizes)


_CODEBOOK, _AFFINE = "loftq_cli.quant.codebook", "loftq_cli.quant.affine"
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)

FORMATS: dict[str, Format] = {
    "nf4": Format(_CODEBOOK, 4, "4-bit NormalFloat, one absmax per block", block_sizes=_BLOCK_SIZES),
    "fp4": Format(_CODEBOOK, 4, "4-bit floating point, one absmax per block", block_sizes=_BLOCK_SIZES),
    "int2": Format(_AFFINE, 2, "2-bit integers, one scale and zero point per group", group_sizes=_GROUP_SIZES),
    "int3": Format(_AFFINE, 3, "3-bit integers, one scale and zero point per group", group_sizes=_GROUP_SIZES),
    "int4": Format(_AFFINE, 4, "4-bit integers, one scale and zero point per group", group_sizes=_GROUP_SIZES),
    "int8": Format(_AFFINE, 8, "8-bit integers, one scale per group", group_sizes=_GROUP_SIZES),
}


def make_quantizer(
    spec: QuantSpec, dtype: str, scales: str = SCALES[0], importance: torch.Tensor | None = None
) -> Quantizer:
    """The quantizer of `spec` whose values a loader decodes to `dtype` ("bfloat16", ...).

    `scales` is a name in SCALES. The "search" weighs the squared errors of columns by `importance`, float32 [in].

    >>> make_quantizer(CodebookSpec("nf4", 64), "float32").scales
    'absmax'
    """
    module = import_module(FORMATS[spec.quant_type].module)
    quantizer: Quantizer = module.make_quantizer(spec, dtype, scales, importance)
    return quantizer


def spec_json(spec: QuantSpec) -> dict[str, Any]:
    """A specification as in reports: quant_type, and the fields of the kind of format.

    >>> spec_json(CodebookSpec("nf4", 64))
    {'quant_type': 'nf4', 'block_size': 64, 'double_quant': True}
    """
    hidden = ("codebook", "bits", "nested_block_size")
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return {"quant_type": spec.quant_type, **{name: value for name, value in values.items() if name not in hidden}}


def spec_from_json(values: Mapping[str, Any]) -> QuantSpec:
    """The inverse of `spec_json`. Raises KeyError, TypeError or ValueError for values of another shape.

    >>> spec_from_json({"quant_type": "nf4", "block_size": 64, "double_quant": True}) == CodebookSpec("nf4", 64)
    True
    """
    quant_type = values["quant_type"]
    if not FORMATS[quant_type].is_affine:
        return CodebookSpec(quant_type, int(values["block_size"]), bool(values["double_quant"]))
    if values["scale_dtype"] not in MODEL_DTYPES:
        raise ValueError
    return AffineSpec(
        FORMATS[quant_type].bits,
        int(values["group_size"]),
        bool(values["symmetric"]),
        values["zero_point"],
        values["scale_dtype"],
    )


def as_affine(spec: QuantSpec) -> AffineSpec:
    """`spec` of an integer format. Raises TypeError for a codebook format: the caller chose by `is_affine` before.

    >>> as_affine(AffineSpec(4, 64, symmetric=True)).bits
    4
    """
    if not isinstance(spec, AffineSpec):
        raise TypeError(f"{spec.quant_type} is no integer format")
    return spec


def as_codebook(spec: QuantSpec) -> CodebookSpec:
    """`spec` of a codebook format. Raises TypeError for an integer format: the caller chose by `is_affine` before.

    >>> as_codebook(CodebookSpec("fp4", 64)).codebook
    'fp4'
    """
    if not isinstance(spec, CodebookSpec):
        raise TypeError(f"{spec.quant_type} is no codebook format")
    return spec


def as_affine_tensor(quantized: QuantizedTensor) -> AffineTensor:
    """`quantized` of an integer format. Raises TypeError for a codebook format.

    >>> spec = CodebookSpec("nf4", 64)
    >>> as_affine_tensor(CodebookTensor(packed=None, absmax=None, spec=spec, shape=(2, 64), dtype="float32"))
    Traceback (most recent call last):
    TypeError: nf4 is no integer format
    """
    if not isinstance(quantized, AffineTensor):
        raise TypeError(f"{quantized.spec.quant_type} is no integer format")
    return quantized


def as_codebook_tensor(quantized: QuantizedTensor) -> CodebookTensor:
    """`quantized` of a codebook format. Raises TypeError for an integer format.

    >>> spec = CodebookSpec("nf4", 64)
    >>> tensor = CodebookTensor(packed=None, absmax=None, spec=spec, shape=(2, 64), dtype="float32")
    >>> as_codebook_tensor(tensor) is tensor
    True
    """
    if not isinstance(quantized, CodebookTensor):
        raise TypeError(f"{quantized.spec.quant_type} is no codebook format")
    return quantized


def override_spec(
    spec: QuantSpec,
    *,
    quant_type: str | None = None,
    group_size: int | None = None,
    block_size: int | None = None,
    double_quant: bool | None = None,
) -> QuantSpec:
    """`spec` with the values of a layer: None keeps the value of `spec`, and an option for another kind of format has
    no effect. `quant_type` is of the kind of `spec`.

    >>> override_spec(AffineSpec(4, 64, symmetric=False), quant_type="int8").quant_type
    'int8'
    """
    if isinstance(spec, AffineSpec):
        bits = spec.bits if quant_type is None else FORMATS[quant_type].bits
        return dataclasses.replace(spec, bits=bits, group_size=group_size or spec.group_size)
    return dataclasses.replace(
        spec,
        codebook=quant_type or spec.codebook,
        block_size=block_size or spec.block_size,
        double_quant=spec.double_quant if double_quant is None else double_quant,
    )


def specs_of_sizes(spec: QuantSpec, quant_types: Iterable[str], sizes: Sequence[int]) -> list[QuantSpec]:
    """Every format of the kind of `spec` with each of `sizes`: integers in each of the bits of `quant_types`,
    ascending; a codebook stays the codebook.

    >>> [spec.block_size for spec in specs_of_sizes(CodebookSpec("nf4", 64), ["nf4", "fp4"], [32, 64])]
    [32, 64]
    """
    if isinstance(spec, CodebookSpec):
        return [dataclasses.replace(spec, block_size=size) for size in sizes]
    bits = sorted({FORMATS[name].bits for name in quant_types if FORMATS[name].is_affine})
    return [dataclasses.replace(spec, bits=count, group_size=size) for count in bits for size in sizes]


def requantized_spec(stored: QuantSpec, spec: QuantSpec) -> QuantSpec:
    """The format of a matrix in the format `stored` after quantizing again to `spec`. A codebook matrix keeps the
    stored blocks and double quantization when `spec` is a codebook format too.

    >>> requantized_spec(CodebookSpec("nf4", 32), CodebookSpec("fp4", 64)).size_text
    'block 32'
    """
    if isinstance(spec, CodebookSpec) and isinstance(stored, CodebookSpec):
        return dataclasses.replace(stored, codebook=spec.codebook)
    return spec


def tensor_from_buffers(
    buffers: Mapping[str, torch.Tensor], spec: QuantSpec, shape: tuple[int, int], dtype: str
) -> QuantizedTensor:
    """The quantized matrix [out, in] = `shape` whose `to_buffers` gave `buffers`; a loader decodes to `dtype`.

    >>> import torch
    >>> buffers = {"packed": torch.full((1,), 255, dtype=torch.uint8), "absmax": torch.tensor([3.0])}
    >>> tensor_from_buffers(buffers, CodebookSpec("nf4", 64, double_quant=False), (1, 2), "float32").dequantize()
    tensor([[3., 3.]])
    """
    if isinstance(spec, AffineSpec):
        return AffineTensor.from_buffers(buffers, spec, shape, dtype)
    return CodebookTensor.from_buffers(buffers, spec, shape, dtype)


def common_spec(specs: Mapping[str, QuantSpec]) -> tuple[QuantSpec, dict[str, QuantSpec]]:
    """Return the most common number format of some modules, and the modules of uncommon formats.

    `specs` maps module names to number formats, and is not empty. The first among equally common formats wins.

    >>> common_spec({"q": CodebookSpec("nf4"), "k": CodebookSpec("nf4"), "v": CodebookSpec("fp4")})[1].keys()
    dict_keys(['v'])
    """
    ((spec, _),) = Counter(specs.values()).most_common(1)
    return spec, {module: module_spec for module, module_spec in specs.items() if module_spec != spec}
