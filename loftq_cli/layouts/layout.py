"""The contract of an output container, and the table of containers. Planning needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from loftq_cli.quant.formats import FORMATS, QuantizedTensor, QuantSpec
from loftq_cli.tensors.headers import MODEL_DTYPES, OutTensor, TensorRef, config_file_beside

if TYPE_CHECKING:
    import torch

# Heads that may be absent from a checkpoint, tied to the embedding or added by a task class, and must not be taken for
# quantized ones at load for that. Names of transformers' own classes.
TASK_HEADS = (
    *("lm_head", "embed_out", "proj_out", "output_projection", "generator_lm_head", "cls.predictions.decoder"),
    *("predictions.decoder", "pred_layer.proj", "mlm_score.decoder", "vocab_projector", "lm_loss", "^decoder$", "cls"),
    *("classifier", "pre_classifier", "classification_head", "score", "qa_outputs", "pooler.dense", "pooler"),
)


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One quantized weight as a container holds it.

    name          its tensor name, "....weight"
    shape         [out, in] of the matrix
    spec          its number format
    dtype         what a loader decodes to
    transposed    the source stores [in, out] (GPT-2's Conv1D)
    """

    name: str
    shape: tuple[int, int]
    spec: QuantSpec
    dtype: str
    transposed: bool


SMALLER_GROUPS = "a smaller --group-size"


@dataclass(frozen=True, slots=True)
class Fit:
    """The specification a container can hold a matrix in, or None; why it is not the one asked for, and what helps."""

    spec: QuantSpec | None
    reason: str | None = None
    hint: str = "--layout dense holds every matrix"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a container's config needs to know of the whole model; module names as the loaded model has them.

    spec          the number format of all quantized modules but those in `other_specs`
    has_experts   whether there are experts in full precision, one matrix each
    """

    dtype: str
    spec: QuantSpec
    quantized_modules: Sequence[str]
    full_precision_modules: Sequence[str]
    has_experts: bool = False
    other_specs: Mapping[str, QuantSpec] = field(default_factory=dict)


def common_spec(specs: Mapping[str, QuantSpec]) -> tuple[QuantSpec, dict[str, QuantSpec]]:
    """Of the number formats of modules by name, at least one: the most common one, of equally common ones the first;
    and the others.
    """
    ((spec, _),) = Counter(specs.values()).most_common(1)
    return spec, {module: other for module, other in specs.items() if other != spec}


def kept_modules(facts: ModelFacts) -> list[str]:
    """Every linear that stays as it is, and the heads that a loader may add to the model."""
    names = list(facts.full_precision_modules)
    return names + [head for head in TASK_HEADS if head not in names and head not in facts.quantized_modules]


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """What a container is read from.

    refs     every stored tensor, as the headers have it
    config   config.json, its quantization_config included; empty where there is none
    dtype    what the model computes in
    load     a stored tensor by its name; load_rows, some rows of it; raw, the bytes of a small one, without torch
    path     what to name in an error about the whole
    loaded   what a module is called in the loaded model, by which configs know it
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
        """What to name in an error about the config."""
        return config_file_beside(self.refs.values()) or self.path


@dataclass(frozen=True, slots=True)
class CodeRows:
    """Where a container holds the codes of a matrix row after row, so that a few can be written and read alone.

    name     of the tensor that holds them
    span     which rows of that tensor hold some rows of the matrix
    pack     codes as a quantizer gives them -> rows of the tensor; unpack, the inverse
    """

    name: str
    span: Callable[[slice], slice]
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor], torch.Tensor]

    def reader(self, load_rows: Callable[[str, int, int], torch.Tensor]) -> Callable[[slice], torch.Tensor]:
        """What gives the codes of some rows; `load_rows` gives rows of a stored tensor by its name."""

        def codes(part: slice) -> torch.Tensor:
            span = self.span(part)
            return self.unpack(load_rows(self.name, span.start, span.stop))

        return codes


