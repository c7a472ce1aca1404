"""Checkpoints that are quantized at the source: FP8 with scales is decoded, bit for bit as its owners decode; every
other form is refused by name, whatever the config says, and is not called damaged.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from support.conversions import files_of, run_conversion, run_merge
from support.quantized_models import F8, UNREAD, fp8_block, fp8_rows, fp8_tensor, source_llama, write

from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.errors import UnreadFormat
from loftq_cli.model.stored import BaseModel

BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
ROWS = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
MODELOPT = {"quantization": {"quant_algo": "FP8"}}
FP8 = {
    "blocks": (fp8_block, BLOCKS, "config.json", "proj"),
    "blocks, described in a part": (fp8_block, BLOCKS, "text_config", "proj"),
    "blocks, without a description": (fp8_block, None, "", "proj"),
    "blocks in the MLP alone": (fp8_block, BLOCKS, "text_config", "mlp"),
    "rows": (fp8_rows, ROWS, "config.json", "proj"),
    "matrices, described in a side file": (fp8_tensor, MODELOPT, "hf_quant_config.json", "proj"),
}
QUICK = {"method": "qlora", "rank": 4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_llama(tmp_path_factory.mktemp("llama") / "source")


def opened(directory: Path, dtype: str = "bfloat16", **tensors: torch.Tensor):
    """A checkpoint of these tensors; a name has ":" for "."."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"dtype": dtype}))
    save_file({name.replace(":", "."): tensor for name, tensor in tensors.items()}, directory / "model.safetensors")
    return open_checkpoint(directory)


def random_codes(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 20).to(F8)


# Values


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("scale", ["float32", "bfloat16", "exponents in bytes", "float8_e8m0fnu"])
def test_blocks_are_decoded_bit_for_bit_as_transformers_decodes_them(tmp_path, dtype, scale):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    codes, generator = random_codes(256, 384), torch.Generator().manual_seed(1)
    if scale == "exponents in bytes":
        scales = torch.randint(115, 122, (2, 3), generator=generator).to(torch.uint8)
    elif scale == "float8_e8m0fnu":
        scales = torch.exp2(torch.randint(-9, -5, (2, 3), generator=generator).float()).to(torch.float8_e8m0fnu)
    else:
        scales = (torch.rand(2, 3, generator=generator) * 0.01 + 0.001).to(getattr(torch, scale))
    checkpoint = opened(tmp_path, dtype, **{"fc:weight": codes, "fc:weight_scale_inv": scales})
    owner = fp8.Fp8Dequantize(SimpleNamespace())
    expected = owner._dequantize_one(codes, scales, getattr(torch, dtype))
    assert torch.equal(checkpoint.load("fc.weight"), expected)


def test_rows_are_decoded_bit_for_bit_as_compressed_tensors_decodes_them(tmp_path):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    codes = random_codes(64, 96)
    scales = (torch.rand(64, 1, generator=torch.Generator().manual_seed(1)) * 0.01).bfloat16()
    checkpoint = opened(tmp_path, **{"fc:weight": codes, "fc:weight_scale": scales})
    scheme = quantization.QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
    expected = quantization.lifecycle.forward.dequantize(codes, scales, args=scheme, dtype=torch.bfloat16)
    assert torch.equal(checkpoint.load("fc.weight"), expected)


