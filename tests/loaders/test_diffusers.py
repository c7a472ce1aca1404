"""Results in diffusers: tiny random models of the real classes, loaded with bitsandbytes, with the adapter in PEFT's
and in diffusers' form, as parts of a pipeline, and merged. Without diffusers the tests are skipped, or with
LOFTQ_RUNTIMES=1 fail.

Expected values are those of bitsandbytes' own decoder and of float64 arithmetic on the files.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.conversions import run_conversion, run_merge
from torch import nn

from loftq_cli.model.stored import BaseModel

QUICK = {"method": "loftq", "rank": 4, "alpha": 8.0, "iterations": 1}
SCALING, LORA = 2.0, "pytorch_lora_weights.safetensors"
HEADS = {"attention_head_dim": 32, "num_attention_heads": 2}
ROPE = {"axes_dims_rope": (8, 12, 12), "joint_attention_dim": 64}


@pytest.fixture(scope="module")
def diffusers() -> Any:
    """diffusers, without the check for a GPU: bitsandbytes computes on the processor too."""
    if os.environ.get("LOFTQ_RUNTIMES") != "1":
        pytest.importorskip("diffusers")
    quantizers = importlib.import_module("diffusers.quantizers.bitsandbytes.bnb_quantizer")
    patch = pytest.MonkeyPatch()
    quantizer = quantizers.BnB4BitDiffusersQuantizer
    patch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
    patch.setattr(quantizer, "update_device_map", lambda self, device_map: device_map or {"": "cpu"})
    yield importlib.import_module("diffusers")
    patch.undo()


@dataclass(frozen=True)
class Case:
    """A class, sizes of a tiny model, and the number of linears to quantize, counted by hand from the class."""

    name: str
    sizes: dict[str, Any]
    linears: int


CASES = {
    # A double block: 8 in attention, 4 in two MLPs. A single block: q, k, v, two projections. proj_out shares a name.
    "flux": Case(
        "FluxTransformer2DModel",
        {**HEADS, **ROPE, "patch_size": 1, "in_channels": 32, "num_layers": 1, "num_single_layers": 1}
        | {"pooled_projection_dim": 32},
        12 + 5 + 1,
    ),
    # The last block has no output and no MLP for the text.
    "sd3": Case(
        "SD3Transformer2DModel",
        {**HEADS, "sample_size": 8, "patch_size": 1, "in_channels": 32, "out_channels": 32, "num_layers": 2}
        | {"joint_attention_dim": 64, "caption_projection_dim": 64, "pooled_projection_dim": 64},
        12 + 9,
    ),
    "wan": Case(
        "WanTransformer3DModel",
        {**HEADS, "patch_size": (1, 2, 2), "in_channels": 8, "out_channels": 8, "text_dim": 64, "freq_dim": 32}
        | {"ffn_dim": 96, "num_layers": 2, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"},
        2 * (4 + 4 + 2),
    ),
    "qwen": Case(
        "QwenImageTransformer2DModel",
        {**HEADS, **ROPE, "patch_size": 2, "in_channels": 32, "out_channels": 8, "num_layers": 2},
        2 * (8 + 4),
    ),
    # A down block and an up block with cross-attention: two attentions of 4 and an MLP of 2 in each transformer; of the
    # up block two transformers; proj_in and proj_out are convolutions, and the time embeddings stay as they are.
    "unet": Case(
        "UNet2DConditionModel",
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1}
        | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 64}
        | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2, "norm_num_groups": 8},
        10 * (1 + 1 + 2),
    ),
}


def random_model(diffusers: Any, case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(diffusers, case.name)(**case.sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.05)
    return model.to(torch.bfloat16)


def inputs_of(name: str) -> dict[str, Any]:
    """Inputs of a forward of the models in `CASES`, bfloat16."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    time = {"timestep": torch.tensor([0.5]).bfloat16(), "encoder_hidden_states": noise(1, 6, 64)}
    if name == "flux":
        ids = {"txt_ids": torch.zeros(6, 3), "img_ids": torch.zeros(16, 3)}
        return {**time, **ids, "hidden_states": noise(1, 16, 32), "pooled_projections": noise(1, 32)}
    if name == "sd3":
        return {**time, "hidden_states": noise(1, 32, 8, 8), "pooled_projections": noise(1, 64)}
    if name == "wan":
        return {**time, "hidden_states": noise(1, 8, 1, 8, 8)}
    if name == "qwen":
        mask = {"encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.long), "img_shapes": [[(1, 4, 4)]]}
        return {**time, **mask, "hidden_states": noise(1, 16, 32)}
    return {**time, "sample": noise(1, 4, 8, 8)}


@dataclass(frozen=True)
class Converted:
    """A result: directory, class, and tensor name by module in the report."""

    output: Path
    cls: Any
    names: dict[str, str]

    def load(self) -> tuple[nn.Module, dict[str, Any]]:
        return self.cls.from_pretrained(self.output, torch_dtype=torch.bfloat16, output_loading_info=True)


@pytest.fixture(scope="module")
def convert_once(diffusers: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Converted]:
    @functools.cache
    def convert(name: str) -> Converted:
        folder, case = tmp_path_factory.mktemp(name), CASES[name]
        random_model(diffusers, case).save_pretrained(folder / "source")
        run_conversion(folder / "source", folder / "out", **QUICK)
        report = json.loads((folder / "out/loftq_report.json").read_text())
        names = {layer["module"]: layer["name"] for layer in report["layers"]}
        return Converted(folder / "out", getattr(diffusers, case.name), names)

    return convert


@pytest.fixture(params=sorted(CASES))
def converted(request: pytest.FixtureRequest, convert_once: Callable[[str], Converted]) -> Converted:
    return convert_once(request.param)


def four_bit_modules(model: nn.Module) -> dict[str, nn.Module]:
    import bitsandbytes

    return {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def adapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if getattr(module, "lora_A", None)}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative Frobenius norm of the difference, in float64; NaN for a tensor with a NaN."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


def save_as_trainers_of_diffusers(diffusers: Any, model: nn.Module, prefix: str, directory: Path) -> None:
    """Save the adapter "x" as the training scripts of diffusers do."""
    from peft.utils import get_peft_model_state_dict

    config = {key: list(v) if isinstance(v, set) else v for key, v in model.peft_config["x"].to_dict().items()}
    pipeline = diffusers.StableDiffusionPipeline if prefix == "unet" else diffusers.FluxPipeline
    layers = {f"{prefix}_lora_layers": get_peft_model_state_dict(model, adapter_name="x")}
    pipeline.save_lora_weights(directory, **layers, **{f"{prefix}_lora_adapter_metadata": config})


def train(model: nn.Module) -> None:
    """Move each lora_B by numbers that depend on the seed alone, as if the adapter had been trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapted_modules(model).values():
            (weight,) = (factor.weight for factor in layer.lora_B.values())
            weight += (torch.randn(weight.shape, generator=generator) * 0.4).to(weight.dtype)


def test_the_base_loads_with_every_key_and_every_weight_as_we_read_it(converted, request):
    from bitsandbytes.functional import dequantize_4bit

    model, info = converted.load()
    assert not any(info.values())
    linears = four_bit_modules(model)
    assert linears.keys() == converted.names.keys()
    assert len(linears) == CASES[request.node.callspec.params["converted"]].linears
    with BaseModel.open(converted.output) as base:
        for module, linear in linears.items():
            weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            assert torch.equal(weight, base.matrix(converted.names[module]).bfloat16()), module


def test_the_adapter_loads_in_diffusers_with_every_factor_and_the_scaling_of_the_config(converted):
    model, _ = converted.load()
    prefix = "unet" if "UNet" in converted.cls.__name__ else "transformer"
    model.load_lora_adapter(str(converted.output / "loftq_init"), prefix=prefix, weight_name=LORA)
    adapted, stored = adapted_modules(model), load_file(converted.output / "loftq_init/adapter_model.safetensors")
    assert adapted.keys() == converted.names.keys()
    for module, layer in adapted.items():
        (adapter,) = layer.lora_A
        assert layer.scaling[adapter] == SCALING
        for factor in ("lora_A", "lora_B"):
            loaded = getattr(layer, factor)[adapter].weight
            assert torch.equal(loaded, stored[f"base_model.model.{module}.{factor}.weight"].to(loaded.dtype))


def test_peft_and_diffusers_give_one_output_and_gradients_reach_the_adapters(converted, request):
    name = request.node.callspec.params["converted"]
    inputs = inputs_of(name)
    model, _ = converted.load()
    prefix = "unet" if name == "unet" else "transformer"
    model.load_lora_adapter(str(converted.output / "loftq_init"), prefix=prefix, weight_name=LORA)
    trained = PeftModel.from_pretrained(converted.load()[0], converted.output / "loftq_init", is_trainable=True)
    train(model), train(trained)
    with torch.no_grad():
        expected, without_adapter = model(**inputs).sample, converted.load()[0](**inputs).sample
    found = trained(**inputs).sample
    # diffusers computes B·A in bfloat16 and PEFT in float32; the adapter itself changes far more.
    assert distance(found, expected) < 0.02 < distance(found, without_adapter)
    found.float().square().mean().backward()
    untrained = {n for n, p in trained.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    # The text of the last block reaches no output: its queries, and in Qwen-Image to_add_out and the MLP's two layers.
    assert len(untrained) == {"qwen": 2 * 4, "sd3": 2}.get(name, 0)


def test_a_trained_adapter_merges_into_a_model_that_diffusers_loads(converted, tmp_path, request, diffusers):
    name = request.node.callspec.params["converted"]
    model, _ = converted.load()
    prefix = "unet" if name == "unet" else "transformer"
    model.load_lora_adapter(str(converted.output / "loftq_init"), prefix=prefix, weight_name=LORA, adapter_name="x")
    train(model)
    save_as_trainers_of_diffusers(diffusers, model, prefix, tmp_path / "trained")
    merged = run_merge(converted.output, tmp_path / "trained", tmp_path / "merged", dtype="float32", force=True)
    dense, info = converted.cls.from_pretrained(merged, torch_dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()) and not four_bit_modules(dense)
    with BaseModel.open(converted.output) as base:
        for module, layer in adapted_modules(model).items():
            A, B = layer.lora_A["x"].weight.double(), layer.lora_B["x"].weight.double()
            expected = base.matrix(converted.names[module]).double() + SCALING * B @ A
            found = dense.get_submodule(module).weight.double()
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)


def test_a_pipeline_loads_with_its_denoiser_in_four_bits_and_the_adapter(diffusers, tmp_path):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(sample_size=8, latent_channels=8, block_out_channels=(32,), norm_num_groups=8)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    absent = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    transformer = random_model(diffusers, CASES["flux"])
    source = diffusers.FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **absent)
    source.save_pretrained(tmp_path / "source")
    run_conversion(tmp_path / "source", tmp_path / "out", **QUICK)
    pipeline = diffusers.FluxPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16, **absent)
    pipeline.load_lora_weights(str(tmp_path / "out/loftq_init"))
    assert len(four_bit_modules(pipeline.transformer)) >= CASES["flux"].linears
    adapted = adapted_modules(pipeline.transformer)
    assert len(adapted) == CASES["flux"].linears
    assert {scaling for layer in adapted.values() for scaling in layer.scaling.values()} == {SCALING}
    merged = run_merge(tmp_path / "out", tmp_path / "out/loftq_init", tmp_path / "merged")
    dense = diffusers.FluxPipeline.from_pretrained(merged, torch_dtype=torch.bfloat16, **absent)
    assert not four_bit_modules(dense.transformer) and dense.vae.config.latent_channels == 8
