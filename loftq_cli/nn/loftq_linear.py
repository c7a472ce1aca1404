"""The linears of LoftQ and QLoRA: the adapter reads every input. `from_linear` makes a module of an existing linear."""

from __future__ import annotations

from typing import Any, Self, TypedDict, Unpack

from torch import nn

from loftq_cli.nn.adapted_linear import AdaptedLinear
from loftq_cli.quant.formats import FORMATS

_BLOCK_SIZE, _DOUBLE_QUANT = 64, True


class AffineKeywords(TypedDict, total=False):
    """More options of `from_linear`, named as the command line's options.

    symmetric     integers without zero points
    scale_dtype   dtype of integer scales: "float32", "bfloat16" or "float16"; the dtype of the weight by default
    scales        choice of the constants: "absmax" or "search"
    layout        a container; the container decides details of the number format ("mlx" has float offsets)
    start         first adapter of the alternation: "zero" or "principal"
    rounds        rounds of refinement after the alternation of a joint fit
    keep_base     share of the cost that counts the base alone, from 0 (the default) to 1
    """

    symmetric: bool | None
    scale_dtype: str | None
    scales: str | None
    layout: str | None
    start: str | None
    rounds: int | None
    keep_base: float | None


class LinearOptions(AffineKeywords, total=False):
    """AffineKeywords, and the group size of integer formats.

    group_size    neighbouring inputs with a common scale: 16, 32, 64 (the default), ..., 1024
    """

    group_size: int | None


class LoftQLinear(AdaptedLinear):
    """LoftQ (arXiv 2310.08659): the adapter starts as the best approximation of the quantization error."""

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        iterations: int | None = 5,
        quant_type: str = "nf4",
        double_quant: bool = _DOUBLE_QUANT,
        block_size: int = _BLOCK_SIZE,
        freeze_base: bool = True,
        fit: str | None = "loftq",
        svd: str = "fast",
        rslora: bool = False,
        adapter_dtype: str = "float32",
        name: str = "",
        seed: int = 0,
        cache: bool = False,
        **options: Unpack[LinearOptions],
    ) -> Self:
        """A LoftQLinear with the numbers of `loftq quantize --fit loftq --iterations 5` for the matrix.
        `linear` does not change. The module has the device, the mode and the weight dtype of `linear`.

        linear         nn.Linear, or transformers' Conv1D, with a weight [out, in] of 16 bits or more
        rank           columns of lora_B
        alpha          the scaling is alpha / rank, or alpha / √rank with `rslora`; None for rank
        iterations     alternations of quantizing and fitting the adapter; None for the command line's number
        quant_type     "nf4" or "fp4", or "int2", "int3", "int4", "int8"
        double_quant   8-bit block constants, for a codebook
        block_size     weights with a common constant, for a codebook; integers have a group_size
        freeze_base    False trains the full-precision weight, see FakeQuantizedLinear, and the bias too
        fit            "loftq", the alternation of the paper, or "joint", the command line's default
        svd            "fast", "faithful" or "exact"
        adapter_dtype  dtype of lora_A and lora_B: "float32", "bfloat16" or "float16"
        name, seed     name of the tensor and seed of the recipe: random draws depend on both
        cache          the base keeps the decoded weight
        options        see LinearOptions

        freeze_base=False trains the matrix quantized by the last alternation: W − s·B·A of the alternation before.
        Rows of 96 get blocks of 32, because the default container does; layout="dense" takes every block size.

        Raises UsageError for another module than a full-precision linear with memory, an unknown or wrong option, a
        rank above min(out, in), and groups unfit for `in`; NumericError for NaN, infinite or too large weights;
        InputError for factors beyond `adapter_dtype`.

        >>> layer = LoftQLinear.from_linear(nn.Linear(128, 64), rank=4)
        >>> sorted(name for name, parameter in layer.named_parameters() if parameter.requires_grad)
        ['lora_A', 'lora_B']
        >>> layer.base_layer
        QuantizedLinear(in_features=128, out_features=64, bias=True, nf4, block 64)
        """
        recipe: dict[str, Any] = {
            **options,
            **_format(quant_type, double_quant, block_size),
            "method": "loftq",
            "rank": rank,
            "alpha": alpha,
            "iterations": iterations,
            "fit": fit,
            "svd": svd,
            "rslora": rslora,
            "adapter_dtype": adapter_dtype,
            "seed": seed,
        }
        return cls._from_linear(linear, recipe, name=name, freeze_base=freeze_base, cache=cache)


class QLoRALinear(AdaptedLinear):
    """QLoRA (arXiv 2305.14314): the adapter starts by adding nothing."""

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        quant_type: str = "nf4",
        double_quant: bool = _DOUBLE_QUANT,
        block_size: int = _BLOCK_SIZE,
        freeze_base: bool = True,
        rslora: bool = False,
        adapter_dtype: str = "float32",
        name: str = "",
        seed: int = 0,
        cache: bool = False,
        **options: Unpack[LinearOptions],
    ) -> Self:
        """A QLoRALinear with the numbers of `loftq quantize --method qlora` for the matrix: lora_A uniform, lora_B
        zero. `linear` does not change.

        Parameters and errors are described at `LoftQLinear.from_linear`. QLoRA fits nothing, and has no options for a
        fit.

        >>> layer = QLoRALinear.from_linear(nn.Linear(128, 64), rank=4, quant_type="int4", group_size=32)
        >>> bool(layer.lora_B.any())
        False
        """
        recipe: dict[str, Any] = {
            **options,
            **_format(quant_type, double_quant, block_size),
            "method": "qlora",
            "rank": rank,
            "alpha": alpha,
            "rslora": rslora,
            "adapter_dtype": adapter_dtype,
            "seed": seed,
        }
        return cls._from_linear(linear, recipe, name=name, freeze_base=freeze_base, cache=cache)


def _format(quant_type: str, double_quant: bool, block_size: int) -> dict[str, Any]:
    """The number format as a recipe takes a format: an integer format gets no defaults of a codebook."""
    options: dict[str, Any] = {"double_quant": double_quant, "block_size": block_size}
    row = FORMATS.get(quant_type) if isinstance(quant_type, str) else None
    if row is not None and row.is_affine:
        defaults = {"double_quant": _DOUBLE_QUANT, "block_size": _BLOCK_SIZE}
        options = {name: value for name, value in options.items() if value != defaults[name]}
    return {"quant_type": quant_type, **options}
