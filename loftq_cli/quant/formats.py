"""The table of number formats, and how a format becomes a quantizer. Names and limits need no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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

# Every kind of quantized matrix and of its specification; a new family adds its own classes here.
QuantSpec: TypeAlias = CodebookSpec | AffineSpec
QuantizedTensor: TypeAlias = CodebookTensor | AffineTensor

# How the constants of a block or group are chosen: from its largest weights, or for the least squared error.
SCALES = ("absmax", "search")


@dataclass(frozen=True, slots=True)
class Cost:
    """What an error E [out, in] costs: the sum over its rows e of e·H·eᵀ. H is one of
    - diag(importance) − vectors·vectorsᵀ; `vectors` float32 [in, r], `importance` float32 [in], or None for ones
    - hessian, float32 [in, in]
    """

    vectors: torch.Tensor | None = None
    importance: torch.Tensor | None = None
    hessian: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Refinement:
    """A quantized matrix after codes and constants were refined, and what its error costs, before and after."""

    quantized: Any
    before: float
    after: float


class Quantizer(Protocol):
    """One matrix, there and back, by rows. `minus` gives rows of what is subtracted from it before it is quantized."""

    def quantize(
        self,
        weight: Rows,
        *,
        minus: Callable[[slice], torch.Tensor] | None = None,
        start: Any | None = None,
        sink: Callable[[slice, torch.Tensor], None] | None = None,
        workers: Workers = SERIAL,
    ) -> Any:
        """The quantized form of a matrix: a QuantizedTensor. With `sink`, that gets the codes a few rows at a time.

        Where constants are searched, that begins with those of `start`, a quantized form of nearly the same.
        """
        ...

    def refine(
        self, weight: Rows, quantized: Any, cost: Cost, *, fits_scales: bool = True, workers: Workers = SERIAL
    ) -> Refinement | None:
        """Codes, and constants if it `fits_scales`, whose error costs less, or as much; but for what rounding constants
        again as they are stored takes back. None where blocks do not divide the rows.
        """
        ...

    def residual(self, weight: Rows, quantized: Any, out: torch.Tensor, *, workers: Workers = SERIAL) -> float:
        """weight - dequant(quantized) into `out` [out, in], float32 or bfloat16; the sum of its squares."""
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
        """Make of `new` the nearer one of two quantized forms of about weight - minus, part by part. Says whether that
        could be done: not where parts cannot be chosen one by one.
        """
        ...

    def decoded(self, quantized: Any, codes: Callable[[slice], torch.Tensor] | None = None) -> Rows:
        """What a loader of the stored tensor computes, rounded to the dtype that it decodes to. `codes` gives those of
        some rows, in the form that `sink` got, where `quantized` holds none.
        """
        ...

    def dequantize(self, quantized: Any) -> torch.Tensor:
        """The whole of `decoded` as float32 [out, in]."""
        ...


@dataclass(frozen=True, slots=True)
class Format:
    """One row of the table: the module that implements it, its bits a weight, and the sizes that it takes: of blocks
    for a codebook format, of groups for an integer format.
    """

    module: str
    bits: int
    summary: str
    block_sizes: tuple[int, ...] = ()
    group_sizes: tuple[int, ...] = ()

    @property
    def is_affine(self) -> bool:
        """Whether it is an integer format."""
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
    """The quantizer of `spec` whose values a loader decodes to `dtype` ("bfloat16", ...). A search for constants weighs
    the squared errors of columns by `importance`, float32 [in].
    """
    module = import_module(FORMATS[spec.quant_type].module)
    quantizer: Quantizer = module.make_quantizer(spec, dtype, scales, importance)
    return quantizer


def spec_json(spec: QuantSpec) -> dict[str, Any]:
    """A specification as the reports have it: its quant_type, and the fields that this kind has."""
    hidden = ("codebook", "bits", "nested_block_size")
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return {"quant_type": spec.quant_type, **{name: value for name, value in values.items() if name not in hidden}}


def spec_from_json(values: Mapping[str, Any]) -> QuantSpec:
    """The inverse of `spec_json`. Raises KeyError, TypeError or ValueError for values of another shape."""
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


def size_of(spec: QuantSpec) -> str:
    """ "block 64" or "group 64": how many weights share constants."""
    return f"block {spec.block_size}" if isinstance(spec, CodebookSpec) else f"group {spec.group_size}"
