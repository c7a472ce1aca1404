"""A run may stop anywhere: what is visible is absent or complete, and the same command ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from support.conversions import Silent, StopAfter, converted_files, files_of, loftq, run_conversion

from loftq_cli.errors import StorageError, UsageError
from loftq_cli.output.journal import JournalEntry
from loftq_cli.output.staging import Staging, check_apart, finished_mark

RECIPE = {"rank": 4, "iterations": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.llama(tmp_path_factory.mktemp("source") / "model", max_shard_size="200KB")


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory):
    return converted_files(source, tmp_path_factory.mktemp("whole"), **RECIPE)


def partial(out):
    """Where an unfinished result is hidden, with its journal."""
    return out.parent / ".out.partial"


@pytest.mark.parametrize("layers", [1, 5, 13, 14])
def test_an_interrupted_run_continues_to_the_same_bytes(source, out, uninterrupted, layers):
    with pytest.raises(KeyboardInterrupt):
        run_conversion(source, out, observer=StopAfter(layers), **RECIPE)
    assert not out.exists()
    second = Silent()
    run_conversion(source, out, observer=second, **RECIPE)
    assert [resumed for _, resumed in second.done] == [True] * layers + [False] * (14 - layers)
    assert files_of(out) == uninterrupted
    assert not partial(out).exists()


def test_three_interruptions_in_a_row_lose_nothing(source, out, uninterrupted):
    for layers in (2, 5, 9):
        with pytest.raises(KeyboardInterrupt):
            run_conversion(source, out, observer=StopAfter(layers), **RECIPE)
    run_conversion(source, out, **RECIPE)
    assert files_of(out) == uninterrupted


def test_a_finished_part_that_was_damaged_is_made_again(source, out, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        run_conversion(source, out, observer=StopAfter(10), **RECIPE)
    shard = next((partial(out) / "result").glob("model*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    shard.write_bytes(data)
    second = Silent()
    run_conversion(source, out, observer=second, **RECIPE)
    assert sum(resumed for _, resumed in second.done) < 10
    assert files_of(out) == uninterrupted


@pytest.mark.parametrize("damage", ["torn", "foreign", "deleted"])
def test_a_damaged_journal_is_believed_only_as_far_as_it_is_whole(source, out, uninterrupted, damage):
    with pytest.raises(KeyboardInterrupt):
        run_conversion(source, out, observer=StopAfter(6), **RECIPE)
    journal = partial(out) / ".journal"
    if damage == "deleted":
        journal.unlink()
    elif damage == "torn":
        journal.write_bytes(journal.read_bytes()[:-40])
    else:
        journal.write_bytes(journal.read_bytes() + b"\xff\x00 not ours\n")
    run_conversion(source, out, **RECIPE)
    assert files_of(out) == uninterrupted


def test_a_deleted_part_is_made_again(source, out, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        run_conversion(source, out, observer=StopAfter(14), **RECIPE)
    (partial(out) / "result" / "loftq_init" / "adapter_model.safetensors").unlink()
    run_conversion(source, out, **RECIPE)
    assert files_of(out) == uninterrupted


def test_other_options_are_never_mixed_into_an_unfinished_run(source, out):
    with pytest.raises(KeyboardInterrupt):
        run_conversion(source, out, observer=StopAfter(3), **RECIPE)
    with pytest.raises(UsageError, match=r"unfinished run with another input, other options .* --restart"):
        run_conversion(source, out, rank=8, iterations=2)
    observer = Silent()
    run_conversion(source, out, observer=observer, restart=True, rank=8, iterations=2)
    assert not any(resumed for _, resumed in observer.done)
    assert {result.rank for result, _ in observer.done} == {8}


def test_an_input_that_changed_meanwhile_is_converted_again(source, out, tmp_path):
    changing = tmp_path / "changing"
    shutil.copytree(source, changing)
    with pytest.raises(KeyboardInterrupt):
        run_conversion(changing, out, observer=StopAfter(14), **RECIPE)
    first = sorted(changing.glob("*.safetensors"))[0]
    data = bytearray(first.read_bytes())
    data[-1] ^= 1  # the last bit of a weight, under an unchanged header
    first.write_bytes(data)
    observer = Silent()
    run_conversion(changing, out, observer=observer, **RECIPE)
    assert sum(not resumed for _, resumed in observer.done) <= 1


def test_an_input_that_changes_during_the_run_publishes_nothing(source, out, tmp_path):
    changing = tmp_path / "changing"
    shutil.copytree(source, changing)

    class Touches(Silent):
        def phase(self, text: str) -> None:
            path = sorted(changing.glob("*.safetensors"))[0]
            os.utime(path, ns=(1, 1))

    with pytest.raises(StorageError, match="changed while it was"):
        run_conversion(changing, out, observer=Touches(), **RECIPE)
    assert not out.exists()


def test_a_second_writer_is_refused_at_once(source, out):
    staging = Staging(out, fingerprint="x", overwrite=False, restart=False)
    with pytest.raises(StorageError, match="another loftq process is writing it"):
        run_conversion(source, out, **RECIPE)
    staging.close()
    run_conversion(source, out, restart=True, **RECIPE)


def test_the_same_command_on_a_finished_result_does_nothing(source, out):
    run_conversion(source, out, **RECIPE)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    run = loftq("quantize", source, out, "--rank", 4, "--iterations", 2, "--fit", "loftq")
    assert run.returncode == 0
    assert "already done" in run.stderr
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert not partial(out).exists()


def test_a_damaged_result_does_not_count_as_done(source, out):
    run_conversion(source, out, **RECIPE)
    fingerprint = json.loads((out / "checksums.json").read_text())["fingerprint"]
    assert finished_mark(out, fingerprint, overwrite=False)
    with open(out / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert finished_mark(out, fingerprint, overwrite=False) is None


def test_a_result_of_other_weights_under_the_same_headers_does_not_count_as_done(source, out, tmp_path):
    changing = tmp_path / "changing"
    shutil.copytree(source, changing)
    run_conversion(changing, out, **RECIPE)
    first = sorted(changing.glob("*.safetensors"))[0]
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    again = loftq("quantize", changing, out, "--rank", 4, "--iterations", 2, "--fit", "loftq")
    assert again.returncode == 2
    assert "exists already (--overwrite replaces it)" in again.stderr


def test_overwrite_replaces_a_result_and_leaves_nothing_behind(source, out):
    run_conversion(source, out, **RECIPE)
    with pytest.raises(UsageError, match=r"exists already \(--overwrite replaces it\)"):
        run_conversion(source, out, rank=8, iterations=1)
    run_conversion(source, out, overwrite=True, rank=8, iterations=1)
    assert json.loads((out / "loftq_report.json").read_text())["recipe"]["rank"] == 8
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]


def test_a_folder_that_is_not_ours_is_never_replaced(source, out):
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not a result of this tool"):
            run_conversion(source, out, overwrite=overwrite, **RECIPE)
    assert files_of(out) == {"precious.txt": b"mine"}
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]


def test_an_empty_folder_may_be_the_output(source, out):
    out.mkdir()
    run_conversion(source, out, **RECIPE)
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("place", ["same", "inside", "around", "through a link"])
def test_the_output_may_not_touch_the_input(source, tmp_path, place):
    model = tmp_path / "a" / "model"
    shutil.copytree(source, model)
    (tmp_path / "link").symlink_to(model)
    output = {"same": model, "inside": model / "x", "around": tmp_path / "a", "through a link": tmp_path / "link" / "x"}
    before = files_of(model)
    with pytest.raises(UsageError, match="may not be, contain or lie inside"):
        run_conversion(model, output[place], **RECIPE)
    assert files_of(model) == before


def test_neighbours_with_a_common_prefix_are_apart(tmp_path):
    check_apart(tmp_path / "model-nf4", [tmp_path / "model"])


def test_files_have_normal_modes(source, out):
    old = os.umask(0o022)
    try:
        run_conversion(source, out, **RECIPE)
    finally:
        os.umask(old)
    assert {oct(p.stat().st_mode & 0o777) for p in out.rglob("*") if p.is_file()} == {"0o644"}


# The command, which gets a signal as soon as its second layer has been reported.
SIGNALLING = """
import os, sys
from loftq_cli.cli.start import main

