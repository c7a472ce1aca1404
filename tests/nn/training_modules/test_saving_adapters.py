"""save_adapter: what is saved merges, loads in PEFT, and replaces nothing unasked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from support.adapted_models import fresh, logits, trained
from support.adapted_modules import IN, POOL, RANK, adapted, assert_close, quantized
from support.adapters import PREFIX, edit_json, edit_tensors
from support.conversions import run_conversion, run_merge
from torch import nn

from loftq_cli.errors import InputError, LoftqError, UsageError
from loftq_cli.nn import LoftQLinear, QALoRALinear, QuantizedLinear, load_adapted, save_adapter
from loftq_cli.planning.recipe import Override


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_trained_adapter_is_saved_and_merged(name, checkpoints, tmp_path):
    base = tmp_path / "base"
    other = Override(match="q_proj|c_proj", rank=8, alpha=4.0)
    run_conversion(checkpoints / name, base, rank=4, alpha=8.0, rslora=True, override=(other,))
    model = trained(load_adapted(fresh(base, name), base))

    save_adapter(model, tmp_path / "trained")

    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    start = json.loads((base / "loftq_init" / "adapter_config.json").read_text())
    assert start["alpha_pattern"]
    assert sorted(config.pop("target_modules")) == sorted(start.pop("target_modules"))
    assert config == start
    provenance = "loftq_provenance.json"
    assert (tmp_path / "trained" / provenance).read_bytes() == (base / "loftq_init" / provenance).read_bytes()
    output = run_merge(base, tmp_path / "trained", tmp_path / "merged", dtype="float32")
    deployed = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    assert_close(logits(deployed), logits(model), 1e-4)
    again = load_adapted(fresh(base, name), base, adapter=tmp_path / "trained")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("layout", ["dense", "metal", "mlx"])
def test_a_trained_pooled_adapter_is_saved_and_merged(layout, pooled, tmp_path):
    model = trained(load_adapted(fresh(pooled), pooled))

    save_adapter(model, tmp_path / "trained")

    output = run_merge(pooled, tmp_path / "trained", tmp_path / "merged", layout=layout, dtype="float32")
    again = load_adapted(fresh(pooled), output)
    assert_close(logits(again), logits(model), 1e-4)
    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    assert (config["use_qalora"], config["qalora_group_size"]) == (True, 32)


def test_what_rounded_training_sees_is_what_round_zeros_writes(pooled, tmp_path):
    model = load_adapted(fresh(pooled), pooled)
    for module in model.modules():
        if isinstance(module, QALoRALinear):
            module.quantization_enabled = True
    trained(model)
    save_adapter(model, tmp_path / "trained")

    deployed = run_merge(pooled, tmp_path / "trained", tmp_path / "merged", round_zeros=True, force=True)

    assert_close(logits(load_adapted(fresh(pooled), deployed)), logits(model), 1e-4)


def test_peft_reads_a_saved_adapter(converted, tmp_path):
    model = trained(load_adapted(fresh(converted), converted))

    save_adapter(model, tmp_path / "trained")

    dense = load_adapted(fresh(converted), converted, adapter=tmp_path / "trained")
    for module in list(dense.modules()):
        for name, child in module.named_children():
            if isinstance(child, LoftQLinear):
                setattr(module, name, child.base_layer)
    wrapped = PeftModel.from_pretrained(dense, tmp_path / "trained").eval()
    assert_close(logits(wrapped), logits(model), 1e-5)


def test_a_saved_adapter_is_replaced_on_demand_only(converted, tmp_path):
    model = load_adapted(fresh(converted), converted)
    save_adapter(model, tmp_path / "trained")
    first = (tmp_path / "trained" / "adapter_model.safetensors").read_bytes()
    trained(model)

    with pytest.raises(UsageError, match="exists already"):
        save_adapter(model, tmp_path / "trained")
    save_adapter(model, tmp_path / "trained", overwrite=True)

    assert (tmp_path / "trained" / "adapter_model.safetensors").read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trained"]


@pytest.mark.parametrize("where", [".", "loftq_init", "new", ".."])
def test_the_base_is_never_written_to(where, converted):
    model = load_adapted(fresh(converted), converted)
    before = sorted(path.name for path in converted.iterdir())

    with pytest.raises(UsageError, match="may not be, contain or lie inside the input"):
        save_adapter(model, converted / where, overwrite=True)

    assert sorted(path.name for path in converted.iterdir()) == before


def test_an_adapter_can_be_saved_when_its_base_has_gone(converted, tmp_path, monkeypatch):
    shutil.copytree(converted, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = load_adapted(fresh(converted), "base")
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    save_adapter(model, "trained")

    files = [path / "adapter_config.json" for path in (converted / "loftq_init", Path("trained"))]
    start, saved = (json.loads(file.read_text()) for file in files)
    assert saved["base_model_name_or_path"] == start["base_model_name_or_path"]
    assert (saved["task_type"], saved["lora_alpha"]) == (start["task_type"], start["lora_alpha"])
    assert (Path("trained") / "loftq_provenance.json").is_file()


def test_what_wraps_a_model_is_not_in_the_names_that_are_saved(converted, tmp_path):
    model = load_adapted(fresh(converted), converted)
    save_adapter(model, tmp_path / "plain")
    layers = model.model.layers
    layers[0] = torch.compile(layers[0])

    for place, wrapped in enumerate((torch.compile(model), nn.DataParallel(model), model)):
        save_adapter(wrapped, tmp_path / str(place))
        names = load_file(tmp_path / str(place) / "adapter_model.safetensors").keys()
        assert names == load_file(tmp_path / "plain" / "adapter_model.safetensors").keys()


def test_nan_neither_gets_in_nor_out(converted, tmp_path):
    model = load_adapted(fresh(converted), converted)
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, LoftQLinear))
    with torch.no_grad():
        layer.lora_A[0, 0] = float("nan")
    with pytest.raises(LoftqError, match=rf"{name}.lora_A.weight: holds NaN or infinite values"):
        save_adapter(model, tmp_path / "trained")
    assert not list(tmp_path.iterdir())

    for file, tensor in (
        ("model.safetensors", f"{name}.weight.nested_absmax"),
        ("loftq_init/adapter_model.safetensors", f"{PREFIX}{name}.lora_B.weight"),
    ):
        base = tmp_path / Path(file).stem
        shutil.copytree(converted, base)
        edit_tensors(base / file, lambda t, key=tensor: t[key].view(-1)[:1].fill_(float("inf")))
        with pytest.raises(InputError, match=rf"{name}.*holds NaN or infinite values"):
            load_adapted(fresh(converted), base)


def test_an_adapter_in_another_dtype_and_without_a_source_is_saved(tmp_path):
    model = nn.Sequential(adapted("repo", QuantizedLinear(quantized())).to(torch.bfloat16))

    save_adapter(model, tmp_path / "trained")

    tensors = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert torch.equal(tensors[f"{PREFIX}0.lora_A.weight"], model[0].lora_A)
    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    assert (config["qalora_pooling"], config["qalora_group_size"], config["lora_alpha"]) == ("repo", POOL, 6)
    assert sorted(path.name for path in (tmp_path / "trained").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checksums.json",
    ]


def test_a_source_can_be_named(converted, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(converted / "loftq_init", source)
    edit_json(source / "adapter_config.json", base_model_name_or_path="somewhere")

    save_adapter(load_adapted(fresh(converted), converted), tmp_path / "trained", source)

    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere"


def test_adapters_that_one_directory_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(nn.Linear(2, 2), tmp_path / "trained")
    model = nn.Sequential(*(adapted(kind, QuantizedLinear(quantized())) for kind in ("repo", "peft")))
    with pytest.raises(ValueError, match="one pooling"):
        save_adapter(model, tmp_path / "trained")
    model = nn.Sequential(adapted("loftq", QuantizedLinear(quantized())))
    model[0].lora_A = nn.Parameter(torch.zeros(RANK + 1, IN))
    with pytest.raises(ValueError, match="planned were"):
        save_adapter(model, tmp_path / "trained")
    assert not list(tmp_path.iterdir())


def test_a_layer_that_is_not_pooled_does_not_hide_how_the_others_are(tmp_path):
    model = nn.Sequential(*(adapted(kind, QuantizedLinear(quantized())) for kind in ("loftq", "repo")))

    save_adapter(model, tmp_path / "trained")

    assert json.loads((tmp_path / "trained" / "adapter_config.json").read_text())["qalora_pooling"] == "repo"
