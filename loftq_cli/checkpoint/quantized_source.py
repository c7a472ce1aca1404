"""Checkpoints whose weights are published in 8 bits: float8 weights with scales in separate tensors are decoded while
reading, and the description of a quantization is found wherever loaders look for one.

value = code · scale of the code's block, in float32, rounded once to the dtype of the model, as transformers decodes
(integrations/finegrained_fp8.py, 5.24) and compressed-tensors does. Blocks at the right and lower edges may be smaller.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.json_files import read_json_object
from loftq_cli.tensors.headers import MODEL_DTYPES, TensorRef

if TYPE_CHECKING:
    import torch

CONFIG_KEY = "quantization_config"
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
_SCALES = ("_scale_inv", "_scale")  # of transformers and DeepSeek; of compressed-tensors and ModelOpt
_SCALE_DTYPES = (*MODEL_DTYPES, "float8_e8m0fnu", "uint8")
_OF_INPUTS = ".input_scale"  # quantizes the inputs of a layer, not the weights
_BLOCK = (128, 128)  # of DeepSeek-V3 and of every published checkpoint in blocks
_SLAB_NUMEL = 1 << 22  # weights decoded at once: 16 MB in float32

# Files beside config.json with a description, of GPTQ, AWQ and ModelOpt. ModelOpt's description is one level down.
_SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
SIDE_FILE = "side_file"  # key of a description from a side file, with the name of the file


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """A float8 weight [out, in] with scales.

    codes   the stored weight
    scale   the stored scales: one for each block of `block`, [ceil(out / rows), ceil(in / columns)], or a single one
    block   rows and columns with a common scale
    dtype   dtype of the decoded weight
    """

    codes: TensorRef
    scale: TensorRef
    block: tuple[int, int]
    dtype: str

    @property
    def ref(self) -> TensorRef:
        """The header of the decoded weight."""
        return replace(self.codes, dtype=self.dtype)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks in each direction."""
        rows, columns = self.codes.shape
        return math.ceil(rows / self.block[0]), math.ceil(columns / self.block[1])

    def decode(self, codes: torch.Tensor, scale: torch.Tensor, start: int) -> torch.Tensor:
        """Decode some rows.

        codes   rows [start, start + n) of the codes, float8 [n, in]
        scale   all scales as stored
        start   number of the first row

        Returns [n, in] in `dtype`. A slab of rows in float32 is in memory at once.
        """
        import torch

        wide = _widen(scale).reshape(self.grid)
        rows, columns = codes.shape
        decoded = torch.empty(rows, columns, dtype=getattr(torch, self.dtype))
        step = max(1, _SLAB_NUMEL // max(1, columns))
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            numbers = torch.arange(start + part.start, start + part.stop) // self.block[0]
            factors = wide[numbers].repeat_interleave(self.block[1], dim=1)[:, :columns]
            decoded[part] = (codes[part].float() * factors).to(decoded.dtype)
        return decoded


def find_scaled_weights(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> dict[str, ScaledWeight]:
    """The float8 weights with scales of a known form, by name.

    tensors   the headers of all stored tensors
    config    the content of config.json; names the block size, and the dtype of the decoded weights (else bfloat16)

    >>> refs = [TensorRef("fc.weight", "float8_e4m3fn", (200, 128), Path("f"))]
    >>> refs.append(TensorRef("fc.weight_scale_inv", "float32", (2, 1), Path("f")))
    >>> find_scaled_weights({ref.name: ref for ref in refs}, {})["fc.weight"].block
    (128, 128)
    """
    dtype, block = _dtype_of(config), _block_of(description_in(config) or {})
    found = {}
    for name, ref in tensors.items():
        if ref.dtype not in FLOAT8 or len(ref.shape) != 2 or 0 in ref.shape:
            continue
        scales = [tensors[name + ending] for ending in _SCALES if name + ending in tensors]
        fitting = _fit_block((ref.shape[0], ref.shape[1]), scales[0].shape, block) if len(scales) == 1 else None
        if fitting is not None and scales[0].dtype in _SCALE_DTYPES:
            found[name] = ScaledWeight(ref, scales[0], fitting, dtype)
    return found


def without_companions(tensors: Mapping[str, TensorRef], scaled: Mapping[str, ScaledWeight]) -> dict[str, TensorRef]:
    """The headers of a checkpoint in the view of a reader: decoded weights, without their scales.

    The scales of a layer's inputs go with the scales of the weight: a decoded layer computes with inputs as they are.
    """
    gone = {weight.scale.name for weight in scaled.values()}
    gone |= {name.removesuffix(".weight") + _OF_INPUTS for name in scaled}
    return {name: scaled[name].ref if name in scaled else ref for name, ref in tensors.items() if name not in gone}


def describe(scaled: Mapping[str, ScaledWeight]) -> str | None:
    """The sentence about decoded weights for a plan and a report; None for none.

    >>> describe({}) is None
    True
    """
    if not scaled:
        return None
    kinds = {(weight.codes.dtype, _name_block(weight)) for weight in scaled.values()}
    text = " and ".join(f"{dtype} with a scale for {block}" for dtype, block in sorted(kinds))
    dtypes = " and ".join(sorted({weight.dtype for weight in scaled.values()}))
    return f"{len(scaled)} weights are {text}: read as code · scale, in {dtypes}; errors count from these numbers"


def description_in(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The description of a quantization in a config, or in a part of the config, like `text_config`; None without one.

    >>> description_in({"text_config": {"quantization_config": {"quant_method": "fp8"}}})
    {'quant_method': 'fp8'}
    """
    if config.get(CONFIG_KEY):
        value = config[CONFIG_KEY]
        return value if isinstance(value, dict) else None
    parts = (value for value in config.values() if isinstance(value, dict))
    return next((found for part in parts if (found := description_in(part))), None)


def settle_description(
    config: Mapping[str, Any], folder: Path | None, names: Collection[str], scaled: Collection[str]
) -> dict[str, Any]:
    """A config with the description of the quantization at the top, where loaders and containers read it.

    config   the content of config.json
    folder   the folder of config.json, with side files of quantizers; None for no folder
    names    names of all tensors in the view of a reader
    scaled   names of decoded weights: their description is dropped, since a reader sees weights in full precision

    A side file counts only beside packed weights, `qweight` or a `weight_scale`: some repositories hold the file beside
    weights in full precision.
    """
    found, is_packed = description_in(config), any(map(_is_packed, names))
    if found is None and folder is not None and is_packed:
        found = next(_side_files_in(folder), None)
    if not scaled and (found is None or config.get(CONFIG_KEY)):
        return dict(config)
    settled = _without_description(config)
    return settled if found is None or (scaled and not is_packed) else {**settled, CONFIG_KEY: dict(found)}


def decoded_chunks(
    weight: ScaledWeight, load_codes: Callable[[int, int], torch.Tensor], scale: torch.Tensor, chunk_nbytes: int
) -> Iterator[memoryview]:
    """Yield the bytes of a decoded weight, row-major, in pieces of at most `chunk_nbytes`, a slab of rows in memory.

    load_codes   first row, last row + 1 -> the codes of some rows
    scale        all scales as stored
    """
    import torch

    rows, columns = weight.codes.shape
    step = max(1, _SLAB_NUMEL // max(1, columns))
    for start in range(0, rows, step):
        slab = weight.decode(load_codes(start, min(start + step, rows)), scale, start)
        data = slab.view(-1).view(torch.uint8).numpy().data
        yield from (data[first : first + chunk_nbytes] for first in range(0, len(data), chunk_nbytes))


def sha256_of(chunks: Iterable[memoryview]) -> str:
    """sha256 of the bytes of a tensor.

    >>> sha256_of([memoryview(b"")])[:8]
    'e3b0c442'
    """
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _widen(scale: torch.Tensor) -> torch.Tensor:
    """Scales in float32. A byte is an exponent, 2^(byte - 127), as in float8_e8m0fnu."""
    import torch

    if scale.dtype == torch.uint8:
        return (scale.float() - 127.0).exp2()
    return scale.float()


def _fit_block(
    shape: tuple[int, int], scales: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The block size that gives `scales` for a weight of `shape`; None for scales of an unknown form."""
    rows, columns = shape
    if math.prod(scales) == 1:
        return rows, columns
    if scales in ((rows,), (rows, 1)):
        return 1, columns
    for height, width in (block, _BLOCK) if block else (_BLOCK,):
        if scales == (math.ceil(rows / height), math.ceil(columns / width)):
            return height, width
    if len(scales) == 2 and 0 not in scales and rows % scales[0] == 0 and columns % scales[1] == 0:
        return rows // scales[0], columns // scales[1]
    return None


def _block_of(description: Mapping[str, Any]) -> tuple[int, int] | None:
    value = description.get("weight_block_size")
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return value[0], value[1]
    return None


def _name_block(weight: ScaledWeight) -> str:
    rows, columns = weight.codes.shape
    if weight.block == (rows, columns):
        return "each matrix"
    if weight.block == (1, columns):
        return "each row"
    return f"each block of {weight.block[0]} by {weight.block[1]}"


def _dtype_of(config: Mapping[str, Any]) -> str:
    """The dtype of a model's computations by its config; bfloat16 for a config without the dtype."""
    parts = (config, *(value for value in config.values() if isinstance(value, dict)))
    names = (str(part.get(key, "")).removeprefix("torch.") for part in parts for key in ("dtype", "torch_dtype"))
    return next((name for name in names if name in MODEL_DTYPES), "bfloat16")


def _is_packed(name: str) -> bool:
    return name.endswith((".qweight", ".weight_scale", ".weight_scale_2", ".weight_scale_inv", ".weight_packed"))


def _side_files_in(folder: Path) -> Iterator[dict[str, Any]]:
    for name in _SIDE_FILES:
        if (folder / name).is_file():
            values = read_json_object(folder / name)
            nested = values.get("quantization")
            yield {SIDE_FILE: name, **(nested if isinstance(nested, dict) else values)}


def _without_description(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_description(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != CONFIG_KEY
    }
