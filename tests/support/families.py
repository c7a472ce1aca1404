"""Tiny random models of families that transformers loads under other names than the files have, and of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

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
_STAGES = {"depths": [1, 1], "image_size": 32, "drop_path_rate": 0.0}
_LABELS = {"num_labels": 3}
_MARKS = {"image_token_index": 150}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}

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
    "BeitForImageClassification": {**_VISION, **_LABELS, "drop_path_rate": 0.0},
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
        "drop_path_rate": 0.0,
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
        "vision_feature_layer": -1,
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
    "Phi3ForCausalLM": _TEXT,
    "Qwen2ForCausalLM": _TEXT,
    "Qwen3MoeForCausalLM": {**_TEXT, **_EXPERTS, "decoder_sparse_step": 1},
    "GptOssForCausalLM": {**_TEXT, **_EXPERTS},
    "Gemma2ForCausalLM": _TEXT,
    "Gemma3ForCausalLM": _TEXT,
    "Gemma3nForCausalLM": {
        **_TEXT,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 160,
        "laurel_rank": 8,
        "num_kv_shared_layers": 0,
        "altup_num_inputs": 2,
        "intermediate_size": [128, 128],
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "Llama4ForCausalLM": {**_TEXT, **_EXPERTS, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 2},
    "FalconForCausalLM": {**_BERT, "new_decoder_architecture": False, "multi_query": True},
    "FalconH1ForCausalLM": {
        **_TEXT,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 2,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
    },
    "GPTNeoXForCausalLM": _BERT,
    "GPTJForCausalLM": {
        "vocab_size": 160,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 2,
        "rotary_dim": 16,
        "n_positions": 64,
    },
    "OPTForCausalLM": {
        "vocab_size": 160,
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 64,
    },
    "BloomForCausalLM": {"vocab_size": 160, "hidden_size": 64, "n_layer": 2, "n_head": 2},
    "MptForCausalLM": {
        "vocab_size": 160,
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 2,
        "expansion_ratio": 2,
        "max_seq_len": 64,
    },
    "DebertaModel": _BERT,
    "RwkvForCausalLM": {
        "vocab_size": 160,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "attention_hidden_size": 64,
        "intermediate_size": 128,
        "context_length": 32,
    },
    "JambaForCausalLM": {
        **_TEXT,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "Zamba2ForCausalLM": {
        **_TEXT,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "mamba_d_state": 16,
        "mamba_headdim": 32,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "num_mem_blocks": 1,
        "hybrid_layer_ids": [1, 2],
        "use_mamba_kernels": False,
        "adapter_rank": 8,
        "use_shared_attention_adapter": False,
    },
    "MambaForCausalLM": {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16},
    "Mamba2ForCausalLM": {
        "vocab_size": 160,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "state_size": 16,
        "num_heads": 32,
        "head_dim": 4,
        "n_groups": 1,
    },
    "GraniteMoeForCausalLM": {**_TEXT, **_EXPERTS},
    "PhimoeForCausalLM": {**_TEXT, **_EXPERTS},
    "OlmoeForCausalLM": {**_TEXT, **_EXPERTS},
    "Glm4ForCausalLM": _TEXT,
    "DeepseekV3ForCausalLM": {
        **_TEXT,
        **_EXPERTS,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "head_dim": 16,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
    "Qwen3NextForCausalLM": {
        **_TEXT,
        **_EXPERTS,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 64,
    },
    "Qwen3_5ForCausalLM": {
        **_TEXT,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {
            **_TEXT,
            "model_type": "qwen2_5_vl_text",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        "vision_config": {
            "model_type": "qwen2_5_vl_vision",
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        "image_token_id": 150,
        "video_token_id": 151,
        "vision_start_token_id": 152,
        "vision_end_token_id": 153,
    },
    "Qwen3VLForConditionalGeneration": {
        "text_config": {
            **_TEXT,
            "model_type": "qwen3_vl_text",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        "image_token_id": 150,
        "video_token_id": 151,
        "vision_start_token_id": 152,
        "vision_end_token_id": 153,
    },
    "InternVLForConditionalGeneration": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_VISION, "model_type": "internvl_vision", "image_size": [32, 32], "patch_size": [8, 8]},
        "image_token_id": 150,
        "downsample_ratio": 0.5,
    },
    "Idefics3ForConditionalGeneration": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "idefics3_vision"},
        "image_token_id": 150,
        "scale_factor": 2,
    },
    "Wav2Vec2ForCTC": {
        "vocab_size": 32,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "conv_dim": [32, 32],
        "conv_stride": [5, 4],
        "conv_kernel": [10, 8],
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "layerdrop": 0.0,
    },
    "WhisperForConditionalGeneration": {
        "vocab_size": 160,
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "max_source_positions": 32,
        "max_target_positions": 32,
        "num_mel_bins": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "BartForConditionalGeneration": {
        "vocab_size": 160,
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    },
    "T5ForConditionalGeneration": {
        "vocab_size": 160,
        "d_model": 64,
        "d_kv": 32,
        "d_ff": 128,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    },
    "CohereForCausalLM": _TEXT,
    "Starcoder2ForCausalLM": _TEXT,
    "LlamaForSequenceClassification": {**_TEXT, "num_labels": 1},
    "Qwen2ForSequenceClassification": {**_TEXT, "num_labels": 1},
    "Gemma2ForSequenceClassification": {**_TEXT, "num_labels": 1},
    "DebertaV2ForSequenceClassification": {**_BERT, "num_labels": 1},
}


def as_on_the_hub(name: str, directory: Path) -> Path:
    """Save the model of `build_family` with its vision tower in the wrapper that older checkpoints have."""
    build_family(name, directory)
    file, wrapper = directory / "model.safetensors", "vision_tower.vision_model."
    tensors = {key.replace("vision_tower.", wrapper, wrapper not in key): t for key, t in load_file(file).items()}
    assert any(wrapper in key for key in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def build_family(name: str, directory: Path) -> Path:
    """Save a model of the class called `name` with random weights, under the names that the class saves."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**SIZES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.05)
            else:  # gates and scales that begin at zero would hide what lies behind
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(directory)
    return directory
