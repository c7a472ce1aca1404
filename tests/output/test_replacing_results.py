"""--overwrite replaces a result and never a file of somebody else; every command names an interrupted replacement; a
folder that only has the name of an unfinished result stays as it is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from support import models
from support.conversions import files_of, loftq, run_conversion
from support.crashes import FailingDisk, Killed

import loftq_cli
from loftq_cli.errors import InputError, StorageError, UsageError
from loftq_cli.nn import load_adapted
from loftq_cli.output import disk
from loftq_cli.output.records import TOOL, write_texts
from loftq_cli.output.staging import Staging, check_output

OLD = {"README.md": "old", "adapter/adapter_model.safetensors": "initial", "config.json": "{}"}
NEW = {"README.md": "new", "config.json": "{}"}


def publish(output: Path, texts: dict[str, str], *, overwrite: bool = True, during: Callable[[], object] = int) -> None:
    """A small result, published as all results are; `during` is called while the result is made."""
    staging = Staging(output, fingerprint="f", overwrite=overwrite, restart=True)
    with staging.whole(TOOL) as path:
        for name in texts:
            (path / name).parent.mkdir(exist_ok=True)
        write_texts(path, texts)
        during()


@pytest.fixture(params=["beside", "mounted"])
def result(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An earlier result, beside an unfinished one or around it."""
    output = tmp_path / "out"
    if request.param == "mounted":
        output.mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    publish(output, OLD, overwrite=False)
    return output


def edit_in_place(file: Path) -> None:
    """With the same size and times as before."""
    status = file.stat()
    file.write_text("t" * status.st_size)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", ["README.md", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize(
    "change",
    [edit_in_place, lambda file: file.write_text("hours of training"), lambda file: file.write_text("")],
    ids=["in place", "longer", "emptied"],
)
def test_a_file_with_other_bytes_than_the_run_wrote_is_not_deleted(
    result: Path, name: str, change: Callable[[Path], object]
) -> None:
    change(result / name)
    before = files_of(result)
    message = rf"holds {name}, changed since the run that made it \(move what you need out of it, or choose"
    with pytest.raises(UsageError, match=message):
        publish(result, NEW)
    assert files_of(result) == before


def test_a_file_that_was_moved_away_as_advised_is_not_missed(result: Path, tmp_path: Path) -> None:
    (result / "README.md").write_text("my notes")
    shutil.move(result / "README.md", tmp_path / "mine.md")
    publish(result, NEW)
    assert (result / "README.md").read_text() == "new"
    assert (tmp_path / "mine.md").read_text() == "my notes"


def test_a_result_as_it_was_written_is_replaced_whatever_its_times(result: Path) -> None:
    for name in OLD:
        os.utime(result / name, ns=(1, 1))
    publish(result, NEW)
    assert {name: data for name, data in files_of(result).items() if name in OLD} == {
        name: text.encode() for name, text in NEW.items()
    }