class Signalling:
    def __init__(self, stream, number):
        self.stream, self.number, self.text = stream, number, ""

    def write(self, text):
        self.stream.write(text)
        self.stream.flush()
        self.text += text
        if "[2/14]" in self.text and text.endswith("\\n"):
            self.text = ""
            os.kill(os.getpid(), self.number)

    def __getattr__(self, name):
        return getattr(self.stream, name)

sys.stderr = Signalling(sys.stderr, int(sys.argv.pop(1)))
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_at_any_moment_leaves_no_output_and_the_run_can_continue(source, out, uninterrupted, number):
    options = ["--rank", "4", "--iterations", "2", "--fit", "loftq"]
    command = [sys.executable, "-c", SIGNALLING, str(int(number)), "quantize", str(source), "out", *options]
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    said = process.stderr
    assert "[2/14]" in said
    assert not out.exists()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert said.splitlines()[-1] == "interrupted; run the same command to continue"
        assert "Traceback" not in said
    again = loftq("quantize", source, "out", "--rank", 4, "--iterations", 2, "--fit", "loftq")
    assert again.returncode == 0, again.stderr
    assert "(kept)" in again.stderr
    assert files_of(out) == uninterrupted


def test_a_full_disk_is_one_line_and_status_3(source, out):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "from loftq_cli.cli.main import _run; sys.exit(_run(sys.argv[1:]))"
    )
    command = [sys.executable, "-B", "-c", code, "quantize", str(source), "out", "-q"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 3
    assert len(run.stderr.splitlines()) == 1
    assert "file too large (free some space" in run.stderr
    assert not out.exists()


def test_too_little_space_is_said_before_the_work_begins(source, out, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match=r"needs 0\.00 GB and 0\.00 GB are free"):
        run_conversion(source, out, **RECIPE)
    assert not partial(out).exists()


def test_a_merge_does_not_discard_an_unfinished_conversion_of_the_same_name(source, out):
    base = out.parent / "base"
    run_conversion(source, base, **RECIPE)
    with pytest.raises(KeyboardInterrupt):
        run_conversion(source, out, observer=StopAfter(3), **RECIPE)
    merge = ("merge", base, base / "loftq_init", "out", "-q")
    refused = loftq(*merge)
    assert refused.returncode == 2
    assert "unfinished run" in refused.stderr
    second = Silent()
    run_conversion(source, out, observer=second, **RECIPE)
    assert sum(resumed for _, resumed in second.done) == 3
    assert loftq(*merge, "--overwrite", "--restart").returncode == 0


def with_a_weight_beyond_double_quantization(directory):
    """The last weight of the model has one block that is far larger than the others."""
    model = models.llama(directory, layers=1, dtype=torch.float32)
    tensors = load_file(model / "model.safetensors")
    name = sorted(name for name in tensors if "proj" in name)[-1]
    tensors[name].view(-1)[:64] = 1e30
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model, name


def test_the_command_that_a_refusal_advises_is_not_blocked_by_the_refused_run(run, tmp_path):
    model, name = with_a_weight_beyond_double_quantization(tmp_path / "model")
    command = ("quantize", model, "out", "--rank", 4, "--method", "qlora")
    status, _, err = run(*command)
    assert (status, f"tensor {name}: its block constants" in err) == (2, True), err
    assert "(--no-double-quant, or" in err
    assert (tmp_path / ".out.partial").is_dir()
    status, _, err = run(*command, "--no-double-quant")
    assert status == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_refused_run_is_continued_when_its_input_was_repaired(run, tmp_path):
    model, name = with_a_weight_beyond_double_quantization(tmp_path / "model")
    command = ("quantize", model, "out", "--rank", 4, "--method", "qlora")
    assert run(*command)[0] == 2
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[:64] = 0.5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    status, _, err = run(*command)
    assert (status, err.count("(kept)")) == (0, 6), err


def test_a_run_that_nothing_refused_blocks_every_other_command(source, out):
    """Also one that the disk stopped, and one that was refused before and then went on."""
    with pytest.raises(KeyboardInterrupt):
        run_conversion(source, out, observer=StopAfter(3), **RECIPE)
    staging = Staging(out, fingerprint="other", overwrite=False, restart=True)
    with staging.recording(int) as record:
        record(JournalEntry("a", "0", {}, {}))
    staging.refuse()
    staging.close()
    continued = Staging(out, fingerprint="other", overwrite=False, restart=False)
    assert list(continued.entries) == ["a"]
    continued.close()
    with pytest.raises(UsageError, match="unfinished run with another input"):
        run_conversion(source, out, **RECIPE)
