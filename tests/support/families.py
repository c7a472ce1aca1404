"""Tiny random models of families that transformers loads under other names than the files have, and of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_TEXT = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {key: value for key, value in _TEXT.items() if key not in ("num_key_value_heads", "head_dim")}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_STAGES = {"depths": [1, 1], "image_size": 32}
_LABELS = {"num_labels": 3}
_MARKS = {"image_token_index": 150}

# Class -> values of its config. A value with "model_type" is the config of a part.
SIZES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _TEXT,
    "Qwen3ForCausalLM": _TEXT,
    "GemmaForCausalLM": _TEXT,
    "NomicBertModel": {**_BERT, "num_hidden_layers": 2},
    "GteModel": _BERT,
    "JinaEmbeddingsV3Model": _BERT,
    "ModernBertModel": {**_BERT, "cls_token_id": 1, "sep_token_id": 2},
    "DebertaV2Model": _BERT,
    "EsmModel": {**_BERT, "mask_token_id": 4},
    "ViTForImageClassification": {**_VISION, **_LABELS},
    "ViTModel": _VISION,
    "DeiTForImageClassification": {**_VISION, **_LABELS},
    "BeitForImageClassification": {**_VISION, **_LABELS},
    "ViTMAEForPreTraining": {
        **_VISION,
        "decoder_hidden_size": 64,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 128,
    },
    "ViTMSNModel": _VISION,
    "YolosModel": {**_VISION, "image_size": [32, 32]},
    "Dinov2ForImageClassification": {**_VISION, **_LABELS, "mlp_ratio": 2},
    "Dinov2Model": {**_VISION, "mlp_ratio": 2, "use_swiglu_ffn": True},
    "Dinov2WithRegistersModel": {**_VISION, "mlp_ratio": 2},
    "DINOv3ViTModel": _VISION,
    "IJepaModel": _VISION,
    "ASTModel": {**_VISION, "max_length": 64, "num_mel_bins": 32},
    "SwinForImageClassification": {**_STAGES, **_LABELS, "embed_dim": 64, "num_heads": [2, 4], "window_size": 4},
    "SegformerForImageClassification": {
        **_LABELS,
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [64, 128],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 64,
    },
    "CLIPModel": {
        "text_config": {**_BERT, "model_type": "clip_text_model"},
        "vision_config": {**_VISION, "model_type": "clip_vision_model"},
        "projection_dim": 64,
    },
    "SiglipModel": {
        "text_config": {**_BERT, "model_type": "siglip_text_model"},
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
    },
    "Gemma3ForConditionalGeneration": {
        "text_config": {**_TEXT, "model_type": "gemma3_text"},
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 150,
        "boi_token_index": 151,
        "eoi_token_index": 152,
    },
    "LlavaForConditionalGeneration": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
        **_MARKS,
    },
    "PaliGemmaForConditionalGeneration": {
        "text_config": {**_TEXT, "model_type": "gemma"},
        "vision_config": {**_VISION, "model_type": "siglip_vision_model", "projection_dim": 64},
        "projection_dim": 64,
        "hidden_size": 64,
        **_MARKS,
    },
    "MllamaForConditionalGeneration": {
        "text_config": {
            **_TEXT,
            "model_type": "mllama_text_model",
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 128,
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
        **_MARKS,
    },
    "Mistral3ForConditionalGeneration": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 32},
        **_MARKS,
    },
}


def build_family(name: str, directory: Path) -> Path:
    """Save a model of the class called `name` with random weights, under the names that the class saves."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**SIZES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.05)
    model.save_pretrained(directory)
    return directory
