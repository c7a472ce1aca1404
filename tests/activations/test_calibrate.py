"""`loftq calibrate`: the mean of x·xᵀ for the input of each linear, as of the whole model that transformers runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import models
from transformers.pytorch_utils import Conv1D

from loftq_cli.activations import transformers_models
from loftq_cli.activations.calibration import (
    CalibrationOptions,
    CalibrationResult,
    prepare_calibration,
    run_calibration,
)
from loftq_cli.activations.input_sums import InputSum
from loftq_cli.activations.text_windows import MAX_TEXT_NBYTES, read_text
from loftq_cli.checkpoint.statistics import Statistics, open_statistics, pack_triangle, unpack_triangle
from loftq_cli.cli.main import _run
from loftq_cli.errors import InputError, StorageError, UsageError
from loftq_cli.model.builtin import resolve_model

TINY_LLAMA = resolve_model("builtin:tiny-llama")
TEXT = "The quick brown fox jumps over the lazy dog; 12 boxes of wizards quickly vex it. " * 8


class Remembering:
    """An observer."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.blocks: list[str] = []

    def calibration_started(self, inputs: int, windows: int, context: int, *, lines: bool, nbytes: int) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def block_calibrated(self, block: str, inputs: int) -> None:
        self.blocks.append(block)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def calibrate(
    model: Path,
    text: Path,
    output: Path,
    *,
    observer: Any = None,
    overwrite: bool = False,
    batch_tokens: int = 4096,
    **options: Any,
) -> CalibrationResult:
    choices = CalibrationOptions(**{"tokens": 4096, **options})
    prepared = prepare_calibration(model, [text], output, choices, overwrite=overwrite)
    return run_calibration(prepared, observer or Remembering(), batch_tokens=batch_tokens)


def moments(model: Any, calls: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """For each linear of the loaded model, the mean of x·xᵀ over all rows that it is called with, in float64."""
    sums: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].double().flatten(0, -2)
            total, rows = sums.get(name, (0, 0))
            sums[name] = (total + x.T @ x, rows + len(x))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            module.register_forward_pre_hook(watch(name))
    model.eval()
    with torch.no_grad():
        for call in calls:
            model(**call)
    return {name: total / rows for name, (total, rows) in sums.items()}


def assert_same(statistics: Statistics, expected: dict[str, torch.Tensor], prefix: str = "") -> None:
    """Float32 products of a few thousand rows: one part in a million of the largest entry, with some room."""
    for name in statistics.names:
        module = prefix + name.removesuffix(".weight")
        torch.testing.assert_close(
            statistics.load(name).double(), expected[module], rtol=1e-4, atol=1e-5 * float(expected[module].max())
        )


