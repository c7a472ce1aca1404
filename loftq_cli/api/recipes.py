"""The presets side by side: `loftq.recipes`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loftq_cli.conversion.report import bits_per_weight
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.planning.planner import build_plan
from loftq_cli.planning.recipe_files import presets, resolve_recipe
from loftq_cli.tensors.headers import TensorRef

# Llama 2 7B, whose sizes most users know: 32 blocks and untied embeddings.
_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
_BLOCKS, _HIDDEN, _INTERMEDIATE, _VOCABULARY = 32, 4096, 11008, 32000
_MATRICES = {
    **{f"self_attn.{name}_proj": (_HIDDEN, _HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (_INTERMEDIATE, _HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (_HIDDEN, _INTERMEDIATE),
}


@dataclass(frozen=True, slots=True)
class Preset:
    """A preset, and what the preset makes of a model of 7 billion weights (Llama 2 7B).

    name              the value of --recipe
    summary           a sentence on the purpose
    method            the start of the adapter
    rank              the rank of the adapter
    quant_type        the number format of the base
    layout            the container of the base
    loaders           the software that loads the base
    bits_per_weight   bits of a quantized weight in the base, constants included
    base_nbytes       bytes of the base, embeddings in 16 bits included
    adapter_nbytes    bytes of the adapter
    """

    name: str
    summary: str
    method: str
    rank: int
    quant_type: str
    layout: str
    loaders: str
    bits_per_weight: float
    base_nbytes: int
    adapter_nbytes: int


def recipes() -> tuple[Preset, ...]:
    """List the presets that `quantize` takes as `recipe`, in alphabetical order.

    >>> {preset.name: round(preset.bits_per_weight, 2) for preset in recipes()}["qlora-nf4"]
    4.13
    """
    tensors = _tensors_of_7b()
    return tuple(_describe(name, summary, tensors) for name, summary in presets().items())


def _describe(name: str, summary: str, tensors: dict[str, TensorRef]) -> Preset:
    recipe = resolve_recipe(name, {})
    plan = build_plan(tensors, _CONFIG, recipe)
    return Preset(
        name=name,
        summary=summary,
        method=recipe.method,
        rank=recipe.rank,
        quant_type=recipe.quant.quant_type,
        layout=recipe.layout,
        loaders=LAYOUTS[recipe.layout].loaders,
        bits_per_weight=bits_per_weight(plan),
        base_nbytes=plan.base_nbytes,
        adapter_nbytes=plan.adapter_nbytes,
    )


def _tensors_of_7b() -> dict[str, TensorRef]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (_VOCABULARY, _HIDDEN), "model.norm": (_HIDDEN,)}
    for block in range(_BLOCKS):
        shapes |= {f"model.layers.{block}.{name}": shape for name, shape in _MATRICES.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"model.layers.{block}.{name}": (_HIDDEN,) for name in norms}
    shapes["lm_head"] = (_VOCABULARY, _HIDDEN)
    file = Path("model.safetensors")
    return {f"{name}.weight": TensorRef(f"{name}.weight", "bfloat16", shape, file) for name, shape in shapes.items()}
