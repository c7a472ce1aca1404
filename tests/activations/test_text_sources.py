"""Where text comes from: files, folders, conversations, random tokens, and the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models

from loftq_cli.activations import transformers_models
from loftq_cli.activations.self_written import draw, write_windows
from loftq_cli.activations.streamed_model import StreamedModel
from loftq_cli.activations.text_sources import make_windows, open_text, random_windows
from loftq_cli.activations.text_windows import TokenizerFacts, cut_ids, read_text, split_documents
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.errors import InputError, UsageError
from loftq_cli.model.builtin import resolve_model
from loftq_cli.planning.recipe import TextOptions

TINY_LLAMA = resolve_model("builtin:tiny-llama")
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers_models.load_tokenizer(TINY_LLAMA)


def streamed(directory: Path) -> StreamedModel:
    checkpoint = open_checkpoint(directory)
    with transformers_models.silence():
        model = transformers_models.build_empty_model(directory, transformers_models.load_config(directory))
        weights = transformers_models.match_weights(model, checkpoint.tensors)
    return StreamedModel(model, directory, checkpoint.load, weights)


def test_a_folder_gives_every_visible_file_of_text_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, data in {"b/2.md": b"two", "a.txt": b"one", "c.bin": b"\xff\xfe\x00", ".git/x": b"no"}.items():
        (tmp_path / name).write_bytes(data)
    assert [file.text for file in open_text([str(tmp_path)]).files] == ["one", "two"]


def test_a_folder_without_text_is_refused_by_name(tmp_path):
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="holds no file of text"):
        open_text([str(tmp_path)])


def test_a_word_stands_alone_and_a_path_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").write_text("a file")
    assert open_text(["self"]).files == ()
    assert [file.text for file in open_text(["./self"]).files] == ["a file"]
    with pytest.raises(UsageError, match="stands beside"):
        open_text(["self", "./self"])


def test_conversations_pass_through_the_chat_template(tokenizer, tmp_path):
    file = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    records = [{"messages": turns}, {"text": "plain"}, {"prompt": "a", "completion": "b"}]
    file.write_text("\n".join(map(json.dumps, [*records, {"prompt": turns[:1], "completion": turns[1:]}])))
    tokenizer.chat_template = TEMPLATE
    try:
        found = split_documents(read_text(file), tokenizer)
    finally:
        tokenizer.chat_template = None
    assert found == ["<user>hi<assistant>ho", "plain", "ab", "<user>hi<assistant>ho"]


@pytest.mark.parametrize(
    "line", ['{"messages": [{"role": "user", "content": "hi"}]}', "not JSON", "[]", '{"other": 1}']
)
def test_a_line_that_is_no_text_is_named(tokenizer, tmp_path, line):
    file = tmp_path / "chat.jsonl"  # the tokenizer has no chat template
    file.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(InputError, match="line 2 is no text"):
        split_documents(read_text(file), tokenizer)


def test_lines_of_a_jsonl_file_are_its_records(tokenizer, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "ab\\ncd"}\n{"text": "efg"}')
    windows = cut_ids([read_text(file)], tokenizer, tokens=64, context=None, lines=True, longest=None, vocabulary=None)
    assert windows == {5: [list(b"ab\ncd")], 3: [list(b"efg")]}


def test_random_tokens_cover_the_vocabulary_without_special_tokens(tokenizer):
    facts = TokenizerFacts.of(tokenizer, None)
    ids = random_windows(facts, 288, count=400, length=64, seed=3)
    assert ids.shape == (400, 64) and torch.equal(ids, random_windows(facts, 288, 400, 64, seed=3))
    assert not torch.equal(ids, random_windows(facts, 288, 400, 64, seed=4))
    plain = set(range(min(len(tokenizer), 288))) - set(tokenizer.all_special_ids)
    assert set(ids.unique().tolist()) == plain
    counts = ids.flatten().bincount(minlength=288)[sorted(plain)].double()
    mean = float(counts.mean())
    chi_square = float((counts - mean).square().sum() / mean)
    assert chi_square < len(plain) + 5 * (2 * len(plain)) ** 0.5  # five standard deviations above the mean


def test_draws_follow_the_softmax():
    logits = torch.tensor([2.0, 0.0, 1.0, -3.0])
    counts = draw(logits.expand(200_000, 4).clone(), torch.Generator().manual_seed(0)).bincount(minlength=4)
    expected = logits.double().softmax(0) * 200_000
    assert float(((counts - expected).square() / expected).sum()) < 16.3  # chi square of 3 degrees, p = 0.001


def test_a_language_model_continues_as_its_own_probabilities_say(tokenizer):
    """Windows score as text of the model: about the entropy of the model, not the log of the vocabulary."""
    from transformers import AutoModelForCausalLM

    ids = write_windows(streamed(TINY_LLAMA), TokenizerFacts.of(tokenizer, None), 40, 48, seed=0, threads=2)
    assert ids is not None and ids.shape == (40, 48) and ids.dtype == torch.int64
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float64)
    with torch.no_grad():
        log = model(ids).logits[:, :-1].log_softmax(-1)
    scores = -log.gather(-1, ids[:, 1:, None])[..., 0].mean()
    entropy = -(log.exp() * log).sum(-1)
    deviation = float(entropy.std() / entropy.numel() ** 0.5) + 0.01
    assert abs(float(scores - entropy.mean())) < 6 * deviation


def test_written_text_depends_on_the_seed_alone(tokenizer):
    first, again, other = (
        write_windows(streamed(TINY_LLAMA), TokenizerFacts.of(tokenizer, None), 40, 16, seed=seed, threads=threads)
        for seed, threads in ((0, 1), (0, 3), (1, 1))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 40  # batches draw differently


def masked_bert(directory: Path, *, has_head: bool) -> Path:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    (BertForMaskedLM if has_head else BertModel)(BertConfig(vocab_size=128, **sizes)).save_pretrained(directory)
    return directory


# The special tokens of BERT, beside a tokenizer without a start token.
MASKED = TokenizerFacts(before=(1,), after=(2,), special=(1, 2, 3), size=128, start=None, mask=3, longest=None)


def test_a_masked_model_fills_every_mask(tmp_path):
    ids = write_windows(streamed(masked_bert(tmp_path, has_head=True)), MASKED, 5, 20, seed=0, threads=1)
    assert ids is not None and ids.shape == (5, 20)
    assert bool((ids[:, 0] == 1).all()) and bool((ids[:, -1] == 2).all())
    assert int((ids == 3).sum()) < 10  # a mask is a token of the vocabulary, and is drawn now and then


def test_an_encoder_without_a_head_reads_random_tokens_and_says_so(tmp_path):
    directory = models.with_tokenizer(masked_bert(tmp_path, has_head=False))
    model, notes = streamed(directory), []
    windows = make_windows(
        open_text(["self"]),
        TextOptions(("self",), tokens=64, context=16),
        directory,
        transformers_models.load_config(directory),
        seed=0,
        write=lambda facts, count, length: write_windows(model, facts, count, length, seed=0, threads=1),
        note=notes.append,
    )
    assert (windows.count, windows.longest) == (4, 16) and "writes no text" in notes[0]
