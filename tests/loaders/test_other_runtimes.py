"""GPTQ bases in gptqmodel, optimum and PEFT, and MLX bases in mlx-lm: the libraries that load these containers, which
the other tests do not need. A missing one skips its tests, or with LOFTQ_RUNTIMES=1 fails them.

Expected values are those libraries' own, and float64 arithmetic on the words that gptqmodel holds.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from support import models
from support.adapters import PREFIX, tensors_of
from support.conversions import run_conversion, run_merge
from torch import nn

from loftq_cli.cli.main import _run
from loftq_cli.model.stored import BaseModel

TOKENS = torch.arange(1, 25).view(2, 12) * 5 % 160
FAST = {"group_size": 32, "rank": 4, "alpha": 8.0, "iterations": 2}


def runtime(name: str) -> Any:
    """A library that may be missing."""
    return importlib.import_module(name) if os.environ.get("LOFTQ_RUNTIMES") == "1" else pytest.importorskip(name)


@pytest.fixture(scope="module")
def gptq() -> None:
    """gptqmodel, imported for the first test that needs it: that takes ten seconds."""
    runtime("optimum")
    runtime("gptqmodel")


@pytest.fixture(scope="module")
def mlx() -> Any:
    runtime("mlx_lm")
    return runtime("mlx.core")


def float32_llama(directory: Path) -> Path:
    return models.llama(directory, dtype=torch.float32)


def float16_llama(directory: Path) -> Path:
    return models.llama(directory, dtype=torch.float16)


@dataclass(frozen=True)
class Case:
    """A checkpoint, how it is converted, and how many linears of it are to be quantized, counted by hand."""

    build: Callable[[Path], Path] = float32_llama
    recipe: dict[str, Any] = field(default_factory=dict)
    linears: int = 14
    auto: str = "AutoModelForCausalLM"


@dataclass(frozen=True)
class Converted:
    source: Path
    output: Path
    case: Case

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.output / "loftq_report.json").read_text())

    @property
    def names(self) -> dict[str, str]:
        """Tensor of each quantized weight, by its module in the loaded model."""
        return {layer["module"]: layer["name"] for layer in self.report["layers"]}

    def ours(self) -> dict[str, torch.Tensor]:
        """What we read from the directory, float32 [out, in] by module."""
        with BaseModel.open(self.output) as base:
            return {module: base.matrix(name) for module, name in self.names.items()}


@pytest.fixture(scope="module")
def convert_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Converted]:
    built = functools.cache(lambda build: build(tmp_path_factory.mktemp("model") / "source"))

    @functools.cache
    def convert(layout: str, name: str) -> Converted:
        case = (GPTQ if layout == "gptq" else MLX)[name]
        source, output = built(case.build), tmp_path_factory.mktemp("case") / "converted"
        run_conversion(source, output, **{**FAST, "quant_type": "int4", "layout": layout, **case.recipe})
        return Converted(source, output, case)

    return convert


def in_transformers(directory: Path, auto: str, **keywords: Any) -> tuple[nn.Module, dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = getattr(transformers, auto).from_pretrained(directory, output_loading_info=True, **keywords)
    return model.eval(), info


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def with_weights(source: Path, auto: str, weights: dict[str, torch.Tensor]) -> nn.Module:
    """The dense source in float32, with other weights in some of its linears."""
    model, _ = in_transformers(source, auto, dtype=torch.float32)
    for module, weight in weights.items():
        model.get_submodule(module).weight.data = weight.float().contiguous()
    return model


# GPTQ, in transformers with optimum and gptqmodel.

GPTQ = {
    **{f"int{bits}": Case(recipe={"quant_type": f"int{bits}", "symmetric": False}) for bits in (2, 3, 4, 8)},
    "int4 symmetric": Case(recipe={"symmetric": True}),
    "int8 symmetric": Case(recipe={"quant_type": "int8"}),
    "float16": Case(float16_llama),
    "bfloat16": Case(models.llama),
    "one group a row": Case(recipe={"group_size": 64, "exclude": ("down_proj",)}, linears=12),
    "one matrix of one block in full precision": Case(
        recipe={"exclude": (r"layers\.0\.self_attn\.q_proj",)}, linears=13
    ),
    "rows that are not whole groups": Case(recipe={"group_size": 128}, linears=12),
    "the first block in full precision": Case(recipe={"exclude": (r"layers\.0\.",)}, linears=7),
    "tied llama": Case(models.tied_llama),
    "bert": Case(models.bert, linears=12, auto="AutoModelForSequenceClassification"),
    "mixtral": Case(models.mixtral, linears=8),
    "qwen2_vl": Case(models.qwen2_vl, {"exclude": ("visual",)}, auto="AutoModelForImageTextToText"),
}


@dataclass(frozen=True)
class InGPTQ(Converted):
    model: nn.Module = field(default_factory=nn.Module)
    info: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def decoded(self) -> dict[str, torch.Tensor]:
        """Every quantized weight [out, in] as gptqmodel decodes it."""
        return {module: self.layer(module).dequantize_weight().T for module in self.names}

    def layer(self, module: str) -> Any:
        """gptqmodel's layer, also where PEFT has wrapped it."""
        found = self.model.get_submodule(module)
        return getattr(found, "base_layer", found)


