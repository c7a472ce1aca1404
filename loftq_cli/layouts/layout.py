"""The contract of a container, and the table of containers: all facts about a container are fields or methods of a row.
Planning needs no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from loftq_cli.layouts.stored_tensors import CodeRows, StoredTensors
from loftq_cli.quant.formats import FORMATS, QuantizedTensor, QuantSpec, as_affine
from loftq_cli.tensors.headers import MODEL_DTYPES, OutTensor
from loftq_cli.tensors.libraries import DEFAULT_LIBRARY, LIBRARIES, Library

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A quantized weight in a container.

    name         tensor name, "....weight"
    shape        [out, in] of the matrix
    spec         number format
    dtype        dtype of the decoded matrix in a loader
    transposed   whether the original stores [in, out] (GPT-2's Conv1D)
    """

    name: str
    shape: tuple[int, int]
    spec: QuantSpec
    dtype: str
    transposed: bool


SMALLER_GROUPS = "a smaller --group-size"


@dataclass(frozen=True, slots=True)
class Fit:
    """The form of a matrix in a container.

    spec     the number format; None: no number format fits
    reason   the reason for a difference from the requested format; None for the requested format
    hint     the remedy for a matrix without a format
    """

    spec: QuantSpec | None
    reason: str | None = None
    hint: str = "--layout dense holds every matrix"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts about the model for the config of a container, with module names of the loaded model.

    dtype                    dtype of the stored model
    spec                     number format of the quantized modules outside `other_specs`
    quantized_modules        names of all quantized modules
    full_precision_modules   names of modules in full precision that a loader might quantize
    has_experts              whether experts are in full precision, as a matrix for each expert
    library                  the library that loads the model
    other_specs              module -> number format, for quantized modules of uncommon integer formats
    refused_by               keys of LAYOUTS: containers whose loaders do not read models of the family
    """

    dtype: str
    spec: QuantSpec
    quantized_modules: Sequence[str]
    full_precision_modules: Sequence[str]
    has_experts: bool = False
    library: Library = DEFAULT_LIBRARY
    other_specs: Mapping[str, QuantSpec] = field(default_factory=dict)
    refused_by: Sequence[str] = ()

    @property
    def specs(self) -> set[QuantSpec]:
        """Every number format in the model."""
        return {self.spec, *self.other_specs.values()}


def kept_modules(facts: ModelFacts) -> list[str]:
    """List all linears in full precision, and the heads that a loader may add to the model."""
    names, known = list(facts.full_precision_modules), {*facts.full_precision_modules, *facts.quantized_modules}
    return names + [head for head in facts.library.task_heads if head not in known]


class Layout(ABC):
    """A container: each row of LAYOUTS has a class without state. mypy checks each class against the methods below."""

    name: ClassVar[str]
    mark: ClassVar[str | None] = None  # a text that tells readers the container from a tensor's name, without a config

    @property
    def row(self) -> LayoutRow:
        """The facts of the container."""
        return LAYOUTS[self.name]

    @abstractmethod
    def fit(self, spec: QuantSpec, shape: tuple[int, int], *, transposed: bool) -> Fit:
        """Choose a number format, near the requested `spec`, that stock loaders read correctly for a matrix of `shape`
        [out, in]; `transposed`: the original stores [in, out].
        """

    @abstractmethod
    def planned(self, matrix: StoredMatrix) -> tuple[OutTensor, ...]:
        """Plan the names, dtypes and shapes of the tensors from `pack`."""

    @abstractmethod
    def pack(self, matrix: StoredMatrix, quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Pack a quantized matrix: tensor name -> tensor to write, without codes for a `quantized` without codes."""

    @abstractmethod
    def code_rows(self, matrix: StoredMatrix) -> CodeRows | None:
        """Locate codes in row order; None for codes in column order or no codes, and for an original that stores
        [in, out].
        """

    @abstractmethod
    def model_config(self, config: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """Build config.json of the base from the model's config without keys about quantization. Raises UsageError for
        a model that the container's loaders do not read.
        """

    @abstractmethod
    def quantized_names(self, stored: StoredTensors) -> list[str]:
        """List the names ("....weight") of the matrices in the container, in order; no names for a model in a different
        container.

        Raises InputError for a model that the tool and the container's loaders would decode differently.
        """

    @abstractmethod
    def stored_matrix(self, name: str, stored: StoredTensors, *, transposed: bool) -> StoredMatrix:
        """Read shape and format of the matrix called `name`, from `quantized_names`. Raises InputError for absent parts
        and for parts of a wrong dtype or shape. `transposed`: dense checkpoints of the family store [in, out].
        """

    @abstractmethod
    def parts(self, name: str) -> tuple[str, ...]:
        """List all possible tensor names of the parts of a matrix called `name`."""

    @abstractmethod
    def unpack(self, matrix: StoredMatrix, stored: StoredTensors, *, has_codes: bool = True) -> QuantizedTensor:
        """Unpack a matrix from `stored_matrix`, the inverse of `pack`; `has_codes=False` leaves codes on disk. Raises
        InputError for numbers that no quantizer writes.
        """


@dataclass(frozen=True, slots=True)
class LayoutRow:
    """One row of the table.

    module           the module with the container's class
    loaders          the software that loads the base
    quant_types      number formats in the container, keys of FORMATS
    zero_point       kind of a group's stored offset in integer formats: "int" or "float"
    scale_dtypes     allowed dtypes of scales
    scale_dtype      the default dtype of scales; None for the model's dtype
    keeps_dtype      whether loaders decode to the model's dtype; else to the dtype of the scales
    one_dtype        whether loaders need every tensor of the model in the dtype of the scales
    group_sizes      allowed group sizes; empty for all sizes of the number formats
    mixed            integers of several formats that loaders read in a model: "any", "symmetric" or "none"
    fused            names of sibling modules that servers fuse into a matrix with a single format
    stores_codes     whether weights stay quantized on disk; else the decoded values are stored
    config_key       key of config.json for the description of the quantization
    side_file        file beside config.json with a description that lacks a quant_method; None for no such file
    libraries        names of the libraries that load the base: keys of LIBRARIES
    peft_pools       whether PEFT's use_qalora pools the inputs of layers in the container
    experts          experts that loaders read from the container: "symmetric" for packed weights without zero points,
                     "any" for all, "" for none
    load_arguments   arguments of `from_pretrained` beside the path
    mixed_decoding   line of Python to run after loading several formats in a model, before PEFT sees the weights
    alternatives     containers to offer for a model that the container's loaders do not read, beside decoded values
    """

    module: str
    loaders: str
    quant_types: tuple[str, ...]
    zero_point: str = "int"
    scale_dtypes: tuple[str, ...] = MODEL_DTYPES
    scale_dtype: str | None = None
    keeps_dtype: bool = True
    one_dtype: bool = False
    group_sizes: tuple[int, ...] = ()
    mixed: str = "any"
    fused: tuple[tuple[str, ...], ...] = ()
    stores_codes: bool = True
    config_key: str = "quantization_config"
    side_file: str | None = None
    libraries: tuple[str, ...] = (DEFAULT_LIBRARY.name,)
    peft_pools: bool = False
    experts: str = ""
    load_arguments: str = ""
    mixed_decoding: str = ""
    alternatives: tuple[str, ...] = ()

    @property
    def has_integer_zeros(self) -> bool:
        """Whether groups have integer zero points on disk: a QA-LoRA merge rounds into integers and loses precision."""
        return self.stores_codes and self.zero_point == "int" and not set(_INTEGERS).isdisjoint(self.quant_types)

    def decoded_dtype(self, spec: QuantSpec, dtype: str) -> str:
        """The dtype of a decoded matrix in a loader, for the number format `spec` in a model of `dtype`."""
        return dtype if self.keeps_dtype else spec.scale_dtype

    def holds(self, spec: QuantSpec) -> bool:
        """Whether the container holds matrices of the number format and group size of `spec`."""
        has_size = not self.group_sizes or spec.group_size_or_none in self.group_sizes
        return spec.quant_type in self.quant_types and has_size

    def spec_with_offsets(self, stored: QuantSpec, scale_dtype: str | None) -> QuantSpec:
        """The integer format in the container for codes in the format `stored`, with an offset for each group.

        The dtype of scales is `scale_dtype`; None: the container's default, else float32 for float offsets, else the
        stored dtype. Raises TypeError for a codebook format.
        """
        integers = as_affine(stored)
        exact = "float32" if self.zero_point == "float" else integers.scale_dtype
        scales = scale_dtype or self.scale_dtype or exact
        return replace(integers, symmetric=False, zero_point=self.zero_point, scale_dtype=scales)


_INTEGERS = tuple(name for name, row in FORMATS.items() if row.is_affine)
_CODEBOOKS = tuple(name for name, row in FORMATS.items() if not row.is_affine)

# Sibling modules fused by vLLM, by names in vLLM's model classes.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)

# The default container of a number format is the first row with the format.
LAYOUTS: dict[str, LayoutRow] = {
    "bitsandbytes": LayoutRow(
        "loftq_cli.layouts.bitsandbytes",
        "transformers, PEFT, diffusers",
        ("nf4", "fp4"),
        libraries=("transformers", "diffusers"),
    ),
    "compressed-tensors": LayoutRow(
        "loftq_cli.layouts.compressed_tensors",
        "transformers, PEFT, vLLM",
        _INTEGERS,
        mixed="symmetric",
        fused=_FUSED,
        experts="symmetric",  # transformers 5.24 passes no zero points on to the decoder of experts
        # PEFT reads weights after loading; transformers decodes a model of several schemes in the first forward pass.
        mixed_decoding="model.hf_quantizer.compressor.decompress_model(model)",
        alternatives=("metal",),
    ),
    "gptq": LayoutRow(
        "loftq_cli.layouts.gptq",
        "GPTQModel, PEFT",
        _INTEGERS,
        scale_dtypes=("float16",),
        scale_dtype="float16",
        keeps_dtype=False,
        mixed="none",
        peft_pools=True,
        side_file="quantize_config.json",
        alternatives=("compressed-tensors", "metal"),
    ),
    "metal": LayoutRow(
        "loftq_cli.layouts.metal",
        "transformers",
        ("int2", "int4", "int8"),
        zero_point="float",
        keeps_dtype=False,
        one_dtype=True,
        mixed="none",
        load_arguments='device_map="cpu"',
    ),
    "mlx": LayoutRow(
        "loftq_cli.layouts.mlx",
        "MLX",
        _INTEGERS,
        zero_point="float",
        keeps_dtype=False,
        group_sizes=(32, 64, 128),
        config_key="quantization",
        libraries=(),
    ),
    "dense": LayoutRow(
        *("loftq_cli.layouts.dequantized", "anything", tuple(FORMATS)),
        stores_codes=False,
        libraries=tuple(LIBRARIES),
        experts="any",
    ),
}

# The container of decoded values: every matrix and every merge fits, and every loader reads the result.
DENSE = next(name for name, row in LAYOUTS.items() if not row.stores_codes)
DENSE_HINT = f"--layout {DENSE}"

# Containers with a float offset for every group; a merge chooses the first container that fits.
FLOAT_OFFSETS = tuple(name for name, row in LAYOUTS.items() if row.zero_point == "float")
INTEGER_ZEROS = tuple(name for name, row in LAYOUTS.items() if row.has_integer_zeros)

# The container of packed experts, with a loader for training: the default for mixtures of experts.
PACKED_EXPERTS = next(name for name, row in LAYOUTS.items() if row.experts and row.stores_codes)

CONFIG_KEYS = tuple(dict.fromkeys(row.config_key for row in LAYOUTS.values()))


def load_layout(name: str) -> Layout:
    """Load the container called `name`, a key of LAYOUTS. Raises KeyError for an unknown name.

    >>> load_layout("gptq").parts("h.0.fc.weight")
    ('h.0.fc.qweight', 'h.0.fc.qzeros', 'h.0.fc.scales', 'h.0.fc.g_idx')
    """
    layout = import_module(LAYOUTS[name].module).LAYOUT
    if not isinstance(layout, Layout):
        raise TypeError(f"LAYOUT of {LAYOUTS[name].module} is no Layout")
    return layout


def default_layout(quant_type: str) -> str:
    """The default container of a number format, a key of FORMATS.

    >>> default_layout("nf4"), default_layout("int4")
    ('bitsandbytes', 'compressed-tensors')
    """
    return next(name for name, row in LAYOUTS.items() if quant_type in row.quant_types)


def default_layouts_text() -> str:
    """The default containers of all number formats, as words for help texts."""
    codebooks: dict[str, list[str]] = {}
    for name in _CODEBOOKS:
        codebooks.setdefault(default_layout(name), []).append(name)
    defaults = [f"{layout} for {' and '.join(names)}" for layout, names in codebooks.items()]
    return ", ".join([*defaults, f"{default_layout(_INTEGERS[0])} for integers"])


def mixing_layouts(quant_type: str, *, with_offsets: bool) -> tuple[str, ...]:
    """List the containers, DENSE included, for a model with `quant_type` beside number formats of equal kind;
    `with_offsets`: groups have zero points or float offsets.

    >>> mixing_layouts("int4", with_offsets=True)
    ('mlx', 'dense')
    """
    modes = ("any",) if with_offsets else ("any", "symmetric")
    return tuple(name for name, row in LAYOUTS.items() if quant_type in row.quant_types and row.mixed in modes)


def alternatives_to(layout: str, specs: Collection[QuantSpec]) -> list[str]:
    """List containers to offer in place of `layout` for a model of the number formats `specs`, DENSE last."""
    is_symmetric = all(spec.zero_point_kind == "none" for spec in specs)
    modes = ("any", "symmetric") if is_symmetric else ("any",)
    rows = {name: LAYOUTS[name] for name in LAYOUTS[layout].alternatives}
    holding = [name for name, row in rows.items() if all(map(row.holds, specs))]
    return [*(name for name in holding if len(set(specs)) == 1 or rows[name].mixed in modes), DENSE]


def either(names: Sequence[str]) -> str:
    """Join names as a choice in a sentence.

    >>> either(["metal"]), either(["mlx", "dense"]), either(["gptq", "metal", "dense"])
    ('metal', 'mlx or dense', 'gptq, metal or dense')
    """
    *firsts, last = names
    return f"{', '.join(firsts)} or {last}" if firsts else last


def layout_of_key(key: str) -> str | None:
    """The container with a description under `key` of config.json; None for a key of no or several containers.

    >>> layout_of_key("quantization"), layout_of_key("quantization_config")
    ('mlx', None)
    """
    names = [name for name, row in LAYOUTS.items() if row.config_key == key]
    return names[0] if len(names) == 1 else None
