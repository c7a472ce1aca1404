"""Results for diffusers, without diffusers: names of files, keys of configs, layers in full precision, the adapter's
second file, and pipelines. tests/loaders/test_diffusers.py loads such results.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.conversions import files_of, run_conversion, run_merge
from support.diffusers_models import FLUX, UNET, denoiser, pipeline

from loftq_cli.adapter.source import open_adapter
from loftq_cli.errors import InputError, MismatchError, UsageError
from loftq_cli.model.stored import BaseModel
from loftq_cli.tensors.libraries import LIBRARIES, library_of, pipeline_in

QUICK = {"method": "loftq", "rank": 4, "alpha": 8.0, "iterations": 1}
WEIGHTS, LORA = "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"
MODULATION = {name for name in FLUX if "norm" in name}
LISTED = {*MODULATION, "x_embedder", "context_embedder", "time_text_embed.timestep_embedder.linear_1"}


def convert(source: Path, output: Path, **recipe: object) -> tuple[dict, tuple[str, ...]]:
    """The config of the result, and the notes."""
    outcome = run_conversion(source, output, **{**QUICK, **recipe})
    part = next((folder for folder in ("transformer/", "unet/") if (output / folder).is_dir()), "")
    return json.loads((output / part / "config.json").read_text()), outcome.notes


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict, tuple[str, ...]]:
    """Source, output, config and notes of one conversion of a model's folder."""
    folder = tmp_path_factory.mktemp("flux")
    source = denoiser(folder / "source")
    return source, folder / "out", *convert(source, folder / "out")


def test_a_result_has_the_names_of_files_that_diffusers_looks_for(flux):
    _, output, _, _ = flux
    assert (output / WEIGHTS).is_file() and not (output / "model.safetensors").exists()