def test_smaller_blocks_at_the_edges_are_decoded_number_by_number(tmp_path):
    codes, scales = random_codes(130, 259), torch.tensor([[0.5, 0.25, 2.0], [3.0, 0.125, 1.0]])
    checkpoint = opened(tmp_path, "float32", **{"fc:weight": codes, "fc:weight_scale_inv": scales})
    decoded = checkpoint.load("fc.weight")
    for row, column in [(0, 0), (127, 127), (127, 128), (128, 127), (128, 128), (129, 256), (129, 258), (0, 258)]:
        expected = float(codes[row, column]) * float(scales[row // 128, column // 128])
        assert float(decoded[row, column]) == expected


def test_the_block_size_is_that_of_the_config(tmp_path):
    codes, scales = random_codes(96, 80), torch.arange(1.0, 7.0).reshape(3, 2)
    checkpoint = opened(tmp_path, "float32", **{"fc:weight": codes, "fc:weight_scale_inv": scales})
    (tmp_path / "config.json").write_text(
        json.dumps({"dtype": "float32", "quantization_config": {"weight_block_size": [40, 64]}})
    )
    # By the shapes alone the blocks would be 32 by 40.
    assert float(checkpoint.load("fc.weight")[33, 0]) == float(codes[33, 0]) * 3
    assert float(open_checkpoint(tmp_path).load("fc.weight")[33, 0]) == float(codes[33, 0]) * 1


def test_rows_bytes_and_hashes_are_of_the_decoded_weight(tmp_path):
    tensors, decoded = fp8_block("fc:weight", torch.randn(300, 200, generator=torch.Generator().manual_seed(0)))
    checkpoint = opened(tmp_path, **tensors)
    whole = checkpoint.load("fc.weight")
    assert torch.equal(whole, decoded.bfloat16())
    assert torch.equal(checkpoint.load_rows("fc.weight", 100, 290), whole[100:290])
    data = b"".join(checkpoint.chunks("fc.weight", 1000))
    assert data == whole.view(torch.uint8).numpy().tobytes()
    plain = opened(tmp_path / "plain", **{"fc:weight": decoded.bfloat16()})
    assert checkpoint.sha256("fc.weight") == plain.sha256("fc.weight")
    assert checkpoint.tensors.keys() == {"fc.weight"} and checkpoint.tensors["fc.weight"].dtype == "bfloat16"


def test_scales_may_lie_in_another_file_than_the_codes(tmp_path):
    tensors, decoded = fp8_block("fc.weight", torch.randn(200, 130, generator=torch.Generator().manual_seed(0)))
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / f"model-{number}.safetensors")
    index = {"weight_map": {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(open_checkpoint(tmp_path).load("fc.weight"), decoded.bfloat16())


# Commands


@pytest.mark.parametrize("name", list(FP8))
def test_an_fp8_model_converts_to_the_bytes_of_the_decoded_model(llama, tmp_path, name):
    form, description, place, only = FP8[name]
    source = write(tmp_path / "fp8", llama, form, description, place, only=only, decoded=tmp_path / "plain")
    outcome = run_conversion(source, tmp_path / "made", **QUICK)
    run_conversion(tmp_path / "plain", tmp_path / "expected", **QUICK)
    made, expected = files_of(tmp_path / "made"), files_of(tmp_path / "expected")
    same = {"model.safetensors", "qlora_init/adapter_model.safetensors"}
    assert made.keys() == expected.keys() and all(made[file] == expected[file] for file in same)
    configs = [json.loads(files["config.json"]) for files in (made, expected)]
    assert configs[0].pop("text_config", {}) == {} and configs[0] == configs[1]
    count = sum(tensor.dtype == F8 for tensor in load_file(source / "model.safetensors").values())
    assert any(f"{count} weights are float8_e4m3fn" in note for note in outcome.notes)
    assert any("float8_e4m3fn" in note for note in json.loads(made["loftq_report.json"])["notes"])


def test_an_fp8_base_merges_as_the_decoded_base_does(llama, tmp_path):
    source = write(tmp_path / "fp8", llama, fp8_block, BLOCKS, decoded=tmp_path / "plain")
    run_conversion(source, tmp_path / "out", **QUICK)
    merged = [
        run_merge(base, tmp_path / "out/qlora_init", tmp_path / f"merged-{base.name}", force=True)
        for base in (source, tmp_path / "plain")
    ]
    assert (merged[0] / "model.safetensors").read_bytes() == (merged[1] / "model.safetensors").read_bytes()
    assert "quantization_config" not in json.loads((merged[0] / "config.json").read_text())


def test_errors_against_an_fp8_original_are_those_against_the_decoded_original(llama, tmp_path, run):
    source = write(tmp_path / "fp8", llama, fp8_block, BLOCKS, decoded=tmp_path / "plain")
    run_conversion(source, tmp_path / "out", **QUICK)
    printed = [run("inspect", tmp_path / "out", "--against", path, "--json") for path in (source, tmp_path / "plain")]
    assert printed[0] == printed[1] and printed[0][0] == 0


def test_statistics_of_an_fp8_model_are_those_of_the_decoded_model(llama, tmp_path, run):
    pytest.importorskip("transformers")
    source = write(tmp_path / "fp8", llama, fp8_block, BLOCKS, decoded=tmp_path / "plain")
    for path in map(models.with_tokenizer, (source, tmp_path / "plain")):
        options = ("--text", "random", "--tokens", "64", "--quiet", "-o", tmp_path / f"statistics-{path.name}")
        status, _, said = run("calibrate", path, *options)
        assert status == 0, said
    found, expected = (load_file(tmp_path / f"statistics-{name}/statistics.safetensors") for name in ("fp8", "plain"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def adapter(llama: Path) -> Path:
    """The adapter of a conversion of `llama`."""
    run_conversion(llama, llama.parent / "out", **QUICK)
    return llama.parent / "out/qlora_init"


@pytest.mark.parametrize("name", list(UNREAD))
def test_a_form_that_is_not_read_is_refused_by_every_command_and_is_not_damaged(llama, adapter, tmp_path, run, name):
    form, description, place = UNREAD[name]
    source = write(tmp_path / "source", llama, form, description, place, only="mlp")
    for command in (
        ("quantize", source, tmp_path / "no"),
        ("quantize", source, tmp_path / "no", "--text", "random"),
        ("calibrate", source, "--text", "random", "-o", tmp_path / "no"),
        ("merge", source, adapter, tmp_path / "no", "--force"),
    ):
        status, _, said = run(*command)
        assert status == 2 and "16 bits" in said and "FP8" in said, (command[0], said)
        assert not (tmp_path / "no").exists()
    status, _, said = run("inspect", source)
    assert status == 0 and "not read" in said
    status, printed, said = run("inspect", source, "--verify")
    assert status == 0 and "verified" in printed and "not read" in printed + said


def test_the_remedy_of_a_refusal_works(llama, tmp_path):
    source = write(tmp_path / "awq", llama, *UNREAD["AWQ"])
    with pytest.raises(UnreadFormat, match="quantized already"):
        run_conversion(source, tmp_path / "out", **QUICK)
    fp8 = write(tmp_path / "fp8", llama, fp8_block, BLOCKS)
    run_conversion(llama, tmp_path / "out", **QUICK)
    run_conversion(fp8, tmp_path / "out2", **QUICK)


def test_names_that_only_look_like_scales_are_ordinary_tensors(tmp_path):
    source = models.llama(tmp_path / "source", hidden=128, layers=1)
    tensors = load_file(source / "model.safetensors")
    others = {
        "logit_scale": torch.tensor(2.6),
        "model.layers.0.layer_scale": torch.ones(128),
        "model.layers.0.attn.k_scale": torch.tensor(1.0),
        "spectral.weight": torch.ones(4, 4, dtype=torch.complex64),
        "model.position_ids": torch.arange(8)[None],
        "mask.bias": torch.ones(4, 4, dtype=torch.bool),
    }
    save_file({**tensors, **others}, source / "model.safetensors", metadata={"format": "pt"})
    run_conversion(source, tmp_path / "out", **QUICK)
    made = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(made[name], tensor) for name, tensor in others.items())


def test_a_gptq_base_whose_description_lies_in_a_side_file_is_read(llama, tmp_path):
    run_conversion(llama, tmp_path / "gptq", method="qlora", rank=4, quant_type="int4", layout="gptq", group_size=32)
    with BaseModel.open(tmp_path / "gptq") as base:
        expected = {name: base.matrix(name) for name in base.quantized}
    config = json.loads((tmp_path / "gptq/config.json").read_text())
    description = config.pop("quantization_config")
    (tmp_path / "gptq/config.json").write_text(json.dumps(config))
    del description["quant_method"]
    (tmp_path / "gptq/quantize_config.json").write_text(json.dumps(description))
    with BaseModel.open(tmp_path / "gptq") as base:
        assert base.quantized.keys() == expected.keys()
        assert all(torch.equal(base.matrix(name), matrix) for name, matrix in expected.items())


def test_a_side_file_beside_weights_in_full_precision_means_nothing(llama, tmp_path):
    run_conversion(llama, tmp_path / "out", **QUICK)
    (tmp_path / "source").mkdir()
    for path in llama.iterdir():
        (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "source/quantize_config.json").write_text('{"bits": 4}')
    run_conversion(tmp_path / "source", tmp_path / "out2", **QUICK)
    assert not (tmp_path / "out2/quantize_config.json").exists()
    expected = (tmp_path / "out/model.safetensors").read_bytes()
    assert (tmp_path / "out2/model.safetensors").read_bytes() == expected


def test_a_damaged_fp8_model_is_still_damaged(llama, tmp_path, run):
    source = write(tmp_path / "fp8", llama, fp8_block, BLOCKS)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name].view(torch.uint8)[0, 0] = 0x7F  # NaN
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    status, printed, _ = run("inspect", source, "--verify")
    assert status == 2 and name in printed
