"""A vocabulary that grew in training is merged where the adapter holds every matrix over the vocabulary in full.

Expected weights are those of PEFT's own merge on the resized base.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import models
from support.adapters import Made, edit_tensors, loaded, made_by_peft, tensors_of
from support.merge_refusals import refused

from loftq_cli.cli.main import _run

BOTH = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 168


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 160 tokens, tied and untied, and each with 168 tokens."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("untied", "tied"):
        models.llama(folder / name, tied=name == "tied", dtype=torch.float32)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / name)
        model.resize_token_embeddings(ROWS, mean_resizing=False)
        model.save_pretrained(folder / f"{name} grown")
    return folder


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def merge(base: Path, made: Made, out: Path, *arguments: str) -> int:
    return _run(["merge", str(base), str(made.path), str(out), "--dtype", "float32", "--force", *arguments])


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_both_matrices_and_the_size_are_the_adapters(base, checkpoints, tmp_path, capsys):
    made = made_by_peft(checkpoints / f"{base} grown", tmp_path / "adapter", **BOTH)

    assert merge(checkpoints / base, made, tmp_path / "out") == 0

    config, state = config_of(tmp_path / "out"), loaded(tmp_path / "out").state_dict()
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (ROWS, False)
    assert state.keys() == made.merged.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, made.merged[name], rtol=0, atol=1e-6)
    assert "the vocabulary grows from 160 to 168 rows" in capsys.readouterr().err


def test_a_tied_model_with_equal_matrices_stays_tied(checkpoints, tmp_path):
    made = made_by_peft(checkpoints / "tied grown", tmp_path / "adapter", **BOTH)

    def tie(tensors: dict[str, torch.Tensor]) -> None:
        embedding = next(value for name, value in tensors.items() if name.endswith("embed_tokens.weight"))
        tensors.update({name: embedding.clone() for name in tensors if name.endswith(HEAD)})

    edit_tensors(made.path / "adapter_model.safetensors", tie)

    assert merge(checkpoints / "tied", made, tmp_path / "out") == 0

    config, merged = config_of(tmp_path / "out"), tensors_of(tmp_path / "out")
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (ROWS, True)
    assert HEAD not in merged
    assert torch.equal(merged[EMBEDDING], made.merged[EMBEDDING])
    assert loaded(tmp_path / "out").lm_head.weight.shape == (ROWS, 128)


def test_factors_of_a_grown_embedding_merge_into_the_saved_matrix(checkpoints, tmp_path):
    made = made_by_peft(
        checkpoints / "untied grown", tmp_path / "adapter", target_modules=["embed_tokens", "lm_head", "q_proj"]
    )

    assert merge(checkpoints / "untied", made, tmp_path / "out") == 0

    merged = tensors_of(tmp_path / "out")
    for name in (EMBEDDING, HEAD):
        torch.testing.assert_close(merged[name], made.merged[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("base", ["untied", "tied"])
@pytest.mark.parametrize("lost", [EMBEDDING, HEAD])
def test_one_matrix_without_the_other_is_refused(base, lost, checkpoints, tmp_path, capsys):
    made = made_by_peft(checkpoints / f"{base} grown", tmp_path / "adapter", **BOTH)
    edit_tensors(made.path / "adapter_model.safetensors", lambda tensors: tensors.pop(f"base_model.model.{lost}"))

    status, line = refused(capsys, checkpoints / base, made.path, tmp_path / "out", "--force")

    assert status == 4
    assert "adapter_model.safetensors" in line


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_matrices_of_two_sizes_are_refused(base, checkpoints, tmp_path, capsys):
    made = made_by_peft(checkpoints / f"{base} grown", tmp_path / "adapter", **BOTH)

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"base_model.model.{HEAD}"] = tensors[f"base_model.model.{HEAD}"][: ROWS - 1].clone()

    edit_tensors(made.path / "adapter_model.safetensors", cut)

    status, line = refused(capsys, checkpoints / base, made.path, tmp_path / "out", "--force")

    assert status == 4
    assert "resize the base's embeddings" in line


def test_a_smaller_vocabulary_is_refused(checkpoints, tmp_path, capsys):
    made = made_by_peft(checkpoints / "untied", tmp_path / "adapter", **BOTH)

    status, line = refused(capsys, checkpoints / "untied grown", made.path, tmp_path / "out", "--force")

    assert status == 4
    assert "resize the base's embeddings" in line