def test_shards_and_their_index_have_the_names_that_diffusers_looks_for(tmp_path):
    wide = {"transformer_blocks.1.attn.to_q": (1024, 640), "transformer_blocks.1.attn.to_k": (1024, 640)}
    source = denoiser(tmp_path / "source", {**FLUX, **wide}, shards=2)
    convert(source, tmp_path / "out", max_shard_size="1MB", layout="dense")
    index = json.loads((tmp_path / "out" / f"{WEIGHTS}.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert set(index["weight_map"].values()) == set(files) and len(files) > 1
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"


def test_a_config_has_no_key_that_a_class_of_diffusers_refuses(flux):
    source, _, config, _ = flux
    given = json.loads((source / "config.json").read_text())
    assert config.keys() - given.keys() == {"quantization_config"}


def test_every_linear_in_full_precision_is_listed_by_its_plain_name(flux):
    _, _, config, notes = flux
    assert set(config["quantization_config"]["llm_int8_skip_modules"]) == LISTED
    assert any(f"{len(MODULATION)} modulation layers" in note for note in notes)


def test_no_entry_of_the_list_would_leave_a_quantized_layer_out(flux):
    """diffusers 0.42, quantizers/bitsandbytes/utils.py: the last part, the whole name, or the name as a folder."""
    _, output, config, _ = flux
    skipped = config["quantization_config"]["llm_int8_skip_modules"]
    for layer in json.loads((output / "loftq_report.json").read_text())["layers"]:
        name = layer["module"]
        assert name.split(".")[-1] not in skipped
        assert not any(f"{entry}." in name or entry == name for entry in skipped)


def test_a_layer_that_diffusers_cannot_tell_from_a_quantized_layer_is_quantized_too(flux):
    _, output, _, notes = flux
    with BaseModel.open(output) as base:
        assert {"proj_out.weight", "single_transformer_blocks.0.proj_out.weight"} <= base.quantized.keys()
    assert any(note.startswith("proj_out is quantized too") for note in notes)


def test_a_plan_that_diffusers_would_misread_is_refused_and_the_remedy_works(tmp_path):
    source = denoiser(tmp_path / "source")
    with pytest.raises(UsageError) as refused:
        convert(source, tmp_path / "out", exclude=["^proj_out$"])
    remedy = str(refused.value.hint).partition("'")[2].partition("'")[0]
    config, _ = convert(source, tmp_path / "out", exclude=[remedy])
    assert {"proj_out", "single_transformer_blocks.0.proj_out"} <= set(
        config["quantization_config"]["llm_int8_skip_modules"]
    )


def test_decoded_values_need_no_list_so_the_output_layer_stays_as_it_is(tmp_path):
    source = denoiser(tmp_path / "source")
    config, _ = convert(source, tmp_path / "out", layout="dense")
    assert config == json.loads((source / "config.json").read_text())
    made, given = load_file(tmp_path / "out" / WEIGHTS), load_file(source / WEIGHTS)
    assert torch.equal(made["proj_out.weight"], given["proj_out.weight"])


def test_modulation_layers_are_chosen_by_name_only(tmp_path):
    source = denoiser(tmp_path / "source")
    config, _ = convert(source, tmp_path / "out", include=[r"norm1\.linear$", "attn"])
    assert "transformer_blocks.0.norm1.linear" not in config["quantization_config"]["llm_int8_skip_modules"]
    assert "transformer_blocks.0.norm1_context.linear" in config["quantization_config"]["llm_int8_skip_modules"]


@pytest.mark.parametrize(
    "module",
    [
        *(
            "transformer_blocks.0.img_mod.1",
            "transformer_blocks.0.txt_mod.1",
            "single_transformer_blocks.3.norm.linear",
        ),
        *(
            "layers.0.adaLN_modulation.1",
            "adaln_single.linear",
            "visual_transformer_blocks.0.visual_modulation.out_layer",
        ),
        *("double_stream_modulation_img.linear", "final_norm.linear", "down_blocks.0.resnets.0.time_emb_proj"),
        "av_ca_video_scale_shift_adaln_single.linear",
    ],
)
def test_layers_that_scale_whole_blocks_are_known_by_name(module):
    assert LIBRARIES["diffusers"].is_modulation(module)


@pytest.mark.parametrize(
    "module",
    ["transformer_blocks.0.attn.to_q", "blocks.0.ffn.net.0.proj", "blocks.0.attn1.add_k_proj", "layers.0.model.fc"],
)
def test_layers_of_attention_and_mlp_are_no_modulation(module):
    assert not LIBRARIES["diffusers"].is_modulation(module)
    assert not LIBRARIES["transformers"].is_modulation("h.0.norm1.linear")


def test_a_container_that_diffusers_does_not_load_is_refused_and_the_remedy_works(tmp_path):
    source = denoiser(tmp_path / "source")
    with pytest.raises(UsageError, match="diffusers loads no base in compressed-tensors") as refused:
        convert(source, tmp_path / "out", quant_type="int4")
    assert "--layout dense" in str(refused.value.hint) and "nf4" in str(refused.value.hint)
    convert(source, tmp_path / "out", quant_type="int4", layout="dense")


def test_the_adapter_lies_there_twice_with_equal_numbers_and_one_config(flux):
    _, output, _, _ = flux
    peft = load_file(output / "loftq_init/adapter_model.safetensors")
    ours = load_file(output / "loftq_init" / LORA)
    assert ours.keys() == {name.replace("base_model.model.", "transformer.") for name in peft}
    assert all(torch.equal(ours[name.replace("base_model.model.", "transformer.")], t) for name, t in peft.items())
    with safe_open(output / "loftq_init" / LORA, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    written = json.loads((output / "loftq_init/adapter_config.json").read_text())
    assert config["transformer.r"] == 4 and config["transformer.lora_alpha"] == 8
    assert all(written[name.removeprefix("transformer.")] == value for name, value in config.items())


def test_a_result_verifies_and_is_read_as_a_model(flux, run):
    _, output, _, _ = flux
    assert run("inspect", output, "--verify")[0] == 0
    status, printed, _ = run("inspect", output)
    assert status == 0 and "proj_out" in printed


# Merging


@pytest.mark.parametrize("spelling", ["peft", "diffusers", "without metadata", "without a prefix"])
def test_merging_writes_a_folder_for_diffusers_whatever_saved_the_adapter(flux, tmp_path, spelling):
    _, output, _, _ = flux
    adapter, trained = tmp_path / "adapter", load_file(output / "loftq_init" / LORA)
    adapter.mkdir()
    with safe_open(output / "loftq_init" / LORA, "pt") as file:
        metadata = file.metadata()
    scaling = 1.0 if spelling == "without metadata" else 2.0
    if spelling == "without a prefix":
        trained = {name.removeprefix("transformer."): tensor for name, tensor in trained.items()}
        metadata = {key: value.replace("transformer.", "") for key, value in metadata.items()}
    if spelling == "peft":
        adapter = output / "loftq_init"
    else:
        save_file(trained, adapter / LORA, metadata=None if spelling == "without metadata" else metadata)
    # Nothing in a file without metadata tells the base of a fitted adapter.
    forced = {"force": True} if spelling == "without metadata" else {}
    merged = run_merge(output, adapter, tmp_path / "merged", dtype="float32", **forced)
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config and "dtype" not in config
    pair = load_file(output / "loftq_init" / LORA)
    with BaseModel.open(output) as base:
        for module in ("proj_out", "transformer_blocks.0.attn.to_out.0"):
            A, B = (pair[f"transformer.{module}.lora_{x}.weight"].double() for x in "AB")
            expected = base.matrix(f"{module}.weight").double() + scaling * B @ A
            found = load_file(merged / WEIGHTS)[f"{module}.weight"].double()
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)


def test_two_adapter_files_that_differ_are_refused(flux, tmp_path):
    _, output, _, _ = flux
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in (output / "loftq_init").iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    trained = {name: tensor + 1 for name, tensor in load_file(adapter / LORA).items()}
    save_file(trained, adapter / LORA)
    with pytest.raises(MismatchError, match="holds other numbers than adapter_model"):
        run_merge(output, adapter, tmp_path / "merged")


def test_adapters_of_several_models_of_a_pipeline_are_refused_by_name(tmp_path):
    pair = {f"lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    tensors = {f"{part}.fc.{name}": t for part in ("transformer", "text_encoder") for name, t in pair.items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / LORA)
    with pytest.raises(MismatchError, match="several models of a pipeline: text_encoder, transformer"):
        open_adapter(tmp_path)


def test_quantizing_a_merged_model_again_keeps_the_list_of_plain_names(flux, tmp_path):
    _, output, config, _ = flux
    merged = run_merge(output, output / "loftq_init", tmp_path / "merged", requantize="nf4", force=True)
    again = json.loads((merged / "config.json").read_text())
    kept = again["quantization_config"]["llm_int8_skip_modules"]
    assert set(kept) == set(config["quantization_config"]["llm_int8_skip_modules"])


# Pipelines


@pytest.mark.parametrize("folder", ["transformer", "unet"])
def test_a_pipeline_converts_its_denoiser_and_keeps_all_other_folders_byte_for_byte(tmp_path, run, folder):
    source, output = pipeline(tmp_path / "source", folder), tmp_path / "out"
    config, _ = convert(source, output)
    given, made = files_of(source), files_of(output)
    kept = {name for name in given if not name.startswith(f"{folder}/")} - {"README.md", "all-in-one.safetensors"}
    assert all(made[name] == given[name] for name in kept) and "text_encoder/more/deeper/weights.bin" in kept
    assert "quantization_config" in config and made["SOURCE_README.md"] == given["README.md"]
    assert {name for name in made if name.startswith(f"{folder}/")} == {f"{folder}/config.json", f"{folder}/{WEIGHTS}"}
    adapted = f"unet.{list(UNET)[2]}" if folder == "unet" else "transformer.proj_out"
    assert f"{adapted}.lora_A.weight" in load_file(output / "loftq_init" / LORA)
    assert run("inspect", output, "--verify")[0] == 0 and run("inspect", output)[0] == 0


def test_a_merged_pipeline_has_its_other_folders_and_a_dense_denoiser(tmp_path):
    source, output = pipeline(tmp_path / "source"), tmp_path / "out"
    convert(source, output)
    merged = run_merge(output, output / "loftq_init", tmp_path / "merged")
    given, made = files_of(source), files_of(merged)
    assert all(made[name] == given[name] for name in given if name.startswith(("vae/", "text_encoder/", "model_index")))
    assert json.loads(made["transformer/config.json"]) == json.loads(given["transformer/config.json"])
    assert load_file(merged / "transformer" / WEIGHTS).keys() == load_file(source / "transformer" / WEIGHTS).keys()


def test_one_changed_byte_in_a_folder_of_a_pipeline_is_found(tmp_path, run):
    output = tmp_path / "out"
    convert(pipeline(tmp_path / "source"), output)
    file = output / f"transformer/{WEIGHTS}"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    status, printed, _ = run("inspect", output, "--verify")
    assert status == 2 and f"transformer/{WEIGHTS}" in printed


def test_a_second_denoiser_is_copied_and_said(tmp_path):
    source = pipeline(tmp_path / "source")
    denoiser(source / "transformer_2")
    _, notes = convert(source, tmp_path / "out")
    assert files_of(tmp_path / "out/transformer_2") == files_of(source / "transformer_2")
    assert any(note.startswith("transformer_2 is copied as it is") for note in notes)


def test_a_folder_that_links_out_of_a_pipeline_is_refused(tmp_path):
    source = pipeline(tmp_path / "source")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/scheduler_config.json").write_text("{}")
    os.symlink(tmp_path / "secret", source / "scheduler")
    with pytest.raises(InputError, match="link out of the model's folder") as refused:
        convert(source, tmp_path / "out")
    subprocess.run(str(refused.value.hint).partition("link: ")[2], shell=True, check=True)
    convert(source, tmp_path / "out")
    assert (tmp_path / "out/scheduler/scheduler_config.json").read_text() == "{}"


def test_a_folder_that_links_inside_a_pipeline_is_copied_and_a_circle_refused(tmp_path):
    source = pipeline(tmp_path / "source")
    os.symlink("vae", source / "vae_2")
    convert(source, tmp_path / "out")
    assert files_of(tmp_path / "out/vae_2") == files_of(source / "vae")
    os.symlink("..", source / "vae/circle")
    with pytest.raises(InputError, match="link to a folder above itself"):
        convert(source, tmp_path / "again")


def test_the_cache_of_the_hub_links_every_file_and_is_copied(tmp_path):
    given = pipeline(tmp_path / "given")
    snapshot, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    blobs.mkdir(parents=True)
    for number, (name, data) in enumerate(files_of(given).items()):
        (blobs / str(number)).write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(blobs / str(number), snapshot / name)
    convert(snapshot, tmp_path / "out")
    assert files_of(tmp_path / "out/vae") == files_of(given / "vae")


def test_a_pipeline_without_a_denoiser_is_refused_by_name(tmp_path):
    source = pipeline(tmp_path / "source")
    (source / "transformer").rename(source / "prior")
    with pytest.raises(InputError, match="pipeline of diffusers without a folder transformer or unet"):
        convert(source, tmp_path / "out")
    convert(source / "prior", tmp_path / "out")


def test_the_library_of_a_model_follows_from_its_config_alone():
    assert library_of({"_class_name": "UNet2DModel"}).name == "diffusers"
    assert library_of({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).name == "transformers"
    assert pipeline_in(["model_index.json", "model.safetensors"]) is None