def load_gptq(converted: Converted) -> InGPTQ:
    model, info = in_transformers(converted.output, converted.case.auto)
    return InGPTQ(converted.source, converted.output, converted.case, model, info)


@pytest.fixture(scope="module")
def gptq_once(gptq: None, convert_once: Callable[[str, str], Converted]) -> Callable[[str], InGPTQ]:
    return functools.cache(lambda name: load_gptq(convert_once("gptq", name)))


@pytest.fixture(params=GPTQ)
def loaded(request: pytest.FixtureRequest, gptq_once: Callable[[str], InGPTQ]) -> InGPTQ:
    return gptq_once(request.param)


def is_gptq(module: nn.Module) -> bool:
    return hasattr(module, "qweight")


def test_gptqmodel_loads_the_reported_linears_and_no_others(loaded: InGPTQ) -> None:
    assert not any(loaded.info.values()), loaded.info
    quantized = {name for name, module in loaded.model.named_modules() if is_gptq(module)}
    assert quantized == loaded.names.keys()
    assert len(quantized) == loaded.case.linears
    # The one that can be trained: others lose gradients after an evaluation.
    assert {type(loaded.model.get_submodule(name)).__name__ for name in quantized} == {"TorchLinear"}


def test_gptqmodel_decodes_what_we_read(loaded: InGPTQ) -> None:
    for module, weight in loaded.ours().items():
        assert torch.equal(loaded.decoded[module].float(), weight), module


def test_all_other_weights_of_a_gptq_model_are_the_originals(loaded: InGPTQ) -> None:
    dtype = getattr(torch, loaded.report["dtype"])
    original = in_transformers(loaded.source, loaded.case.auto, dtype=dtype)[0].state_dict()
    kept = loaded.model.state_dict()
    left = original.keys() - {f"{module}.weight" for module in loaded.names}
    assert left == {name for name in kept if not name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))}
    for name in left:
        # gptqmodel holds the biases of its layers in float16.
        is_theirs = name.removesuffix(".bias") in loaded.names
        expected = original[name].half().to(dtype) if is_theirs else original[name]
        assert torch.equal(kept[name].to(dtype), expected), name
        assert is_theirs or kept[name].dtype == dtype


def test_a_gptq_model_computes_with_these_weights(loaded: InGPTQ) -> None:
    expected = logits_of(with_weights(loaded.source, loaded.case.auto, loaded.decoded))
    # float16 products in a float32 model, measured 4e-7; a bfloat16 model rounds after every layer.
    limit = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2}[loaded.report["dtype"]]
    assert relative(logits_of(loaded.model), expected) < limit


# QA-LoRA: trained by PEFT on the GPTQ base, and merged.

POOLED = {
    **{f"int{bits}": Case(recipe={"quant_type": f"int{bits}", "method": "qalora"}) for bits in (2, 3, 4, 8)},
    "rank-stabilized, another rank": Case(recipe={"method": "qalora", "rslora": True, "rank": 8, "alpha": 4.0}),
    "zero": Case(recipe={"method": "qalora", "init": "standard"}),
}
GPTQ |= {f"qalora {name}": case for name, case in POOLED.items()}


