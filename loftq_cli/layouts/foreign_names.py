"""Number formats as other tools name the formats, and the nearest choice here: hints for mistyped names."""

from __future__ import annotations

import re

_HINTS = {
    "awq": "AWQ chooses scales by a text; here: --quant-type int4 --text FILE",
    "gptq": "GPTQ is a container here: --quant-type int4 --layout gptq",
    "hqq": "HQQ searches zero points without a text; here: --quant-type int4",
    "exl2": "bits per layer under a bound; here: --quant-type int4 --target-bpw 3.5",
    "bnb": "bitsandbytes' format is --quant-type nf4",
    "bnb-4bit": "bitsandbytes' format is --quant-type nf4",
    "bitsandbytes": "bitsandbytes is a container; its format is --quant-type nf4",
    "gguf": "GGUF is not written; an exact 16-bit merge for llama.cpp's converter: loftq merge --dtype float32",
    "mlx": "MLX is a container here: --quant-type int4 --layout mlx",
    "fp8": "8 bits are --quant-type int8",
    "nvfp4": "4-bit floating point is --quant-type fp4, in bitsandbytes' container",
    "mxfp4": "4-bit floating point is --quant-type fp4, in bitsandbytes' container",
}
_LLAMA_CPP = re.compile(r"i?q([1-8])_\w+", re.IGNORECASE)
_COUNT_OF_BITS = re.compile(r"(?:w|int|q|uint)?([2348])(?:-?bits?|a16|b)?", re.IGNORECASE)
_NEAREST = {"1": "int2", "2": "int2", "3": "int3", "4": "nf4 or int4", "5": "int4 or int8", "6": "int8", "8": "int8"}


def foreign_hint(name: str) -> str | None:
    """The nearest choice of this tool for a number format that another tool calls `name`; None for an unknown name.

    >>> foreign_hint("q4_k_m"), foreign_hint("8bit")
    ("q4_k_m is llama.cpp's and not written; the nearest is --quant-type nf4 or int4", '--quant-type int8')
    >>> foreign_hint("colour") is None
    True
    """
    if (hint := _HINTS.get(name.lower())) is not None:
        return hint
    if (found := _LLAMA_CPP.fullmatch(name)) is not None:
        nearest = _NEAREST.get(found[1], "int8")
        return f"{name} is llama.cpp's and not written; the nearest is --quant-type {nearest}"
    if (found := _COUNT_OF_BITS.fullmatch(name)) is not None:
        return f"--quant-type {_NEAREST[found[1]]}"
    return None
