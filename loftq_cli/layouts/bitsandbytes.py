"""bitsandbytes' 4-bit container, as transformers loads pre-quantized weights: nothing is quantized again at load.

Each weight has codes, block constants and a JSON blob; spaces pad the blob to the size that the plan computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.json_files import parse_json_object
from loftq_cli.errors import InputError, UsageError
from loftq_cli.layouts.layout import DENSE_HINT, LAYOUTS, Fit, Layout, ModelFacts, StoredMatrix, kept_modules
from loftq_cli.layouts.stored_parts import check_part, file_of
from loftq_cli.layouts.stored_tensors import CodeRows, StoredTensors
from loftq_cli.quant.formats import QuantizedTensor, QuantSpec, as_codebook, as_codebook_tensor
from loftq_cli.tensors.headers import MODEL_DTYPES, OutTensor
from loftq_cli.tensors.matrices import CodebookTensor, NestedAbsmax
from loftq_cli.tensors.specs import CodebookSpec

if TYPE_CHECKING:
    from pathlib import Path

    import torch

NESTED_BLOCK_SIZE = 256  # bitsandbytes implements no other size
STATE_PREFIX = ".quant_state.bitsandbytes__"

# "-1.17549435e-38": nine digits give every float32 back exactly.
_OFFSET_WIDTH = 15
# The CPU kernels of bitsandbytes read 32 rows at a time; a model with a broken group of rows does not run.
_ROW_MULTIPLE = 32
_PLAIN_NAME = re.compile(r"[\w.\-]+")  # of a module: safe as an expression
_MAX_STATE_NBYTES = 10_000  # bitsandbytes writes 200

# bitsandbytes' numbers for the values of an ascending table: FP4 values are numbered by sign, exponent and mantissa.
_NUMBERS = {
    "nf4": tuple(range(16)),
    "fp4": (0b1011, 0b1010, 0b1101, 0b1100, 0b1111, 0b1110, 0b1001, 0b0000)
    + (0b1000, 0b0001, 0b0110, 0b0111, 0b0100, 0b0101, 0b0010, 0b0011),
}
_IDENTITY = bytes(range(256))


class BitsandbytesLayout(Layout):
    """bitsandbytes' 4-bit codebooks."""

    name = "bitsandbytes"
    mark = STATE_PREFIX

    def fit(self, spec: QuantSpec, shape: tuple[int, int], *, transposed: bool) -> Fit:
        """Accept rows of whole blocks in multiples of 32 rows: loaders on a CPU read wrong scales otherwise, or stop.

        The fallback is a block size of 32, then full precision.
        """
        del transposed  # loaders turn a Conv1D into a linear
        codebook, (out_features, in_features) = as_codebook(spec), shape
        if out_features % _ROW_MULTIPLE:
            return Fit(
                None, f"{out_features} rows are not a multiple of {_ROW_MULTIPLE}, which bitsandbytes needs on a CPU"
            )
        size = codebook.block_size
        if in_features % size == 0:
            return Fit(codebook)
        if in_features % 32 == 0:
            reason = f"block size 32: rows of {in_features} are not whole blocks of {size}"
            return Fit(replace(codebook, block_size=32), reason)
        return Fit(None, f"rows of {in_features} are not whole blocks of {size} or 32, and loaders misread them")

    def planned(self, matrix: StoredMatrix) -> tuple[OutTensor, ...]:
        """Plan codes uint8 [ceil(numel / 2), 1], absmax, the table of values float32 [16] and the JSON blob; double
        quant adds nested absmax and a nested table.
        """
        name, spec = matrix.name, as_codebook(matrix.spec)
        numel = matrix.shape[0] * matrix.shape[1]
        n_blocks = -(-numel // spec.block_size)
        tensors = [
            OutTensor(name, "uint8", ((numel + 1) // 2, 1)),
            OutTensor(f"{name}.absmax", "uint8" if spec.double_quant else "float32", (n_blocks,)),
            OutTensor(f"{name}.quant_map", "float32", (16,)),
            OutTensor(f"{name}{STATE_PREFIX}{spec.codebook}", "uint8", (len(_encode_state(matrix, 0.0)),)),
        ]
        if spec.double_quant:
            tensors += [
                OutTensor(f"{name}.nested_absmax", "float32", (-(-n_blocks // spec.nested_block_size),)),
                OutTensor(f"{name}.nested_quant_map", "float32", (256,)),
            ]
        return tuple(tensors)

    def pack(self, matrix: StoredMatrix, quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Pack the codes and constants into the tensors of `planned`."""
        import torch

        weight = as_codebook_tensor(quantized)
        name, absmax, codebook = matrix.name, weight.absmax, weight.spec.codebook
        tensors = {f"{name}.quant_map": _build_table(codebook)}
        if weight.packed.numel():
            tensors[name] = _renumber(weight.packed, _byte_maps(codebook)[0]).view(-1, 1)
        offset = 0.0
        if isinstance(absmax, NestedAbsmax):
            offset = float(absmax.offset)
            tensors[f"{name}.absmax"] = absmax.codes
            tensors[f"{name}.nested_absmax"] = absmax.absmax
            tensors[f"{name}.nested_quant_map"] = absmax.code_map
        else:
            tensors[f"{name}.absmax"] = absmax
        state = _encode_state(matrix, offset)
        tensors[f"{name}{STATE_PREFIX}{codebook}"] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
        return tensors

    def code_rows(self, matrix: StoredMatrix) -> CodeRows | None:
        """Locate the codes: two weights a byte, a byte a row of the stored tensor."""
        if matrix.transposed:
            return None
        columns, (to_numbers, to_codes) = matrix.shape[1], _byte_maps(as_codebook(matrix.spec).codebook)
        return CodeRows(
            name=matrix.name,
            span=lambda part: slice(part.start * columns // 2, -(-part.stop * columns // 2)),
            pack=lambda codes: _renumber(codes, to_numbers).view(-1, 1),
            unpack=lambda stored: _renumber(stored.view(-1), to_codes),
        )

    def quantized_names(self, stored: StoredTensors) -> list[str]:
        """List the weights with a JSON blob beside the codes."""
        return [key.partition(STATE_PREFIX)[0] for key in stored.refs if STATE_PREFIX in key]

    def stored_matrix(self, name: str, stored: StoredTensors, *, transposed: bool) -> StoredMatrix:
        """Read shape and format of the matrix called `name` from headers and the quant_state.

        Raises InputError for parts that bitsandbytes and the tool would decode differently.
        """
        for part in (name, f"{name}.absmax", f"{name}.quant_map"):
            if part not in stored.refs:
                raise InputError("is missing, and its quant_state is there", file=stored.path, tensor=part)
        file, state = file_of(name, stored), _read_stored_state(name, stored)
        spec = CodebookSpec(state["quant_type"], state["blocksize"], "nested_blocksize" in state)
        matrix = StoredMatrix(name, (state["shape"][0], state["shape"][1]), spec, state["dtype"], transposed)
        for tensor in self.planned(matrix):
            # Loaders flatten codes: [n, 1], [1, n] and [n] are right.
            if STATE_PREFIX not in tensor.name:
                check_part(tensor, stored, file, asks="its quant_state", flat=tensor.name == name)
        return matrix

    def parts(self, name: str) -> tuple[str, ...]:
        """List all tensor names of the parts of a weight called `name`, first the codes."""
        suffixes = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        states = [f"{name}{STATE_PREFIX}{codebook}" for codebook in _NUMBERS]
        return (name, *(f"{name}.{suffix}" for suffix in suffixes), *states)

    def unpack(self, matrix: StoredMatrix, stored: StoredTensors, *, has_codes: bool = True) -> QuantizedTensor:
        """Unpack a checked `matrix`. Raises InputError for a stored table that contradicts the quant_type."""
        import torch

        name, spec, load = matrix.name, as_codebook(matrix.spec), stored.load
        # Some loaders use the stored table, and some an internal table: two different tables leave no right answer.
        if not torch.equal(load(f"{name}.quant_map"), _build_table(spec.codebook)):
            message = "holds a table that is not the one of its quant_type"
            raise InputError(message, file=file_of(name, stored), tensor=f"{name}.quant_map")
        absmax: torch.Tensor | NestedAbsmax = load(f"{name}.absmax")
        if spec.double_quant:
            state = _read_stored_state(name, stored)
            absmax = NestedAbsmax(
                load(f"{name}.absmax"),
                load(f"{name}.nested_absmax"),
                load(f"{name}.nested_quant_map"),
                torch.tensor(float(state["nested_offset"]), dtype=torch.float32),
            )
        packed = torch.empty(0, dtype=torch.uint8)
        if has_codes:
            packed = _renumber(load(name).view(-1), _byte_maps(spec.codebook)[1])
        return CodebookTensor(packed, absmax, spec, matrix.shape, matrix.dtype)

    def model_config(self, config: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """Add a `quantization_config` for transformers to the model's config."""
        return {
            **config,
            "quantization_config": {
                "quant_method": self.name,
                "load_in_4bit": True,
                "load_in_8bit": False,
                "bnb_4bit_quant_type": facts.spec.quant_type,
                "bnb_4bit_use_double_quant": as_codebook(facts.spec).double_quant,
                "bnb_4bit_compute_dtype": facts.dtype,
                "bnb_4bit_quant_storage": "uint8",
                "llm_int8_skip_modules": _list_skip_modules(facts),
            },
        }


LAYOUT = BitsandbytesLayout()


def _read_stored_state(name: str, stored: StoredTensors) -> dict[str, Any]:
    """Read and check the JSON blob of a weight. Raises InputError for no blob, two blobs and a wrong blob."""
    file = file_of(name, stored)
    states = [part for part in LAYOUT.parts(name) if STATE_PREFIX in part and part in stored.refs]
    if len(states) != 1:
        message = "has two quant_states" if states else "has a quant_state of a type that we do not know"
        raise InputError(message, file=file, tensor=name)
    nbytes = stored.refs[states[0]].nbytes
    if nbytes > _MAX_STATE_NBYTES:
        raise InputError(f"has {nbytes} bytes, and a quant_state is small", file=file, tensor=states[0])
    state = read_state(name, stored.raw(states[0]), file)
    if states[0] != f"{name}{STATE_PREFIX}{state['quant_type']}":
        message = f"says quant_type {state['quant_type']}, and its name another one"
        raise InputError(message, file=file, tensor=states[0])
    return state


def read_state(name: str, data: bytes, file: Path) -> dict[str, Any]:
    """Read and check a weight's JSON blob.

    name   tensor name of the weight, for errors
    data   the bytes of the blob
    file   the file of the blob, for errors

    Raises InputError for an absent key, and for a value out of range.

    >>> from pathlib import Path
    >>> data = b'{"quant_type": "nf4", "dtype": "float16", "blocksize": 64, "shape": [64, 64]}'
    >>> read_state("h.0.fc.weight", data, Path("model.safetensors"))["blocksize"]
    64
    """
    state = parse_json_object(data, file=file, what=f"the quant_state of {name}")

    def check(condition: bool, message: str) -> None:
        if not condition:
            raise InputError(f"its quant_state {message}", file=file, tensor=name)

    quant_type, shape = state.get("quant_type"), state.get("shape")
    codebooks = LAYOUTS["bitsandbytes"].quant_types
    check(quant_type in codebooks, f"has quant_type {quant_type!r}, of which we read {', '.join(codebooks)}")
    check(state.get("dtype") in MODEL_DTYPES, f"has dtype {state.get('dtype')!r}")
    check(type(state.get("blocksize")) is int and 2 <= state["blocksize"] <= 4096, "has no valid blocksize")
    check(
        isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**40 for n in shape),
        "has no valid shape",
    )
    if "nested_blocksize" in state:
        check(state["nested_blocksize"] == NESTED_BLOCK_SIZE, f"has a nested_blocksize other than {NESTED_BLOCK_SIZE}")
        check(type(state.get("nested_offset")) in (int, float), "has no valid nested_offset")
    return state


def _build_table(codebook: str) -> torch.Tensor:
    """Build the table of values, float32 [16], in the order of bitsandbytes' numbers."""
    import torch

    from loftq_cli.triton_kernels.codebook.contract import codebook_table

    numbers = _NUMBERS[codebook]
    return codebook_table(codebook)[torch.tensor([numbers.index(i) for i in range(16)])]


@cache
def _byte_maps(codebook: str) -> tuple[bytes, bytes]:
    """Two tables of 256 bytes: from a byte of two codes to a byte of two numbers, and back."""
    numbers = _NUMBERS[codebook]
    to_numbers = bytes(high << 4 | low for high in numbers for low in numbers)
    return to_numbers, bytes(map(to_numbers.index, range(256)))


def _renumber(packed: torch.Tensor, pairs: bytes) -> torch.Tensor:
    """Replace every byte b of `packed`, uint8 [n], by `pairs[b]`; no copy if `pairs` changes no byte."""
    import torch

    if pairs == _IDENTITY or not packed.numel():
        return packed
    return torch.frombuffer(bytearray(packed.numpy().data).translate(pairs), dtype=torch.uint8)


def _list_skip_modules(facts: ModelFacts) -> list[str]:
    """List all linears in full precision: an unlisted linear loads silently and fails in the first forward pass."""
    if facts.library.skips_by_part:
        return _check_told_apart(kept_modules(facts), facts)
    return [_disambiguate(name, facts.quantized_modules) for name in kept_modules(facts)]


def _check_told_apart(kept: list[str], facts: ModelFacts) -> list[str]:
    """Return `kept`. Raises UsageError for a layer that the library would not tell from a quantized layer."""
    library = facts.library
    for entry in kept:
        module = next((module for module in facts.quantized_modules if library.skips(entry, module)), None)
        if module is not None:
            last = module.rpartition(".")[2]
            message = f"{entry} stays in full precision, and {library.name} would take {module} for it"
            raise UsageError(message, hint=rf"--exclude '(^|\.){last}$' keeps both, or {DENSE_HINT}")
    return kept


def _disambiguate(name: str, quantized: Any) -> str:
    """Return `name`, or a pattern for `name` alone if transformers' suffix match would skip a quantized module too, or
    would take a name of a stranger for an expression.
    """
    if _PLAIN_NAME.fullmatch(name):
        clash = any(module.endswith(name) or re.match(rf"{name}(?:\.|$)", module) for module in quantized)
        if not clash:
            return name
    return f"^{re.escape(name)}$"


def _encode_state(matrix: StoredMatrix, offset: float) -> bytes:
    spec = as_codebook(matrix.spec)
    fields: dict[str, Any] = {
        "quant_type": spec.codebook,
        "blocksize": spec.block_size,
        "dtype": matrix.dtype,
        "shape": list(matrix.shape),
    }
    text = json.dumps(fields)
    if not spec.double_quant:
        return text.encode()
    nested = f', "nested_blocksize": {spec.nested_block_size}, "nested_dtype": "float32", "nested_offset": '
    return (text[:-1] + nested + f"{offset:.9g}" + "}").ljust(len(text) + len(nested) + _OFFSET_WIDTH).encode()
