"""What a tiny model of each class reads: token ids, images, sounds, and the marks that join them."""

from __future__ import annotations

from typing import Any

import torch

_PIXELS = (1, 3, 32, 32)
_IMAGE_MARK = 150


def _tokens(vocabulary: int = 100, length: int = 8) -> torch.Tensor:
    return torch.arange(5, 5 + length).view(1, length) % vocabulary


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _with_image(marks: int, **values: Any) -> dict[str, Any]:
    """Token ids with `marks` marks of an image among them, and the image."""
    ids = torch.cat([_tokens(), torch.full((1, marks), _IMAGE_MARK), _tokens()], 1)
    kinds = (ids == _IMAGE_MARK).long()
    return {
        "input_ids": ids,
        "pixel_values": _random(*_PIXELS),
        "attention_mask": torch.ones_like(ids),
        **values,
        "_kinds": kinds,
    }


def _patches(length: int, width: int) -> dict[str, Any]:
    """An image of 4×4 patches of 8×8 pixels, as Qwen's models read it: the rows of all patches."""
    return {"pixel_values": _random(length, width), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def inputs_of(name: str, model: Any) -> dict[str, Any]:
    """The keyword arguments of a forward of the class called `name`."""
    kind = model.config.model_type
    if name in _SPECIAL:
        values = _SPECIAL[name]()
        kinds = values.pop("_kinds", None)
        if kinds is not None and name in _WITH_KINDS:
            values["mm_token_type_ids" if name.startswith("Qwen") else "token_type_ids"] = kinds
        return values
    if model.main_input_name == "pixel_values":
        return {"pixel_values": _random(*_PIXELS)}
    if getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": _tokens(), "decoder_input_ids": _tokens()}
    return {"input_ids": _tokens(30 if kind == "esm" else 100)}


_WITH_KINDS = (
    "Gemma3ForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
)
_SPECIAL: dict[str, Any] = {
    "CLIPModel": lambda: {"input_ids": _tokens(), "pixel_values": _random(*_PIXELS)},
    "SiglipModel": lambda: {"input_ids": _tokens(), "pixel_values": _random(*_PIXELS)},
    "ASTModel": lambda: {"input_values": _random(1, 64, 32)},
    "Wav2Vec2ForCTC": lambda: {"input_values": _random(1, 800)},
    "WhisperForConditionalGeneration": lambda: {"input_features": _random(1, 16, 64), "decoder_input_ids": _tokens()},
    "Gemma3ForConditionalGeneration": lambda: _with_image(4),
    "LlavaForConditionalGeneration": lambda: _with_image(15),
    "PaliGemmaForConditionalGeneration": lambda: _with_image(16),
    "Mistral3ForConditionalGeneration": lambda: _with_image(4, image_sizes=torch.tensor([[32, 32]])),
    "InternVLForConditionalGeneration": lambda: _with_image(4),
    "Idefics3ForConditionalGeneration": lambda: _with_image(4, pixel_values=_random(1, 1, 3, 32, 32)),
    "Qwen2_5_VLForConditionalGeneration": lambda: _with_image(4, **_patches(16, 3 * 2 * 8 * 8)),
    "Qwen3VLForConditionalGeneration": lambda: _with_image(4, **_patches(16, 3 * 2 * 8 * 8)),
    "MllamaForConditionalGeneration": lambda: {
        "input_ids": _tokens(),
        "pixel_values": _random(1, 1, 1, 3, 32, 32),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 8, 1, 1, dtype=torch.long),
    },
    "ViTMAEForPreTraining": lambda: {"pixel_values": _random(*_PIXELS), "noise": _random(1, 16)},
}
