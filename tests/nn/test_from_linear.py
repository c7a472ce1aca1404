"""An existing linear becomes a quantized linear with an adapter: the numbers are those that `loftq quantize` writes for
the matrix, the linear stays as it is, and each wrong argument gives one clear error.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from support import models
from torch import nn

from loftq_cli.errors import InputError, LoftqError, UsageError
from loftq_cli.nn import (
    AdaptedLinear,
    LoftQLinear,
    QALoRALinear,
    QLoRALinear,
    QuantizedLinear,
    load_adapted,
)

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def linear(in_features: int = 128, out_features: int = 64, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias)


def assert_same(module: AdaptedLinear, expected: AdaptedLinear) -> None:
    """Codes, constants, factors and bias of both, bit for bit, with the same dtypes."""
    state, expected_state = module.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    assert type(module) is type(expected)
    assert module.lora == expected.lora and module.scaling == expected.scaling
    assert module.weight.dtype == expected.weight.dtype
    assert torch.equal(module.weight, expected.weight)


# The numbers of the command line


def checkpoint(name: str, directory: Path) -> Path:
    """Small models with and without biases, in bfloat16 and float32, of linears and of Conv1D."""
    if name == "llama with biases, float32":
        config = transformers.LlamaConfig(
            vocab_size=160,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            attention_bias=True,
            mlp_bias=True,
        )
        return models._save(transformers.LlamaForCausalLM, config, directory)
    return {"llama, bfloat16": models.llama, "gpt2, float32": models.gpt2}[name](directory)


LLAMA, BIASED, GPT2 = "llama, bfloat16", "llama with biases, float32", "gpt2, float32"


def nf4(module: nn.Module, name: str, **options: Any) -> AdaptedLinear:
    return LoftQLinear.from_linear(module, 4, name=name, **options)


ALONE = ("--calibration", "none")  # a linear alone has no model that shows the inputs

CASES: dict[str, tuple[str, list[str], Any]] = {
    "loftq, NF4": (LLAMA, ["--fit", "loftq", "--iterations", "5"], nf4),
    "loftq, NF4, biases": (BIASED, ["--fit", "loftq", "--iterations", "5"], nf4),
    "loftq, NF4 of Conv1D": (GPT2, ["--fit", "loftq", "--iterations", "5"], nf4),
    "loftq joint, seed and alpha": (
        LLAMA,
        ["--alpha", "8", "--seed", "3", "--rslora", *ALONE],
        lambda module, name: nf4(module, name, fit="joint", iterations=None, alpha=8, seed=3, rslora=True),
    ),
    "loftq joint, base kept": (
        LLAMA,
        ["--keep-base", "0.5", "--iterations", "3", *ALONE],
        lambda module, name: nf4(module, name, fit="joint", iterations=3, keep_base=0.5),
    ),
    "loftq, int4": (
        LLAMA,
        ["--quant-type", "int4", "--group-size", "32", "--fit", "loftq", "--iterations", "3", "--svd", "faithful"],
        lambda module, name: nf4(module, name, quant_type="int4", group_size=32, iterations=3, svd="faithful"),
    ),
    "loftq, int3 with float offsets": (
        LLAMA,
        ["--quant-type", "int3", "--group-size", "32", "--layout", "mlx", "--fit", "loftq", "--iterations", "2"],
        lambda module, name: nf4(module, name, quant_type="int3", group_size=32, layout="mlx", iterations=2),
    ),
    "qlora, NF4 without double quantization": (
        BIASED,
        ["--method", "qlora", "--no-double-quant", "--block-size", "32", "--adapter-dtype", "bfloat16"],
        lambda module, name: QLoRALinear.from_linear(
            module, 4, name=name, double_quant=False, block_size=32, adapter_dtype="bfloat16"
        ),
    ),
    "qlora, int8": (
        LLAMA,
        ["--method", "qlora", "--quant-type", "int8", "--group-size", "64"],
        lambda module, name: QLoRALinear.from_linear(module, 4, name=name, quant_type="int8"),
    ),
    "qalora, int4": (
        BIASED,
        ["--method", "qalora", "--quant-type", "int4", "--group-size", "32", *ALONE],
        lambda module, name: QALoRALinear.from_linear(module, 4, 4, 32, name=name),
    ),
    "qalora standard, int2": (
        LLAMA,
        [
            "--method",
            "qalora",
            "--quant-type",
            "int2",
            "--group-size",
            "16",
            "--init",
            "standard",
            "--pooling",
            "paper",
        ],
        lambda module, name: QALoRALinear.from_linear(module, 4, 2, 16, init="standard", pooling="paper", name=name),
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {name: checkpoint(name, tmp_path_factory.mktemp("model") / "model") for name in (LLAMA, BIASED, GPT2)}


@pytest.mark.parametrize("case", CASES)
def test_a_linear_gets_the_numbers_that_the_command_line_writes(case, checkpoints, tmp_path, run):
    name, arguments, build = CASES[case]
    status, _, printed = run("quantize", checkpoints[name], "out", "--rank", "4", "--quiet", *arguments)
    assert status == 0, printed
    source = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype="auto")
    loaded = load_adapted(
        transformers.AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype="auto"), tmp_path / "out"
    )
    layers = ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj") if name == GPT2 else LAYERS

    for layer in layers:
        expected = loaded.get_submodule(layer)
        assert_same(build(source.get_submodule(layer), layer), expected)
        assert_same(build(source.get_submodule(layer), f"{layer}.weight"), expected)


def test_the_name_and_the_seed_decide_what_is_drawn():
    source = linear()
    first = QLoRALinear.from_linear(source, 4, name="first")

    assert torch.equal(first.lora_A, QLoRALinear.from_linear(source, 4, name="first").lora_A)
    assert not torch.equal(first.lora_A, QLoRALinear.from_linear(source, 4, name="second").lora_A)
    assert not torch.equal(first.lora_A, QLoRALinear.from_linear(source, 4, name="first", seed=1).lora_A)


def test_parameters_have_the_names_order_and_defaults_of_the_seed_documents():
    def head(kind: type, count: int) -> list[str]:
        return list(inspect.signature(kind.from_linear).parameters)[:count]  # type: ignore[attr-defined]

    defaults = {
        name: parameter.default for name, parameter in inspect.signature(LoftQLinear.from_linear).parameters.items()
    }
    assert head(LoftQLinear, 8) == [
        *("linear", "rank", "alpha", "iterations", "quant_type", "double_quant", "block_size", "freeze_base")
    ]
    assert head(QALoRALinear, 5) == ["linear", "rank", "bits", "group_size", "alpha"]
    assert defaults["alpha"] is None and defaults["iterations"] == 5 and defaults["quant_type"] == "nf4"
    assert defaults["double_quant"] is True and defaults["block_size"] == 64 and defaults["freeze_base"] is True


def test_alpha_is_the_rank_unless_it_is_given():
    assert LoftQLinear.from_linear(linear(), 4).scaling == 1.0
    assert LoftQLinear.from_linear(linear(), 4, 6.0).scaling == 1.5
    assert LoftQLinear.from_linear(linear(), 4, alpha=6, rslora=True).scaling == 3.0


def test_five_iterations_are_better_than_one_and_one_better_than_none():
    source = linear(256, 256)

    def error(module: AdaptedLinear) -> float:
        return float((source.weight.detach() - module.weight).norm())

    errors = [
        error(QLoRALinear.from_linear(source, 16)),
        error(LoftQLinear.from_linear(source, 16, iterations=1)),
        error(LoftQLinear.from_linear(source, 16)),
    ]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.99 * errors[1] < 0.98 * errors[0]


# What stays, and what trains


@pytest.mark.parametrize("build", [LoftQLinear.from_linear, QLoRALinear.from_linear])
def test_the_linear_stays_as_it_is(build):
    source = linear()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}

    layer = build(source, 4)
    torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1.0)
    layer(torch.randn(3, 128)).square().sum().backward()

    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())
    assert source.weight.requires_grad and source.bias.requires_grad
    assert source.bias.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_and_mode_are_kept(dtype):
    source = linear().to(dtype).eval()

    layer = LoftQLinear.from_linear(source, 4)

    assert layer.weight.dtype == dtype and layer.bias.dtype == dtype and not layer.training
    assert layer(torch.randn(2, 128, dtype=dtype)).dtype == dtype
    assert layer.lora_A.dtype == torch.float32


@pytest.mark.gpu
def test_the_device_is_kept_and_the_numbers_are_those_of_the_processor():
    source = linear()
    expected = LoftQLinear.from_linear(source, 4)

    layer = LoftQLinear.from_linear(source.cuda(), 4)

    assert layer.weight.device.type == "cuda"
    assert_same(layer.cpu(), expected)


def test_a_frozen_base_trains_the_factors_alone():
    layer = QALoRALinear.from_linear(linear(), 4, 4, 32)
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}

    assert trained == {"lora_A", "lora_B"}
    assert isinstance(layer.base_layer, QuantizedLinear)


def test_a_matrix_that_the_default_container_does_not_hold_is_quantized_as_asked():
    layer = LoftQLinear.from_linear(linear(50, 10), 4)  # bitsandbytes needs rows of whole blocks, and 32 of them

    assert layer.base_layer.spec.block_size == 64
    weight = linear(50, 10).weight.detach()
    assert float((layer.weight - weight).norm() / weight.norm()) < 0.15


def test_rows_that_the_default_container_holds_in_smaller_blocks_get_those_blocks():
    assert LoftQLinear.from_linear(linear(96, 64), 4).base_layer.spec.block_size == 32
    assert LoftQLinear.from_linear(linear(96, 64), 4, layout="dense").base_layer.spec.block_size == 64


def test_nothing_of_the_process_is_changed():
    from loftq_cli.triton_kernels.backend import has_kernels

    torch.set_num_threads(2)
    try:
        LoftQLinear.from_linear(linear(), 4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert not has_kernels("codebook", "cpu")


# What is refused


def lazy() -> nn.Module:
    return nn.LazyLinear(64)


def with_nan() -> nn.Linear:
    source = linear()
    source.weight.data[3, 5] = float("nan")
    return source


def too_large() -> nn.Linear:
    source = linear().double()
    source.weight.data[3, 5] = 1e200
    return source


def empty() -> nn.Linear:
    source = linear()
    source.weight, source.in_features = nn.Parameter(torch.empty(64, 0)), 0
    return source


def attention_projection() -> nn.Module:
    return nn.MultiheadAttention(64, 4).out_proj


REFUSED: dict[str, tuple[Any, type[LoftqError], str]] = {
    "another module": (lambda: LoftQLinear.from_linear(nn.Conv2d(3, 3, 3), 4), UsageError, "Conv2d is not a linear"),
    "no module": (lambda: LoftQLinear.from_linear("q_proj", 4), UsageError, "str is not a linear (an nn.Linear, or"),
    "an embedding": (lambda: QLoRALinear.from_linear(nn.Embedding(9, 64), 4), UsageError, "Embedding is not a linear"),
    "a quantized linear": (
        lambda: LoftQLinear.from_linear(LoftQLinear.from_linear(linear(), 4).base_layer, 4),
        UsageError,
        "QuantizedLinear is quantized already (start from the full-precision linear)",
    ),
    "an adapted linear": (
        lambda: LoftQLinear.from_linear(LoftQLinear.from_linear(linear(), 4), 4),
        UsageError,
        "LoftQLinear is not a linear",
    ),
    "attention's own linear": (
        lambda: LoftQLinear.from_linear(attention_projection(), 4),
        UsageError,
        "the weight of this linear is read past its forward, as MultiheadAttention does",
    ),
    "a lazy linear": (lambda: LoftQLinear.from_linear(lazy(), 4), UsageError, "has no weight yet (run one forward"),
    "the meta device": (
        lambda: LoftQLinear.from_linear(nn.Linear(64, 64, device="meta"), 4, name="proj"),
        UsageError,
        "tensor proj: the weight is on the meta device (give it memory and numbers first, as with to_empty",
    ),
    "float8": (
        lambda: LoftQLinear.from_linear(linear().to(torch.float8_e4m3fn), 4),
        UsageError,
        "the weight is float8_e4m3fn, not floating point of 16 bits or more",
    ),
    "4-bit codes of bitsandbytes": (
        lambda: LoftQLinear.from_linear(bitsandbytes.nn.Linear4bit(64, 64).to("cpu"), 4),
        UsageError,
        "the weight is uint8, not floating point of 16 bits or more (start from the full-precision linear)",
    ),
    "4-bit codes that are stored as bfloat16": (
        lambda: LoftQLinear.from_linear(bitsandbytes.nn.Linear4bit(64, 64, quant_storage=torch.bfloat16).to("cpu"), 4),
        UsageError,
        "the weight is (1024, 1), and the linear has 64 inputs and 64 outputs: the numbers are packed",
    ),
    "no inputs": (lambda: LoftQLinear.from_linear(empty(), 1), UsageError, "the weight is empty: 64 by 0"),
    "NaN": (
        lambda: LoftQLinear.from_linear(with_nan(), 4, name="proj"),
        InputError,
        "tensor proj.weight: holds NaN or infinite values",
    ),
    "too large": (lambda: QLoRALinear.from_linear(too_large(), 4), InputError, "has numbers too large for float32"),
    "rank 0": (lambda: LoftQLinear.from_linear(linear(), 0), UsageError, "rank must be at least 1, not 0"),
    "a rank above the matrix's": (
        lambda: LoftQLinear.from_linear(linear(), 65),
        UsageError,
        "rank 65 is more than the matrix has (64 by 128) (rank=64 or less)",
    ),
    "half a rank": (lambda: LoftQLinear.from_linear(linear(), 4.5), UsageError, "rank must be a whole number, not 4.5"),
    "no rank": (lambda: QALoRALinear.from_linear(linear(), None, 4, 32), UsageError, "rank must be a whole number"),
    "alpha 0": (lambda: LoftQLinear.from_linear(linear(), 4, 0.0), UsageError, "alpha must be a positive number"),
    "negative alpha": (lambda: LoftQLinear.from_linear(linear(), 4, -1), UsageError, "alpha must be a positive number"),
    "no iterations": (
        lambda: LoftQLinear.from_linear(linear(), 4, iterations=0),
        UsageError,
        "iterations must be at least 1, not 0",
    ),
    "an unknown format": (
        lambda: LoftQLinear.from_linear(linear(), 4, quant_type="nf5"),
        UsageError,
        "quant_type 'nf5' does not exist (one of nf4, fp4, int2",
    ),
    "a block size": (
        lambda: LoftQLinear.from_linear(linear(), 4, block_size=48),
        UsageError,
        "block_size 48 does not exist for nf4 (one of 32, 64",
    ),
    "a block size of integers": (
        lambda: LoftQLinear.from_linear(linear(), 4, quant_type="int4", block_size=32),
        UsageError,
        "block_size means nothing with quant_type int4 (leave block_size out)",
    ),
    "a group size of a codebook": (
        lambda: LoftQLinear.from_linear(linear(), 4, group_size=32),
        UsageError,
        "group_size means nothing with quant_type nf4 (leave group_size out)",
    ),
    "a group size": (
        lambda: QALoRALinear.from_linear(linear(), 4, 4, 48),
        UsageError,
        "group_size 48 does not exist for int4 (one of 16, 32",
    ),
    "groups that do not divide the rows": (
        lambda: QALoRALinear.from_linear(linear(96), 4, 4, 64),
        UsageError,
        "rows of 96 are not whole groups of 64 (group_size=32 divides them)",
    ),
    "rows that no groups divide": (
        lambda: LoftQLinear.from_linear(linear(100), 4, quant_type="int4"),
        UsageError,
        "rows of 100 are not whole groups of 64 (a codebook, as quant_type='nf4', needs no whole groups)",
    ),
    "5 bits": (
        lambda: QALoRALinear.from_linear(linear(), 4, 5, 32),
        UsageError,
        "there are no integers of 5 bits (bits is one of 2, 3, 4, 8)",
    ),
    "a symmetric pooled base": (
        lambda: QALoRALinear.from_linear(linear(), 4, 4, 32, symmetric=True),
        UsageError,
        "method qalora merges into zero points, and a symmetric base has none",
    ),
    "an unknown name": (
        lambda: LoftQLinear.from_linear(linear(), 4, blocksize=64),
        UsageError,
        "unknown option blocksize (did you mean block_size?)",
    ),
    "a name of models": (
        lambda: LoftQLinear.from_linear(linear(), 4, exclude=["q_proj"]),
        UsageError,
        "option exclude means nothing here",
    ),
    "a container that does not hold it": (
        lambda: LoftQLinear.from_linear(linear(128, 50), 4, layout="bitsandbytes"),
        UsageError,
        "layout bitsandbytes does not hold it: 50 rows are not a multiple of 32, which bitsandbytes needs on a CPU "
        "(layout='dense' holds every matrix)",
    ),
    "a cache of a weight that trains": (
        lambda: LoftQLinear.from_linear(linear(), 4, freeze_base=False, cache=True),
        UsageError,
        "cache means nothing with freeze_base=False: the weight changes with every step (leave cache out)",
    ),
    "a step that float32 cannot hold": (
        lambda: LoftQLinear.from_linear(huge(), 4, adapter_dtype="float16"),
        InputError,
        "is too large for float32 without what its adapter holds (iterations=1, or exclude it)",
    ),
    "factors too large for their dtype": (
        lambda: LoftQLinear.from_linear(huge(), 4, iterations=1, adapter_dtype="float16"),
        InputError,
        "the adapter would not be finite in float16 (adapter_dtype='float32' holds more)",
    ),
}


def huge() -> nn.Linear:
    source = linear()
    source.weight.data *= 1e12
    return source


@pytest.mark.parametrize("case", REFUSED)
def test_each_wrong_argument_gives_one_clear_error(case):
    build, kind, message = REFUSED[case]

    with pytest.raises(kind) as caught:
        build()

    assert message in str(caught.value)


def test_the_largest_rank_is_accepted():
    layer = LoftQLinear.from_linear(linear(128, 64), 64, svd="exact", iterations=1)

    assert float((layer.weight - linear(128, 64).weight.detach()).norm()) < 1e-4  # full rank holds the whole error
