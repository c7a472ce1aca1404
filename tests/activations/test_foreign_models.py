"""Configs and tokenizers of strangers under `calibrate` and `inspect --reference`: every way to break transformers is a
line with the file, and nothing waits for ever.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from support import models
from support.conversions import run_conversion

from loftq_cli.activations import foreign_tokenizer, transformers_models
from loftq_cli.cli.main import _run

TEXT = "The quick brown fox jumps over the lazy dog; 12 boxes of wizards quickly vex it. " * 8
Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.with_tokenizer(models.llama(tmp_path_factory.mktemp("original") / "llama"))


@pytest.fixture(scope="module")
def converted(original: Path) -> Path:
    return run_conversion(original, original.parent / "converted", method="qlora", rank=4).output


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture(params=["calibrate", "inspect"])
def refusal(request: pytest.FixtureRequest, model: Path, converted: Path, capfd: pytest.CaptureFixture[str]) -> Refusal:
    """Run a command on `model`, which has to end with a line on stderr and status `status`: the line."""
    text = ("--text", str(model.parent / "text.txt"), "--tokens", "64")
    commands = {
        "calibrate": ("calibrate", str(model), "-o", str(model.parent / "stats"), *text),
        "inspect": ("inspect", str(converted), "--reference", str(model), *text),
    }

    def run(status: int = 2) -> str:
        assert _run([*commands[request.param]]) == status
        lines = [line for line in capfd.readouterr().err.splitlines() if "arning" not in line]
        assert len(lines) == 1, lines
        assert not (model.parent / "stats").exists()
        return lines[0]

    return run


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# Configs


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},  # 128 is no multiple
        {"num_key_value_heads": 0},
        {"num_key_value_heads": 3},
        {"hidden_size": 0},
        {"hidden_size": 96},
        {"intermediate_size": 64},
        {"num_attention_heads": "four"},
        {"rope_parameters": {"rope_type": "no such type"}},
        {"hidden_act": "no such function"},
        {"vocab_size": -1},
    ],
    ids=str,
)
def test_numbers_that_make_no_model_are_a_line(values, model, refusal):
    edit(model / "config.json", **values)
    line = refusal()
    assert line.startswith(f"error: {model.parent}/")


@pytest.mark.parametrize(
    "name", ["Trainer", "LlamaConfig", "AutoModelForCausalLM", "PreTrainedModel", "pipeline", "utils"]
)
def test_only_models_of_transformers_are_called(name, model, refusal, monkeypatch):
    called: list[str] = []
    monkeypatch.setattr(transformers.Trainer, "__init__", lambda *arguments, **options: called.append("Trainer"))
    edit(model / "config.json", architectures=[name])
    assert f"names the class {name}, which is no model of transformers for a llama config" in refusal()
    assert not called


def test_a_model_class_of_another_config_is_not_called(model, refusal):
    edit(model / "config.json", architectures=["BertModel"])
    assert "names the class BertModel, which is no model of transformers for a llama config" in refusal()


def test_a_class_that_transformers_has_not_is_named(model, refusal):
    edit(model / "config.json", architectures=["LlamaForDreaming"])
    assert "names the class LlamaForDreaming, which transformers has not" in refusal()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaModel"])
def test_the_classes_of_the_config_are(name, model):
    """All models of one config class, whatever they end in."""
    edit(model / "config.json", architectures=[name])
    config = transformers_models.load_config(model)
    assert type(transformers_models.build_empty_model(model, config)).__name__ == name


# Tokenizers


def split_at(model: Path, expression: str) -> None:
    values = json.loads((model / "tokenizer.json").read_text())
    values["pre_tokenizer"]["pattern"] = {"Regex": expression}
    (model / "tokenizer.json").write_text(json.dumps(values))


def test_a_limit_that_is_no_number_is_a_line(model, refusal):
    edit(model / "tokenizer_config.json", model_max_length="x")
    assert f"{model}: " in refusal()


def test_a_panic_in_rust_is_a_line_without_the_trace_of_rust(model, refusal):
    split_at(model, "(?:([a-z ]+)+)+$b")
    line = refusal()
    assert f"{model}: its tokenizer fails on this text: " in line and "regex" in line.lower()


def test_an_expression_that_is_none_is_a_line(model, refusal):
    split_at(model, "(")
    assert f"{model}: holds no tokenizer that transformers reads" in refusal()


def test_a_tokenizer_that_takes_for_ever_is_stopped(model, refusal, monkeypatch):
    def endless(directory: Path) -> Any:
        while True:
            pass

    monkeypatch.setattr(transformers_models, "load_tokenizer", endless)
    monkeypatch.setattr(foreign_tokenizer, "_SECONDS", 0.5)
    assert f"{model}: its tokenizer takes more than 1 seconds (give less text" in refusal()


def test_a_tokenizer_that_ends_its_process_ends_no_more(model, refusal, monkeypatch):
    monkeypatch.setattr(transformers_models, "load_tokenizer", lambda directory: os.kill(os.getpid(), signal.SIGKILL))
    assert f"{model}: its tokenizer fails on this text: its process ended" in refusal()


def test_a_tokenizer_without_memory_is_a_shortage_of_memory(model, refusal, monkeypatch):
    def greedy(directory: Path) -> Any:
        raise MemoryError

    monkeypatch.setattr(transformers_models, "load_tokenizer", greedy)
    assert "not enough memory" in refusal(6)


@pytest.mark.parametrize(("nbytes", "status", "said"), [(100_000_000, 2, "it fits"), (600_000_000, 6, "not enough")])
def test_the_memory_of_a_tokenizer_is_bounded(model, refusal, monkeypatch, nbytes, status, said):
    def greedy(directory: Path) -> Any:
        raise ValueError(f"it fits in {len(bytearray(nbytes))} bytes")

    monkeypatch.setattr(foreign_tokenizer, "MEMORY_NBYTES", 300_000_000)
    monkeypatch.setattr(transformers_models, "load_tokenizer", greedy)
    assert said in refusal(status)


def test_a_tokenizer_writes_no_file(model, refusal, monkeypatch, tmp_path):
    def write(directory: Path) -> Any:
        (tmp_path / "written").write_text("by a tokenizer")

    monkeypatch.setattr(transformers_models, "load_tokenizer", write)
    assert "its tokenizer fails on this text: [Errno 27] File too large" in refusal()
    assert not (tmp_path / "written").stat().st_size


def test_a_signal_between_the_fork_and_the_child_ends_the_child_alone(model, refusal, monkeypatch):
    """An exception there would run the clean-up of every caller twice."""
    real = os.fork

    def fork() -> int:
        child = real()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
        return child

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    monkeypatch.setattr(os, "fork", fork)
    try:
        assert "its tokenizer fails on this text: its process ended" in refusal()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_no_process_is_left_behind(model, refusal, monkeypatch):
    monkeypatch.setattr(transformers_models, "load_tokenizer", lambda directory: os.kill(os.getpid(), signal.SIGKILL))
    refusal()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_ids_of_a_child_are_those_of_the_tokenizer(model):
    """An ASCII character is its code: windows of 32 from 64 tokens, spread over the text."""
    config = transformers_models.load_config(model)
    text = foreign_tokenizer.TextFile(model / "text.txt", TEXT[:64], 64, "")
    windows = foreign_tokenizer.cut_windows(model, config, [text], tokens=64, context=32, lines=False)
    assert windows.by_length[0].flatten().tolist() == [ord(letter) for letter in TEXT[:64]]


def test_files_and_locks_of_the_parent_are_closed_in_the_child(model, refusal, monkeypatch):
    """A child that outlives a killed parent must not hold the lock of an output."""
    held = os.open(model / "config.json", os.O_RDONLY)

    def look(directory: Path) -> Any:
        try:
            os.fstat(held)
        except OSError:
            raise ValueError("it is closed") from None

    monkeypatch.setattr(transformers_models, "load_tokenizer", look)
    assert "it is closed" in refusal()
    os.close(held)


def test_a_process_that_cannot_start_is_a_line(model, refusal, monkeypatch):
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    assert f"{model}: no process for its tokenizer can start: Resource temporarily unavailable" in refusal(3)
