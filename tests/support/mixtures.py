"""Tiny random mixtures of experts of real classes, and adapters that PEFT trained on the experts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from loftq_cli.layouts.layout import ModelFacts, StoredMatrix, load_layout
from loftq_cli.quant.formats import make_quantizer
from loftq_cli.tensors.rows import TensorRows
from loftq_cli.tensors.specs import AffineSpec

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}

# Class -> values of its config. No two of the dimensions of an expert are equal, unless a test asks for a square.
MIXTURES: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"intermediate_size": 24, "num_local_experts": 4},
    "Qwen2MoeForCausalLM": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
    },
    "Qwen3MoeForCausalLM": {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 4, "head_dim": 16},
    "DeepseekV3ForCausalLM": {"intermediate_size": 48, "moe_intermediate_size": 24, **_LATENT},
    "OlmoeForCausalLM": {"intermediate_size": 24, "num_experts": 4},
    "Glm4MoeForCausalLM": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "head_dim": 16,
    },
    "PhimoeForCausalLM": {"intermediate_size": 24, "num_local_experts": 4},
    "GptOssForCausalLM": {"intermediate_size": 24, "num_local_experts": 4, "head_dim": 16, "sliding_window": 32},
    "GraniteMoeForCausalLM": {"intermediate_size": 24, "num_local_experts": 4},
    "Llama4ForCausalLM": {
        "intermediate_size": 24,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "head_dim": 16,
        "interleave_moe_layer_step": 1,
        "num_experts_per_tok": 1,
    },
}
IDS = (torch.arange(24).reshape(2, 12) * 7 + 5) % 96
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def mixture(name: str, path: Path, **values: Any) -> Path:
    """A checkpoint of the class `name` in float32, every parameter random."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**{**_SIZES, "num_experts_per_tok": 2, **MIXTURES[name], **values}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.05)
    model.save_pretrained(path)
    return path


@dataclass(frozen=True)
class Trained:
    """An adapter that PEFT saved after random changes, and the logits of PEFT's own forward."""

    path: Path
    logits: torch.Tensor
    wrappers: int
    config: dict[str, Any]


def trained(base: Path, path: Path, **config: Any) -> Trained:
    """Adapt the model at `base` under PEFT, change every trained number, and save the adapter."""
    import peft

    model = load(base)
    made = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": []} | config))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    made.save_pretrained(path)
    wrappers = sum(type(module).__name__ == "ParamWrapper" for module in made.modules())
    return Trained(path, logits(made.eval()), wrappers, json.loads((path / "adapter_config.json").read_text()))


def load(path: Path) -> torch.nn.Module:
    """The model at `path` in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.double()


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def with_packed_experts(base: Path, path: Path) -> Path:
    """The mixture at `base` with 4-bit experts in compressed-tensors, a matrix [out, in] for each expert."""
    layout, spec = load_layout("compressed-tensors"), AffineSpec(4, 32, symmetric=True, scale_dtype="bfloat16")
    quantizer, stored, experts = make_quantizer(spec, "bfloat16"), dict[str, torch.Tensor](), list[str]()
    for name, tensor in [item for pair in tensors_of(base).items() for item in _split(*pair)]:
        if ".experts." not in name or not name.endswith(".weight"):
            stored[name] = tensor
            continue
        matrix = StoredMatrix(name, tuple(tensor.shape), spec, "bfloat16", transposed=False)
        stored |= layout.pack(matrix, quantizer.quantize(TensorRows(tensor)))
        experts.append(name.removesuffix(".weight"))
    kept = [name.removesuffix(".weight") for name, tensor in stored.items() if tensor.is_floating_point()]
    facts = ModelFacts("float32", spec, experts, [name for name in kept if not name.endswith(".weight_scale")])
    path.mkdir()
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(layout.model_config(config, facts)))
    return path


def _split(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A tensor of all experts [experts, in, out] as a matrix for each; gate and up apart in Llama 4."""
    if ".experts." not in name or tensor.dim() != 3:
        return [(name, tensor)]
    holder, _, leaf = name.rpartition(".")
    matrices = [matrix.T.contiguous() for matrix in tensor]
    if leaf == "down_proj" or ".mlp." in name:
        return [(f"{holder}.{e}.{leaf}.weight", matrix) for e, matrix in enumerate(matrices)]
    return [
        (f"{holder}.{e}.{half}.weight", part.contiguous())
        for e, matrix in enumerate(matrices)
        for half, part in zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True)
    ]