class Layout(Protocol):
    """The functions of a module in LAYOUTS. Those that read are missing where nothing is quantized on disk, and
    `code_rows` where codes do not lie row after row.
    """

    QUANTIZED_ON_DISK: bool

    def fit(self, spec: QuantSpec, shape: tuple[int, int], *, transposed: bool) -> Fit:
        """What stock loaders read right for a matrix of this shape."""
        ...

    def planned(self, matrix: StoredMatrix) -> tuple[OutTensor, ...]:
        """Names, dtypes and shapes of the tensors that `pack` will give."""
        ...

    def pack(self, matrix: StoredMatrix, quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
        """The tensors to write, by name; without the codes where `quantized` holds none."""
        ...

    def code_rows(self, matrix: StoredMatrix) -> CodeRows:
        """Where the codes are."""
        ...

    def model_config(self, config: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """config.json of the output. Raises UsageError for a model that the container's loaders do not read."""
        ...

    def quantized_names(self, stored: StoredTensors) -> list[str]:
        """Names ("....weight") of the matrices that are stored in this container, in order; none in another one.

        Raises InputError for one that we do not decode as its loaders do.
        """
        ...

    def stored_matrix(self, name: str, stored: StoredTensors, *, transposed: bool) -> StoredMatrix:
        """What the matrix called `name` is, from headers and small tensors. Raises InputError where parts are missing
        or not those of such a matrix.
        """
        ...

    def parts(self, name: str) -> tuple[str, ...]:
        """Every tensor name that can belong to the matrix called `name`."""
        ...

    def unpack(self, matrix: StoredMatrix, stored: StoredTensors, *, has_codes: bool = True) -> QuantizedTensor:
        """The inverse of `pack`, for a matrix that `stored_matrix` gave; without its codes on demand. Raises InputError
        for numbers that no quantizer writes.
        """
        ...


@dataclass(frozen=True, slots=True)
class LayoutRow:
    """One row of the table.

    quant_types    number formats that it holds
    zero_point     how integer formats store a group's offset in it: "int", or "float"
    scale_dtypes   what its scales may be
    scale_dtype    what its scales are by default; None for the model's dtype
    keeps_dtype    whether its loaders decode to the model's dtype; otherwise to the scales'
    one_dtype      whether its loaders need every tensor of the model in the scales' dtype
    group_sizes    those it holds; empty for all
    mixed          which integers of several formats its loaders read in one model: "any", "symmetric" ones or "none"
    fused          names of sibling modules that servers of it make one matrix of, so that they need one format
    """

    module: str
    summary: str
    quant_types: tuple[str, ...]
    zero_point: str = "int"
    scale_dtypes: tuple[str, ...] = MODEL_DTYPES
    scale_dtype: str | None = None
    keeps_dtype: bool = True
    one_dtype: bool = False
    group_sizes: tuple[int, ...] = ()
    mixed: str = "any"
    fused: tuple[tuple[str, ...], ...] = ()


_INTEGERS = tuple(name for name, row in FORMATS.items() if row.is_affine)
_CODEBOOKS = tuple(name for name, row in FORMATS.items() if not row.is_affine)

# What vLLM fuses, in the names of its families.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)

# The first row that holds a number format is its default.
LAYOUTS: dict[str, LayoutRow] = {
    "bitsandbytes": LayoutRow("loftq_cli.layouts.bitsandbytes", "4-bit codebooks, for transformers", _CODEBOOKS),
    "compressed-tensors": LayoutRow(
        "loftq_cli.layouts.compressed_tensors",
        "integers, for transformers and vLLM",
        _INTEGERS,
        mixed="symmetric",
        fused=_FUSED,
    ),
    "gptq": LayoutRow(
        "loftq_cli.layouts.gptq",
        "integers, for GPTQ's loaders and PEFT's use_qalora",
        _INTEGERS,
        scale_dtypes=("float16",),
        scale_dtype="float16",
        keeps_dtype=False,
        mixed="none",
    ),
    "metal": LayoutRow(
        "loftq_cli.layouts.metal",
        "integers with float offsets, for transformers",
        ("int2", "int4", "int8"),
        zero_point="float",
        keeps_dtype=False,
        one_dtype=True,
        mixed="none",
    ),
    "mlx": LayoutRow(
        "loftq_cli.layouts.mlx",
        "integers with float offsets, for MLX",
        _INTEGERS,
        zero_point="float",
        keeps_dtype=False,
        group_sizes=(32, 64, 128),
    ),
    "dense": LayoutRow("loftq_cli.layouts.dequantized", "the decoded values, for anything", tuple(FORMATS)),
}


def load_layout(name: str) -> Layout:
    """The container called `name`."""
    return cast(Layout, import_module(LAYOUTS[name].module))


def default_layout(quant_type: str) -> str:
    """The container that a number format is written in when none is named."""
    return next(name for name, row in LAYOUTS.items() if quant_type in row.quant_types)


def fused_modules(layout: str, modules: Iterable[str]) -> list[tuple[str, ...]]:
    """Those of `modules` that servers of the container called `layout` make one matrix of, in groups of two or more."""
    known = {name: names for names in LAYOUTS[layout].fused for name in names}
    groups: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for module in modules:
        parent, _, name = module.rpartition(".")
        if name in known:
            groups.setdefault((parent, known[name]), set()).add(name)
    return [
        tuple(f"{parent}.{name}" if parent else name for name in names if name in found)
        for (parent, names), found in groups.items()
        if len(found) > 1
    ]


def code_rows(layout: str, matrix: StoredMatrix) -> CodeRows | None:
    """Where the container called `layout` holds the codes of `matrix`; None where not row after row."""
    container = load_layout(layout)
    return None if matrix.transposed or not hasattr(container, "code_rows") else container.code_rows(matrix)
