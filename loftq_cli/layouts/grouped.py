"""What the containers of group-wise integers have in common: which matrices they hold, and the containers whose offset
is a float: codes in 32-bit words along the row, a scale and a bias per group, value = code * scale + bias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from loftq_cli.errors import InputError
from loftq_cli.layouts.layout import TASK_HEADS, Fit, ModelFacts, StoredMatrix, StoredTensors
from loftq_cli.layouts.stored_parts import check_part, file_of, whole_number
from loftq_cli.quant.formats import FORMATS
from loftq_cli.tensors import MODEL_DTYPES, AffineSpec, AffineTensor, OutTensor

if TYPE_CHECKING:
    import torch


def fit_groups(
    spec: AffineSpec, shape: tuple[int, int], *, transposed: bool, container: str, row_multiple: int = 1
) -> Fit:
    """Rows must be whole groups; the container describes one format, so nothing else is tried."""
    out_features, in_features = shape
    if transposed:
        return Fit(None, f"{container} holds no layers that are stored [in, out]")
    if in_features % spec.group_size:
        return Fit(None, f"rows of {in_features} are not whole groups of {spec.group_size}")
    if in_features * spec.bits % 32:
        return Fit(None, f"rows of {in_features} are not whole 32-bit words of {spec.bits}-bit codes")
    if out_features % row_multiple:
        return Fit(None, f"{out_features} rows are not a multiple of {row_multiple}, which {container} needs")
    return Fit(spec)


def spec_shape(spec: AffineSpec, shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales: [out, groups in a row]."""
    return shape[0], shape[1] // spec.group_size


def checked_bits(values: Mapping[str, Any], key: str, stored: StoredTensors) -> int:
    """The bits of a quantization_config. Raises InputError for bits that we do not read."""
    bits = whole_number(values, key, stored)
    known = sorted(row.bits for row in FORMATS.values() if row.is_affine)
    if bits not in known:
        raise InputError(
            f"is quantized to {bits} bits, of which we read {', '.join(map(str, known))}", file=stored.path
        )
    return bits


def scale_dtype(name: str, stored: StoredTensors) -> str:
    """The dtype of the scales called `name`. Raises InputError where they are missing or of another kind."""
    ref = stored.refs.get(name)
    if ref is None or ref.dtype not in MODEL_DTYPES:
        found = "missing" if ref is None else ref.dtype
        raise InputError(f"is {found}, and its codes are there", file=file_of(name, stored), tensor=name)
    return ref.dtype


def planned_biased(matrix: StoredMatrix, biases: str) -> tuple[OutTensor, ...]:
    """Codes under the weight's own name; scales, and biases under the name that the container gives them."""
    spec, (out_features, in_features) = cast(AffineSpec, matrix.spec), matrix.shape
    module, shape = matrix.name.removesuffix("weight"), spec_shape(spec, matrix.shape)
    return (
        OutTensor(matrix.name, "uint32", (out_features, in_features * spec.bits // 32)),
        OutTensor(f"{module}scales", spec.scale_dtype, shape),
        OutTensor(module + biases, spec.scale_dtype, shape),
    )


def pack_biased(matrix: StoredMatrix, quantized: AffineTensor, biases: str) -> dict[str, torch.Tensor]:
    """The tensors of `planned_biased`, filled."""
    import torch

    from loftq_cli.triton_kernels.packing import pack_rows

    assert quantized.biases is not None  # `fit` asked for a float zero point
    module = matrix.name.removesuffix("weight")
    words = pack_rows(quantized.codes, quantized.spec.bits).view(torch.uint32)
    return {matrix.name: words, f"{module}scales": quantized.scales, module + biases: quantized.biases}


def biased_names(stored: StoredTensors, biases: str) -> list[str]:
    """Weights that have scales and biases beside them."""
    ending = re.compile(rf"\.{biases}$")
    modules = [ending.sub("", name) for name in stored.refs if ending.search(name)]
    return [f"{module}.weight" for module in modules if f"{module}.scales" in stored.refs]


def stored_biased(name: str, stored: StoredTensors, biases: str, values: Mapping[str, Any]) -> StoredMatrix:
    """What the weight called `name` is; `values` has bits and group_size. Raises InputError."""
    bits, group_size = checked_bits(values, "bits", stored), whole_number(values, "group_size", stored)
    scales = name.removesuffix("weight") + "scales"
    dtype = scale_dtype(scales, stored)
    shape = stored.refs[scales].shape
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"is {shape}, not a matrix", file=file_of(scales, stored), tensor=scales)
    spec = AffineSpec(bits, group_size, symmetric=False, zero_point="float", scale_dtype=dtype)
    matrix = StoredMatrix(name, (shape[0], shape[1] * group_size), spec, dtype, transposed=False)
    for part in planned_biased(matrix, biases):
        check_part(part, stored, file_of(name, stored), asks=f"its {bits} bits and group size {group_size}")
    return matrix


def unpack_biased(matrix: StoredMatrix, stored: StoredTensors, biases: str) -> AffineTensor:
    """The inverse of `pack_biased`."""
    import torch

    from loftq_cli.triton_kernels.packing import unpack_rows

    spec, module = cast(AffineSpec, matrix.spec), matrix.name.removesuffix("weight")
    codes = unpack_rows(stored.load(matrix.name).view(torch.int32), spec.bits, matrix.shape[1])
    scales, offsets = stored.load(f"{module}scales"), stored.load(module + biases)
    return AffineTensor(codes, scales, None, offsets, spec, matrix.dtype)


def kept_modules(facts: ModelFacts) -> list[str]:
    """Every linear that stays as it is, and the heads that a loader may add to the model."""
    names = list(facts.full_precision_modules)
    heads = (head for head in TASK_HEADS if not head.startswith("^"))
    return names + [head for head in heads if head not in names and head not in facts.quantized_modules]
