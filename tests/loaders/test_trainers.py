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
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training, set_peft_model_state_dict
from safetensors.torch import load_file
from support.adapters import PREFIX, decoded, delta, quietly, tensors_of
from support.conversions import loftq, run_conversion, run_merge
from support.loading import keep_trainable
from support.pages import ROOT, pages

from loftq_cli.model.builtin import resolve_model


def runtime(name: str) -> Any:
    """A library that may be missing."""
    return importlib.import_module(name) if os.environ.get("LOFTQ_RUNTIMES") == "1" else pytest.importorskip(name)


trl = runtime("trl")
datasets = runtime("datasets")

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
    data = datasets.Dataset.from_dict({"text": PASSAGES})
    return trl.SFTTrainer(model=model, args=trl.SFTConfig(**arguments), train_dataset=data, processing_class=tokenizer)


def dpo(model: PeftModel, tokenizer: Any, arguments: dict[str, Any]) -> Any:
    columns = {
        "prompt": [passage[:HALF] for passage in PASSAGES],
        "chosen": [passage[HALF:] for passage in PASSAGES],
        "rejected": [passage[HALF:] for passage in [*PASSAGES[1:], PASSAGES[0]]],  # how another passage ends
    }
    data = datasets.Dataset.from_dict(columns)
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


def in_float32(build: Callable[[PeftModel, Any, dict[str, Any]], Any]) -> Callable[..., Any]:
    """A trainer of TRL whose trained weights are cast back: the optimizer is made later, when training begins."""

    def build_in_float32(model: PeftModel, tokenizer: Any, arguments: dict[str, Any]) -> Any:
        trainer = build(model, tokenizer, arguments)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return trainer

    return build_in_float32


@dataclass(frozen=True)
class Kind:
    """A trainer, the dtype of the trained weights, and a rate that trains in a few steps."""

    build: Callable[[PeftModel, Any, dict[str, Any]], Any]
    dtype: torch.dtype
    rate: float = 1e-3


KINDS = {
    "SFTTrainer": Kind(sft, torch.bfloat16),
    "SFTTrainer, float32": Kind(in_float32(sft), torch.float32),
    "DPOTrainer": Kind(dpo, torch.bfloat16, rate=5e-4),
    "DPOTrainer, float32": Kind(in_float32(dpo), torch.float32, rate=1e-4),
    "Trainer": Kind(plain, torch.float32),
    "Trainer, bfloat16": Kind(plain_bfloat16, torch.bfloat16),
}
DPO = ["DPOTrainer", "DPOTrainer, float32"]


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
    trainer = quietly(KINDS[kind].build, base.model(dropout=dropout), base.tokenizer, arguments_of(kind, folder, last))
    quietly(trainer.train, resume_from_checkpoint=resume and str(resume))
    trainer.save_model(str(folder / "trained"))
    return Run(kind, trainer, folder / "trained")


def arguments_of(kind: str, folder: Path, last: int) -> dict[str, Any]:
    """Of a trainer that writes to `folder`."""
    return {
        "output_dir": str(folder),
        "max_steps": last,
        "per_device_train_batch_size": len(PASSAGES),
        "learning_rate": KINDS[kind].rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": CHECKPOINT,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }


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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in DPO])
def test_the_loss_before_the_first_step_is_that_of_base_and_adapter(kind: str, base: Base, tmp_path: Path) -> None:
    run = train(kind, base, tmp_path, dropout=0.0, last=1)

    ids = token_ids(base.tokenizer)
    adapted, alone = (-float(log_probabilities(base.dense(one), ids).mean()) for one in (base.adapter, None))
    assert run.logged() == pytest.approx([adapted], abs=BFLOAT16)
    assert alone > adapted + 1.0  # so the loss shows that the adapter is there


@pytest.mark.parametrize("kind", DPO)
def test_dpo_prefers_nothing_yet_and_compares_with_base_and_adapter(kind: str, base: Base, tmp_path: Path) -> None:
    run = train(kind, base, tmp_path, dropout=0.0, last=1)

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
    assert config.base_model_name_or_path == base.path.name


def test_a_resumed_run_continues_like_the_uninterrupted_one(run: Run, base: Base, tmp_path: Path) -> None:
    resumed = train(run.kind, base, tmp_path, resume=run.saved.parent / f"checkpoint-{CHECKPOINT}")

    states, expected = (list(one.trainer.optimizer.state.values()) for one in (resumed, run))
    assert [int(state["step"]) for state in states] == [STEPS] * 2 * 28
    # PEFT loads a checkpoint in float32, so what began in bfloat16 goes on in float32, with finer steps.
    assert {factor.dtype for factor in resumed.trainer.model.parameters() if factor.requires_grad} == {torch.float32}
    if KINDS[run.kind].dtype == torch.bfloat16:
        assert resumed.logged() == pytest.approx(run.logged(), abs=BFLOAT16)
        return
    assert resumed.logged() == run.logged()  # bit by bit, with the same dropout
    for state, other in zip(states, expected, strict=True):
        assert torch.equal(state["exp_avg"], other["exp_avg"])
        assert torch.equal(state["exp_avg_sq"], other["exp_avg_sq"])


# The result.