@dataclass(frozen=True)
class Trained(InGPTQ):
    """A QA-LoRA adapter after some steps: in PEFT, and as PEFT saved it."""

    peft: Any = None
    adapter: Path = Path()
    losses: tuple[float, ...] = ()
    initial: dict[str, torch.Tensor] = field(default_factory=dict)

    def delta(self, module: str) -> torch.Tensor:
        """What PEFT's layer adds to the weight, float64 [out, in], from the factors that PEFT saved: the pooled input
        is the mean of a group times the number of groups.
        """
        config = json.loads((self.adapter / "adapter_config.json").read_text())
        factors = load_file(self.adapter / "adapter_model.safetensors")
        lora_A, lora_B = (factors[f"{PREFIX}{module}.lora_{x}.weight"].double() for x in "AB")
        scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        size, groups = config["qalora_group_size"], lora_A.shape[1]
        return (scaling * groups / size * lora_B @ lora_A).repeat_interleave(size, dim=1)

    def exact(self, module: str) -> torch.Tensor:
        """(code - zero point) * scale, float64 [out, in]: the base before it is rounded to float16."""
        layer, bits = self.layer(module), self.report["layers"][0]["quant_type"].removeprefix("int")
        index = layer.g_idx.long()
        codes = codes_in(layer.qweight.T, int(bits), len(index)).T  # [in, out]
        zero_points = codes_in(layer.qzeros, int(bits), codes.shape[1])  # [groups, out]
        return ((codes - zero_points[index]) * layer.scales.double()[index]).T


