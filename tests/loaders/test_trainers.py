"""TRL's SFTTrainer and DPOTrainer, and the Trainer of transformers, on an NF4 base with the adapter of a conversion:
trained, saved, resumed, merged and loaded again.

The start is the best adapter of the weights: the base alone is no model, so a loss shows at once whether the adapter is
there. Expected numbers come from a float32 model with base and adapter added by hand. A missing TRL skips the tests, or
with LOFTQ_RUNTIMES=1 fails them.
"""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from safetensors.torch import load_file
from support.adapters import decoded, delta, quietly
from support.conversions import loftq, run_conversion, run_merge
from support.loading import keep_trainable
from support.pages import ROOT, pages
from support.reader import steps

from loftq_cli.model.builtin import resolve_model

BUILTIN = "builtin:tiny-llama"
RANK, SCALING = 16, 2.0
STEPS, CHECKPOINT = 6, 3
LENGTH = 160  # bytes of a passage
HALF = LENGTH // 2

TEXT = (ROOT / "LICENSE").read_text()
# All passages are one batch, so every step sees the same tokens.
PASSAGES = [TEXT[begin : begin + LENGTH] for begin in range(0, 8 * LENGTH, LENGTH)]

# Of losses and logits in bfloat16, beside float32.
BFLOAT16 = 0.01


def runtime(name: str) -> Any:
    """A library that may be missing."""
    return importlib.import_module(name) if os.environ.get("LOFTQ_RUNTIMES") == "1" else pytest.importorskip(name)


@dataclass(frozen=True)
class Base:
    """A converted directory, and its adapter."""

    path: Path
    adapter: Path

    @property
    def tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.path)

    def model(self, adapter: Path | None = None, *, dropout: float = 0.0, trainable: bool = True) -> PeftModel:
        """The base with an adapter, else with its own."""
        config = LoraConfig.from_pretrained(adapter or self.adapter)
        config.lora_dropout = dropout
        model = keep_trainable(quietly(transformers.AutoModelForCausalLM.from_pretrained, self.path))
        return PeftModel.from_pretrained(model, adapter or self.adapter, config=config, is_trainable=trainable)

    def dense(self, adapter: Path | None) -> torch.nn.Module:
        """The model that base and adapter mean, in float32: the weights of bitsandbytes plus s·B·A. With None, the base
        alone.
        """
        original = resolve_model(BUILTIN)
        model = transformers.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
        for name, weight in decoded(self.path).items():
            module = name.removesuffix(".weight")
            change = delta(adapter, module, SCALING) if adapter else 0.0
            model.get_submodule(module).weight.data = (weight.double() + change).float()
        return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    recipe = {"fit": "joint", "start": "principal", "keep_base": 0.0, "rank": RANK, "alpha": RANK * SCALING}
    outcome = run_conversion(BUILTIN, tmp_path_factory.mktemp("base") / "base", **recipe)
    return Base(outcome.output, outcome.adapter)


# The trainers.


def sft(model: PeftModel, tokenizer: Any, arguments: dict[str, Any]) -> Any:
    trl = runtime("trl")
    data = runtime("datasets").Dataset.from_dict({"text": PASSAGES})
    return trl.SFTTrainer(model=model, args=trl.SFTConfig(**arguments), train_dataset=data, processing_class=tokenizer)


def dpo(model: PeftModel, tokenizer: Any, arguments: dict[str, Any]) -> Any:
    trl = runtime("trl")
    columns = {
        "prompt": [passage[:HALF] for passage in PASSAGES],
        "chosen": [passage[HALF:] for passage in PASSAGES],
        "rejected": [passage[HALF:][::-1] for passage in PASSAGES],
    }
    data = runtime("datasets").Dataset.from_dict(columns)
    return trl.DPOTrainer(model=model, args=trl.DPOConfig(**arguments), train_dataset=data, processing_class=tokenizer)


def plain(model: PeftModel, tokenizer: Any, arguments: dict[str, Any]) -> Any:
    args = transformers.TrainingArguments(gradient_checkpointing=True, **arguments)
    data = [{"input_ids": ids, "labels": ids} for ids in token_ids(tokenizer).tolist()]
    return transformers.Trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)


def plain_bfloat16(model: PeftModel, tokenizer: Any, arguments: dict[str, Any]) -> Any:
    """What TRL does on 4-bit bases, in a script of one's own."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return plain(model, tokenizer, {**arguments, "bf16": True})


@dataclass(frozen=True)
class Kind:
    """A trainer. `dtype` is that of the trained weights before a resume: PEFT gives a resumed run float32."""

    build: Callable[[PeftModel, Any, dict[str, Any]], Any]
    dtype: torch.dtype = torch.bfloat16


KINDS = {
    "SFTTrainer": Kind(sft),
    "DPOTrainer": Kind(dpo),
    "Trainer, bfloat16": Kind(plain_bfloat16),
    "Trainer": Kind(plain, torch.float32),
}


@dataclass(frozen=True)
class Run:
    """A trainer that has trained, and the adapter that the trainer saved."""

    kind: str
    trainer: Any
    saved: Path

    def logged(self, name: str = "loss") -> list[float]:
        """A number of every step."""
        return [entry[name] for entry in self.trainer.state.log_history if name in entry]


def train(
    kind: str, base: Base, folder: Path, *, dropout: float = 0.05, last: int = STEPS, resume: Path | None = None
) -> Run:
    """Train up to step `last`, with a checkpoint in `folder` after every third; or go on from the checkpoint `resume`.
    The adapter is saved as `folder`/trained.
    """
    arguments = {
        "output_dir": str(folder),
        "max_steps": last,
        "per_device_train_batch_size": len(PASSAGES),
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": CHECKPOINT,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = quietly(KINDS[kind].build, base.model(dropout=dropout), base.tokenizer, arguments)
    quietly(trainer.train, resume_from_checkpoint=resume and str(resume))
    trainer.save_model(str(folder / "trained"))
    return Run(kind, trainer, folder / "trained")


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, base: Base, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every trainer, after all steps with dropout."""
    return train(request.param, base, tmp_path_factory.mktemp("run"))


