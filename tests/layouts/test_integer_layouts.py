"""Integer bases in every container: what lies on the disk, what transformers, compressed-tensors and PEFT make of it,
what a container does not hold, and what is refused when it is read back.

Expected values are those libraries' own, or float64 arithmetic on what `decoded` (below) takes bit by bit from the
files, as the containers' documents describe them. GPTQ's and MLX's own loaders are in test_other_runtimes.py.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import models
from support.adapters import edit_json, edit_tensors, tensors_of
from support.conversions import Silent, StopAfter, files_of, quick_recipe, run_conversion
from support.loading import Loaded, matrix, matrix_of_lora, relative_error
from torch import nn

from loftq_cli.cli.main import _run
from loftq_cli.conversion.prepare import prepare_conversion
from loftq_cli.errors import InputError, UsageError
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.methods.method import METHODS
from loftq_cli.model.stored import BaseModel
from loftq_cli.planning.settle import make_recipe
from loftq_cli.quant.formats import FORMATS
from loftq_cli.tensors.specs import POOLINGS

PREFIX = "base_model.model."
CAUSAL, BASE = "AutoModelForCausalLM", "AutoModel"
INTEGERS = {name: row.bits for name, row in FORMATS.items() if row.is_affine}
CONTAINERS = [name for name, row in LAYOUTS.items() if name != "dense" and set(row.quant_types) & set(INTEGERS)]
FAST = {"group_size": 32, "rank": 4, "alpha": 8.0, "iterations": 2}


# What the files say, read with nothing but bits and torch's arithmetic.


def codes_in(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int64 [rows, count]: unsigned numbers of `bits` bits, one little-endian bit stream along each row of words."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    return torch.from_numpy(stream.reshape(len(words), count, bits) @ (1 << np.arange(bits)))


def words_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse: int32 words [rows, count * bits / 32]."""
    stream = (codes.numpy().astype(np.uint8)[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little").view("<i4").copy())


def wide(groups: torch.Tensor, columns: int) -> torch.Tensor:
    """[out, columns]: one number a group, for every weight of it."""
    return groups.repeat_interleave(columns // groups.shape[1], dim=1)


def of_compressed_tensors(config: dict[str, Any], tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """(code - zero point) * scale in the scales' dtype, as the model's."""
    scheme = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    name, bits = f"{module}.weight", scheme["num_bits"]
    rows, columns = tensors[f"{name}_shape"].tolist()
    scales = tensors[f"{name}_scale"]
    if scheme["symmetric"]:
        zero_points = torch.full(scales.shape, 2 ** (bits - 1))
    else:
        zero_points = codes_in(tensors[f"{name}_zero_point"].T, bits, rows).T
    steps = codes_in(tensors[f"{name}_packed"], bits, columns) - wide(zero_points, columns)
    return (steps.to(scales.dtype) * wide(scales, columns)).to(getattr(torch, config["dtype"]))


def of_gptq(config: dict[str, Any], tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """The same in float16; codes lie down the columns, groups too."""
    bits, index = config["quantization_config"]["bits"], tensors[f"{module}.g_idx"].long()
    codes = codes_in(tensors[f"{module}.qweight"].T, bits, len(index)).T  # [in, out]
    zero_points = codes_in(tensors[f"{module}.qzeros"], bits, codes.shape[1])  # [groups, out]
    return ((codes - zero_points[index]).float() * tensors[f"{module}.scales"].float()[index]).half().T


def of_biased(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], module: str, *, key: str, biases: str
) -> torch.Tensor:
    """code * scale + bias in float32, as the scales' dtype."""
    size, bits = config[key]["group_size"], config[key]["bits"]
    scales, offsets = tensors[f"{module}.scales"], tensors[f"{module}.{biases}"]
    columns = scales.shape[1] * size
    codes = codes_in(tensors[f"{module}.weight"], bits, columns)
    return (codes * wide(scales.float(), columns) + wide(offsets.float(), columns)).to(scales.dtype)


# The part that only a quantized weight has, and what the parts of one mean.
DECODERS: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "compressed-tensors": (".weight_packed", of_compressed_tensors),
    "gptq": (".qweight", of_gptq),
    "metal": (".qbiases", functools.partial(of_biased, key="quantization_config", biases="qbiases")),
    "mlx": (".biases", functools.partial(of_biased, key="quantization", biases="biases")),
}


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def report_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "loftq_report.json").read_text())


def decoded(directory: Path) -> dict[str, torch.Tensor]:
    """Every quantized weight [out, in] as its loader computes it, by name; of a dense directory the stored ones."""
    config, tensors = config_of(directory), tensors_of(directory)
    layout = report_of(directory)["recipe"]["layout"]
    if layout not in DECODERS:
        return {layer["name"]: tensors[layer["name"]] for layer in report_of(directory)["layers"]}
    part, decode = DECODERS[layout]
    modules = [name.removesuffix(part) for name in tensors if name.endswith(part)]
    return {f"{module}.weight": decode(config, tensors, module) for module in modules}


def added(directory: Path, module: str, columns: int) -> torch.Tensor:
    """What the adapter adds to a weight of `columns` inputs, float64 [out, in]. A pooled input is the sum of its group
    ("paper"), its mean ("repo"), or its mean times the number of groups (PEFT).
    """
    (folder,) = directory.glob("*_init")
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(next(folder.glob("*.saf*")))
    lora_A, lora_B = (tensors[f"{PREFIX}{module}.lora_{x}.weight"].double() for x in "AB")
    product, pooled = config["lora_alpha"] / config["r"] * lora_B @ lora_A, lora_A.shape[1]
    if pooled == columns:
        return product
    assert pooled * config["qalora_group_size"] == columns
    convention = "peft" if config.get("use_qalora") else config["qalora_pooling"]
    size = config["qalora_group_size"]
    return wide(product * {"paper": 1.0, "repo": 1 / size, "peft": pooled / size}[convention], columns)


# Every number format, with every method, in every container that holds it.


@dataclass(frozen=True)
class Converted:
    source: Path
    output: Path
    recipe: dict[str, Any]

    @property
    def originals(self) -> dict[str, torch.Tensor]:
        return tensors_of(self.source)

    @property
    def report(self) -> dict[str, Any]:
        return report_of(self.output)


Converter = Callable[..., Converted]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("source") / "llama", layers=1)


