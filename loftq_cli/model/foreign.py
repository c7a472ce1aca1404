"""Quantized weights in a format that the tool does not read, known by dtypes and names, whatever a config says. Copied
as they are, the codes would lose their scales: a loader would compute with the codes. The same for the tensors of an
adapter beside the weights: a loader would compute without the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from loftq_cli.errors import SOURCE_HINT, UnreadFormat, UsageError
from loftq_cli.tensors.headers import WEIGHT_DTYPES, TensorRef

# Last part of a name -> the format with tensors of the name. No layer in full precision has such tensors.
_PARTS = {
    "weight_scale_2": "NVFP4 of ModelOpt",
    "weight_global_scale": "NVFP4 of compressed-tensors",
    "weight_packed": "a packed form of compressed-tensors",
    "weight_scale_inv": "FP8 in blocks",
    "weight_scale": "FP8, INT8 or NVFP4",
    "scale_weight": "scaled FP8 of ComfyUI",
    "SCB": "LLM.int8 of bitsandbytes",
    "qweight": "GPTQ or AWQ",
}
# Ending of a name -> the endings of tensors beside, one of which makes the tensor a part, and the format.
_BESIDE = {
    "_blocks": (("_scales",), "MXFP4"),
    "_scale_inv": (("",), "FP8 in blocks"),
    "_scale_2": (("",), "NVFP4 of ModelOpt"),
    "_scale": (("", "_packed"), "FP8 or NVFP4"),
}
# Tensors that PEFT adds to a model: a checkpoint with the tensors is a model in training, saved as a whole.
_ADAPTER = re.compile(r"(?:^|\.)lora_(?:[AB]|embedding_[AB]|magnitude_vector)(?:\.|$)")
_MAX_NAMES = 3  # more names hide the sentence around them


def foreign_parts(tensors: Mapping[str, TensorRef]) -> Iterator[tuple[str, str]]:
    """Yield the name of each tensor of a weight in a format that is not read, and a sentence about the tensor.

    tensors   the headers of a checkpoint, without the parts of weights that the tool reads

    >>> from pathlib import Path
    >>> codes = TensorRef("fc.weight", "float8_e4m3fn", (64, 64), Path("model.safetensors"))
    >>> list(foreign_parts({"fc.weight": codes}))
    [('fc.weight', 'is float8_e4m3fn: codes of a quantized weight in a format that is not read')]
    """
    for name, ref in tensors.items():
        form = _PARTS.get(name.rpartition(".")[2]) or _form_beside(name, tensors)
        if form is not None:
            yield name, f"is a part of a weight in {form}, which is not read"
        elif _has_codes(ref):
            yield name, f"is {ref.dtype}: codes of a quantized weight in a format that is not read"


def check_merged(tensors: Mapping[str, TensorRef]) -> None:
    """Raises UsageError for a checkpoint with the tensors of an adapter beside the weights: the model without the
    adapter is another model.

    >>> check_merged({})
    """
    for name, ref in tensors.items():
        if _ADAPTER.search(name):
            message = "belongs to an adapter that is not merged"
            hint = "merge_and_unload() and save_pretrained() of PEFT write a model to convert"
            raise UsageError(message, file=ref.file, tensor=name, hint=hint)


def check_read(tensors: Mapping[str, TensorRef]) -> None:
    """Raises UnreadFormat, naming the first tensor, for a quantized weight in a format that is not read.

    tensors   as for `foreign_parts`

    >>> check_read({})
    """
    for name, text in foreign_parts(tensors):
        raise UnreadFormat(text, file=tensors[name].file, tensor=name, hint=SOURCE_HINT)


def foreign_note(tensors: Mapping[str, TensorRef]) -> str | None:
    """The note about all tensors of `foreign_parts`; None without any.

    >>> foreign_note({}) is None
    True
    """
    names: Collection[str] = [name for name, _ in foreign_parts(tensors)]
    if not names:
        return None
    listed = ", ".join(list(names)[:_MAX_NAMES]) + (f" and {len(names) - _MAX_NAMES} more" * (len(names) > _MAX_NAMES))
    return f"quantized in a format that is not read, so quantize, calibrate and merge refuse the model: {listed}"


def _has_codes(ref: TensorRef) -> bool:
    """Whether a weight of two or more dimensions holds codes by its dtype. Complex numbers are numbers."""
    is_weight = ref.name.endswith(".weight") and len(ref.shape) >= 2
    return is_weight and ref.dtype not in WEIGHT_DTYPES and not ref.dtype.startswith("complex")


def _form_beside(name: str, tensors: Mapping[str, TensorRef]) -> str | None:
    for ending, (others, form) in _BESIDE.items():
        if name.endswith(ending) and any(name.removesuffix(ending) + other in tensors for other in others):
            return form
    return None