# What is expected, by hand.


def token_ids(tokenizer: Any) -> torch.Tensor:
    """The passages, each with the end of a text: int64 [8, 161]. The tokenizer's tokens are bytes."""
    return torch.tensor([[*passage.encode(), tokenizer.eos_token_id] for passage in PASSAGES])


def log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of each token after the first, given those before, [texts, tokens − 1]."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.double()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# Before the first step.


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "DPOTrainer"])
def test_the_loss_before_the_first_step_is_that_of_base_and_adapter(kind: str, base: Base, tmp_path: Path) -> None:
    run = train(kind, base, tmp_path, dropout=0.0, last=1)

    ids = token_ids(base.tokenizer)
    adapted, alone = (-float(log_probabilities(base.dense(one), ids).mean()) for one in (base.adapter, None))
    assert run.logged() == pytest.approx([adapted], abs=BFLOAT16)
    assert alone > adapted + 1.0  # so the loss shows that the adapter is there


def test_dpo_prefers_nothing_yet_and_compares_with_base_and_adapter(base: Base, tmp_path: Path) -> None:
    run = train("DPOTrainer", base, tmp_path, dropout=0.0, last=1)

    completion = log_probabilities(base.dense(base.adapter), token_ids(base.tokenizer))[:, HALF - 1 :]
    assert run.logged() == pytest.approx([math.log(2)], abs=1e-6)
    assert run.logged("logps/chosen") == pytest.approx([float(completion.sum(1).mean())], rel=BFLOAT16)


# Training.


def test_the_loss_falls(run: Run) -> None:
    losses = run.logged()
    assert len(losses) == STEPS
    assert losses[-1] < 0.95 * losses[0]


def test_every_factor_of_the_adapter_is_trained(run: Run, base: Base) -> None:
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (base.adapter, run.saved))
    assert {factor.dtype for factor in after.values()} == {KINDS[run.kind].dtype}
    for name, factor in after.items():
        assert not torch.equal(factor, before[name].to(factor.dtype)), name


def test_the_saved_adapter_has_the_modules_of_the_conversion(run: Run, base: Base) -> None:
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (base.adapter, run.saved))
    assert {name: factor.shape for name, factor in after.items()} == {n: f.shape for n, f in before.items()}
    config = LoraConfig.from_pretrained(run.saved)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (RANK, RANK * SCALING, 0.05)
    assert config.base_model_name_or_path == str(base.path)


def test_a_resumed_run_continues_like_the_uninterrupted_one(run: Run, base: Base, tmp_path: Path) -> None:
    checkpoint = run.saved.parent / f"checkpoint-{CHECKPOINT}"

    resumed = train(run.kind, base, tmp_path, resume=checkpoint)

    states, expected = (list(one.trainer.optimizer.state.values()) for one in (resumed, run))
    assert [int(state["step"]) for state in states] == [STEPS] * 2 * 28
    if run.kind == "Trainer":  # bit by bit, dropout too
        assert resumed.logged() == run.logged()
        for state, other in zip(states, expected, strict=True):
            assert torch.equal(state["exp_avg"], other["exp_avg"])
            assert torch.equal(state["exp_avg_sq"], other["exp_avg_sq"])
    # PEFT resumes in float32 what TRL trains in bfloat16.
    assert {factor.dtype for factor in resumed.trainer.model.parameters() if factor.requires_grad} == {torch.float32}
    assert resumed.logged() == pytest.approx(run.logged(), abs=BFLOAT16)


# The result.


def test_merging_gives_the_trained_model(run: Run, base: Base, tmp_path: Path) -> None:
    merged = run_merge(base.path, run.saved, tmp_path / "merged", dtype="float32")

    ids = token_ids(base.tokenizer)
    found = logits_of(quietly(transformers.AutoModelForCausalLM.from_pretrained, merged), ids)
    assert relative(found, logits_of(base.dense(run.saved), ids)) < 1e-5
    trained = logits_of(run.trainer.model, ids)
    assert relative(trained, found) < BFLOAT16
    assert relative(logits_of(base.dense(base.adapter), ids), found) > 3 * BFLOAT16  # training went further


def test_peft_loads_the_trained_adapter_again(run: Run, base: Base) -> None:
    ids = token_ids(base.tokenizer)
    again = logits_of(base.model(run.saved, trainable=False), ids)
    assert relative(again, logits_of(run.trainer.model, ids)) < BFLOAT16
