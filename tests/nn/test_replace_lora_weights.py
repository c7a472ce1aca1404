"""A model that PEFT wrapped over a 4-bit base gets the fitted start in place: the base keeps its codes, and the
adapters are the best ones for what those codes lost, PEFT's scaling included.

Expected values come from float64 singular values, from what bitsandbytes decodes, and from PEFT's own function.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.utils.loftq_utils import replace_lora_weights_loftq
from support import models
from support.conversions import run_conversion
from torch import nn

from loftq_cli.errors import InputError, LoftqError, MismatchError, UsageError
from loftq_cli.nn import QLoRALinear, load_adapted, replace_lora_weights

RANK, LAYER = 8, "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return models.llama(tmp_path_factory.mktemp("model") / "model", dtype=torch.float32)


def loaded(checkpoint: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()


def in_4_bit(checkpoint: Path, **options: Any) -> Any:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", **options})
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config).eval()


def wrapped(model: nn.Module, *, rank: int = RANK, alpha: float = RANK, **options: Any) -> Any:
    targets = options.pop("target_modules", ["q_proj", "down_proj"])
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **options))


def layer_of(model: Any, name: str = LAYER) -> Any:
    return model.base_model.model.get_submodule(name)


def decoded(layer: Any) -> torch.Tensor:
    """float64 [out, in] of a Linear4bit, by bitsandbytes."""
    weight = layer.get_base_layer().weight
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).double()


def effective(layer: Any) -> torch.Tensor:
    """float64 [out, in]: the base with what PEFT adds to it."""
    return decoded(layer) + layer.get_delta_weight("default").double()


def original(checkpoint: Path, name: str = LAYER) -> torch.Tensor:
    return loaded(checkpoint).get_submodule(name).weight.detach().double()


def least_error(residual: torch.Tensor, rank: int) -> float:
    """Eckart and Young: the norm of the singular values that no matrix of this rank can hold."""
    return float(torch.linalg.svdvals(residual)[rank:].norm())


@pytest.mark.parametrize(
    ("alpha", "options", "four_bit"),
    [
        (RANK, {}, {}),
        (4 * RANK, {}, {"bnb_4bit_use_double_quant": True}),
        (3.0, {"use_rslora": True}, {"bnb_4bit_quant_type": "fp4"}),
        (2 * RANK, {}, {"bnb_4bit_quant_storage": torch.bfloat16}),
    ],
    ids=["alpha is rank", "double quantization", "rslora, FP4", "codes stored as bfloat16"],
)
def test_base_and_adapter_are_as_near_to_the_original_as_the_rank_allows(alpha, options, four_bit, checkpoint):
    model = wrapped(in_4_bit(checkpoint, **four_bit), alpha=alpha, **options)

    returned = replace_lora_weights(model, checkpoint)

    assert returned is model
    for name in (LAYER, "model.layers.1.self_attn.q_proj"):
        layer, weight = layer_of(model, name), original(checkpoint, name)
        error = float((weight - effective(layer)).norm())
        assert error == pytest.approx(least_error(weight - decoded(layer), RANK), rel=1e-5)
        assert error < 0.95 * float((weight - decoded(layer)).norm())


@pytest.fixture
def cuda_is_the_processor(monkeypatch):
    """PEFT's function computes on "cuda", also where there is none."""
    to = torch.Tensor.to

    def moved(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        if keywords.get("device") == "cuda" and not torch.cuda.is_available():
            keywords["device"] = "cpu"
        return to(tensor, *arguments, **keywords)

    monkeypatch.setattr(torch.Tensor, "to", moved)


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_pefts_own_function_forgets_the_scaling(ratio, checkpoint, cuda_is_the_processor):
    ours = wrapped(in_4_bit(checkpoint), alpha=ratio * RANK)
    theirs = wrapped(in_4_bit(checkpoint), alpha=ratio * RANK)
    weight = original(checkpoint)
    alone = float((weight - decoded(layer_of(ours))).norm())

    replace_lora_weights(ours, checkpoint)
    replace_lora_weights_loftq(theirs, str(checkpoint / "model.safetensors"))

    error, pefts = (float((weight - effective(layer_of(model))).norm()) for model in (ours, theirs))
    assert error < 0.95 * alone
    if ratio == 1:
        assert error == pytest.approx(pefts, rel=1e-3)
    else:
        assert error < 0.95 * pefts
    if ratio == 2:
        assert pefts == pytest.approx(alone, rel=1e-3)  # twice the correction is as wrong as none
    if ratio == 4:
        assert pefts > 1.2 * alone


def test_the_base_and_other_adapters_stay_as_they_are(checkpoint):
    model = wrapped(in_4_bit(checkpoint))
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=16, target_modules=["down_proj"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    replace_lora_weights(model, checkpoint, adapter_name="second")

    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {
        f"base_model.model.model.layers.{i}.mlp.down_proj.lora_{part}.second.weight" for i in (0, 1) for part in "AB"
    }
    assert layer_of(model).lora_A["second"].weight.requires_grad is False  # the active adapter trains, as before
    assert layer_of(model).lora_A["default"].weight.requires_grad


def test_the_model_computes_more_nearly_what_the_original_computes(checkpoint):
    tokens = torch.arange(32)[None]
    exact = loaded(checkpoint)(input_ids=tokens).logits
    model = wrapped(in_4_bit(checkpoint), rank=32, alpha=64, target_modules="all-linear").train()
    before = (model(input_ids=tokens).logits - exact).norm()

    replace_lora_weights(model, checkpoint)

    assert (model(input_ids=tokens).logits - exact).norm() < 0.9 * before


def test_originals_of_every_kind_give_the_same_factors(checkpoint):
    source = loaded(checkpoint)

    def factors(kind: Any) -> torch.Tensor:
        return layer_of(replace_lora_weights(wrapped(in_4_bit(checkpoint)), kind)).lora_A["default"].weight

    expected = factors(str(checkpoint))
    state = source.state_dict()
    assert torch.equal(factors(source), expected)
    assert torch.equal(factors(state), expected)
    assert torch.equal(factors({name.removesuffix(".weight"): tensor for name, tensor in state.items()}), expected)
    assert torch.equal(factors(lambda name: source.get_submodule(name).weight), expected)


def test_one_weight_is_read_at_a_time(checkpoint):
    source, names = loaded(checkpoint), []

    def weight_of(name: str) -> torch.Tensor:
        names.append(name)
        return source.get_submodule(name).weight

    replace_lora_weights(wrapped(in_4_bit(checkpoint)), weight_of)

    layers = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")]
    assert names == layers


def test_conv1d_is_read_in_the_orientation_of_the_loaded_model(tmp_path):
    path = models.gpt2(tmp_path / "model")
    model = wrapped(in_4_bit(path), target_modules=["c_attn", "c_proj"], fan_in_fan_out=False)

    replace_lora_weights(model, path)

    for name in ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"):  # 128 by 384, and square
        layer, weight = layer_of(model, name), original(path, name).T
        error = float((weight - effective(layer)).norm())
        assert error == pytest.approx(least_error(weight - decoded(layer), RANK), rel=1e-5)


@pytest.mark.parametrize("quant_type", ["nf4", "int4", "int2"])
def test_a_quantized_linear_of_ours_is_a_base_too(quant_type, checkpoint, tmp_path):
    run_conversion(checkpoint, tmp_path / "out", method="qlora", rank=1, quant_type=quant_type)
    base = load_adapted(loaded(checkpoint), tmp_path / "out")
    for name, module in list(base.named_modules()):
        if isinstance(module, QLoRALinear):
            base.set_submodule(name, module.base_layer)
    model = wrapped(base, alpha=2 * RANK)

    replace_lora_weights(model, checkpoint)

    layer, weight = layer_of(model), original(checkpoint)
    quantized = layer.get_base_layer().dequantized().double()
    error = float((weight - quantized - layer.get_delta_weight("default").double()).norm())
    assert error == pytest.approx(least_error(weight - quantized, RANK), rel=1e-5)


def test_a_linear_in_full_precision_keeps_its_adapter(checkpoint):
    model = wrapped(in_4_bit(checkpoint), target_modules=["q_proj", "lm_head"])
    before = model.base_model.model.lm_head.lora_A["default"].weight.clone()

    replace_lora_weights(model, checkpoint)

    assert torch.equal(model.base_model.model.lm_head.lora_A["default"].weight, before)
    assert not model.base_model.model.lm_head.lora_B["default"].weight.any()
    assert layer_of(model, "model.layers.0.self_attn.q_proj").lora_B["default"].weight.any()


def test_training_goes_on_from_the_fitted_start(checkpoint):
    model = replace_lora_weights(wrapped(in_4_bit(checkpoint), alpha=16), checkpoint)
    tokens = torch.arange(32)[None]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)

    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    assert losses[2] < losses[1] < losses[0]


# What is refused


def merged(checkpoint: Path) -> Any:
    model = wrapped(in_4_bit(checkpoint))
    model.merge_adapter()
    return model


def two_active(checkpoint: Path) -> Any:
    model = wrapped(in_4_bit(checkpoint))
    model.add_adapter("second", LoraConfig(r=4, target_modules=["down_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def weights(checkpoint: Path, change: Any) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in loaded(checkpoint).state_dict().items()}
    state[f"{LAYER}.weight"] = change(state[f"{LAYER}.weight"])
    return state


def dequantized(checkpoint: Path) -> Any:
    model = wrapped(in_4_bit(checkpoint))
    return lambda name: decoded(layer_of(model, name)).float()


def not_yet_quantized() -> Any:
    linear = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
    return wrapped(nn.Sequential(linear), target_modules=["0"])


def used_on_a_processor() -> Any:
    """What a pass in evaluation mode leaves on a processor that multiplies bfloat16."""
    model = wrapped(nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")).to("cpu"), target_modules=["0"])
    state = layer_of(model, "0").get_base_layer().weight.quant_state
    state.absmax, state.packing_format_for_cpu = state.absmax.bfloat16(), True
    return model


PLAIN: Any = lambda checkpoint: wrapped(in_4_bit(checkpoint))  # noqa: E731

REFUSED: dict[str, tuple[Any, Any, dict[str, Any], type[LoftqError], str]] = {
    "no adapter": (
        in_4_bit,
        str,
        {},
        UsageError,
        "the model has no LoRA layer of PEFT (wrap it with peft.get_peft_model first)",
    ),
    "no 4-bit base": (
        lambda checkpoint: wrapped(loaded(checkpoint)),
        str,
        {},
        UsageError,
        "adapter 'default' has no layer over a 4-bit linear (load the base with BitsAndBytesConfig(load_in_4bit=True)",
    ),
    "an unknown adapter": (
        PLAIN,
        str,
        {"adapter_name": "other"},
        UsageError,
        "the model has no LoRA adapter 'other' (adapter_name is one of default)",
    ),
    "two active adapters": (
        two_active,
        str,
        {},
        UsageError,
        "2 adapters are active (name the adapter, as adapter_name='default')",
    ),
    "DoRA": (
        lambda checkpoint: wrapped(in_4_bit(checkpoint), use_dora=True),
        str,
        {},
        UsageError,
        "tensor model.layers.0.self_attn.q_proj: has an adapter of Dora",
    ),
    "a merged adapter": (merged, str, {}, UsageError, "has a merged adapter (call unmerge_adapter first)"),
    "a rank above the matrix's": (
        lambda checkpoint: wrapped(in_4_bit(checkpoint), rank=129),
        str,
        {},
        UsageError,
        "rank 129 is more than the matrix has (128 by 128) (LoraConfig(r=128) or less)",
    ),
    "a base that is not quantized yet": (
        lambda checkpoint: not_yet_quantized(),
        str,
        {},
        UsageError,
        "tensor 0: its weight is not quantized yet (move the model to its device first: bitsandbytes quantizes then)",
    ),
    "constants that bitsandbytes has rounded": (
        lambda checkpoint: used_on_a_processor(),
        str,
        {},
        UsageError,
        "tensor 0: bitsandbytes has rounded the constants of its weight to bfloat16, in a pass in evaluation mode "
        "(load the base anew, and replace the weights before the first pass)",
    ),
    "an unknown solver": (PLAIN, str, {"svd": "quick"}, UsageError, "svd 'quick' does not exist (one of fast,"),
    "no threads": (PLAIN, str, {"threads": 0}, UsageError, "threads must be at least 1"),
    "no path": (PLAIN, lambda checkpoint: checkpoint / "missing", {}, LoftqError, "missing"),
    "a number": (PLAIN, lambda checkpoint: 7, {}, UsageError, "original is a int (a path, a mapping from module names"),
    "a missing weight": (
        PLAIN,
        lambda checkpoint: {"lm_head": torch.zeros(1, 1)},
        {},
        MismatchError,
        "tensor model.layers.0.self_attn.q_proj: original has no weight of this name (names are those of the model "
        "before PEFT wrapped it)",
    ),
    "another shape": (
        PLAIN,
        lambda checkpoint: weights(checkpoint, lambda weight: weight[:, :64]),
        {},
        MismatchError,
        f"tensor {LAYER}: original is (128, 64), and the base (128, 192) (name the checkpoint of the base)",
    ),
    "the other orientation": (
        PLAIN,
        lambda checkpoint: weights(checkpoint, lambda weight: weight.T),
        {},
        MismatchError,
        "original is (192, 128), and the base (128, 192) (weights are [out, in]: turn it, as weight.T)",
    ),
    "NaN": (
        PLAIN,
        lambda checkpoint: weights(checkpoint, lambda weight: weight * float("nan")),
        {},
        InputError,
        f"tensor {LAYER}: original holds NaN or infinite values",
    ),
    "the meta device": (
        PLAIN,
        lambda checkpoint: weights(checkpoint, lambda weight: weight.to("meta")),
        {},
        UsageError,
        f"tensor {LAYER}: original is on the meta device (load its numbers, or name the path of the checkpoint)",
    ),
    "integers": (
        PLAIN,
        lambda checkpoint: weights(checkpoint, lambda weight: weight.to(torch.int8)),
        {},
        InputError,
        f"tensor {LAYER}: original is not in full precision",
    ),
    "a function that gives no tensor": (
        PLAIN,
        lambda checkpoint: lambda name: [1.0],
        {},
        UsageError,
        "original gives a list, not a tensor",
    ),
    "another model": (
        PLAIN,
        lambda checkpoint: weights(checkpoint, lambda weight: weight.flip(0)),
        {},
        MismatchError,
        f"tensor {LAYER}: original is not what the base was quantized from: both differ by more than the weight itself",
    ),
    "the decoded base": (
        PLAIN,
        dequantized,
        {},
        MismatchError,
        "original equals what the base decodes to: nothing was lost that an adapter could hold (name the "
        "full-precision checkpoint, not a dequantized one)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_each_wrong_model_or_original_gives_one_clear_error(case, checkpoint):
    build, source, options, kind, message = REFUSED[case]
    model = build(checkpoint)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}

    with pytest.raises(kind) as caught:
        replace_lora_weights(model, source(checkpoint), **options)

    assert message in str(caught.value)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name].detach(), tensor) for name, tensor in before.items())


def test_a_quantized_checkpoint_is_not_an_original(checkpoint, tmp_path):
    run_conversion(checkpoint, tmp_path / "out", method="qlora", rank=1)

    with pytest.raises(InputError, match="original is quantized itself"):
        replace_lora_weights(wrapped(in_4_bit(checkpoint)), tmp_path / "out")


def test_weights_that_are_barely_those_of_the_base_are_accepted(checkpoint):
    """From the other side of the threshold: an original that differs by nearly, and not quite, its own norm."""
    weight = original(checkpoint)
    noise = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def shifted(share: float) -> dict[str, torch.Tensor]:
        size = math.sqrt(share / (1 - share)) * float(weight.norm() / noise.norm())
        return weights(checkpoint, lambda stored: (weight + size * noise).float())

    replace_lora_weights(wrapped(in_4_bit(checkpoint)), shifted(0.9))
    with pytest.raises(MismatchError):
        replace_lora_weights(wrapped(in_4_bit(checkpoint)), weights(checkpoint, lambda stored: stored * -0.01))