def test_statistics_of_a_real_llama_are_those_of_the_whole_model(text, tmp_path):
    done = calibrate(TINY_LLAMA, text, tmp_path / "stats", context=64, tokens=256)
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    data = text.read_bytes()  # the vocabulary is bytes
    starts = [number * (len(data) - 64) // 3 for number in range(4)]
    calls = [{"input_ids": torch.tensor([list(data[start : start + 64])])} for start in starts]
    statistics = open_statistics(tmp_path / "stats")
    assert len(statistics.names) == 28 and statistics.kind == "full"
    assert (done.tokens, done.windows, done.context, statistics.tokens) == (256, 4, 64, 256)
    assert_same(statistics, moments(model, calls))


def test_statistics_of_a_real_encoder_have_its_special_tokens_in_every_window(text, tmp_path):
    calibrate(models.minilm(), text, tmp_path / "stats", context=48, tokens=300)
    model = transformers.AutoModel.from_pretrained(models.minilm(), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.minilm())
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    pieces = [ids[46 * window : 46 * window + 46] for window in range(len(ids) // 46)]
    windows = [[tokenizer.cls_token_id, *piece, tokenizer.sep_token_id] for piece in pieces]
    assert 1 < len(windows) <= 300 // 48
    statistics = open_statistics(tmp_path / "stats")
    assert len(statistics.names) == 36
    assert statistics.tokens == 48 * len(windows)
    assert_same(statistics, moments(model, [{"input_ids": torch.tensor([window])} for window in windows]))


@pytest.mark.parametrize(
    ("build", "prefix"),
    [
        (models.gpt2_without_prefix, "transformer."),  # linears stored [in, out]
        (models.tied_llama, ""),
        (models.qwen2_moe, ""),  # experts, which loaders fuse: they are run, and not measured
        (models.bert, ""),
    ],
    ids=["gpt2", "tied llama", "qwen2_moe", "bert"],
)
def test_statistics_are_those_of_the_whole_model(build, prefix, text, tmp_path):
    model = models.with_tokenizer(build(tmp_path / "model"))
    calibrate(model, text, tmp_path / "stats", context=32, tokens=1 << 20)
    kind = transformers.BertForSequenceClassification if build is models.bert else transformers.AutoModelForCausalLM
    whole = kind.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([ord(character) for character in TEXT][: len(TEXT) // 32 * 32]).view(-1, 32)
    assert_same(open_statistics(tmp_path / "stats"), moments(whole, [{"input_ids": ids}]), prefix)


def test_a_decoder_beside_an_encoder_reads_the_same_text_shifted(text, tmp_path):
    model = models.with_tokenizer(models.t5(tmp_path / "model"))
    calibrate(model, text, tmp_path / "stats", context=32, tokens=1 << 20)
    whole = transformers.T5ForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([ord(character) for character in TEXT][: len(TEXT) // 32 * 32]).view(-1, 32)
    shifted = torch.cat([torch.zeros(len(ids), 1, dtype=torch.int64), ids[:, :-1]], dim=1)
    calls = [{"input_ids": ids, "decoder_input_ids": shifted}]
    statistics = open_statistics(tmp_path / "stats")
    assert any("EncDecAttention" in name for name in statistics.names)
    assert_same(statistics, moments(whole, calls))


def test_the_diagonal_is_that_of_the_full_statistics(text, tmp_path):
    for name, diagonal in (("full", False), ("diagonal", True)):
        calibrate(TINY_LLAMA, text, tmp_path / name, context=32, tokens=128, diagonal=diagonal)
    full, diagonal = open_statistics(tmp_path / "full"), open_statistics(tmp_path / "diagonal")
    assert diagonal.kind == "diagonal" and diagonal.names == full.names
    for name in full.names:
        assert diagonal.in_features(name) == full.in_features(name)
        torch.testing.assert_close(diagonal.load(name), full.load(name).diagonal(), rtol=1e-5, atol=0)


def test_layers_that_read_the_same_tensor_share_one_statistic(text, tmp_path):
    calibrate(TINY_LLAMA, text, tmp_path / "stats", context=32, tokens=64)
    inputs = open_statistics(tmp_path / "stats").inputs
    block = "model.layers.0."
    for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        assert len({inputs[f"{block}{name}.weight"] for name in group}) == 1
    assert len({stored for name, stored in inputs.items() if name.startswith(block)}) == 4
    assert set(load_file(tmp_path / "stats" / "statistics.safetensors")) == set(inputs.values())


def test_the_same_arguments_give_the_same_bytes(text, tmp_path):
    for name in ("one", "two"):
        calibrate(TINY_LLAMA, text, tmp_path / name, context=32, tokens=128)
    for file in ("statistics.safetensors", "calibration.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_statistics_do_not_depend_on_how_many_windows_go_at_once(text, tmp_path):
    calibrate(TINY_LLAMA, text, tmp_path / "one", context=32, tokens=128)
    calibrate(TINY_LLAMA, text, tmp_path / "four", context=32, tokens=128, batch_tokens=32)
    one, four = open_statistics(tmp_path / "one"), open_statistics(tmp_path / "four")
    for name in one.names:
        scale = float(one.load(name).max())
        torch.testing.assert_close(one.load(name), four.load(name), rtol=1e-4, atol=1e-5 * scale)


def test_statistics_are_symmetric_and_have_no_negative_eigenvalue(text, tmp_path):
    calibrate(TINY_LLAMA, text, tmp_path / "stats", context=64, tokens=512)
    statistics = open_statistics(tmp_path / "stats")
    found = statistics.load("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(found, found.T)
    assert float(torch.linalg.eigvalsh(found.double()).min()) > -1e-5 * float(found.max())


def test_at_most_one_block_is_in_memory(text, tmp_path, monkeypatch):
    model = models.with_tokenizer(models.llama(tmp_path / "model", layers=5))
    numel = {name: tensor.numel() for name, tensor in load_file(model / "model.safetensors").items()}
    one_block = sum(count for name, count in numel.items() if name.startswith("model.layers.0."))
    outside = max(count for name, count in numel.items() if not name.startswith("model.layers."))
    most, original = [], InputSum.add

    def counting(self: Any, x: torch.Tensor) -> None:
        most.append(sum(p.numel() for p in built[0].parameters() if not p.is_meta))
        original(self, x)

    built: list[Any] = []
    build = transformers_models.build_empty_model
    monkeypatch.setattr(transformers_models, "build_empty_model", lambda *a: built.append(build(*a)) or built[0])
    monkeypatch.setattr(InputSum, "add", counting)
    calibrate(model, text, tmp_path / "stats", context=32, tokens=128, batch_tokens=32)
    assert len(most) == 5 * 4 * 4  # blocks, inputs, windows
    assert 0 < max(most) <= one_block + outside


def test_blocks_are_reported_in_their_order(text, tmp_path):
    observer = Remembering()
    calibrate(TINY_LLAMA, text, tmp_path / "stats", observer=observer, context=32, tokens=64)
    assert observer.blocks == [f"model.layers.{layer}" for layer in range(4)]


def test_a_text_shorter_than_asked_is_read_whole_and_that_is_said(text, tmp_path):
    observer = Remembering()
    done = calibrate(TINY_LLAMA, text, tmp_path / "stats", observer=observer, context=100, tokens=4096)
    assert done.tokens == len(TEXT) // 100 * 100
    assert any("fewer than --tokens 4096" in note for note in observer.notes)


def test_windows_are_spread_over_all_of_a_long_text(tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("a" * 500 + "b" * 500)
    calibrate(TINY_LLAMA, long, tmp_path / "stats", context=50, tokens=100)
    short = tmp_path / "short.txt"
    short.write_text("a" * 50 + "b" * 50)
    calibrate(TINY_LLAMA, short, tmp_path / "short", context=50, tokens=100)
    of_long, of_short = open_statistics(tmp_path / "stats"), open_statistics(tmp_path / "short")
    name = "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(of_long.load(name), of_short.load(name))


def test_each_line_is_a_text_of_its_own_whose_end_is_cut_off(tmp_path):
    lines = ["A short one.", "One that has a few more words in it.", "", "And a third,", "of the same length."]
    lines += ["This one goes on " + "and on " * 30, "  The last has spaces around it. "]
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(lines))
    observer = Remembering()
    done = calibrate(models.minilm(), text, tmp_path / "stats", observer=observer, context=16, tokens=4096, lines=True)
    model = transformers.AutoModel.from_pretrained(models.minilm(), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.minilm())
    windows = [tokenizer(line, truncation=True, max_length=16)["input_ids"] for line in lines if line]
    assert (done.windows, done.context) == (6, 16)
    assert done.tokens == sum(map(len, windows)) < 6 * 16
    assert any("fewer than --tokens 4096" in note for note in observer.notes)
    expected = moments(model, [{"input_ids": torch.tensor([window])} for window in windows])
    assert_same(open_statistics(tmp_path / "stats"), expected)


def test_of_many_lines_those_are_read_that_lie_evenly_in_the_text(tmp_path):
    many, few = tmp_path / "many.txt", tmp_path / "few.txt"
    lines = [f"{number:03d}" + "x" * 5 for number in range(100)]  # 8 bytes, of which each is a token
    many.write_text("\n".join(lines))
    few.write_text("\n".join(lines[::25]))
    for text in (many, few):
        done = calibrate(TINY_LLAMA, text, tmp_path / text.stem, context=8, tokens=39, lines=True)
        assert (done.tokens, done.windows) == (32, 4)
    of_many, of_few = open_statistics(tmp_path / "many"), open_statistics(tmp_path / "few")
    assert all(torch.equal(of_many.load(name), of_few.load(name)) for name in of_many.names)


def test_lines_of_one_token_are_no_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a\nb\n\nc")
    with pytest.raises(InputError, match="has no line of two tokens"):
        calibrate(TINY_LLAMA, text, tmp_path / "stats", lines=True)


def test_lines_of_two_tokens_are_texts(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a\nbc\n\ndef")
    done = calibrate(TINY_LLAMA, text, tmp_path / "stats", lines=True)
    assert (done.windows, done.tokens) == (2, 5)


def test_layers_that_text_does_not_reach_are_named(text, tmp_path):
    observer = Remembering()
    model = models.with_tokenizer(models.qwen2_vl(tmp_path / "model"))
    done = calibrate(model, text, tmp_path / "stats", observer=observer, context=32, tokens=64)
    assert done.unread and all("visual" in name for name in done.unread)
    assert not open_statistics(tmp_path / "stats").names & set(done.unread)
    assert any("read no text" in note for note in observer.notes)


def test_a_model_that_listens_is_refused(text, tmp_path):
    with pytest.raises(UsageError, match="takes input_features and not text"):
        calibrate(models.with_tokenizer(models.whisper(tmp_path / "model")), text, tmp_path / "stats")


def test_a_model_without_a_tokenizer_is_refused(text, tmp_path):
    with pytest.raises(InputError, match="holds no tokenizer"):
        calibrate(models.llama(tmp_path / "model"), text, tmp_path / "stats")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model = models.llama(tmp_path / "model")  # a vocabulary of 160
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, model)
    text = tmp_path / "text.txt"
    text.write_text("ünicode beyond it" * 9)
    with pytest.raises(InputError, match="gives ids that the model, with 160, has not"):
        calibrate(model, text, tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"", "text.txt: "), (b" \n", "holds no text"), (b"\xff\xfe\x00", "is not UTF-8 text"), (b"a", "is too short")],
    ids=["empty", "blank", "not text", "one letter"],
)
def test_a_text_that_gives_no_window_is_refused(content, what, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=what):
        calibrate(TINY_LLAMA, path, tmp_path / "stats")
    assert list(tmp_path.iterdir()) == [path]


def test_a_context_beyond_the_model_is_refused(text, tmp_path):
    with pytest.raises(UsageError, match=r"--context 513 is more than the model takes .at most 512"):
        calibrate(TINY_LLAMA, text, tmp_path / "stats", context=513)


def test_a_weight_that_is_missing_is_named(text, tmp_path):
    model = models.with_tokenizer(models.llama(tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model.layers.1.input_layernorm.weight: is needed"):
        calibrate(model, text, tmp_path / "stats")


def test_an_input_that_is_not_finite_is_refused_and_leaves_nothing(text, tmp_path):
    model = models.with_tokenizer(models.llama(tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(float("nan"))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model.layers.1.mlp.down_proj.weight: its input is not finite"):
        calibrate(model, text, tmp_path / "stats")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_an_interrupted_run_leaves_nothing(text, tmp_path):
    class Interrupting(Remembering):
        def block_calibrated(self, block: str, inputs: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(TINY_LLAMA, text, tmp_path / "stats", observer=Interrupting(), context=32, tokens=64)
    assert list(tmp_path.iterdir()) == [text]


def test_an_earlier_result_is_replaced_only_when_asked(text, tmp_path):
    calibrate(TINY_LLAMA, text, tmp_path / "stats", context=32, tokens=64)
    with pytest.raises(UsageError, match=r"exists already .--overwrite replaces it"):
        calibrate(TINY_LLAMA, text, tmp_path / "stats", context=32, tokens=128)
    calibrate(TINY_LLAMA, text, tmp_path / "stats", context=32, tokens=128, overwrite=True)
    assert open_statistics(tmp_path / "stats").tokens == 128


def test_statistics_say_what_they_were_made_from(text, tmp_path):
    calibrate(TINY_LLAMA, text, tmp_path / "stats", context=32, tokens=64)
    values = json.loads((tmp_path / "stats" / "calibration.json").read_text())
    assert values["model"] == "tiny-llama"
    assert values["texts"] == [
        {"name": "text.txt", "nbytes": len(TEXT), "sha256": hashlib.sha256(TEXT.encode()).hexdigest()}
    ]
    numbers = (tmp_path / "stats" / "statistics.safetensors").read_bytes()
    assert values["statistics_sha256"] == hashlib.sha256(numbers).hexdigest()
    described = (tmp_path / "stats" / "calibration.json").read_bytes()
    assert open_statistics(tmp_path / "stats").sha256 == hashlib.sha256(described).hexdigest()


class TestReadingStatistics:
    """Directories that `loftq calibrate` does not write."""

    @pytest.fixture
    def stats(self, tmp_path: Path) -> Path:
        tmp_path.joinpath("stats").mkdir()
        self.write(tmp_path / "stats", torch.eye(4))
        return tmp_path / "stats"

    @staticmethod
    def write(directory: Path, tensor: torch.Tensor, **values: Any) -> None:
        save_file({"a": tensor}, directory / "statistics.safetensors")
        known = {"tool": "loftq-cli", "format": 1, "kind": "full", "tokens": 5, "inputs": {"a": "a", "b": "a"}}
        numbers = (directory / "statistics.safetensors").read_bytes()
        text = json.dumps({**known, "statistics_sha256": hashlib.sha256(numbers).hexdigest(), **values})
        (directory / "calibration.json").write_text(text)

    def test_is_read(self, stats):
        found = open_statistics(stats)
        assert found.names == {"a", "b"} and found.tokens == 5 and found.in_features("b") == 4
        assert torch.equal(found.load("b"), torch.eye(4))

    @pytest.mark.parametrize(
        ("tensor", "values", "what"),
        [
            (torch.ones(4, 3), {}, "tensor a: is float32 .4, 3., which is no full statistic"),
            (torch.ones(4), {}, "tensor a: is float32 .4., which is no full"),
            (torch.ones(4, 4), {"kind": "diagonal"}, "no diagonal"),
            (torch.ones(4, 4, dtype=torch.float64), {}, "is float64"),
            (torch.ones(4, 4), {"inputs": {"c": "d"}}, "tensor d: is not in statistics.safetensors, and c needs it"),
            (torch.ones(4, 4), {"kind": "half"}, "lacks kind"),
            (torch.ones(4, 4), {"tokens": 0}, "lacks kind, tokens"),
            (torch.ones(4, 4), {"format": 3}, "is of format 3, and 1 and 2 are read here"),
            (torch.ones(4, 4), {"tool": "other"}, "is not of a calibration of this tool"),
        ],
    )
    def test_is_refused(self, stats, tensor, values, what):
        self.write(stats, tensor, **values)
        with pytest.raises(InputError, match=what):
            open_statistics(stats)

    def test_numbers_other_than_the_recorded_ones_are_refused_down_to_one_bit(self, stats):
        numbers = stats / "statistics.safetensors"
        data = bytearray(numbers.read_bytes())
        for place in (-1, -64):  # the last byte, and the first byte of the data
            data[place] ^= 1
            numbers.write_bytes(data)
            with pytest.raises(InputError, match=r"statistics.safetensors: does not hold the numbers of calibration"):
                open_statistics(stats)
            data[place] ^= 1
        numbers.write_bytes(data)
        assert torch.equal(open_statistics(stats).load("a"), torch.eye(4))

    def test_a_file_replaced_after_opening_is_noticed(self, stats):
        found = open_statistics(stats)
        found.check_unchanged()
        self.write(stats, 2 * torch.eye(4))
        for use in (lambda: found.load("a"), found.check_unchanged):
            with pytest.raises(StorageError, match="changed while it was being read"):
                use()

    def test_refuses_numbers_that_are_not_finite(self, stats):
        self.write(stats, torch.full((4, 4), float("inf")))
        with pytest.raises(InputError, match=r"tensor a: holds NaN or infinite values"):
            open_statistics(stats).load("b")


def test_the_command_line_asks_for_65536_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("A short text.")
    assert _run(["calibrate", "builtin:tiny-llama", "--text", "short.txt", "-o", "stats", "--diagonal"]) == 0
    assert "the text gives 13 tokens, fewer than --tokens 65536" in capsys.readouterr().err


def test_the_command_line_says_what_it_wrote(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["calibrate", "builtin:tiny-llama", "--text", str(text), "-o", "stats", "--tokens", "64"]
    assert _run([*command, "--json"]) == 0
    said = capsys.readouterr()
    values = json.loads(said.out)
    assert (values["layers"], values["inputs"], values["tokens"], values["kind"]) == (28, 16, 64, "full")
    assert "[16/16] model.layers.3" in said.err
    assert _run(command) == 2
    assert "stats: exists already (--overwrite replaces it)" in capsys.readouterr().err
    assert _run([*command, "--overwrite", "--diagonal", "--quiet"]) == 0
    said = capsys.readouterr()
    assert "28 layers with 16 diagonal statistics, 64 tokens in windows of 64" in said.out
    assert not said.err


def test_without_transformers_the_command_line_says_what_to_install(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert _run(["calibrate", "builtin:tiny-llama", "--text", str(text), "-o", str(tmp_path / "stats")]) == 2
    said = capsys.readouterr().err.strip()
    assert said == "error: this needs transformers 5 and accelerate (pip install transformers accelerate)"


def test_a_text_is_a_regular_file_of_at_most_a_gigabyte(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with (tmp_path / "sparse.txt").open("wb") as file:
        file.truncate(MAX_TEXT_NBYTES + 1)
    for name, message in (("pipe.txt", "is not a regular file"), ("sparse.txt", "is larger than the 1000000000 bytes")):
        with pytest.raises(InputError, match=message):
            read_text(tmp_path / name)
    (tmp_path / "right.txt").write_text("A text.")
    assert read_text(tmp_path / "right.txt").nbytes == 7


@pytest.mark.parametrize("side", [1, 2, 3, 64, 101])
def test_a_triangle_holds_a_symmetric_matrix(side):
    half = torch.randn(side, side)
    matrix = half + half.T
    packed = pack_triangle(matrix)
    assert packed.tolist() == matrix[torch.triu_indices(side, side).unbind()].tolist()
    assert torch.equal(unpack_triangle(packed), matrix)


def test_squares_of_an_earlier_version_are_read_as_their_triangles(text, tmp_path):
    calibrate(TINY_LLAMA, text, tmp_path / "stats", tokens=128, context=64)
    new = open_statistics(tmp_path / "stats")
    squares = {stored: new.load(name) for name, stored in new.inputs.items()}
    nbytes = (tmp_path / "stats" / "statistics.safetensors").stat().st_size
    (tmp_path / "old").mkdir()
    save_file(squares, tmp_path / "old" / "statistics.safetensors")
    values = json.loads((tmp_path / "stats" / "calibration.json").read_text())
    sha256 = hashlib.sha256((tmp_path / "old" / "statistics.safetensors").read_bytes()).hexdigest()
    values |= {"format": 1, "statistics_sha256": sha256}
    (tmp_path / "old" / "calibration.json").write_text(json.dumps(values))
    old = open_statistics(tmp_path / "old")
    assert all(torch.equal(old.load(name), new.load(name)) for name in new.names)
    assert all(old.in_features(name) == new.in_features(name) for name in new.names)
    assert nbytes < 0.51 * (tmp_path / "old" / "statistics.safetensors").stat().st_size


def test_statistics_of_random_tokens_need_no_file(tmp_path):
    prepared = prepare_calibration(
        TINY_LLAMA, ["random"], tmp_path / "stats", CalibrationOptions(tokens=256, context=64)
    )
    done = run_calibration(prepared, Remembering(), threads=2)
    assert (done.tokens, done.windows) == (256, 4)
    values = json.loads((tmp_path / "stats" / "calibration.json").read_text())
    assert (values["text"], values["texts"]) == ("random", [])
