"""What transformers, compressed-tensors and PEFT make of an integer base in each container.

Expected values are those libraries' own. GPTQ's and MLX's own loaders are in test_other_runtimes.py.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from support import models
from support.conversions import run_conversion
from support.integer_files import (
    BASE,
    CAUSAL,
    CONTAINERS,
    FAST,
    INTEGERS,
    PREFIX,
    Converter,
    bfloat16_llama,
    combination,
    config_of,
    decoded,
    report_of,
)
from support.loading import Loaded, matrix, matrix_of_lora, relative_error
from torch import nn

from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.methods.method import METHODS


@dataclass(frozen=True)
class Case:
    """A checkpoint, the class that loads it, and how many linears of it are to be quantized, counted by hand."""

    build: Callable[[Path], Path]
    auto: str
    linears: int
    recipe: dict[str, Any] = field(default_factory=dict)


def float16_llama(directory: Path) -> Path:
    return models.llama(directory, layers=1, dtype=torch.float16)


def float32_llama(directory: Path) -> Path:
    return models.llama(directory, layers=1, dtype=torch.float32)


def minilm(_: Path) -> Path:
    return models.minilm()


FAMILIES = {
    "tied llama": Case(models.tied_llama, CAUSAL, 14),
    "bert": Case(models.bert, "AutoModelForSequenceClassification", 12),
    "t5": Case(models.t5, "AutoModelForSeq2SeqLM", 28),
    "qwen2_vl": Case(models.qwen2_vl, "AutoModelForImageTextToText", 14, {"exclude": ("visual",)}),
    "whisper": Case(models.whisper, "AutoModelForSpeechSeq2Seq", 32),
}
DTYPES = {"bfloat16": bfloat16_llama, "float16": float16_llama, "float32": float32_llama}
FLOAT32_SCALES = {"scale_dtype": "float32"}
PACKED = {
    **{
        f"{quant_type} {'symmetric' if symmetric else 'asymmetric'} {dtype}": Case(
            build, CAUSAL, 7, {"quant_type": quant_type, "symmetric": symmetric}
        )
        for quant_type in INTEGERS
        for symmetric in (True, False)
        for dtype, build in DTYPES.items()
        if dtype == "bfloat16" or quant_type == "int4"
    },
    "float32 scales": Case(bfloat16_llama, CAUSAL, 7, FLOAT32_SCALES),
    "bfloat16 scales in a float32 model": Case(float32_llama, CAUSAL, 7, {"scale_dtype": "bfloat16"}),
    "rows that are not whole groups": Case(bfloat16_llama, CAUSAL, 6, {"group_size": 128}),
    "one matrix excluded": Case(models.llama, CAUSAL, 13, {"exclude": (r"layers\.0\.self_attn\.q_proj",)}),
    **FAMILIES,
    "minilm": Case(minilm, BASE, 36, {"group_size": 64}),
}
METAL = {
    **{
        f"{quant_type} {dtype}": Case(build, CAUSAL, 7, {"quant_type": quant_type, "symmetric": False})
        for quant_type in LAYOUTS["metal"].quant_types
        for dtype, build in DTYPES.items()
    },
    "float32 scales": Case(bfloat16_llama, CAUSAL, 7, FLOAT32_SCALES),
    "rows that are not whole groups": Case(bfloat16_llama, CAUSAL, 6, {"group_size": 128}),
    **FAMILIES,
    "mixtral": Case(models.mixtral, CAUSAL, 8, FLOAT32_SCALES),
    "mixtral in bfloat16": Case(models.mixtral, CAUSAL, 8),
    "float32 scales beside biases": Case(
        models.qwen2_vl, "AutoModelForImageTextToText", 14, {"exclude": ("visual",), **FLOAT32_SCALES}
    ),
}
LOADED = {f"{name}, compressed-tensors": ("compressed-tensors", case) for name, case in PACKED.items()} | {
    f"{name}, metal": ("metal", case) for name, case in METAL.items()
}


@dataclass(frozen=True)
class InTransformers(Loaded):
    """A case: what it became, and what it was."""

    source: Path = Path()
    case: Case = Case(minilm, "", 0)
    layout: str = ""

    @functools.cached_property
    def original(self) -> nn.Module:
        """The source as transformers loads it, in the dtype of the result."""
        dtype = getattr(torch, self.report["dtype"])
        return getattr(transformers, self.case.auto).from_pretrained(self.source, dtype=dtype).eval()

    @functools.cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """Decoded weight of each reported module, by its name in the loaded model."""
        values = decoded(self.output)
        return {layer["module"]: values[layer["name"]] for layer in self.report["layers"]}


def load(output: Path, adapter: Path, auto: str, **keywords: Any) -> dict[str, Any]:
    """The fields of Loaded: the base, then its adapter, ready for training."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "compressed_tensors")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            auto_class = getattr(transformers, auto)
            model, info = auto_class.from_pretrained(output, output_loading_info=True, **keywords)
            peft = PeftModel.from_pretrained(model, output, subfolder=adapter.name, is_trainable=True)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    said += [str(warning.message) for warning in caught if not issubclass(warning.category, FutureWarning)]
    return {"output": output, "adapter": adapter, "model": model, "peft": peft, "info": info, "said": said}


