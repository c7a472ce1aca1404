"""Checkpoints under diffusers' names, made without diffusers: a denoiser as Flux names it, a UNet, and a pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

# Name -> [out, in] of the linears of a small Flux: a block of each kind, the embedders, and the output.
FLUX = {
    "x_embedder": (64, 32),
    "context_embedder": (64, 64),
    "time_text_embed.timestep_embedder.linear_1": (64, 256),
    "transformer_blocks.0.norm1.linear": (384, 64),
    "transformer_blocks.0.norm1_context.linear": (384, 64),
    "transformer_blocks.0.attn.to_q": (64, 64),
    "transformer_blocks.0.attn.add_q_proj": (64, 64),
    "transformer_blocks.0.attn.to_out.0": (64, 64),
    "transformer_blocks.0.ff.net.0.proj": (256, 64),
    "transformer_blocks.0.ff.net.2": (64, 256),
    "single_transformer_blocks.0.norm.linear": (192, 64),
    "single_transformer_blocks.0.attn.to_q": (64, 64),
    "single_transformer_blocks.0.proj_mlp": (256, 64),
    "single_transformer_blocks.0.proj_out": (64, 320),
    "norm_out.linear": (128, 64),
    "proj_out": (32, 64),
}
UNET = {
    "time_embedding.linear_1": (128, 64),
    "down_blocks.0.resnets.0.time_emb_proj": (64, 128),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (64, 64),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2": (64, 256),
}


def denoiser(
    directory: Path, modules: dict[str, tuple[int, int]] = FLUX, name: str = "FluxTransformer2DModel", shards: int = 1
) -> Path:
    """A folder as `save_pretrained` of diffusers writes it: config, weights with biases, an index over two shards."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, shape in modules.items():
        tensors[f"{module}.weight"] = (torch.randn(shape, generator=generator) * 0.05).bfloat16()
        tensors[f"{module}.bias"] = (torch.randn(shape[0], generator=generator) * 0.02).bfloat16()
    config = {"_class_name": name, "_diffusers_version": "0.42.1", "in_channels": 32}
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        return directory
    names = list(tensors)
    stems = [f"diffusion_pytorch_model-0000{i + 1}-of-0000{shards}" for i in range(shards)]
    files = {f"{stem}.safetensors": names[i::shards] for i, stem in enumerate(stems)}
    for file, held in files.items():
        save_file({key: tensors[key] for key in held}, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, held in files.items() for key in held}}
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def pipeline(directory: Path, folder: str = "transformer") -> Path:
    """The root of a pipeline: a denoiser in `folder`, and models and small files that are none of our business."""
    if folder == "transformer":
        denoiser(directory / folder)
    else:
        denoiser(directory / folder, UNET, "UNet2DConditionModel")
    index = {"_class_name": "FluxPipeline", folder: ["diffusers", "Any"], "vae": ["diffusers", "AutoencoderKL"]}
    (directory / "model_index.json").write_text(json.dumps(index))
    (directory / "README.md").write_text("# a pipeline")
    (directory / "vae").mkdir()
    (directory / "vae/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    save_file({"x": torch.ones(4)}, directory / "vae/diffusion_pytorch_model.safetensors")
    (directory / "text_encoder/more/deeper").mkdir(parents=True)
    save_file({"y": torch.ones(4)}, directory / "text_encoder/model-00001-of-00001.safetensors")
    (directory / "text_encoder/model.safetensors.index.json").write_text('{"weight_map": {}}')
    (directory / "text_encoder/more/deeper/weights.bin").write_bytes(b"any bytes")
    save_file({"z": torch.ones(4)}, directory / "all-in-one.safetensors")
    return directory
