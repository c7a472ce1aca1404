"""Loads: few descriptors, many tensors, little memory, signals at random, no home, clocks that go backwards. The table
in tests/README.md says what was tried, at which size, and what held.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.conversions import Silent, files_of, loftq, run_conversion, run_merge

from loftq_cli.errors import StorageError
from loftq_cli.output import writer
from loftq_cli.output.checksums import file_sha256, files_in, read_checksums
from loftq_cli.output.journal import JournalEntry
from loftq_cli.output.staging import Staging
from loftq_cli.output.writer import Descriptors, OutputFiles, SafetensorsWriter
from loftq_cli.tensors.headers import OutTensor

TEXT = "A text of some words for a model that reads letters. " * 40


def check_whole(output: Path) -> None:
    """The result of a run that ended well: every file has the listed sha256, and no other file is there."""
    mark = read_checksums(output)
    assert mark is not None
    assert {*mark.files, "checksums.json"} == set(files_in(output))
    assert all(file_sha256(output / name) == sha256 for name, sha256 in mark.files.items())


Run = subprocess.CompletedProcess[str]


def limited(limits: dict[int, int], *arguments: object, cwd: Path) -> Run:
    """A command in a process under limits of the system."""

    def confine() -> None:
        for kind, limit in limits.items():
            resource.setrlimit(kind, (limit, limit))

    command = [sys.executable, "-m", "loftq_cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, preexec_fn=confine, capture_output=True, text=True, timeout=300)


def check_said(run: Run) -> None:
    """Success, or one line of an error with a status of ours."""
    assert "Traceback" not in run.stderr, run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert (run.returncode, len(errors)) in {(0, 0), *((status, 1) for status in (2, 3, 4, 5, 6))}, run.stderr


# Shards


def sharded(directory: Path, count: int, rows: int = 32, columns: int = 64) -> Path:
    """A model of `count` files with one weight each."""
    directory.mkdir()
    files = {}
    for number in range(count):
        name, file = (
            f"model.layers.{number}.self_attn.q_proj.weight",
            f"model-{number + 1:05}-of-{count:05}.safetensors",
        )
        values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(number)) * 0.02
        save_file({name: values}, directory / file, metadata={"format": "pt"})
        files[name] = file
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (directory / "config.json").write_text(json.dumps({"dtype": "float32"}))
    return directory


def test_36_files_are_read_and_written_with_40_descriptors(tmp_path: Path) -> None:
    model = sharded(tmp_path / "model", 36, 256, 1024)  # 1 MB each, and so a shard each
    limits = {resource.RLIMIT_NOFILE: 40}
    options = ("--method", "qlora", "--rank", 2, "--layout", "dense", "--max-shard-size", "1MB", "-q")
    run = limited(limits, "quantize", model, "out", *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 36
    check_whole(tmp_path / "out")


@pytest.mark.slow
def test_500_files_are_read_with_64_descriptors_by_all_commands(tmp_path: Path) -> None:
    model, limits = sharded(tmp_path / "model", 500), {resource.RLIMIT_NOFILE: 64}
    for command in (
        ("quantize", model, "out", "--method", "qlora", "--rank", 2, "-q"),
        ("merge", "out", "out/qlora_init", "merged", "-q"),
        ("inspect", "out", "--against", model),
        ("inspect", model, "--verify"),
    ):
        run = limited(limits, *command, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    check_whole(tmp_path / "out")
    check_whole(tmp_path / "merged")


def one_tensor_each(count: int) -> dict[str, list[OutTensor]]:
    return {f"{number}.safetensors": [OutTensor(f"t{number}", "float32", (4,))] for number in range(count)}


@pytest.mark.parametrize("most", [1, 3, 7, 8])
def test_files_beyond_the_most_are_closed_and_keep_their_bytes(
    tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_half_of_all_descriptors", lambda: most)
    before = len(os.listdir("/proc/self/fd"))
    with OutputFiles(tmp_path, one_tensor_each(8)) as files:
        for number in (*range(8), *reversed(range(8))):
            files[f"t{number}"].write(f"t{number}", torch.full((4,), float(number)))
            assert len(os.listdir("/proc/self/fd")) - before <= most
        assert torch.equal(files["t3"].load("t3"), torch.full((4,), 3.0))
    assert len(os.listdir("/proc/self/fd")) == before
    for number in range(8):
        assert load_file(tmp_path / f"{number}.safetensors")[f"t{number}"].tolist() == [number] * 4


def test_a_file_that_is_closed_was_brought_to_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, real = set[int](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), real(fd)))
    descriptors = Descriptors(1)
    first, second = (
        SafetensorsWriter(tmp_path / name, [OutTensor("x", "float32", (4,))], descriptors=descriptors)
        for name in ("a", "b")
    )
    synced.clear()
    first.write("x", torch.ones(4))
    assert (tmp_path / "a").stat().st_ino not in synced
    second.write("x", torch.ones(4))
    assert (tmp_path / "a").stat().st_ino in synced


def test_a_file_replaced_between_two_writes_is_refused(tmp_path: Path) -> None:
    descriptors = Descriptors(0)
    path = tmp_path / "a.safetensors"
    first = SafetensorsWriter(path, [OutTensor("x", "float32", (4,))], descriptors=descriptors)
    path.rename(tmp_path / "b.safetensors")
    with pytest.raises(StorageError, match="was replaced by another file while it was written"):
        first.write("x", torch.ones(4))


def test_units_of_a_file_that_did_not_reach_the_disk_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system reports a lost write when the file is closed: no line of the journal may count on the file."""
    monkeypatch.setattr(writer, "_half_of_all_descriptors", lambda: 1)
    staging = Staging(tmp_path / "out", fingerprint="f", overwrite=False, restart=False)

    def lost(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with (
        OutputFiles(staging.path, one_tensor_each(2)) as files,
        pytest.raises(StorageError, match="input/output error"),
        staging.recording(files.sync) as record,
    ):
        record(JournalEntry("t0", "0", {"t0": files["t0"].write("t0", torch.ones(4))}, {}))
        monkeypatch.setattr(os, "fsync", lost)
        files["t1"].write("t1", torch.ones(4))
    monkeypatch.undo()
    staging.close()
    again = Staging(tmp_path / "out", fingerprint="f", overwrite=False, restart=False)
    assert not again.entries
    again.close()


# Many tensors, and little memory


def many(path: Path, count: int) -> Path:
    """A model of `count` weights and as many norms in one file."""
    path.mkdir()
    values = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    tensors = {f"model.layers.{i}.self_attn.q_proj.weight": values.clone() for i in range(count)}
    tensors |= {f"model.layers.{i}.input_layernorm.weight": torch.ones(64) for i in range(count)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"dtype": "float32"}))
    return path