@pytest.fixture(scope="module")
def convert_once(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Converter:
    """The small llama by a recipe, each recipe once."""

    @functools.cache
    def convert_by(**recipe: Any) -> Converted:
        output = tmp_path_factory.mktemp("case") / "converted"
        run_conversion(source, output, **{**FAST, **recipe})
        return Converted(source, output, {**FAST, **recipe})

    return convert_by


def combination(quant_type: str, method: str, layout: str) -> dict[str, Any]:
    """A recipe; int8 without zero points, as by default, where a container does not ask for them."""
    symmetric = quant_type == "int8" and method != "qalora" and LAYOUTS[layout].zero_point != "float"
    return {"quant_type": quant_type, "method": method, "layout": layout, "symmetric": symmetric}


ALL = [
    combination(quant_type, method, layout)
    for quant_type in INTEGERS
    for method in METHODS
    for layout, row in LAYOUTS.items()
    if quant_type in row.quant_types
]


@pytest.fixture(params=ALL, ids=lambda recipe: "-".join((recipe["quant_type"], recipe["method"], recipe["layout"])))
def converted(request: pytest.FixtureRequest, convert_once: Converter) -> Converted:
    return convert_once(**request.param)


def test_the_files_hold_the_planned_tensors_and_have_the_reported_size(converted: Converted) -> None:
    plan = prepare_conversion(str(converted.source), converted.output, quick_recipe(**converted.recipe)).plan
    stored = {}
    for path in converted.output.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    planned = [*plan.adapter_tensors, *(tensor for shard in plan.shards for tensor in shard.tensors)]
    assert {tensor.name: (f"torch.{tensor.dtype}", tensor.shape) for tensor in planned} == {
        name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in stored.items()
    }
    nbytes = {name: tensor.nbytes for name, tensor in stored.items()}
    totals, in_layers = converted.report["totals"], 0
    assert totals["base_nbytes"] == sum(size for name, size in nbytes.items() if ".lora_" not in name)
    assert totals["adapter_nbytes"] == sum(size for name, size in nbytes.items() if ".lora_" in name)
    for layer in converted.report["layers"]:
        module = layer["name"].removesuffix("weight")
        size = sum(size for name, size in nbytes.items() if name.startswith(module))
        assert layer["bits_per_weight"] == pytest.approx(8 * size / math.prod(layer["shape"]), abs=1e-4)
        in_layers += size
    assert totals["bits_per_weight"] == pytest.approx(8 * in_layers / totals["weights"], abs=1e-4)


def test_the_reported_error_is_that_of_what_is_stored(converted: Converted) -> None:
    assert_reported_errors(converted)


def assert_reported_errors(converted: Converted) -> None:
    weights, originals = decoded(converted.output), converted.originals
    squared_error = squared_weight = 0.0
    assert weights.keys() == {layer["name"] for layer in converted.report["layers"]}
    for layer in converted.report["layers"]:
        original, base = originals[layer["name"]].double(), weights[layer["name"]].double()
        difference = original - base - added(converted.output, layer["module"], base.shape[1])
        # Ours is float32 arithmetic; of int8, 2⁻²⁴ of a weight is up to 1e-5 of its error.
        assert layer["error"]["base_error"] == pytest.approx(relative_error(original, base), rel=1e-5)
        assert layer["error"]["error"] == pytest.approx(float(difference.norm() / original.norm()), rel=1e-5)
        assert layer["error"]["max_error"] == pytest.approx(float(difference.abs().max()), rel=1e-4)
        squared_error += float(difference.square().sum())
        squared_weight += float(original.square().sum())
    total = math.sqrt(squared_error / squared_weight)
    assert converted.report["totals"]["error"] == pytest.approx(total, rel=1e-5)
    # A step of a group of 32 normal weights is 4.1 σ / (2^bits - 1) and its error step / √12; with values read in
    # another order, the error would be about √2.
    assert total < 1.3 * 4.1 / math.sqrt(12) / (2 ** INTEGERS[converted.recipe["quant_type"]] - 1)


def test_what_is_read_back_is_what_is_stored(converted: Converted) -> None:
    with BaseModel.open(converted.output) as base:
        for name, weight in decoded(converted.output).items():
            assert base.matrix(name).dtype == torch.float32
            assert torch.equal(base.matrix(name), weight.float())


@pytest.mark.parametrize("init", ["residual", "standard"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layout", ["gptq", "metal"])
def test_every_pooling_has_the_reported_error(layout: str, pooling: str, init: str, convert_once: Converter) -> None:
    recipe = combination("int4", "qalora", layout)
    converted = convert_once(**recipe, pooling=pooling, init=init)
    assert_reported_errors(converted)
    standard = convert_once(**recipe, pooling=pooling, init="standard").report["totals"]["error"]
    assert (converted.report["totals"]["error"] < standard) == (init == "residual")


@pytest.mark.parametrize("layout", CONTAINERS)
def test_searched_scales_leave_less(layout: str, convert_once: Converter) -> None:
    recipe = combination("int4", "qlora", layout)
    assert_reported_errors(convert_once(**recipe, scales="search"))
    errors = [convert_once(**recipe, scales=scales).report["totals"]["error"] for scales in ("search", "absmax")]
    assert errors[0] < 0.98 * errors[1]


@pytest.mark.parametrize(
    ("quant_type", "layout", "bits"),
    [
        ("int2", "compressed-tensors", 2 + 16 / 32 + 2 / 32 + 128 / 128**2),
        ("int3", "compressed-tensors", 3 + 16 / 32 + 3 / 32 + 128 / 128**2),
        ("int8", "compressed-tensors", 8 + 16 / 32 + 128 / 128**2),
        ("int4", "gptq", 4 + 16 / 32 + 4 / 32 + 32 / 128),
        ("int4", "metal", 4 + 2 * 16 / 32),
        ("int3", "mlx", 3 + 2 * 16 / 32),
        ("int3", "dense", 16),
    ],
)
def test_bits_of_a_weight_by_hand(quant_type: str, layout: str, bits: float, convert_once: Converter) -> None:
    # [128, 128] in groups of 32: code, scale, offset; weight_shape has 128 bits, g_idx 32 for each column.
    layers = convert_once(**combination(quant_type, "qlora", layout)).report["layers"]
    (query,) = [layer for layer in layers if layer["name"].endswith("q_proj.weight")]
    assert query["bits_per_weight"] == round(bits, 4)


@pytest.mark.parametrize("layout", [name for name in CONTAINERS if LAYOUTS[name].zero_point == "float"])
def test_int8_has_offsets_by_default_where_the_container_stores_them(layout: str, source: Path, tmp_path: Path) -> None:
    outcome = run_conversion(source, tmp_path / "out", quant_type="int8", layout=layout, method="qlora")
    assert outcome.total.error < 0.01


# The same bytes every time.


@pytest.mark.parametrize("layout", CONTAINERS)
def test_two_conversions_and_an_interrupted_one_give_the_same_bytes(
    layout: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**FAST, **combination("int4", "loftq", layout), "max_shard_size": "1MB"}
    written = []
    for folder, layers in (("first", 0), ("second", 0), ("third", 1), ("fourth", 5)):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)  # the output's name as typed is in some of its files
        if layers:
            with pytest.raises(KeyboardInterrupt):
                run_conversion(source, Path("out"), observer=StopAfter(layers), **recipe)
        observer = Silent()
        run_conversion(source, Path("out"), observer=observer, **recipe)
        assert [resumed for _, resumed in observer.done] == [True] * layers + [False] * (7 - layers)
        written.append(files_of(Path("out")))
    assert all(files == written[0] for files in written)


# What transformers and PEFT make of it.


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


def bfloat16_llama(directory: Path) -> Path:
    return models.llama(directory, layers=1)


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


# What a container does not hold.


@dataclass(frozen=True)
class Refusal:
    """A recipe for a model that is refused, and the one line that says it."""

    says: str
    recipe: dict[str, Any]
    build: Callable[[Path], Path] = bfloat16_llama


def int4(layout: str, **recipe: Any) -> dict[str, Any]:
    return {"quant_type": "int4", "layout": layout, **recipe}


TITLES = {"gptq": "GPTQ", "mlx": "MLX"}  # what a container is called in prose
TRANSPOSED = r"no weight to quantize: {} holds no layers that are stored \[in, out\] \(.*--layout dense.*\)"
REFUSALS = {
    **{
        f"[in, out] weights in {layout}": Refusal(
            TRANSPOSED.format(TITLES.get(layout, layout)),
            int4(layout),
            models.gpt2,
        )
        for layout in CONTAINERS
    },
    **{
        f"experts of {family} in compressed-tensors": Refusal(
            r"transformers loads no experts in full precision from compressed-tensors \(--layout metal, or dense\)",
            int4("compressed-tensors"),
            build,
        )
        for family, build in (("mixtral", models.mixtral), ("qwen2_moe", models.qwen2_moe))
    },
    "two stacks of blocks of t5 in gptq": Refusal(
        r"GPTQ loaders .* one stack of blocks, .* decoder\.block, encoder\.block \(--layout compressed-tensors, .*\)",
        int4("gptq", group_size=32),
        models.t5,
    ),
    "whisper in gptq": Refusal("GPTQ loaders read models of one stack of blocks", int4("gptq"), models.whisper),
    "whisper's decoder in gptq": Refusal(
        "GPTQ loaders .*--layout compressed-tensors", int4("gptq", exclude=("encoder",)), models.whisper
    ),
    "no rows that are whole groups": Refusal(
        r"no weight to quantize: rows of \d+ are not whole groups of 256", int4("compressed-tensors", group_size=256)
    ),
    "int3 in metal": Refusal(
        r"layout metal does not hold int3 \(one of compressed-tensors, gptq, mlx, dense\)",
        {"quant_type": "int3", "layout": "metal"},
    ),
    "int4 in bitsandbytes": Refusal(
        r"layout bitsandbytes does not hold int4 \(one of compressed-", int4("bitsandbytes")
    ),
    **{
        f"nf4 in {layout}": Refusal(
            rf"layout {layout} does not hold nf4 \(one of bitsandbytes, dense\)", {"layout": layout}
        )
        for layout in CONTAINERS
    },
    **{
        f"groups of {size} in mlx": Refusal(
            rf"layout mlx does not hold groups of {size} \(one of 32, 64, 128\)", int4("mlx", group_size=size)
        )
        for size in (16, 256, 512, 1024)
    },
    "groups of 48": Refusal(
        r"group_size 48 does not exist for int4 \(one of 16, 32, 64, .*\)", int4("compressed-tensors", group_size=48)
    ),
    **{
        f"symmetric in {layout}": Refusal(
            rf"layout {layout} stores an offset for every group \(--asymmetric\)", int4(layout, symmetric=True)
        )
        for layout in ("metal", "mlx")
    },
    "float32 scales in gptq": Refusal(
        r"layout gptq has no float32 scales \(one of float16\)", int4("gptq", scale_dtype="float32")
    ),
    **{
        f"{name} with integers": Refusal(
            rf"{name} means nothing with quant_type int4 \(leave {name} out\)", {"quant_type": "int4", name: value}
        )
        for name, value in (("block_size", 64), ("double_quant", True), ("double_quant", False))
    },
    **{
        f"{name} with nf4": Refusal(rf"{name} means nothing with quant_type nf4 \(leave {name} out\)", {name: value})
        for name, value in (("group_size", 64), ("symmetric", True), ("scale_dtype", "float32"))
    },
    **{
        f"{name} with loftq": Refusal(
            rf"{name} means nothing with method loftq \(leave {name} out\)", {"quant_type": "int4", name: value}
        )
        for name, value in (("pooling", "peft"), ("init", "residual"))
    },
    "qalora with nf4": Refusal(
        r"method qalora does not work with nf4 \(--quant-type int2, int3, int4, int8\)", {"method": "qalora"}
    ),
    "qalora without zero points": Refusal(
        r"method qalora merges into zero points, and a symmetric base has none \(--asymmetric\)",
        {"method": "qalora", "quant_type": "int4", "symmetric": True},
    ),
    "scales that do not exist": Refusal(
        r"scales 'best' does not exist \(one of absmax, search\)", {"quant_type": "int4", "scales": "best"}
    ),
}


def flags_of(recipe: dict[str, Any]) -> Iterator[str]:
    """The options of the command line for a recipe."""
    switches = {"symmetric": ("symmetric", "asymmetric"), "double_quant": ("double-quant", "no-double-quant")}
    for name, value in recipe.items():
        if name in switches:
            yield f"--{switches[name][not value]}"
            continue
        for each in value if isinstance(value, tuple) else (value,):
            yield from (f"--{name.replace('_', '-')}", str(each))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], Path]], Path]:
    return functools.cache(lambda build: build(tmp_path_factory.mktemp("built") / "source"))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_container_does_not_hold_is_refused_before_anything_is_written(
    name: str, built: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    refusal, output = REFUSALS[name], tmp_path / "out"
    model = built(refusal.build)
    with pytest.raises(UsageError, match=refusal.says):
        prepare_conversion(str(model), output, make_recipe(**refusal.recipe))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    assert _run(["quantize", str(model), str(output), *flags_of(refusal.recipe)]) == 2

    said = capsys.readouterr()
    assert re.fullmatch(rf"error: .*{refusal.says}.*\n", said.err)
    assert not said.out
    assert not list(tmp_path.iterdir())


def test_the_remedy_for_rows_that_are_no_whole_groups_is_one(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        prepare_conversion(str(source), tmp_path / "out", make_recipe(quant_type="int4", group_size=256))
    # The same recipe with --layout dense is refused too: a group has to end with its row.
    assert "group" in str(caught.value.hint)


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


@pytest.mark.parametrize("layout", [*CONTAINERS, "dense"])
def test_a_matrix_whose_rows_are_no_whole_groups_stays_in_full_precision_and_is_named(
    layout: str, convert_once: Converter
) -> None:
    converted = convert_once(**combination("int4", "loftq", layout), group_size=128)
    name = "model.layers.0.mlp.down_proj.weight"  # 192 columns
    assert len(decoded(converted.output)) == 6
    assert torch.equal(tensors_of(converted.output)[name], converted.originals[name])
    reason = "rows of 192 are not whole groups of 128"
    assert f"{name}: kept in full precision: {reason}" in converted.report["notes"]
    assert {"name": name, "reason": reason} in converted.report["copied"]


# What is refused when it is read, and what others write.

Q0 = "model.layers.0.self_attn.q_proj"
Change = Callable[[Path], None]


def config_with(**values: Any) -> Change:
    """Changes of the quantization, of its one scheme too."""

    def change(directory: Path) -> None:
        config = config_of(directory)
        key = "quantization" if "quantization" in config else "quantization_config"
        parts = [config[key], *(group["weights"] for group in config[key].get("config_groups", {}).values())]
        for name, value in values.items():
            (part,) = [part for part in parts if name in part] or parts[-1:]
            part[name] = value
        edit_json(directory / "config.json", **{key: config[key]})

    return change


def a_second_scheme(directory: Path) -> None:
    groups = config_of(directory)["quantization_config"]["config_groups"]
    config_with(config_groups={**groups, "group_1": groups["group_0"]})(directory)


def without(name: str) -> Change:
    return lambda directory: edit_tensors(directory / "model.safetensors", lambda tensors: tensors.pop(name))


def replaced(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = value(tensors[name]).contiguous()

    return lambda directory: edit_tensors(directory / "model.safetensors", change)


def with_zero_point_15(qzeros: torch.Tensor) -> torch.Tensor:
    return words_of(codes_in(qzeros, 4, 128).index_fill_(1, torch.tensor([3]), 15), 4)


# Layout, what is done to it, the tensor that is named, and what is said. Q0 is [128, 128] in groups of 32.
DAMAGES: dict[str, tuple[dict[str, Any], Change, str | None, str]] = {
    **{
        f"{layout} without {part}": (int4(layout), without(f"{Q0}.{part}"), f"{Q0}.{part}", "is missing")
        for layout, parts in {
            "compressed-tensors": ("weight_scale", "weight_shape", "weight_zero_point"),
            "gptq": ("qzeros", "scales", "g_idx"),
            "metal": ("scales", "weight"),
            "mlx": ("scales", "weight"),
        }.items()
        for part in parts
    },
    **{
        f"{layout} with {part} of another shape": (
            int4(layout),
            replaced(f"{Q0}.{part}", lambda tensor: tensor[..., :-1]),
            f"{Q0}.{named}",
            r"asks for .* \(",
        )
        for layout, part, named in (
            ("compressed-tensors", "weight_packed", "weight_packed"),
            ("compressed-tensors", "weight_scale", "weight_scale"),
            ("compressed-tensors", "weight_zero_point", "weight_zero_point"),
            ("gptq", "scales", "scales"),
            ("gptq", "qzeros", "qzeros"),
            ("gptq", "g_idx", "g_idx"),
            ("metal", "qbiases", "qbiases"),
            ("metal", "weight", "weight"),
            ("mlx", "biases", "biases"),
            ("mlx", "weight", "weight"),
        )
    },
    **{
        f"{layout} with {part} as {dtype}": (
            int4(layout),
            replaced(f"{Q0}.{part}", lambda tensor, dtype=dtype: tensor.to(dtype)),
            f"{Q0}.{part}",
            f"is {str(dtype).removeprefix('torch.')}",
        )
        for layout, part, dtype in (
            ("compressed-tensors", "weight_packed", torch.int64),
            ("compressed-tensors", "weight_scale", torch.float64),
            ("compressed-tensors", "weight_zero_point", torch.int8),
            ("compressed-tensors", "weight_shape", torch.float32),
            ("gptq", "qweight", torch.int64),
            ("gptq", "scales", torch.float64),
            ("gptq", "g_idx", torch.int64),
            ("metal", "weight", torch.int64),
            ("metal", "scales", torch.float64),
            ("mlx", "biases", torch.float32),
        )
    },
    "a weight_shape that is not the matrix": (
        int4("compressed-tensors"),
        replaced(f"{Q0}.weight_shape", lambda _: torch.tensor([128, 160])),
        f"{Q0}.weight_packed",
        "its weight_shape and the config's scheme asks for",
    ),
    **{
        f"a weight_shape of {shape}": (
            int4("compressed-tensors"),
            replaced(f"{Q0}.weight_shape", lambda _, shape=shape: torch.tensor(shape)),
            f"{Q0}.weight_shape",
            says,
        )
        for shape, says in (
            ([128, 0], "not a shape"),
            ([-128, 128], "not a shape"),
            ([128, 2**62], "not a shape"),
            ([128, 100], "not whole groups of 32"),
            ([128], r"is int64 \(1,\)"),
        )
    },
    **{
        f"{layout} of 5 bits": (int4(layout), config_with(**{bits: 5}), None, "5 bits, of which we read 2, 3, 4, 8")
        for layout, bits in (("compressed-tensors", "num_bits"), ("gptq", "bits"), ("metal", "bits"), ("mlx", "bits"))
    },
    **{
        f"{layout} in groups of {size!r}": (
            int4(layout),
            config_with(group_size=size),
            None,
            "has group_size .*, not a whole number",
        )
        for layout in CONTAINERS
        for size in (0, None, "32")
    },
    "another format": (
        int4("compressed-tensors"),
        config_with(format="int-quantized"),
        None,
        "'int-quantized', of which",
    ),
    "two schemes": (int4("compressed-tensors"), a_second_scheme, None, "2 schemes of weights for Linear"),
    "floating point": (int4("compressed-tensors"), config_with(type="float"), None, "are float by group; we read int"),
    "blocks": (int4("compressed-tensors"), config_with(strategy="block"), None, "are int by block; we read int"),
    "act-order in its scheme": (int4("compressed-tensors"), config_with(actorder="group"), None, "act-order"),
    "desc_act": (int4("gptq"), config_with(desc_act=True), None, r"act-order \(desc_act\)"),
    "groups of columns that are no neighbours": (
        int4("gptq"),
        replaced(f"{Q0}.g_idx", lambda index: index.flip(0)),
        f"{Q0}.g_idx",
        "act-order: the groups are not neighbouring columns",
    ),
    "zero points in a file that is called sym": (
        int4("gptq"),
        config_with(sym=True),
        "model.layers.0.mlp.down_proj.qzeros",
        "holds zero points other than the middle, and the config says sym",
    ),
    "a v1 zero point that wraps around": (
        int4("gptq"),
        lambda directory: (
            config_with(checkpoint_format="gptq")(directory),
            replaced(f"{Q0}.qzeros", with_zero_point_15)(directory),
        )[0],
        f"{Q0}.qzeros",
        "holds a v1 zero point that wraps around",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_container_is_refused_by_file_and_tensor(name: str, convert_once: Converter, tmp_path: Path) -> None:
    recipe, damage, tensor, says = DAMAGES[name]
    directory = tmp_path / "damaged"
    shutil.copytree(convert_once(**combination("int4", "qlora", recipe["layout"])).output, directory)
    damage(directory)

    with pytest.raises(InputError, match=says) as caught, BaseModel.open(directory) as base:
        for weight in base.quantized:
            base.quantized_tensor(weight)

    assert caught.value.tensor == tensor
    # Tensors that are not there have no file of their own.
    assert caught.value.file in (str(directory), *(str(directory / n) for n in ("config.json", "model.safetensors")))
    assert tensor is not None or caught.value.file.endswith("config.json")
    assert tensor is None or "missing" in says or caught.value.file.endswith("model.safetensors")


def test_a_missing_part_never_makes_a_weight_disappear(convert_once: Converter, tmp_path: Path) -> None:
    # Parts by which a container's weights are found; without one, its other parts are there for nothing.
    for layout, (part, _) in DECODERS.items():
        directory = tmp_path / layout
        shutil.copytree(convert_once(**combination("int4", "qlora", layout)).output, directory)
        without(f"{Q0}{part}")(directory)
        with pytest.raises(InputError, match=re.escape(Q0)), BaseModel.open(directory):
            pass


def test_gptq_v1_holds_zero_points_less_one(convert_once: Converter, tmp_path: Path) -> None:
    converted, directory = convert_once(**combination("int4", "qlora", "gptq")), tmp_path / "v1"
    shutil.copytree(converted.output, directory)

    def less_one(tensors: dict[str, torch.Tensor]) -> None:
        for name, words in tensors.items():
            if name.endswith(".qzeros"):
                tensors[name] = words_of(codes_in(words, 4, words.shape[1] * 8) - 1, 4)

    edit_tensors(directory / "model.safetensors", less_one)
    for checkpoint_format in ("gptq", None):  # the format of files that do not name one
        config_with(checkpoint_format=checkpoint_format)(directory)
        with BaseModel.open(directory) as base:
            for name, weight in decoded(converted.output).items():
                assert torch.equal(base.matrix(name), weight.float())


def test_gptq_calls_rows_that_are_one_group_minus_one(convert_once: Converter, tmp_path: Path) -> None:
    recipe = {**combination("int4", "qlora", "gptq"), "group_size": 128, "include": (r"q_proj",)}
    converted, directory = convert_once(**recipe), tmp_path / "theirs"
    shutil.copytree(converted.output, directory)
    config_with(group_size=-1)(directory)
    with BaseModel.open(directory) as base:
        assert base.quantized.keys() == {f"{Q0}.weight"}
        assert torch.equal(base.matrix(f"{Q0}.weight"), decoded(converted.output)[f"{Q0}.weight"].float())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_are_one_group_are_read_as_transformers_loads_them(
    bits: int, symmetric: bool, source: Path, tmp_path: Path
) -> None:
    # What somebody else writes with strategy "channel": no group_size, one scale a row.
    directory, generator = tmp_path / "theirs", torch.Generator().manual_seed(5)
    shutil.copytree(source, directory)
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel", "dynamic": False}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "dequantize": True,
    }
    edit_json(directory / "config.json", quantization_config=quantization)

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            rows, columns = tensors.pop(name).shape
            tensors[f"{name}_packed"] = words_of(torch.randint(2**bits, (rows, columns), generator=generator), bits)
            tensors[f"{name}_scale"] = (torch.rand(rows, 1, generator=generator) * 0.1).bfloat16()
            tensors[f"{name}_shape"] = torch.tensor([rows, columns])
            if not symmetric:
                zero_points = torch.randint(2**bits, (1, rows), generator=generator)
                tensors[f"{name}_zero_point"] = words_of(zero_points, bits).T.contiguous()

    edit_tensors(directory / "model.safetensors", quantize)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    config, tensors = config_of(directory), tensors_of(directory)
    with BaseModel.open(directory) as base:
        assert len(base.quantized) == 7
        for name in base.quantized:
            module = name.removesuffix(".weight")
            expected = of_compressed_tensors(config, tensors, module)
            assert torch.equal(base.matrix(name), expected.float())
            assert torch.equal(model.get_submodule(module).weight, expected)


# What inspect says of it.


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert _run(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("against", [False, True], ids=["reported", "recomputed"])
def test_inspect_describes_every_layer(converted: Converted, against: bool, capsys: Any) -> None:
    found = inspected(capsys, converted.output, *(("--against", converted.source) if against else ()))
    weights, row = decoded(converted.output), LAYOUTS[converted.recipe["layout"]]
    assert {layer["name"] for layer in found["layers"]} == weights.keys()
    for layer, reported in zip(
        found["layers"], sorted(converted.report["layers"], key=lambda r: r["name"]), strict=True
    ):
        assert layer["quant_type"] == converted.recipe["quant_type"]
        assert layer["group_size"] == 32
        assert layer["symmetric"] == converted.recipe["symmetric"]
        assert layer["zero_point"] == row.zero_point
        assert layer["bits_per_weight"] == pytest.approx(reported["bits_per_weight"], abs=1e-4)
        original, base = converted.originals[layer["name"]].double(), weights[layer["name"]].double()
        both = base + added(converted.output, reported["module"], base.shape[1])
        assert layer["error"]["base_error"] == pytest.approx(relative_error(original, base), rel=1e-5)
        assert layer["error"]["error"] == pytest.approx(relative_error(original, both), rel=1e-5)
        if against:
            assert_group_statistics(layer["groups"], original, both)
        else:
            assert layer["groups"] is None


def assert_group_statistics(groups: dict[str, Any], weight: torch.Tensor, approximation: torch.Tensor) -> None:
    """Mean and worst of the relative errors of groups of 32, one by one in float64."""
    errors = {
        (row, group): relative_error(*(matrix[row, 32 * group : 32 * group + 32] for matrix in (weight, approximation)))
        for row in range(weight.shape[0])
        for group in range(weight.shape[1] // 32)
    }
    worst = max(errors, key=errors.__getitem__)
    assert groups["groups"] == len(errors)
    assert groups["mean_error"] == pytest.approx(math.fsum(errors.values()) / len(errors), rel=1e-5)
    assert groups["max_error"] == pytest.approx(errors[worst], rel=1e-4)
    assert (groups["worst_row"], groups["worst_group"]) == worst


@pytest.mark.parametrize("quant_type", INTEGERS)
@pytest.mark.parametrize("layout", ["compressed-tensors", "mlx"])
def test_the_table_says_groups_zero_points_and_worst_groups(
    layout: str, quant_type: str, convert_once: Converter, capsys: Any
) -> None:
    recipe = combination(quant_type, "qlora", layout)
    converted = convert_once(**recipe)
    capsys.readouterr()
    assert _run(["inspect", str(converted.output), "--against", str(converted.source)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(title in lines[0] for title in ("zero point", "mean group", "worst group"))
    rows = [re.split(r" {2,}", line.strip()) for line in lines if line.startswith("model.layers")]
    expected = "none" if recipe["symmetric"] else LAYOUTS[layout].zero_point
    assert len(rows) == 7
    assert all(row[2:5] == [quant_type, "group 32", expected] for row in rows)
    found = inspected(capsys, converted.output, "--against", converted.source)
    for row, layer in zip(rows, found["layers"], strict=True):
        assert row[0] == layer["name"]
        assert row[-2:] == [f"{layer['groups'][key]:.4f}" for key in ("mean_error", "max_error")]


def test_groups_of_zeros_count_in_no_mean(source: Path, tmp_path: Path, capsys: Any) -> None:
    model = tmp_path / "model"
    shutil.copytree(source, model)
    replaced(f"{Q0}.weight", lambda weight: weight.index_fill(1, torch.arange(32), 0.0))(model)
    run_conversion(model, tmp_path / "out", quant_type="int4", group_size=32, method="qlora")
    found = inspected(capsys, tmp_path / "out", "--against", model)
    (layer,) = [layer for layer in found["layers"] if layer["name"] == f"{Q0}.weight"]
    original, base = tensors_of(model)[f"{Q0}.weight"].double(), decoded(tmp_path / "out")[f"{Q0}.weight"].double()
    errors = [
        relative_error(a, b)
        for a, b in zip(original[:, 32:].reshape(-1, 32), base[:, 32:].reshape(-1, 32), strict=True)
    ]
    assert layer["groups"]["groups"] == 128 * 4
    assert layer["groups"]["mean_error"] == pytest.approx(math.fsum(errors) / len(errors), rel=1e-5)
    assert layer["groups"]["max_error"] == pytest.approx(max(errors), rel=1e-5)
    assert layer["groups"]["worst_group"] > 0


@pytest.mark.parametrize("quant_type", INTEGERS)
def test_a_tried_error_is_that_of_a_conversion_with_default_options(
    quant_type: str, source: Path, tmp_path: Path, capsys: Any
) -> None:
    run_conversion(source, tmp_path / "out", quant_type=quant_type, method="qlora")
    weights, originals = decoded(tmp_path / "out"), tensors_of(source)
    found = inspected(capsys, source, "--try", quant_type)
    errors = {row["name"]: row["errors"][quant_type]["error"] for row in found["tensors"] if row["errors"]}
    assert errors.keys() == weights.keys()
    for name, error in errors.items():
        assert error == pytest.approx(relative_error(originals[name], weights[name]), rel=1e-5)
    total = math.sqrt(
        sum(float((originals[n].double() - w.double()).square().sum()) for n, w in weights.items())
        / sum(float(originals[n].double().square().sum()) for n in weights)
    )
    assert found["totals"][quant_type]["error"] == pytest.approx(total, rel=1e-5)


def test_formats_are_tried_on_transposed_layers_too(tmp_path: Path, capsys: Any) -> None:
    source = models.gpt2(tmp_path / "source")
    outcome = run_conversion(source, tmp_path / "out", quant_type="int4", layout="dense", method="qlora")
    originals, weights = tensors_of(source), tensors_of(outcome.output)
    found = inspected(capsys, source, "--try", "int4")
    errors = {row["name"]: row["errors"]["int4"]["error"] for row in found["tensors"] if row["errors"]}
    assert len(errors) == 8
    for name, error in errors.items():
        assert error == pytest.approx(relative_error(originals[name], weights[name]), rel=1e-5)


def test_the_tried_error_of_a_real_model_is_that_of_rounding_between_minimum_and_maximum(capsys: Any) -> None:
    source = models.minilm()
    found = inspected(capsys, source, "--try", "int4")
    errors = {row["name"]: row["errors"]["int4"]["error"] for row in found["tensors"] if row["errors"]}
    tensors = tensors_of(source)
    assert len(errors) == 36
    for name, error in errors.items():
        groups = tensors[name].double().reshape(-1, 64)
        lowest, highest = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
        scale = ((highest - lowest) / 15).float().double()
        zero_point = (-lowest / scale).round()
        rounded = (((groups / scale).round() + zero_point).clamp(0, 15) - zero_point) * scale
        # A weight that lies between two steps in float32 may round to the other one: one in some 10⁵ of them.
        assert error == pytest.approx(relative_error(groups, rounded), rel=1e-4)


def test_a_partly_quantized_checkpoint_is_no_source(tmp_path):
    models.llama(tmp_path / "model", layers=1)
    run_conversion(tmp_path / "model", tmp_path / "base", quant_type="int4", layout="mlx", include=("q_proj",), rank=4)
    with pytest.raises(InputError, match=r"the model is quantized already \(mlx\)"):
        run_conversion(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trying_a_format_tries_what_its_own_containers_hold(tmp_path, capsys):
    shapes = {"model.layers.0.a.weight": (40, 128), "model.layers.0.b.weight": (64, 96)}
    generator = torch.Generator().manual_seed(0)
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, tmp_path / "w.safetensors"
    )

    assert _run(["inspect", str(tmp_path / "w.safetensors"), "--try", "int4", "--try", "nf4", "--json"]) == 0

    # NF4's loaders need rows in multiples of 32, integers of the default size whole groups of 64.
    rows = {row["name"]: set(row["errors"]) for row in json.loads(capsys.readouterr().out)["tensors"]}
    assert rows == {"model.layers.0.a.weight": {"int4"}, "model.layers.0.b.weight": {"nf4"}}