def codes_in(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int64 [rows, count]: unsigned numbers of `bits` bits, one little-endian bit stream along each row of words."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    return torch.from_numpy(stream.reshape(len(words), count, bits) @ (1 << np.arange(bits)))


@pytest.fixture(scope="module")
def train_once(
    gptq: None, convert_once: Callable[[str, str], Converted], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Trained]:
    @functools.cache
    def train(name: str) -> Trained:
        fresh = load_gptq(convert_once("gptq", f"qalora {name}"))
        peft = PeftModel.from_pretrained(fresh.model, fresh.output, subfolder="qalora_init", is_trainable=True)
        initial = {name: p.detach().clone() for name, p in peft.named_parameters() if p.requires_grad}
        torch.manual_seed(0)
        optimizer, losses = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], 1e-2), []
        peft.train()
        for _ in range(5):
            loss = peft(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        adapter = tmp_path_factory.mktemp("trained") / "adapter"
        peft.save_pretrained(adapter)
        return Trained(**vars(fresh), peft=peft.eval(), adapter=adapter, losses=tuple(losses), initial=initial)

    return train


@pytest.fixture(params=POOLED)
def trained(request: pytest.FixtureRequest, train_once: Callable[[str], Trained]) -> Trained:
    return train_once(request.param)


def test_peft_trains_every_tensor_of_our_adapter_and_nothing_else(trained: Trained) -> None:
    stored = load_file(trained.output / "qalora_init" / "adapter_model.safetensors")
    started = {name.replace(".default", ""): tensor for name, tensor in trained.initial.items()}
    assert started.keys() == stored.keys()
    assert all(torch.equal(started[name], tensor) for name, tensor in stored.items())
    moved = dict(trained.peft.named_parameters())
    assert all(not torch.equal(moved[name], tensor) for name, tensor in trained.initial.items())
    assert trained.losses[-1] < trained.losses[0]


def test_what_peft_adds_is_the_same_for_every_weight_of_a_group(trained: Trained) -> None:
    for module in trained.names:
        layer = trained.peft.base_model.model.get_submodule(module)
        inputs = torch.eye(layer.base_layer.in_features)
        with torch.no_grad():
            seen = (layer(inputs) - layer.base_layer(inputs)).T
        # A difference of float32 outputs.
        assert relative(seen, trained.delta(module)) < 1e-4


def test_the_reported_error_is_that_of_what_peft_loads(gptq: None, convert_once: Callable[..., Converted]) -> None:
    loaded = load_gptq(convert_once("gptq", "qalora int4"))
    untrained = Trained(**vars(loaded), adapter=loaded.output / "qalora_init")
    originals = tensors_of(loaded.source)
    for layer in loaded.report["layers"]:
        weight, base = originals[layer["name"]], loaded.decoded[layer["module"]].double()
        assert relative(base, weight) == pytest.approx(layer["error"]["base_error"], rel=1e-5)
        error = relative(base + untrained.delta(layer["module"]), weight)
        assert error == pytest.approx(layer["error"]["error"], rel=1e-5)
        assert error < layer["error"]["base_error"]


def merge(trained: Trained, output: Path, **options: Any) -> Path:
    return run_merge(trained.output, trained.adapter, output, **options)


@pytest.mark.parametrize("trained", [name for name in POOLED if name != "int3"], indirect=True)  # metal holds no int3
def test_a_trained_adapter_merges_into_offsets_and_loads_in_transformers(trained: Trained, tmp_path: Path) -> None:
    merged, info = in_transformers(
        merge(trained, tmp_path / "out", layout="metal"), trained.case.auto, device_map="cpu"
    )
    assert not any(info.values()), info
    for module in trained.names:
        expected = trained.exact(module) + trained.delta(module)
        difference = (merged.get_submodule(module).weight.detach().double() - expected).abs().max()
        assert float(difference / expected.abs().max()) <= 1e-6
    # gptqmodel rounds the base to float16, and 2⁻¹¹ of a weight is 1e-3 of an output at most.
    assert relative(logits_of(merged), logits_of(trained.peft)) < 2e-3


def test_a_trained_adapter_merges_into_a_dense_model(trained: Trained, tmp_path: Path) -> None:
    merged, info = in_transformers(merge(trained, tmp_path / "out", layout="dense"), trained.case.auto)
    assert not any(info.values()), info
    for module in trained.names:
        expected = trained.decoded[module].double() + trained.delta(module)
        difference = (merged.get_submodule(module).weight.detach().double() - expected).abs().max()
        assert float(difference / expected.abs().max()) <= 1e-6
    assert relative(logits_of(merged), logits_of(trained.peft)) < 1e-5


def test_the_command_line_merges_what_peft_saved(
    train_once: Callable[[str], Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train_once("int4")
    merge(trained, tmp_path / "expected", layout="metal")
    arguments = (trained.output, trained.adapter, tmp_path / "out")
    capsys.readouterr()
    assert _run(["merge", *map(str, arguments), "--layout", "metal", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "metal"
    found, expected = (tensors_of(tmp_path / name) for name in ("out", "expected"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_offsets_that_are_rounded_to_gptq_load_again(train_once: Callable[[str], Trained], tmp_path: Path) -> None:
    trained = train_once("int8")
    output = merge(trained, tmp_path / "out", layout="gptq", round_zeros=True, force=True)
    model, info = in_transformers(output, trained.case.auto)
    assert not any(info.values()), info
    for module in trained.names:
        layer = model.get_submodule(module)
        assert torch.equal(layer.qweight, trained.layer(module).qweight)
        # Where no zero point was clamped, half a step at most: (code - round(z - delta / scale)) * scale.
        step = layer.scales.double().T.repeat_interleave(32, dim=1)
        zero_points = codes_in(layer.qzeros, 8, layer.out_features).T.repeat_interleave(32, dim=1)
        inside = (zero_points > 0) & (zero_points < 255)
        expected = trained.exact(module) + trained.delta(module)
        difference = (layer.dequantize_weight().T.double() - expected).abs() / step
        # Half a step, and 2⁻¹¹ of up to 255 steps for the rounding to float16.
        assert float(difference[inside].max()) < 0.5 + 255 / 2**11


@pytest.mark.parametrize("name", ["int4", "qalora int4"])
def test_the_lines_of_the_model_card_of_a_gptq_base_load_the_adapter(
    name: str, gptq: None, convert_once: Callable[[str, str], Converted]
) -> None:
    output = convert_once("gptq", name).output
    lines = (output / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    namespace: dict[str, Any] = {}
    with contextlib.chdir(output):
        exec(lines, namespace)
    parameters = {n.replace(".default", ""): parameter for n, parameter in namespace["model"].named_parameters()}
    (folder,) = output.glob("*_init")
    stored = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(parameters[n], tensor) and parameters[n].requires_grad for n, tensor in stored.items())


# MLX, in mlx-lm.

MLX = {
    **{f"int{bits}": Case(recipe={"quant_type": f"int{bits}", "symmetric": False}) for bits in (2, 3, 4, 8)},
    "groups of 64": Case(recipe={"group_size": 64}),
    "rows that are not whole groups": Case(recipe={"group_size": 128}, linears=12),
    "one matrix of one block in full precision": Case(
        recipe={"exclude": (r"layers\.0\.self_attn\.q_proj",)}, linears=13
    ),
    "ranges of least error": Case(recipe={"scales": "search"}),
    "float16": Case(float16_llama),
    "bfloat16": Case(models.llama),
    "float32 scales in a bfloat16 model": Case(models.llama, {"scale_dtype": "float32"}),
    "tied llama": Case(models.tied_llama),
    "mixtral": Case(models.mixtral, linears=8),
}


def tensor_of(array: Any, mlx: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array.astype(mlx.float32)))


def load_mlx(directory: Path) -> tuple[Any, dict[str, Any]]:
    """mlx-lm's model, which must find every weight and need no other; and its parameters by name."""
    model, _ = importlib.import_module("mlx_lm.utils").load_model(directory, strict=True)
    return model, dict(importlib.import_module("mlx.utils").tree_flatten(model.parameters()))


def mlx_logits(model: Any, mlx: Any) -> torch.Tensor:
    return tensor_of(model(mlx.array(TOKENS.numpy())), mlx)


def mlx_weights(directory: Path, parameters: dict[str, Any], mlx: Any) -> dict[str, torch.Tensor]:
    """Every quantized weight as MLX decodes it, float32 [out, in] by module; constants widened first, as we do."""
    values = json.loads((directory / "config.json").read_text())["quantization"]
    modules = [name.removesuffix(".biases") for name in parameters if name.endswith(".biases")]
    return {
        module: tensor_of(
            mlx.dequantize(
                parameters[f"{module}.weight"],
                *(parameters[f"{module}.{part}"].astype(mlx.float32) for part in ("scales", "biases")),
                group_size=values["group_size"],
                bits=values["bits"],
            ),
            mlx,
        )
        for module in modules
    }


@pytest.mark.parametrize("name", MLX)
def test_mlx_decodes_and_computes_what_we_read(
    name: str, mlx: Any, convert_once: Callable[[str, str], Converted]
) -> None:
    converted = convert_once("mlx", name)
    model, parameters = load_mlx(converted.output)
    weights, ours = mlx_weights(converted.output, parameters, mlx), converted.ours()
    assert weights.keys() == ours.keys()
    assert len(weights) == converted.case.linears
    scales = parameters["model.layers.1.self_attn.v_proj.scales"].dtype
    for module, weight in ours.items():
        assert torch.equal(weights[module].to(torch_dtype(scales, mlx)).float(), weight), module
    if name != "mixtral":  # MLX gathers experts in float32 alone on a CPU
        assert bool(mlx_logits(model, mlx).isfinite().all())
    # In float32, since narrower dtypes round after every layer; with sums of another library.
    model.set_dtype(mlx.float32)
    expected = logits_of(with_weights(converted.source, converted.case.auto, weights))
    assert relative(mlx_logits(model, mlx), expected) < 1e-5


def torch_dtype(dtype: Any, mlx: Any) -> torch.dtype:
    return {mlx.float32: torch.float32, mlx.float16: torch.float16, mlx.bfloat16: torch.bfloat16}[dtype]


def test_what_mlx_lm_quantizes_is_read_as_mlx_decodes_it(mlx: Any, tmp_path: Path) -> None:
    mlx_lm, source, output = (
        importlib.import_module("mlx_lm.utils"),
        float32_llama(tmp_path / "source"),
        tmp_path / "out",
    )
    model, config = mlx_lm.load_model(source)
    model, config = mlx_lm.quantize_model(model, config, group_size=64, bits=4)
    mlx_lm.save_model(output, model)
    mlx_lm.save_config(config, output / "config.json")
    weights = mlx_weights(output, load_mlx(output)[1], mlx)
    assert len(weights) == 16  # embedding and head too
    with BaseModel.open(output) as base:
        assert {name.removesuffix(".weight") for name in base.quantized} == weights.keys()
        assert all(torch.equal(base.matrix(f"{module}.weight"), weight) for module, weight in weights.items())


def test_a_merged_qalora_model_in_mlx_form_computes_what_peft_did(trained: Trained, mlx: Any, tmp_path: Path) -> None:
    output = merge(trained, tmp_path / "out", layout="mlx")
    model, parameters = load_mlx(output)
    weights = mlx_weights(output, parameters, mlx)
    assert weights.keys() == trained.names.keys()
    for module, weight in weights.items():
        expected = trained.exact(module) + trained.delta(module)
        assert float((weight.double() - expected).abs().max() / expected.abs().max()) <= 1e-6
    assert relative(mlx_logits(model, mlx), logits_of(trained.peft)) < 2e-3