def test_a_link_to_a_folder_inside_a_result_is_not_deleted(result: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (result / "data").symlink_to(tmp_path / "data")
    with pytest.raises(UsageError, match="holds data, which the run that made it did not write"):
        publish(result, NEW)
    assert (result / "data").is_symlink()


def test_a_folder_of_the_result_behind_a_link_is_not_deleted(result: Path, tmp_path: Path) -> None:
    shutil.move(result / "adapter", tmp_path / "adapter")
    (result / "adapter").symlink_to(tmp_path / "adapter")
    with pytest.raises(UsageError, match="holds adapter, which the run that made it did not write"):
        publish(result, NEW)
    assert (result / "adapter").is_symlink()


@pytest.mark.parametrize("name", ["README.md", "trained.safetensors"])
def test_what_somebody_writes_into_the_result_during_the_run_is_not_deleted(result: Path, name: str) -> None:
    with pytest.raises(StorageError, match=rf"{name}.*, and the result would replace it \(move what you need out of"):
        publish(result, NEW, during=lambda: (result / name).write_text("trained meanwhile"))
    assert (result / name).read_text() == "trained meanwhile"
    (result / name).unlink()
    publish(result, NEW)
    assert (result / "README.md").read_text() == "new"


def test_what_somebody_writes_under_the_name_of_a_first_result_is_not_deleted(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def write() -> None:
        output.mkdir()
        (output / "mine.txt").write_text("mine")

    with pytest.raises(StorageError, match="is not empty and not a result of this tool, and the result would replace"):
        publish(output, NEW, during=write)
    assert files_of(output) == {"mine.txt": b"mine"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("source") / "model")


def test_an_adapter_that_was_trained_in_place_survives_overwrite(source: Path, out: Path) -> None:
    from safetensors.torch import load_file, save_file

    run_conversion(source, out, method="qlora", rank=4)
    adapter = out / "qlora_init" / "adapter_model.safetensors"
    trained = {name: tensor + 1 for name, tensor in load_file(adapter).items()}
    save_file(trained, adapter)
    before = files_of(out)
    again = loftq("quantize", source, out, "--method", "qlora", "--rank", "8", "--overwrite")
    assert again.returncode == 2
    assert "holds qlora_init/adapter_model.safetensors, changed since the run that made it" in again.stderr
    assert files_of(out) == before


# Between the last look at the earlier result and its replacement.


def just_before(patch: pytest.MonkeyPatch, name: str, write: Callable[[], object]) -> None:
    """Call `write` once, at the first use of an operation of the disk that moves a result."""
    real, calls = getattr(disk, name), []

    def operation(*arguments: Path) -> object:
        if not calls:
            calls.append(arguments)
            write()
        return real(*arguments)

    patch.setattr(disk, name, operation)


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("name", ["README.md", "adapter/adapter_model.safetensors", "adapter/mine.txt"])
def test_what_comes_into_the_output_in_the_last_moment_is_not_deleted(
    result: Path, name: str, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **options: object())
    before = files_of(result)
    is_mounted = os.path.ismount(result)
    with monkeypatch.context() as patch:
        moment = "exchange" if exchanges and not is_mounted else "rename"
        just_before(patch, moment, lambda: (result / name).write_text("trained meanwhile"))
        with pytest.raises(StorageError, match=r", and the result would replace it \(move what you need out of"):
            publish(result, NEW)
    assert files_of(result) == {**before, name: b"trained meanwhile"}
    shutil.move(result / name, result.parent / "mine")
    publish(result, NEW)
    assert (result / "README.md").read_text() == "new"
    assert sorted(os.listdir(result.parent)) == ["mine", "out"]


def test_a_first_result_does_not_replace_what_took_its_name_in_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def write() -> None:
        output.mkdir()
        (output / "mine.txt").write_text("mine")

    just_before(monkeypatch, "rename", write)
    with pytest.raises(StorageError, match="directory not empty"):
        publish(output, NEW)
    assert files_of(output) == {"mine.txt": b"mine"}


def killed_after_exchange(folder: Path) -> AbstractContextManager[FailingDisk]:
    """Killed right after the exchange, before anybody looked at the earlier result again."""
    return FailingDisk(folder / "trash", at=0, fail="after", only=("exchange",)).installed()


@pytest.mark.parametrize("name", ["README.md", "mine.txt"])
def test_after_a_kill_in_the_last_moment_the_next_command_deletes_nothing_either(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    publish(output, OLD, overwrite=False)
    with killed_after_exchange(tmp_path), monkeypatch.context() as patch, pytest.raises((Killed, UsageError)):
        just_before(patch, "exchange", lambda: (output / name).write_text("trained meanwhile"))
        publish(output, NEW)
    earlier = tmp_path / ".out.partial" / "result"
    assert (output / "README.md").read_text() == "new" and (earlier / name).read_text() == "trained meanwhile"
    for command in (lambda: publish(output, NEW), lambda: publish(output, OLD)):
        with pytest.raises(UsageError, match=rf"holds {name}, which came into an earlier result while a run replaced"):
            command()
        assert (earlier / name).read_text() == "trained meanwhile"
    shutil.move(earlier / name, tmp_path / "mine")
    publish(output, OLD)
    assert sorted(os.listdir(tmp_path)) == ["mine", "out"]


def test_after_a_kill_right_behind_the_exchange_an_untouched_result_is_removed(tmp_path: Path) -> None:
    output = tmp_path / "out"
    publish(output, OLD, overwrite=False)
    with killed_after_exchange(tmp_path), pytest.raises(Killed):
        publish(output, NEW)
    publish(output, OLD)
    assert (output / "README.md").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["out"]


# An interrupted replacement.


@pytest.fixture
def interrupted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A converted directory, absent: where names cannot be exchanged, a kill between two renames leaves that."""
    output = tmp_path / "the base"
    run_conversion(source, output, method="qlora", rank=4)
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda *arguments, **options: object())
        counting = FailingDisk(tmp_path / "trash", at=1, only=("rename",))
        with counting.installed(), pytest.raises(Killed):
            publish(output, NEW)
    assert not output.exists()
    return output


@pytest.mark.parametrize(
    "use",
    [
        lambda out, model: loftq_cli.quantize(out, model.parent / "new"),
        lambda out, model: loftq_cli.quantize(model, model.parent / "new", calibration=out),
        lambda out, model: loftq_cli.merge(out, model, model.parent / "new"),
        lambda out, model: loftq_cli.merge(model, out / "qlora_init", model.parent / "new"),
        lambda out, model: loftq_cli.inspect(out),
        lambda out, model: loftq_cli.inspect(out, verify=True),
        lambda out, model: loftq_cli.calibrate(out, model / "config.json", model.parent / "new"),
        lambda out, model: load_adapted(models.torch.nn.Linear(1, 1), out),
    ],
    ids=["quantize", "statistics", "merge", "adapter", "inspect", "verify", "calibrate", "load_adapted"],
)
def test_every_command_names_an_interrupted_replacement(
    use: Callable[[Path, Path], object], interrupted: Path, source: Path, tmp_path: Path
) -> None:
    previous = tmp_path / ".the base.partial" / "replaced"
    with pytest.raises(InputError) as caught:
        use(interrupted, source)
    message = f"a run was interrupted while it replaced {interrupted}; the previous result lies in {previous}"
    assert message in str(caught.value)
    hint = str(caught.value.hint)
    assert hint.startswith("run the interrupted command again, or bring the previous result back: mv ")
    subprocess.run(hint.partition(": ")[2], shell=True, check=True)
    assert (interrupted / "qlora_init").is_dir()
    publish(interrupted, NEW)  # the interrupted command
    assert (interrupted / "README.md").read_text() == "new"


def test_an_absent_result_without_an_interrupted_replacement_is_absent(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(InputError, match=r"no such file or folder \(check the path\)"):
        loftq_cli.inspect(tmp_path / "out")


def test_an_output_in_a_mount_point_without_its_files_says_that_it_is_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    publish_in = tmp_path / "out"
    publish_in.mkdir()
    publish(publish_in, OLD)
    with FailingDisk(tmp_path / "trash", at=len(OLD), only=("rename",)).installed(), pytest.raises(Killed):
        publish(publish_in, NEW)
    assert sorted(os.listdir(publish_in / ".partial" / "replaced")) == ["README.md", "checksums.json", "config.json"]
    shutil.rmtree(publish_in / "adapter")
    with pytest.raises(InputError, match=r"holds an unfinished result \(run the interrupted command again\)"):
        loftq_cli.inspect(publish_in)
    publish(publish_in, NEW)
    assert (publish_in / "README.md").read_text() == "new"


def test_another_command_on_the_output_brings_the_previous_result_back(interrupted: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        publish(interrupted, NEW, overwrite=False)
    assert (interrupted / "qlora_init").is_dir()


def test_after_a_kill_during_the_publication_a_folder_that_took_the_name_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with FailingDisk(tmp_path / "trash", at=0, only=("rename",)).installed(), pytest.raises(Killed):
        publish(output, NEW)
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is not empty and not a result of this tool"):
            publish(output, NEW, overwrite=overwrite)
    assert files_of(output) == {"mine.txt": b"mine"}


class NoExchange:
    """A C library whose system call ends with an error."""

    def __init__(self, number: int) -> None:
        self._number = number

    def renameat2(self, *arguments: object) -> int:
        ctypes.set_errno(self._number)
        return -1


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
def test_where_the_system_does_not_exchange_names_a_result_is_replaced_all_the_same(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old kernel, NFS, a FUSE file system, and a sandbox that forbids the call."""
    publish(tmp_path / "out", OLD)
    monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **options: NoExchange(number))
    publish(tmp_path / "out", NEW)
    assert (tmp_path / "out" / "README.md").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_an_exchange_that_fails_leaves_the_earlier_result(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "out", OLD)
    before = files_of(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda *arguments, **options: NoExchange(number))
        with pytest.raises(StorageError, match=os.strerror(number).lower()):
            publish(tmp_path / "out", NEW)
    assert files_of(tmp_path / "out") == before
    assert os.listdir(tmp_path) == ["out"]


# A folder with the name of an unfinished result.


def refusal(output: Path, **options: bool) -> str:
    with pytest.raises(UsageError) as caught:
        publish(output, NEW, **options)
    return str(caught.value)


OTHERS = "has the name of the folder for an unfinished result, and this tool did not make it"


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": "mine"},
        {"result/model.safetensors": "mine"},
        {"replaced/thesis.txt": "mine"},
        {".journal": "Dear diary"},
        {".loftq-cli": "a marker of something else"},
        {".loftq-cli": "", "thesis.txt": "mine"},
    ],
    ids=lambda files: " and ".join(files),
)
def test_a_folder_with_the_name_of_an_unfinished_result_stays(tmp_path: Path, files: dict[str, str]) -> None:
    hidden = tmp_path / ".out.partial"
    for name, text in files.items():
        (hidden / name).parent.mkdir(parents=True, exist_ok=True)
        (hidden / name).write_text(text)
    expected = f"{hidden}: {OTHERS} (rename it, or choose another output)"
    assert refusal(tmp_path / "out", overwrite=False) == refusal(tmp_path / "out", overwrite=True) == expected
    assert files_of(hidden) == {name: text.encode() for name, text in files.items()}
    hidden.rename(tmp_path / "mine")
    publish(tmp_path / "out", NEW)
    assert files_of(tmp_path / "mine") == {name: text.encode() for name, text in files.items()}