# Without a device, transformers asks for Apple's; without one of those, it says once in a process that it decodes.
KEYWORDS = {"metal": {"device_map": "cpu"}}
DECODES = "Metal quantization requires an Apple Silicon GPU"


@pytest.fixture(scope="module")
def load_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], InTransformers]:
    build = functools.cache(lambda builder: builder(tmp_path_factory.mktemp("model") / "source"))

    @functools.cache
    def load_case(name: str) -> InTransformers:
        layout, case = LOADED[name]
        model, output = build(case.build), tmp_path_factory.mktemp("case") / "converted"
        recipe = {**FAST, "quant_type": "int4", "layout": layout, **case.recipe}
        outcome = run_conversion(model, output, **recipe)
        fields = load(outcome.output, outcome.adapter, case.auto, **KEYWORDS.get(layout, {}))
        return InTransformers(**fields, source=model, case=case, layout=layout)

    return load_case


@pytest.fixture(params=LOADED)
def loaded(request: pytest.FixtureRequest, load_once: Callable[[str], InTransformers]) -> InTransformers:
    return load_once(request.param)


def outputs(model: nn.Module, config: dict[str, Any]) -> torch.Tensor:
    """Logits, or the last hidden state of a base model, for a small batch; with a graph where the model trains."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 150, (2, 12), generator=generator)
    batch: dict[str, torch.Tensor] = {"input_ids": tokens}
    if config["model_type"] == "t5":
        batch |= {"decoder_input_ids": tokens[:, :5]}
    if config["model_type"] == "whisper":
        batch = {"input_features": torch.randn(2, 80, 32, generator=generator), "decoder_input_ids": tokens}
    with torch.set_grad_enabled(model.training):
        result = model(**batch)
    return result.last_hidden_state if "logits" not in result else result.logits


def test_nothing_is_missing_unexpected_or_newly_initialized(loaded: InTransformers) -> None:
    assert not any(loaded.info.values()), loaded.info
    assert not [text for text in loaded.said if loaded.layout != "metal" or not text.startswith(DECODES)]


def test_the_reported_linears_are_loaded_with_exactly_the_stored_values(loaded: InTransformers) -> None:
    assert len(loaded.weights) == loaded.case.linears
    assert loaded.modules.keys() == loaded.weights.keys()
    for name, module in loaded.modules.items():
        assert type(module.base_layer) is nn.Linear
        assert str(module.base_layer.weight.dtype) == f"torch.{loaded.report['dtype']}"
        assert torch.equal(module.base_layer.weight, loaded.weights[name]), name


def test_all_other_parameters_are_the_originals(loaded: InTransformers) -> None:
    originals = dict(loaded.original.named_parameters())
    parameters = {n.replace(".base_layer", ""): p for n, p in loaded.model.named_parameters() if "lora_" not in n}
    assert parameters.keys() == originals.keys()
    for name in parameters.keys() - {f"{module}.weight" for module in loaded.modules}:
        assert parameters[name].dtype == originals[name].dtype, name
        assert torch.equal(parameters[name], originals[name]), name


def test_the_loaded_model_computes_what_a_dense_one_with_these_weights_computes(loaded: InTransformers) -> None:
    config = config_of(loaded.output)
    expected_model = getattr(transformers, loaded.case.auto).from_pretrained(loaded.source, dtype=loaded.original.dtype)
    for name, weight in loaded.weights.items():
        expected_model.get_submodule(name).weight.data = weight
    loaded.peft.eval()
    with loaded.peft.disable_adapter():
        found = outputs(loaded.peft, config)
    # The same numbers in the same operations.
    assert torch.equal(found, outputs(expected_model.eval(), config))


def test_base_and_adapter_have_the_reported_error(loaded: InTransformers) -> None:
    original = getattr(transformers, loaded.case.auto).from_pretrained(loaded.source, dtype=torch.float32)
    for layer in loaded.report["layers"]:
        module, weight = loaded.modules[layer["module"]], original.get_submodule(layer["module"]).weight.detach()
        base = matrix(module.base_layer).double()
        assert relative_error(weight, base) == pytest.approx(layer["error"]["base_error"], rel=1e-5)
        assert relative_error(weight, base + matrix_of_lora(module)) == pytest.approx(layer["error"]["error"], rel=1e-5)


def test_a_training_step_has_finite_gradients_for_the_adapter_and_none_for_the_base(loaded: InTransformers) -> None:
    torch.manual_seed(0)
    loaded.peft.train()
    output = outputs(loaded.peft, config_of(loaded.output))
    # Not the mean square: behind a layer norm that is a constant.
    (output.float() * torch.randn(output.shape)).mean().backward()
    gradients = {name: parameter.grad for name, parameter in loaded.peft.named_parameters()}
    loaded.peft.zero_grad(set_to_none=True)
    adapted = {name: gradient for name, gradient in gradients.items() if "lora_" in name}
    assert len(adapted) == 2 * loaded.case.linears
    assert all(gradient is None for name, gradient in gradients.items() if name not in adapted)
    assert all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in adapted.values())


@pytest.mark.parametrize("name", [name for name, (layout, _) in LOADED.items() if layout == "compressed-tensors"])
def test_compressed_tensors_itself_decompresses_the_stored_values(
    name: str, load_once: Callable[[str], InTransformers]
) -> None:
    compressor = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base").PackedQuantizationCompressor
    quantization = pytest.importorskip("compressed_tensors.quantization")
    loaded = load_once(name)
    values = quantization.QuantizationConfig.model_validate(config_of(loaded.output)["quantization_config"])
    (scheme,) = values.config_groups.values()
    for layer in loaded.report["layers"]:
        module = layer["name"].removesuffix("weight")
        parts = {key.removeprefix(module): value for key, value in loaded.tensors.items() if key.startswith(module)}
        weight = compressor.decompress(parts, scheme)["weight"].to(getattr(torch, loaded.report["dtype"]))
        assert torch.equal(weight, loaded.weights[layer["module"]])


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        (method, layout)
        for method in METHODS
        for layout in CONTAINERS
        if layout != "gptq" or method == "qalora"  # with gptqmodel in test_other_runtimes.py
    ],
)
def test_the_lines_of_the_model_card_load_base_and_adapter(method: str, layout: str, convert_once: Converter) -> None:
    # PEFT pools on GPTQ layers, and only as it does; "paper" is loaded by our modules there too.
    pooling = {"pooling": "paper"} if layout == "gptq" else {}
    output = convert_once(**combination("int4", method, layout), **pooling).output
    lines = (output / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    namespace: dict[str, Any] = {}
    with contextlib.chdir(output):
        exec(lines, namespace)
    # Our modules hold the factors themselves, PEFT's hold linears.
    parameters = {
        f"{PREFIX}{re.sub(r'[.]default|[.]weight$', '', name).removeprefix(PREFIX)}.weight": parameter
        for name, parameter in namespace["model"].named_parameters()
        if "lora_" in name
    }
    stored = load_file(next(output.glob("*_init")) / "adapter_model.safetensors")
    assert parameters.keys() == stored.keys()
    assert all(
        torch.equal(parameters[name], tensor) and parameters[name].requires_grad for name, tensor in stored.items()
    )


@pytest.mark.parametrize(("layout", "key"), [("compressed-tensors", "ignore"), ("metal", "modules_to_not_convert")])
def test_heads_that_a_model_may_add_are_not_looked_for_among_the_quantized(
    layout: str, key: str, tmp_path: Path
) -> None:
    source = models.bert_as("BertForTokenClassification")(tmp_path / "source")
    outcome = run_conversion(source, tmp_path / "out", quant_type="int4", layout=layout, method="qlora")
    auto_class = transformers.AutoModelForSequenceClassification
    model, info = auto_class.from_pretrained(outcome.output, output_loading_info=True, **KEYWORDS.get(layout, {}))
    assert info["missing_keys"] == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert type(model.bert.pooler.dense) is nn.Linear
    # Where codes are computed with as they are, on servers and Apple's GPUs, only this list tells.
    kept = config_of(outcome.output)["quantization_config"][key]
    assert {"classifier", "pooler.dense", "lm_head", "score"} <= set(kept)
    assert not {layer["module"] for layer in report_of(outcome.output)["layers"]} & set(kept)


@pytest.mark.parametrize("quant_type", INTEGERS)
def test_transposed_layers_are_decoded_in_groups_of_their_inputs(quant_type: str, tmp_path: Path) -> None:
    recipe = {**FAST, "quant_type": quant_type, "layout": "dense"}
    source = models.gpt2(tmp_path / "source")
    outcome = run_conversion(source, tmp_path / "out", **recipe)
    loaded = Loaded(**load(outcome.output, outcome.adapter, CAUSAL))
    original = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert not any(loaded.info.values())
    assert len(loaded.modules) == 8
    for layer in loaded.report["layers"]:
        module, weight = loaded.modules[layer["module"]], matrix(original.get_submodule(layer["module"]))
        base = matrix(module.base_layer)
        groups = base.unflatten(1, (-1, 32)).flatten(0, 1)
        assert max(len(group.unique()) for group in groups) <= 2 ** INTEGERS[quant_type]
        assert relative_error(weight, base) == pytest.approx(layer["error"]["base_error"], rel=1e-5)
        assert relative_error(weight, base + matrix_of_lora(module)) == pytest.approx(layer["error"]["error"], rel=1e-5)