def test_merging_gives_the_trained_model(run: Run, base: Base, tmp_path: Path) -> None:
    merged = run_merge(base.path, run.saved, tmp_path / "merged", dtype="float32")

    ids = token_ids(base.tokenizer)
    found = logits_of(quietly(transformers.AutoModelForCausalLM.from_pretrained, merged), ids)
    assert relative(found, logits_of(base.dense(run.saved), ids)) < 1e-5
    trained = logits_of(run.trainer.model, ids)
    assert relative(trained, found) < BFLOAT16
    assert relative(logits_of(base.dense(base.adapter), ids), found) > 2 * BFLOAT16  # training went further


def test_peft_loads_the_trained_adapter_again(run: Run, base: Base) -> None:
    ids = token_ids(base.tokenizer)
    again = logits_of(base.model(run.saved, trainable=False), ids)
    assert relative(again, logits_of(run.trainer.model, ids)) < BFLOAT16


# What a trainer must know: these mistakes raise nothing, or raise where the adapter is not at fault.


def test_a_model_that_is_not_loaded_as_trainable_is_trained_without_a_word(base: Base, tmp_path: Path) -> None:
    trainer = quietly(sft, base.model(trainable=False), base.tokenizer, arguments_of("SFTTrainer", tmp_path, STEPS))
    trainer.train()
    assert [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry] == [0.0] * STEPS


def test_preparing_the_base_for_training_comes_before_the_adapter(base: Base) -> None:
    after = prepare_model_for_kbit_training(base.model())
    assert not any(parameter.requires_grad for parameter in after.parameters())

    model = prepare_model_for_kbit_training(quietly(transformers.AutoModelForCausalLM.from_pretrained, base.path))
    model = PeftModel.from_pretrained(model, base.adapter, is_trainable=True)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 2 * 28


def test_a_peft_config_means_another_adapter(base: Base, tmp_path: Path) -> None:
    arguments = trl.SFTConfig(**arguments_of("SFTTrainer", tmp_path, 1))
    data = datasets.Dataset.from_dict({"text": PASSAGES})
    fresh = LoraConfig(r=RANK, target_modules="all-linear")

    with pytest.raises(ValueError, match="peft_config"):
        trl.SFTTrainer(model=base.model(), args=arguments, train_dataset=data, peft_config=fresh)

    trainer = quietly(trl.SFTTrainer, model=str(base.path), args=arguments, train_dataset=data, peft_config=fresh)
    trainer.train()
    alone = -float(log_probabilities(base.dense(None), token_ids(base.tokenizer)).mean())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(alone, rel=BFLOAT16)


def test_a_layer_to_train_whole_is_added_beside_the_adapter(base: Base, tmp_path: Path) -> None:
    config = LoraConfig.from_pretrained(base.adapter)
    config.modules_to_save = ["lm_head"]
    config.inference_mode = False
    model = keep_trainable(quietly(transformers.AutoModelForCausalLM.from_pretrained, base.path))
    head = model.lm_head.weight.detach().clone()
    model = get_peft_model(model, config)
    factors = load_file(base.adapter / "adapter_model.safetensors")
    with pytest.raises(KeyError, match="lm_head"):
        set_peft_model_state_dict(model, dict(factors))
    set_peft_model_state_dict(model, {**factors, f"{PREFIX}lm_head.weight": head})

    trainer = quietly(sft, model, base.tokenizer, arguments_of("SFTTrainer", tmp_path, STEPS))
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))

    merged = run_merge(base.path, tmp_path / "trained", tmp_path / "merged")
    assert not torch.equal(tensors_of(merged)["lm_head.weight"], head)
    ids = token_ids(base.tokenizer)
    found = logits_of(quietly(transformers.AutoModelForCausalLM.from_pretrained, merged), ids)
    assert relative(found, logits_of(model, ids)) < BFLOAT16


# The front page.


def test_the_script_of_the_front_page_trains_and_merges_as_it_stands(tmp_path: Path) -> None:
    (code,) = [block.text for block in pages()["README.md"].blocks("python") if "SFTTrainer" in block.text]
    (shown,) = [block.text for block in pages()["README.md"].blocks("console") if "python train.py" in block.text]
    assert 20 <= len(code.splitlines()) <= 30
    (tmp_path / "train.py").write_text(code)
    shutil.copy(ROOT / "LICENSE", tmp_path)
    assert loftq("quantize", BUILTIN, "tiny-nf4", cwd=tmp_path).returncode == 0

    commands = [line.removeprefix("$ ") for line in shown.splitlines() if line.startswith("$ ")]
    assert [command.split()[0] for command in commands] == ["python", "loftq"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = subprocess.run(
        [sys.executable, *commands[0].split()[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert script.returncode == 0, script.stderr
    merge = loftq(*commands[1].split()[1:], cwd=tmp_path)
    assert merge.returncode == 0, merge.stderr
    assert shown.splitlines()[-1] in merge.stdout + merge.stderr

    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "tiny-nf4")(TEXT[:500], return_tensors="pt").input_ids
    start = Base(tmp_path / "tiny-nf4", tmp_path / "tiny-nf4" / "loftq_init").model(trainable=False)
    merged = quietly(transformers.AutoModelForCausalLM.from_pretrained, tmp_path / commands[1].split()[4])
    losses = [-float(log_probabilities(model.eval(), text).mean()) for model in (start, merged)]
    assert losses[1] < 0.9 * losses[0]