def test_a_folder_that_stands_beside_a_finished_result_stays(source: Path, out: Path) -> None:
    command = ("quantize", source, out, "--method", "qlora", "--rank", "4", "-q")
    assert loftq(*command).returncode == 0
    hidden = out.parent / f".{out.name}.partial"
    hidden.mkdir()
    (hidden / "thesis.txt").write_text("mine")
    assert "already done" in loftq(*command).stderr
    for options in (["--overwrite"], ["--overwrite", "--restart"]):
        assert OTHERS in loftq(*command, *options).stderr
    assert files_of(hidden) == {"thesis.txt": b"mine"}


def test_a_folder_of_that_name_inside_a_mount_point_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    (tmp_path / "out" / ".partial").mkdir(parents=True)
    (tmp_path / "out" / ".partial" / "thesis.txt").write_text("mine")
    assert OTHERS in refusal(tmp_path / "out")
    assert files_of(tmp_path / "out") == {".partial/thesis.txt": b"mine"}


def test_a_file_or_a_link_of_that_name_stays(tmp_path: Path) -> None:
    hidden = tmp_path / ".out.partial"
    hidden.write_text("mine")
    assert OTHERS in refusal(tmp_path / "out")
    hidden.unlink()
    (tmp_path / "elsewhere").mkdir()
    hidden.symlink_to(tmp_path / "elsewhere")
    assert OTHERS in refusal(tmp_path / "out")
    assert hidden.is_symlink()


