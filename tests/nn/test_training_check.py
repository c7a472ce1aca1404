"""A hundred training steps of the built-in model from each start: the losses fall, LoftQ's start and end are the better
ones where quantization hurts, what is merged loses what the trained model loses, and training for rounded zero points
pays where they are deployed.

Losses are in nats per byte, on held-out windows of another text than the model was trained on.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from benchmarks.corpus import held_out_text
from support import models
from support.conversions import run_conversion, run_merge
from torch import nn

from loftq_cli.model.builtin import resolve_model
from loftq_cli.nn import QALoRALinear, load_adapted, save_adapter

pytestmark = pytest.mark.slow

METHODS = ("qlora", "loftq", "qalora")
QUANT_TYPES = ("int4", "int2")
STEPS, BATCH, CONTEXT = 100, 2, 128
RATE = 1e-3  # every method's loss falls at it; at 3e-3 they fall further, and are closer together
EVERY = 97  # one window in so many is held out


@dataclass(frozen=True)
class Trained:
    """One run: the held-out loss before and after, and of what `loftq merge` made of the adapter."""

    base: Path
    adapter: Path
    start: float
    end: float
    merged: float


def windows() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out windows of bytes, [n, CONTEXT]."""
    text = torch.tensor(list(held_out_text().encode()))
    cut = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    is_held_out = torch.arange(len(cut)) % EVERY == 0
    return cut[~is_held_out], cut[is_held_out]


def empty_model() -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(resolve_model("builtin:tiny-llama"))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def loss_of(model: nn.Module) -> float:
    _, held_out = windows()
    with torch.no_grad():
        return float(model(input_ids=held_out, labels=held_out).loss)


def train(model: nn.Module) -> None:
    text, _ = windows()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(STEPS):
        batch = text[torch.randint(len(text), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


def merged_loss(base: Path, adapter: Path, output: Path, **options: object) -> float:
    """The held-out loss of what `loftq merge` writes, in float32."""
    return loss_of(load_adapted(empty_model(), run_merge(base, adapter, output, dtype="float32", **options)))


def run(quant_type: str, method: str, folder: Path, *, rounds: bool = False) -> Trained:
    """Convert with rank 16 and groups of 64, train, save and merge; `rounds` trains for rounded zero points.

    The model is called float32, so that bases decode in it: one in bfloat16 would round what merged offsets do not.
    """
    source, base, adapter = folder / "source", folder / "base", folder / "trained"
    shutil.copytree(resolve_model("builtin:tiny-llama"), source)
    run_conversion(models.with_dtype(source, "float32"), base, method=method, quant_type=quant_type, rank=16)
    model = load_adapted(empty_model(), base, cache=True)
    start = loss_of(model)
    for module in model.modules():
        if isinstance(module, QALoRALinear):
            module.quantization_enabled = rounds
    train(model)
    save_adapter(model, adapter)
    options = {"round_zeros": True, "force": True} if rounds else {}
    return Trained(base, adapter, start, loss_of(model), merged_loss(base, adapter, folder / "merged", **options))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Trained]:
    found = {}
    for quant_type in QUANT_TYPES:
        for method in METHODS:
            found[quant_type, method] = result = run(quant_type, method, tmp_path_factory.mktemp(f"{method}-"))
            print(f"{quant_type} {method}: {result.start:.4f} -> {result.end:.4f}, merged {result.merged:.5f}")
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_training_lowers_the_loss(quant_type, method, results):
    assert results[quant_type, method].end < results[quant_type, method].start - 0.05


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_loftq_starts_at_a_lower_loss(quant_type, results):
    assert results[quant_type, "loftq"].start < results[quant_type, "qlora"].start


def test_loftq_ends_at_a_lower_loss_at_2_bits(results):
    assert results["int2", "loftq"].end < results["int2", "qlora"].end - 0.02


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_merged_model_has_the_loss_of_the_trained_one(quant_type, method, results):
    # QA-LoRA merges into float32 offsets, the others into float32 weights.
    assert results[quant_type, method].merged == pytest.approx(results[quant_type, method].end, abs=1e-5)


def test_training_for_rounded_zero_points_pays_where_they_are_deployed(results, tmp_path):
    plain, aware = results["int4", "qalora"], run("int4", "qalora", tmp_path, rounds=True)

    rounded = merged_loss(plain.base, plain.adapter, tmp_path / "rounded", round_zeros=True, force=True)

    print(f"int4 qalora with rounded zero points: {rounded:.4f}; trained for them: {aware.merged:.4f}")
    assert aware.merged == pytest.approx(aware.end, abs=1e-5)
    assert aware.merged < rounded - 0.005
