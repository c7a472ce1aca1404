"""The linears of LoftQ and QLoRA, whose adapter reads every input: what each method makes of an existing linear."""

from __future__ import annotations

from typing import Any, Self, TypedDict, Unpack

from torch import nn

from loftq_cli.nn.adapted_linear import AdaptedLinear
from loftq_cli.quant.formats import FORMATS

_BLOCK_SIZE, _DOUBLE_QUANT = 64, True


class AffineOptions(TypedDict, total=False):
    """Options of the command line that `from_linear` takes by their names, beside its own parameters.

    symmetric     integers without zero points
    scale_dtype   of the scales of integers: "float32", "bfloat16" or "float16"; by default that of the weight
    scales        how constants are chosen: "absmax" or "search"
    layout        the container whose number format is taken, as "mlx" with float offsets
    start         of the alternation: "zero" or "principal"
    rounds        of refinement after the alternation, of a joint fit
    """

    symmetric: bool | None
    scale_dtype: str | None
    scales: str | None
    layout: str | None
    start: str | None
    rounds: int | None


class LinearOptions(AffineOptions, total=False):
    """The same for the methods that take codebooks and integers.

    group_size    neighbouring inputs that share a scale, of integers: 16, 32, 64 (the default), ..., 1024
    """

    group_size: int | None


class LoftQLinear(AdaptedLinear):
    """LoftQ (arXiv 2310.08659): the adapter starts as the best approximation of what quantization lost."""

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
        """The LoftQ module of an existing linear, with the numbers that `loftq quantize --fit loftq --iterations 5`
        writes for the matrix. `linear` stays as it is; device, mode and dtype of its weight are those of the module.

        linear         nn.Linear, or transformers' Conv1D, with a weight [out, in] of 16 bits or more
        rank           columns of lora_B
        alpha          the scaling is alpha / rank, or alpha / √rank with `rslora`; None for rank
        iterations     alternations of quantizing and fitting the adapter; None for as many as the fit is good for
        quant_type     "nf4" or "fp4", or "int2", "int3", "int4", "int8"
        double_quant   whether the constants of blocks are 8-bit themselves, of a codebook
        block_size     weights that share a constant, of a codebook; `group_size` is the same of integers
        freeze_base    False trains the base too: its full-precision weight, see FakeQuantizedLinear, and its bias
        fit            "loftq", the alternation of the paper, or "joint", the command line's default
        svd            "fast", "faithful" or "exact"
        adapter_dtype  of lora_A and lora_B
        name, seed     of the tensor and of the recipe: random draws depend on both, as on the command line
        cache          whether the base keeps its decoded weight
        options        see LinearOptions

        With freeze_base=False the weight that trains is the matrix that the last alternation quantizes, and the adapter
        that of what is lost by that.
        A container of the command line may hold other blocks: rows of 96 are whole blocks of 32 in bitsandbytes, and
        have these here too. layout="dense" takes every block size as it is.

        Raises UsageError for a module that is no such linear, on the meta device or quantized already, an unknown or
        wrong option, a rank above min(out, in), and groups that do not divide `in`; NumericError for NaN, infinite or
        too large weights; InputError for factors that are not finite in `adapter_dtype`.

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
        """The QLoRA module of an existing linear, with the numbers that `loftq quantize --method qlora` writes for the
        matrix: lora_A uniform, lora_B zero. `linear` stays as it is.

        Parameters, and what is raised, are those of `LoftQLinear.from_linear`; nothing is fitted, so that options of
        the fit mean nothing.

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
    """The number format as a recipe has it: integers have no blocks, and defaults are nothing that anybody named."""
    options: dict[str, Any] = {"double_quant": double_quant, "block_size": block_size}
    row = FORMATS.get(quant_type) if isinstance(quant_type, str) else None
    if row is not None and row.is_affine:
        defaults = {"double_quant": _DOUBLE_QUANT, "block_size": _BLOCK_SIZE}
        options = {name: value for name, value in options.items() if value != defaults[name]}
    return {"quant_type": quant_type, **options}
