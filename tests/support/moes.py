"""Tiny mixtures of experts of transformers' own classes, saved as users have them: a matrix for each expert, or one
tensor for all experts of a layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OWN = {"num_key_value_heads": 4}
_SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32}
_HEADS = {"head_dim": 16}
_TWO = {"num_experts_per_tok": 2}

# Family -> the config beside the sizes. Hidden sizes of experts differ from all other sizes where a family has one.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 96, "num_local_experts": 4, **_TWO},
    "qwen2_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 128,
        "num_experts": 4,
        **_TWO,
    },
    "qwen3_moe": {"intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4, **_TWO, **_HEADS},
    "deepseek_v3": {
        "intermediate_size": 96,
        **_SHARED,
        **_OWN,
        **_TWO,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
    "olmoe": {"intermediate_size": 32, "num_experts": 4, **_OWN, **_TWO},
    "glm4_moe": {"intermediate_size": 96, **_SHARED, **_OWN, **_TWO, **_HEADS},
    "phimoe": {"intermediate_size": 32, "num_local_experts": 4, **_TWO},
    "gpt_oss": {"intermediate_size": 32, "num_local_experts": 4, "sliding_window": 32, **_TWO, **_HEADS},
    "granitemoe": {"intermediate_size": 32, "num_local_experts": 4, **_TWO},
    "llama4_text": {
        "intermediate_size": 32,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        **_HEADS,
    },
}


def moe(family: str, directory: Path) -> Path:
    """Save a tiny random model of `family`, a key of FAMILIES, in bfloat16; gives the directory."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**_SIZES, **FAMILIES[family]}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.05)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory
