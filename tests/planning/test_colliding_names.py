"""A tensor with the name of a part of a quantized weight is refused in the plan, by name, and the remedy works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import lora_tensors, write_adapter

from loftq_cli.cli.main import _run

WEIGHT = "layers.0.self_attn.q_proj.weight"
OTHER = "layers.0.self_attn.k_proj.weight"
MODULE = WEIGHT.removesuffix("weight")
INT4 = ("--quant-type", "int4", "--group-size", "32")
QUANTIZE = ("--method", "qlora", "--rank", "2", "--quiet")


def model_with(tmp_path: Path, *names: str) -> Path:
    """Two linears, and a float32 tensor under each of `names`."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(64, 64, generator=generator) for name in (WEIGHT, OTHER)}
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({**tensors, **dict.fromkeys(names, torch.ones(3))}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert _run([*map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# Names of codes, like qweight, are refused before: tests/checkpoint/test_quantized_sources.py.
PARTS = {
    "bitsandbytes": ((), [f"{WEIGHT}.absmax", f"{WEIGHT}.quant_map", f"{WEIGHT}.nested_absmax"]),
    "compressed-tensors": (INT4, [f"{WEIGHT}_zero_point", f"{WEIGHT}_shape"]),
    "gptq": ((*INT4, "--layout", "gptq"), [f"{MODULE}scales", f"{MODULE}g_idx"]),
    "metal": ((*INT4, "--layout", "metal"), [f"{MODULE}scales", f"{MODULE}qbiases"]),
    "mlx": ((*INT4, "--layout", "mlx"), [f"{MODULE}scales", f"{MODULE}biases"]),
}


@pytest.mark.parametrize(("layout", "part"), [(layout, part) for layout, (_, parts) in PARTS.items() for part in parts])
def test_the_name_of_a_part_is_refused_before_anything_is_written(layout, part, tmp_path, capsys):
    model = model_with(tmp_path, part)
    line = refusal(capsys, "quantize", model, tmp_path / "out", *QUANTIZE, *PARTS[layout][0])
    remedy = "(--layout dense, or rename the tensor in the model)"
    assert line == f"error: tensor {part}: is the name of a part of {WEIGHT} in {layout} {remedy}"
    assert not (tmp_path / "out").exists()


def test_the_remedy_works_when_typed(tmp_path):
    model = model_with(tmp_path, f"{WEIGHT}.absmax")
    assert _run(["quantize", str(model), str(tmp_path / "out"), *QUANTIZE, "--layout", "dense"]) == 0
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[f"{WEIGHT}.absmax"], torch.ones(3))


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "metal", "mlx"])
def test_so_is_a_part_of_a_weight_that_stays_in_full_precision(layout, tmp_path, capsys):
    """Readers would miss the codes beside a lone scale, and call the result damaged."""
    options, parts = PARTS[layout]
    model = model_with(tmp_path, parts[0])
    line = refusal(capsys, "quantize", model, tmp_path / "out", *QUANTIZE, *options, "--exclude", "q_proj")
    assert f"tensor {parts[0]}: is the name of a part of {WEIGHT} in {layout}" in line


def test_a_name_that_stands_for_bitsandbytes_is_refused_in_every_container(tmp_path, capsys):
    name = f"{OTHER}.quant_state.bitsandbytes__nf4"
    model = model_with(tmp_path, name)
    for options in (INT4, ("--layout", "dense")):
        line = refusal(capsys, "quantize", model, tmp_path / "out", *QUANTIZE, *options, "--exclude", "k_proj")
        assert line.startswith(f"error: tensor {name}: has a name by which readers take the model for one in bitsandb")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ((), f"{OTHER}.absmax"),  # k_proj is not quantized, and no container claims the name
        ((), f"{MODULE}scales"),  # a part in other containers only
        (INT4, f"{WEIGHT}.absmax"),
        ((*INT4, "--layout", "gptq"), f"{MODULE}qbiases"),
        ((), "layers.0.norm.weight"),
    ],
)
def test_names_that_mean_nothing_in_the_container_pass(options, name, tmp_path, capsys):
    model = model_with(tmp_path, name)
    assert _run(["quantize", str(model), str(tmp_path / "out"), *QUANTIZE, *options, "--exclude", "k_proj"]) == 0
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name].float(), torch.ones(3))
    assert _run(["inspect", str(tmp_path / "out"), "--verify"]) == 0


def test_a_merge_that_quantizes_again_refuses_the_name_too(tmp_path, capsys):
    model = model_with(tmp_path, f"{WEIGHT}.absmax")
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(MODULE.removesuffix("."), (64, 64)))
    line = refusal(capsys, "merge", model, adapter, tmp_path / "out", "--requantize", "nf4", "--quiet")
    assert (
        f"tensor {WEIGHT}.absmax: is the name of a part of {WEIGHT} in bitsandbytes (leave out --requantize, or rename"
        in line
    )
    assert _run(["merge", str(model), str(adapter), str(tmp_path / "out"), "--quiet"]) == 0


@pytest.mark.parametrize(("part", "is_refused"), [("lora_A.weight", True), ("lora_Attention.weight", False)])
def test_a_model_in_training_is_refused_by_the_name_of_the_adapters_tensor(part, is_refused, tmp_path, capsys):
    model = model_with(tmp_path, f"{MODULE}{part}")
    if not is_refused:
        assert _run(["quantize", str(model), str(tmp_path / "out"), *QUANTIZE]) == 0
        return
    line = refusal(capsys, "quantize", model, tmp_path / "out", *QUANTIZE)
    assert f"tensor {MODULE}{part}: belongs to an adapter that is not merged (merge_and_unload()" in line
