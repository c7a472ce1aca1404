"""transformers' "metal" container: codes, scales and float offsets (qbiases). Apple GPUs compute with them as they are;
elsewhere transformers decodes them at load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from loftq_cli.layouts import grouped
from loftq_cli.layouts.layout import Fit, ModelFacts, StoredMatrix, StoredTensors
from loftq_cli.layouts.stored_parts import quantization_config
from loftq_cli.quant.formats import QuantizedTensor, QuantSpec
from loftq_cli.tensors import AffineSpec, AffineTensor, OutTensor

if TYPE_CHECKING:
    import torch

QUANTIZED_ON_DISK = True
_BIASES = "qbiases"


def fit(spec: QuantSpec, shape: tuple[int, int], *, transposed: bool) -> Fit:
    """Whole groups in every row."""
    return grouped.fit_groups(cast(AffineSpec, spec), shape, transposed=transposed, container="metal")


def planned(matrix: StoredMatrix) -> tuple[OutTensor, ...]:
    """weight uint32 [out, in * bits / 32], scales and qbiases [out, in / group_size]."""
    return grouped.planned_biased(matrix, _BIASES)


def pack(matrix: StoredMatrix, quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors of `planned`, filled."""
    return grouped.pack_biased(matrix, cast(AffineTensor, quantized), _BIASES)


def quantized_names(stored: StoredTensors) -> list[str]:
    """Names of the weights that are stored in this container."""
    return grouped.biased_names(stored, _BIASES) if quantization_config(stored, "metal") else []


def stored_matrix(name: str, stored: StoredTensors, *, transposed: bool) -> StoredMatrix:
    """What the weight called `name` is. Raises InputError where its parts do not fit together."""
    del transposed
    return grouped.stored_biased(name, stored, _BIASES, quantization_config(stored, "metal") or {})


def parts(name: str) -> tuple[str, ...]:
    """Every tensor name that can belong to the weight called `name`."""
    module = name.removesuffix("weight")
    return (name, f"{module}scales", module + _BIASES)


def unpack(matrix: StoredMatrix, stored: StoredTensors) -> QuantizedTensor:
    """The inverse of `pack`."""
    return grouped.unpack_biased(matrix, stored, _BIASES)


def model_config(config: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
    """The source's config with a `quantization_config` that makes transformers load the tensors as they are."""
    spec = cast(AffineSpec, facts.spec)
    quantization = {
        "quant_method": "metal",
        "bits": spec.bits,
        "group_size": spec.group_size,
        "modules_to_not_convert": grouped.kept_modules(facts),
    }
    return {**config, "quantization_config": quantization}