@pytest.mark.parametrize("kept", [None, 0, 1, 20])
def test_what_a_crash_leaves_before_the_marker_is_whole_is_ours(tmp_path: Path, kept: int | None) -> None:
    staging = Staging(tmp_path / "out", fingerprint="f", overwrite=False, restart=False)
    staging.close()
    marker = (tmp_path / ".out.partial" / ".loftq-cli").read_bytes()
    shutil.rmtree(tmp_path / ".out.partial")
    (tmp_path / ".out.partial").mkdir()
    if kept is not None:
        (tmp_path / ".out.partial" / ".loftq-cli").write_bytes(marker[:kept])
    publish(tmp_path / "out", NEW)
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_the_marker_says_when_the_folder_must_not_be_deleted(tmp_path: Path) -> None:
    Staging(tmp_path / "out", fingerprint="f", overwrite=False, restart=False).close()
    text = (tmp_path / ".out.partial" / ".loftq-cli").read_text()
    assert re.search(r"Never delete .* while `replaced`", text)


@pytest.mark.parametrize(
    ("count", "shown"), [(1, "a"), (3, "a, b, c"), (4, "a, b, c and 1 more files"), (5, "a, b, c and 2 more files")]
)
def test_three_foreign_files_are_named_and_the_rest_counted(count: int, shown: str, tmp_path: Path) -> None:
    publish(tmp_path / "out", OLD, overwrite=False)
    for name in "abcde"[:count]:
        (tmp_path / "out" / name).touch()
    with pytest.raises(UsageError) as caught:
        check_output(tmp_path / "out", overwrite=True)
    assert caught.value.message == f"holds {shown}, which the run that made it did not write"
    assert caught.value.file == str(tmp_path / "out")


def test_files_are_hashed_before_a_run_unless_the_caller_hashes_them_later(tmp_path: Path) -> None:
    publish(tmp_path / "out", OLD, overwrite=False)
    edit_in_place(tmp_path / "out" / "README.md")
    check_output(tmp_path / "out", overwrite=True, hashes=False)
    with pytest.raises(UsageError, match=r"holds README\.md, changed since the run that made it"):
        check_output(tmp_path / "out", overwrite=True)