@pytest.mark.slow
def test_3000_tensors_are_converted_and_read(tmp_path: Path) -> None:
    model = many(tmp_path / "model", 1500)
    quantize = loftq("quantize", model, "out", "--method", "qlora", "--rank", 2, "-q", cwd=tmp_path)
    assert quantize.returncode == 0, quantize.stderr
    verified = loftq("inspect", "out", "--verify", cwd=tmp_path)
    assert (verified.returncode, "all finite" in verified.stdout) == (0, True), verified.stderr
    check_whole(tmp_path / "out")


COMMANDS: dict[str, tuple[str, ...]] = {
    "quantize": ("quantize", "builtin:tiny-llama", "out", "--method", "qlora", "-q"),
    "merge": ("merge", "base", "base/qlora_init", "out", "-q"),
    "inspect": ("inspect", "base", "--against", "builtin:tiny-llama"),
    "verify": ("inspect", "base", "--verify"),
    "calibrate": ("calibrate", "builtin:tiny-llama", "--text", "text.txt", "--output", "out", "--tokens", "128", "-q"),
    "reference": ("inspect", "base", "--reference", "builtin:tiny-llama", "--text", "text.txt", "--tokens", "128"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("base") / "base"
    run_conversion("builtin:tiny-llama", output, method="qlora", rank=2)
    return output


@pytest.fixture
def place(base: Path, tmp_path: Path) -> Path:
    """A folder with a converted model and a text."""
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def check_nothing_looks_finished(place: Path, run: Run) -> None:
    assert run.returncode == 0 or not (place / "out").exists()
    if (place / "out").exists():
        check_whole(place / "out")
        shutil.rmtree(place / "out")


@pytest.mark.parametrize("megabytes", [60, 500])
def test_a_small_address_space_is_one_line(place: Path, megabytes: int) -> None:
    """At 60 MB no library of torch can be mapped, at 500 MB some can."""
    run = limited({resource.RLIMIT_AS: megabytes * 1_000_000}, *COMMANDS["quantize"], cwd=place)
    assert run.returncode == 6
    assert run.stderr == "error: not enough memory (--threads 1 takes less; --dry-run says how much is needed)\n"
    assert not (place / "out").exists()


# Libraries in C end the process themselves when memory is short, before Python can say anything: status and line.
LIBRARIES = {
    1: "OpenBLAS error: Memory allocation still failed",
    127: "cannot allocate memory for thread-local data: ABORT",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["quantize", "verify"])
def test_every_step_of_address_space_is_one_line_or_a_result(place: Path, command: str) -> None:
    # Not 550: OpenBLAS may ask for memory there again and again, without end.
    for megabytes in (150, 700, 1000, 4000):
        run = limited({resource.RLIMIT_AS: megabytes * 1_000_000}, *COMMANDS[command], cwd=place)
        if run.returncode in LIBRARIES:
            assert run.stderr.startswith(LIBRARIES[run.returncode]) and len(run.stderr.splitlines()) == 1, run.stderr
        else:
            check_said(run)
        check_nothing_looks_finished(place, run)
    assert run.returncode == 0


@pytest.mark.slow
def test_a_tensor_of_3_gb_is_converted_in_2_gb_of_address_space(tmp_path: Path) -> None:
    """A file with a hole: zeros cost no disk. QLoRA streams the weight; LoftQ, which holds it, refuses it by name."""
    name, shape = "model.layers.0.mlp.up_proj.weight", (24576, 65536)
    model = tmp_path / "model"
    model.mkdir()
    nbytes = shape[0] * shape[1] * 2
    header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    with open(model / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)
    (model / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    limits = {resource.RLIMIT_AS: 2_000_000_000}
    refused = limited(limits, "quantize", model, "out", "--fit", "loftq", "--iterations", 1, "-q", cwd=tmp_path)
    assert refused.returncode == 6
    assert f"tensor {name}: not enough memory" in refused.stderr
    assert not (tmp_path / "out").exists()
    run = limited(limits, "quantize", model, "out", "--method", "qlora", "--rank", 2, "-q", "--restart", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    check_whole(tmp_path / "out")


# Signals

SIGNALLING = """
import os, signal, sys
number, seconds, to_group = int(sys.argv.pop(1)), float(sys.argv.pop(1)), sys.argv.pop(1) == "True"

def send(*arguments):
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    (os.killpg if to_group else os.kill)(os.getpid(), number)

for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(each, signal.SIG_DFL)
signal.signal(signal.SIGPROF, send)
signal.setitimer(signal.ITIMER_PROF, seconds)
from loftq_cli.cli.start import main
try:
    main()
finally:
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
"""


def signalled(place: Path, name: str, number: int, seconds: float, *, to_group: bool) -> Run:
    """The command, which gets a signal after `seconds` of processor time, alone or with its child processes."""
    command = [sys.executable, "-c", SIGNALLING, str(number), str(seconds), str(to_group), *COMMANDS[name]]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, start_new_session=True, timeout=300)


def check_interrupted(place: Path, run: Run, number: int) -> None:
    """Ended in order; before and after everything else, at once and in silence."""
    assert "Traceback" not in run.stderr and "Exception ignored" not in run.stderr, run.stderr
    assert run.returncode in (0, 130, -number)
    if run.returncode == 130:
        assert run.stderr.splitlines()[-1] == "interrupted; run the same command to continue"
    if (place / "out").exists():
        check_whole(place / "out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_during_the_imports_ends_the_command_in_order(place: Path, number: signal.Signals) -> None:
    run = signalled(place, "quantize", number, 0.1, to_group=False)
    assert (run.returncode, run.stderr) == (130, "interrupted; run the same command to continue\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(COMMANDS))
def test_signals_at_random_moments_end_every_command_in_order(place: Path, name: str) -> None:
    dice = random.Random(name)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    whole = subprocess.run(
        [sys.executable, "-m", "loftq_cli", *COMMANDS[name]], cwd=place, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert whole.returncode == 0, whole.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    expected = files_of(place / "out") if (place / "out").exists() else None
    check_nothing_looks_finished(place, whole)
    for _ in range(2):
        number = dice.choice([signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
        run = signalled(place, name, number, dice.uniform(0.02, seconds), to_group=dice.random() < 0.5)
        check_interrupted(place, run, number)
        if (place / "out").exists():
            assert files_of(place / "out") == expected
            shutil.rmtree(place / "out")
    if name == "quantize":  # from whatever the interrupted runs left
        assert subprocess.run(whole.args, cwd=place, capture_output=True).returncode == 0
        assert files_of(place / "out") == expected
    assert sorted(set(os.listdir(place)) - {"out", ".out.partial"}) == ["base", "text.txt"]


@pytest.mark.slow
def test_a_signal_that_the_caller_ignores_stays_ignored(place: Path) -> None:
    """As under nohup, and in the background of a shell."""
    program = SIGNALLING.replace("signal.signal(each, signal.SIG_DFL)", "signal.signal(each, signal.SIG_IGN)")
    command = [sys.executable, "-c", program, str(int(signal.SIGHUP)), "0.3", "False", *COMMANDS["verify"]]
    run = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


# Homes, optimized bytecode, clocks


@pytest.mark.parametrize(
    ("command", "home"),
    [
        ("quantize", None),
        *(pytest.param("quantize", home, marks=pytest.mark.slow) for home in ("/proc", "")),
        *(pytest.param("calibrate", home, marks=pytest.mark.slow) for home in ("relative", None)),
    ],
)
def test_no_home_or_a_home_that_cannot_be_written_changes_nothing(place: Path, home: str | None, command: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "USER", "LOGNAME")}
    environment |= {} if home is None else {"HOME": home}
    whole = [sys.executable, "-m", "loftq_cli", *COMMANDS[command]]
    run = subprocess.run(whole, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    check_whole(place / "out") if command == "quantize" else None
    assert sorted(os.listdir(place)) == ["base", "out", "text.txt"]


@pytest.mark.slow
def test_bytecode_without_asserts_and_docstrings_makes_the_same_bytes(place: Path) -> None:
    run = loftq(
        "quantize", "builtin:tiny-llama", "out", "--method", "qlora", "--rank", 2, "-q", cwd=place, PYTHONOPTIMIZE="2"
    )
    assert run.returncode == 0, run.stderr
    names = [name for name in files_in(place / "base") if name.endswith(".safetensors")]
    assert names
    assert all((place / "base" / name).read_bytes() == (place / "out" / name).read_bytes() for name in names)
    verified = loftq("inspect", "base", "--verify", cwd=place, PYTHONOPTIMIZE="2")
    assert (verified.returncode, verified.stdout.startswith("verified: ")) == (0, True), verified.stderr


@pytest.mark.slow
def test_where_transformers_cannot_run_without_docstrings_calibrate_says_so(place: Path) -> None:
    run = loftq(*COMMANDS["calibrate"], cwd=place, PYTHONOPTIMIZE="2")
    check_said(run)
    assert run.returncode == 0 or ("PYTHONOPTIMIZE" in run.stderr and not (place / "out").exists())


def backwards(start: float) -> Callable[[], float]:
    """A clock that loses an hour with every look."""
    return itertools.count(start, -3600.0).__next__


def test_clocks_that_go_backwards_change_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_conversion("builtin:tiny-llama", out, method="qlora", rank=2)
    expected = files_of(out)
    out.rename("expected")
    monkeypatch.setattr(time, "time", backwards(time.time()))
    monkeypatch.setattr(time, "monotonic", backwards(time.monotonic()))
    run_conversion("builtin:tiny-llama", out, method="qlora", rank=2)
    assert files_of(out) == expected
    run_merge(out, out / "qlora_init", Path("merged"))
    check_whole(Path("merged"))


def test_progress_tells_no_nonsense_when_the_clock_goes_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq_cli.cli.render.progress import CommandProgress

    monkeypatch.setattr(time, "monotonic", backwards(1e6))
    progress = CommandProgress(quiet=False)
    progress._done, progress._total = 1, 2
    assert progress._times().startswith("0.0 s, 0 s left")


def test_a_model_whose_files_are_of_the_future_is_converted(out: Path, tmp_path: Path) -> None:
    model = sharded(tmp_path / "model", 2)
    for path in model.iterdir():
        os.utime(path, (4e9, 4e9))
    observer = Silent()
    run_conversion(model, out, method="qlora", rank=2, observer=observer)
    assert len(observer.done) == 2
    check_whole(out)
