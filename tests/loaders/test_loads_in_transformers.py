"""What we write is what transformers, PEFT and bitsandbytes load: nothing missing, quantized again or scaled wrongly.

Expected values are those libraries' own, or float64 arithmetic on the original as transformers loads it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from support import models
from support.conversions import run_conversion
from support.loading import Loaded, load, matrix, matrix_of_lora, peft_delta, relative_error
from torch import nn
from transformers.pytorch_utils import Conv1D

from loftq_cli.adapter.source import open_adapter
from loftq_cli.errors import LoftqError
from loftq_cli.model.stored import BaseModel
from loftq_cli.planning.recipe import Override
from loftq_cli.tensors.matrices import LoraPair
from loftq_cli.tensors.metrics import adapter_delta

CAUSAL, BASE = "AutoModelForCausalLM", "AutoModel"


@dataclass(frozen=True)
class Case:
    """A checkpoint, the class that loads it, and how many linears of it are to be quantized, counted by hand."""

    build: Callable[[Path], Path]
    auto: str
    linears: int
    recipe: dict[str, Any] = field(default_factory=dict)


def minilm(_: Path) -> Path:
    return models.minilm()


def sharded_llama(directory: Path) -> Path:
    models.llama(directory, max_shard_size="100KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    return directory


def float32_llama_called_bfloat16(directory: Path) -> Path:
    return models.with_dtype(models.llama(directory, dtype=torch.float32), "bfloat16")


def float32_bert_called_bfloat16(directory: Path) -> Path:
    return models.with_dtype(models.bert(directory), "bfloat16")


def bfloat16_llama_called_float32(directory: Path) -> Path:
    return models.with_dtype(models.llama(directory), "float32")


def float16_llama(directory: Path) -> Path:
    return models.llama(directory, dtype=torch.float16)


# A block of llama has 7 linears, of gpt2 4, of bert 6; an MoE one has 4 in its attention and 3 for each shared expert;
# t5 has 4 in every attention (the decoder's blocks have two) and 1 in its feed-forward that is not `wo`.
CASES = {
    "llama": Case(models.llama, CAUSAL, 14),
    "llama qlora": Case(models.llama, CAUSAL, 14, {"method": "qlora"}),
    "llama single quant": Case(models.llama, CAUSAL, 14, {"double_quant": False, "block_size": 32}),
    "llama, joint fit": Case(models.llama, CAUSAL, 14, {"fit": "joint", "iterations": 3, "rounds": 1}),
    "llama, constants of both signs": Case(
        models.llama, CAUSAL, 14, {"fit": "joint", "iterations": 2, "double_quant": False}
    ),
    "llama, fp4": Case(models.llama, CAUSAL, 14, {"quant_type": "fp4"}),
    "llama, fp4 beside nf4": Case(
        models.llama, CAUSAL, 14, {"override": (Override(match="self_attn", quant_type="fp4"),)}
    ),
    "tied llama": Case(models.tied_llama, CAUSAL, 14),
    "torch llama": Case(models.torch_llama, CAUSAL, 14),
    "sharded llama": Case(sharded_llama, CAUSAL, 14),
    "float16 llama": Case(float16_llama, CAUSAL, 14),
    "float32 llama called bfloat16": Case(float32_llama_called_bfloat16, CAUSAL, 14),
    "bfloat16 llama called float32": Case(bfloat16_llama_called_float32, CAUSAL, 14),
    "llama with head": Case(models.llama, CAUSAL, 15, {"include": ("layers", "lm_head")}),
    "gpt2": Case(models.gpt2, CAUSAL, 8),
    "gpt2 qlora": Case(models.gpt2, CAUSAL, 8, {"method": "qlora"}),
    "gpt2 without prefix": Case(models.gpt2_without_prefix, CAUSAL, 8),
    "gpt2 base": Case(models.gpt2_base, BASE, 8),
    "bert": Case(models.bert, "AutoModelForSequenceClassification", 12),
    "bert base": Case(models.bert_as("BertModel"), BASE, 12),
    "bert with a tied head": Case(models.bert_as("BertForMaskedLM"), "AutoModelForMaskedLM", 12),
    "float32 bert called bfloat16": Case(float32_bert_called_bfloat16, "AutoModelForSequenceClassification", 12),
    "mixtral": Case(models.mixtral, CAUSAL, 8),
    "qwen2_moe": Case(models.qwen2_moe, CAUSAL, 14),
    # The dense and the shared feed-forward have the leaf names of experts, and PEFT takes their adapters for experts'.
    "deepseek_v3": Case(models.deepseek_v3, CAUSAL, 10),
    "t5": Case(models.t5, "AutoModelForSeq2SeqLM", 28),
    "whisper": Case(models.whisper, "AutoModelForSpeechSeq2Seq", 32),
    "qwen2_vl": Case(models.qwen2_vl, "AutoModelForImageTextToText", 14, {"exclude": ("visual",)}),
    # Of a block's in_proj, x_proj, dt_proj and out_proj, PEFT refuses the last, and x_proj has 40 rows, not 32 · n.
    "mamba": Case(models.mamba, CAUSAL, 2),
    "minilm": Case(minilm, BASE, 36, {"iterations": 2, "max_shard_size": "5MB"}),
    "minilm qlora": Case(minilm, BASE, 36, {"method": "qlora"}),
    "dense llama": Case(models.llama, CAUSAL, 14, {"layout": "dense"}),
    "dense gpt2 without prefix": Case(models.gpt2_without_prefix, CAUSAL, 8, {"layout": "dense"}),
    "dense float32 bert called bfloat16": Case(
        float32_bert_called_bfloat16, "AutoModelForSequenceClassification", 12, {"layout": "dense"}
    ),
}
DENSE = [name for name in CASES if name.startswith("dense")]
FOUR_BIT = [name for name in CASES if name not in DENSE]
TIED = [
    "tied llama",
    "torch llama",
    "gpt2",
    "gpt2 without prefix",
    "bert with a tied head",
    "dense gpt2 without prefix",
]
SENTENCES = [
    "The train to the coast leaves at seven from platform four.",
    "He poured the tea, sat down by the window and read the letter twice.",
    "A low-rank adapter holds what quantization lost.",
    "Prices fell in March, but nobody in the market seemed surprised.",
]
FLOAT32 = ["bfloat16 llama called float32", "gpt2", "gpt2 without prefix", "bert", "bert base", "t5", "minilm"]


@dataclass(frozen=True)
class Converted(Loaded):
    """A case: what it became, and what it was."""

    source: Path = Path()
    auto: str = ""

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.output / "config.json").read_text())

    @functools.cached_property
    def original(self) -> nn.Module:
        """The source as transformers loads it, in float32."""
        return getattr(transformers, self.auto).from_pretrained(self.source, dtype=torch.float32).eval()

    def original_matrix(self, module: str) -> torch.Tensor:
        return matrix(self.original.get_submodule(module))


Converter = Callable[[str], Converted]


@pytest.fixture(scope="module")
def convert_once(tmp_path_factory: pytest.TempPathFactory) -> Converter:
    @functools.cache
    def convert(name: str) -> Converted:
        case, directory = CASES[name], tmp_path_factory.mktemp("case")
        source = case.build(directory / "source")
        outcome = run_conversion(source, directory / "converted", **case.recipe)
        return Converted(**vars(load(outcome, case.auto)), source=source, auto=case.auto)

    return convert


@pytest.fixture(params=CASES)
def converted(request: pytest.FixtureRequest, convert_once: Converter) -> Converted:
    return convert_once(request.param)


def only(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("converted", names, indirect=True)


def test_nothing_is_missing_unexpected_or_newly_initialized(converted: Converted) -> None:
    assert not any(converted.info.values()), converted.info
    assert not converted.said


def test_every_tensor_of_the_adapter_file_is_in_the_model_and_nothing_else_is_adapted(converted: Converted) -> None:
    loaded = {
        name.replace(".default", ""): parameter
        for name, parameter in converted.peft.named_parameters()
        if "lora_" in name
    }
    stored = converted.adapter_tensors
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], tensor.to(loaded[name].dtype)) for name, tensor in stored.items())


@only(*FOUR_BIT)
def test_exactly_the_reported_linears_are_4_bit(converted: Converted, request: pytest.FixtureRequest) -> None:
    four_bit = {
        name.removesuffix(".base_layer")
        for name, module in converted.model.named_modules()
        if isinstance(module, Linear4bit)
    }
    assert four_bit == converted.modules.keys()
    assert len(four_bit) == CASES[request.node.callspec.params["converted"]].linears


@only(*DENSE)
def test_a_dense_base_loads_with_no_quantization(converted: Converted) -> None:
    assert "quantization_config" not in converted.config
    assert all(type(layer.base_layer) in (nn.Linear, Conv1D) for layer in converted.modules.values())
    assert len(converted.modules) in (8, 12, 14)


def test_an_override_has_its_own_format(convert_once: Converter) -> None:
    layers = convert_once("llama, fp4 beside nf4").report["layers"]
    found = {(layer["quant_type"], ".self_attn." in layer["name"]) for layer in layers}
    assert found == {("fp4", True), ("nf4", False)}


@only(*FOUR_BIT)
def test_the_stored_bytes_are_in_the_model_unchanged(converted: Converted) -> None:
    stored = converted.tensors
    for layer in converted.report["layers"]:
        name, weight = layer["name"], converted.modules[layer["module"]].base_layer.weight
        state = weight.quant_state
        quant_type = layer["quant_type"]
        fields = json.loads(bytes(stored[f"{name}.quant_state.bitsandbytes__{quant_type}"].tolist()))
        assert torch.equal(weight.data, stored[name])
        assert torch.equal(state.absmax, stored[f"{name}.absmax"])
        assert torch.equal(state.code, stored[f"{name}.quant_map"])
        assert (state.quant_type, state.blocksize) == (fields["quant_type"], fields["blocksize"])
        assert (state.quant_type, state.blocksize) == (quant_type, layer["block_size"])
        assert list(state.shape) == fields["shape"] == layer["shape"]
        assert state.nested == layer["double_quant"]
        if state.nested:
            assert torch.equal(state.state2.absmax, stored[f"{name}.nested_absmax"])
            assert torch.equal(state.state2.code, stored[f"{name}.nested_quant_map"])
            assert state.offset == torch.tensor(fields["nested_offset"], dtype=torch.float32)


def test_all_other_weights_are_the_originals_in_the_dtype_of_the_config(converted: Converted) -> None:
    dtype = getattr(torch, converted.config.get("dtype") or "float32")
    originals = dict(converted.original.named_parameters())
    quantized = {f"{module}.weight" for module in converted.modules}
    loaded = {
        name.replace(".base_layer", ""): p for name, p in converted.model.named_parameters() if "lora_" not in name
    }
    assert loaded.keys() == originals.keys()
    for name in loaded.keys() - quantized:
        assert loaded[name].dtype == dtype, name
        assert torch.equal(loaded[name], originals[name].to(dtype)), name


def test_the_base_is_decoded_to_exactly_the_values_we_read(converted: Converted) -> None:
    with BaseModel.open(converted.output) as base:
        for layer in converted.report["layers"]:
            decoded = matrix(converted.modules[layer["module"]].base_layer)
            assert decoded.dtype == getattr(torch, converted.report["dtype"])
            assert torch.equal(base.matrix(layer["name"]), decoded.float())


def test_the_adapter_adds_what_we_say_it_adds(converted: Converted) -> None:
    source = open_adapter(converted.adapter)
    assert source.lora.keys() == converted.modules.keys()
    for layer in converted.report["layers"]:
        module, ours = converted.modules[layer["module"]], source.lora[layer["module"]]
        pair = LoraPair(source.weights.load(ours.lora_A), source.weights.load(ours.lora_B), ours.scaling)
        expected = matrix_of_lora(module)
        assert module.scaling["default"] == pytest.approx(layer["scaling"], rel=1e-12)
        # A float32 product of 16 terms is good to about 16 · 2⁻²⁴ = 1e-6; qlora's is 0 and has no relative error.
        bound = 1e-6 * float(expected.norm())
        assert float((adapter_delta(pair).double() - expected).norm()) <= bound
        if type(module.base_layer) is Linear4bit or converted.report["dtype"] == "float32":
            assert float((peft_delta(module).double() - expected).norm()) <= bound


def test_the_reported_error_is_that_of_the_loaded_weights(converted: Converted) -> None:
    for layer in converted.report["layers"]:
        module, weight = converted.modules[layer["module"]], converted.original_matrix(layer["module"])
        base = matrix(module.base_layer).double()
        assert relative_error(weight, base) == pytest.approx(layer["error"]["base_error"], rel=1e-5)
        assert relative_error(weight, base + matrix_of_lora(module)) == pytest.approx(layer["error"]["error"], rel=1e-5)
        assert layer["error"]["error"] < 0.12  # of NF4; with a square matrix transposed, it would be √2


def test_a_training_step_has_finite_gradients_for_the_adapter_and_none_for_the_base(converted: Converted) -> None:
    torch.manual_seed(0)
    converted.peft.train()
    output = outputs(converted, converted.peft)
    # Not the mean square: behind a layer norm that is a constant.
    loss = (output.float() * torch.randn(output.shape)).mean()
    loss.backward()
    assert math.isfinite(loss.item())
    gradients = {name: parameter.grad for name, parameter in converted.peft.named_parameters()}
    converted.peft.zero_grad(set_to_none=True)
    adapted = {name: gradient for name, gradient in gradients.items() if "lora_" in name}
    assert all(gradient is None for name, gradient in gradients.items() if name not in adapted)
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in adapted.values())
    # lora_B of qlora is zero, and with it the gradients of lora_A.
    assert all(bool(gradient.any()) for name, gradient in adapted.items() if "lora_B" in name)


@only(*TIED)
def test_a_tied_head_stays_tied(converted: Converted) -> None:
    assert converted.model.get_output_embeddings().weight is converted.model.get_input_embeddings().weight
    assert not {"lm_head.weight", "cls.predictions.decoder.weight"} & converted.tensors.keys()


@only("t5")
def test_the_layer_that_t5_keeps_in_float32_stays_a_plain_linear(converted: Converted) -> None:
    kept = [module for name, module in converted.model.named_modules() if name.endswith("DenseReluDense.wo")]
    assert len(kept) == 4
    assert all(type(module) is nn.Linear and module.weight.dtype == torch.float32 for module in kept)


@only("minilm")
def test_a_base_in_several_files_is_loaded_from_all_of_them(converted: Converted) -> None:
    assert len(list(converted.output.glob("model-*.safetensors"))) > 2


@only(*FLOAT32)
def test_the_loaded_model_computes_with_the_weights_we_report_on(converted: Converted) -> None:
    expected_model = getattr(transformers, converted.auto).from_pretrained(converted.source, dtype=torch.float32).eval()
    for name, module in converted.modules.items():
        target, effective = expected_model.get_submodule(name), matrix(module.base_layer) + matrix_of_lora(module)
        target.weight.data = (effective.T if isinstance(target, Conv1D) else effective).float().contiguous()
    expected = outputs(converted, expected_model)
    # Measured 3e-6 to 3e-5 of the largest output: sums in another order, through every layer.
    assert float((outputs(converted, converted.peft.eval()) - expected).abs().max()) < 1e-4 * float(
        expected.abs().max()
    )


@only("llama", "gpt2")
def test_the_adapter_brings_the_outputs_closer_to_the_originals(converted: Converted) -> None:
    original = outputs(converted, converted.original)
    converted.peft.eval()
    adapted = outputs(converted, converted.peft)
    with converted.peft.disable_adapter():
        bare = outputs(converted, converted.peft)
    assert relative_error(original, adapted) < 0.95 * relative_error(original, bare)


def test_a_real_model_starts_closer_to_the_original_with_loftq_than_without(convert_once: Converter) -> None:
    loftq, qlora = convert_once("minilm"), convert_once("minilm qlora")
    tokenizer = transformers.AutoTokenizer.from_pretrained(loftq.output)
    batch = tokenizer(SENTENCES, return_tensors="pt", padding=True)

    def embed(model: nn.Module) -> torch.Tensor:
        mask = batch["attention_mask"][..., None]
        with torch.no_grad():
            return (model.eval()(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)

    original = embed(loftq.original)
    error = relative_error(original, embed(loftq.peft))
    with loftq.peft.disable_adapter():
        assert error < 0.95 * relative_error(original, embed(loftq.peft))
    assert error < 0.95 * relative_error(original, embed(qlora.peft))


@only("llama", "gpt2 without prefix", "bert", "bert base", "bert with a tied head", "t5", "minilm")
def test_the_lines_of_the_model_card_load_the_adapter(converted: Converted) -> None:
    lines = (converted.output / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    namespace: dict[str, Any] = {}
    with contextlib.chdir(converted.output):
        exec(lines, namespace)
    loaded = {name.replace(".default", ""): parameter for name, parameter in namespace["model"].named_parameters()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in converted.adapter_tensors.items())


@pytest.mark.parametrize(("checkpoint", "auto"), [("BertForTokenClassification", "AutoModel")])
def test_a_head_that_the_checkpoint_lacks_is_never_made_4_bit(checkpoint: str, auto: str, tmp_path: Path) -> None:
    outcome = run_conversion(models.bert_as(checkpoint)(tmp_path / "source"), tmp_path / "converted", iterations=1)
    model = getattr(transformers, auto).from_pretrained(outcome.output)
    assert type(model.pooler.dense) is nn.Linear


def test_a_family_whose_linears_bitsandbytes_does_not_replace_is_refused(tmp_path: Path) -> None:
    # FalconLinear is a subclass of nn.Linear, and transformers replaces nn.Linear itself alone.
    with pytest.raises(LoftqError, match="layout dense"):
        run_conversion(models.falcon(tmp_path / "source"), tmp_path / "converted")


def outputs(converted: Converted, model: nn.Module) -> torch.Tensor:
    """Logits, or the last hidden state of a base model, for a small batch; with a graph where the model trains."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 150, (2, 12), generator=generator)
    batch: dict[str, torch.Tensor] = {"input_ids": tokens}
    if converted.config["model_type"] == "t5":
        batch |= {"decoder_input_ids": tokens[:, :5]}
    if converted.config["model_type"] == "whisper":
        batch = {"input_features": torch.randn(2, 80, 32, generator=generator), "decoder_input_ids": tokens}
    with torch.set_grad_enabled(model.training):
        result = model(**batch)
    return result.last_hidden_state if converted.auto == BASE else result.logits
