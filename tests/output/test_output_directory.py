"""Where a result is made and where it goes: beside the output, or inside it where that is a mount point; links, foreign
files, space and second writers.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import models
from support.conversions import Silent, StopAfter, converted_files, files_of, loftq, run_conversion, run_merge

from loftq_cli.errors import StorageError, UsageError
from loftq_cli.output.checksums import file_sha256
from loftq_cli.output.place import Place
from loftq_cli.output.staging import Staging

RECIPE = {"rank": 4, "iterations": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.llama(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    return converted_files(source, tmp_path_factory.mktemp("whole"), **RECIPE)


@pytest.fixture
def mounted(out, tmp_path, monkeypatch):
    """The same as a mount point."""
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    return out


def test_a_part_of_the_same_file_system_that_is_mounted_is_found_in_the_list_of_mounts(tmp_path):
    """With a blank in its name, which the list writes as \\040."""
    mounted, beside = tmp_path / "a disk" / "out", tmp_path / "a disk" / "other"
    mounted.mkdir(parents=True)
    beside.mkdir()
    mounts = tmp_path / "mountinfo"
    shown = str(mounted).replace(" ", "\\040")
    mounts.write_text(f"36 35 98:0 / / rw - ext4 /dev/a rw\n37 36 98:0 /x {shown} rw - ext4 /dev/a rw\n")

    assert Place.of(mounted, mounts).root == mounted / ".partial"
    assert Place.of(beside, mounts).root == tmp_path / "a disk" / ".other.partial"
    assert Place.of(mounted, tmp_path / "no list").root == tmp_path / "a disk" / ".out.partial"


def test_a_mount_point_is_filled_and_never_replaced(source, mounted, expected):
    (mounted / "lost+found").mkdir()  # as on a fresh file system
    inode = mounted.stat().st_ino
    run_conversion(source, mounted, **RECIPE)
    assert files_of(mounted) == expected
    assert mounted.stat().st_ino == inode
    assert sorted(os.listdir(mounted)) == sorted({name.partition("/")[0] for name in expected} | {"lost+found"})


def test_a_run_into_a_mount_point_is_continued(source, mounted, expected):
    with pytest.raises(KeyboardInterrupt):
        run_conversion(source, mounted, observer=StopAfter(5), **RECIPE)
    assert os.listdir(mounted) == [".partial"]
    second = Silent()
    run_conversion(source, mounted, observer=second, **RECIPE)
    assert sum(resumed for _, resumed in second.done) == 5
    assert files_of(mounted) == expected


def test_a_result_in_a_mount_point_is_replaced_in_place(source, mounted, expected):
    run_conversion(source, mounted, rank=8, iterations=1, layout="dense")
    with pytest.raises(UsageError, match="exists already"):
        run_conversion(source, mounted, **RECIPE)
    run_conversion(source, mounted, overwrite=True, **RECIPE)
    assert files_of(mounted) == expected


def test_a_foreign_file_in_a_mount_point_stays(source, mounted):
    (mounted / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and not a result of this tool"):
        run_conversion(source, mounted, overwrite=True, **RECIPE)
    assert files_of(mounted) == {"thesis.txt": b"mine"}


def test_a_real_bind_mount(source, expected, tmp_path):
    commands = (
        "mkdir real out && mount --bind real out && "
        f"{sys.executable} -m loftq_cli quantize {source} out --rank 4 --iterations 1 --fit loftq -q"
    )
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount anything")
    subprocess.run(["unshare", "-rm", "sh", "-ec", commands], cwd=tmp_path, check=True, capture_output=True)
    assert files_of(tmp_path / "real") == expected
    assert sorted(os.listdir(tmp_path)) == ["out", "real"]


def test_where_the_parent_may_not_be_written_the_work_is_done_inside(source, out, expected, monkeypatch):
    out.mkdir()
    parent = str(out.parent.resolve())
    monkeypatch.setattr(os, "access", lambda path, mode, real=os.access: str(path) != parent and real(path, mode))
    run_conversion(source, out, **RECIPE)
    assert files_of(out) == expected


def test_a_link_to_a_folder_is_followed_and_stays(source, out, expected, tmp_path):
    elsewhere = tmp_path / "large disk" / "results"
    elsewhere.mkdir(parents=True)
    out.symlink_to(elsewhere)
    run_conversion(source, out, **RECIPE)
    assert out.is_symlink()
    assert files_of(elsewhere) == expected
    assert os.listdir(tmp_path / "large disk") == ["results"]


def test_a_dangling_link_is_refused(source, out, tmp_path):
    out.symlink_to(tmp_path / "nothing")
    with pytest.raises(UsageError, match="is not a directory"):
        run_conversion(source, out, **RECIPE)


@pytest.mark.parametrize("added", ["trained/adapter_model.safetensors", "notes.txt", "loftq_init/optimizer.pt"])
def test_overwriting_never_removes_what_the_run_did_not_write(source, out, added):
    run_conversion(source, out, **RECIPE)
    (out / added).parent.mkdir(exist_ok=True)
    (out / added).write_text("hours of work")
    before = files_of(out)
    with pytest.raises(UsageError, match=rf"holds {added}, which the run that made it did not write \(move what you"):
        run_conversion(source, out, overwrite=True, rank=8, iterations=1)
    assert files_of(out) == before


def test_checksums_of_something_else_do_not_make_a_folder_ours(source, out):
    out.mkdir()
    (out / "checksums.json").write_text(json.dumps({"tool": "another", "files": {}}))
    with pytest.raises(UsageError, match="is not empty and not a result of this tool"):
        run_conversion(source, out, overwrite=True, **RECIPE)


def test_a_file_that_somebody_put_into_the_hidden_folder_is_not_published(source, out, expected):
    with pytest.raises(KeyboardInterrupt):
        run_conversion(source, out, observer=StopAfter(5), **RECIPE)
    (out.parent / ".out.partial" / "result" / "modeling_evil.py").write_text("print('hello')")
    run_conversion(source, out, **RECIPE)
    assert files_of(out) == expected


def test_a_link_in_the_hidden_folder_is_not_written_through(source, out, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_conversion(source, out, observer=StopAfter(5), **RECIPE)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    weights = out.parent / ".out.partial" / "result" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(victim)
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        run_conversion(source, out, **RECIPE)
    assert victim.read_text() == "precious"


def test_space_that_an_unfinished_run_has_taken_is_not_asked_for_again(source, out, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run_conversion(source, out, observer=StopAfter(14), **RECIPE)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))  # of 400,000 that are needed
    run_conversion(source, out, **RECIPE)
    shutil.rmtree(out)
    with pytest.raises(StorageError, match=r"needs 0\.00 GB and 0\.00 GB are free \(free some space"):
        run_conversion(source, out, **RECIPE)


# Converts into `out`, and after three layers waits for a line.
HOLDING = """
import sys
from pathlib import Path
from support.conversions import Silent, run_conversion

class Holding(Silent):
    def layer_converted(self, layer, *, resumed):
        super().layer_converted(layer, resumed=resumed)
        if len(self.done) == 3:
            print("holding", flush=True)
            sys.stdin.readline()

run_conversion(Path(sys.argv[1]), Path("out"), observer=Holding(), rank=4, iterations=1)
"""


def test_a_second_process_is_refused_at_once_and_the_first_one_is_not_disturbed(source, out, expected):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(source)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "holding\n"
    second = loftq("quantize", source, "out", "--rank", "4", "--iterations", "1", "--fit", "loftq")
    assert (second.returncode, second.stderr.splitlines()[-1]) == (
        3,
        "error: out: another loftq process is writing it (wait for it, or choose another output)",
    )
    first.communicate("\n", timeout=120)
    assert first.returncode == 0
    assert files_of(out) == expected


@pytest.mark.parametrize("changed", ["base", "adapter"])
def test_an_input_that_changes_during_a_merge_publishes_nothing(source, out, tmp_path, changed):
    base = tmp_path / "base"
    run_conversion(source, base, **RECIPE)
    adapter = tmp_path / "adapter"
    shutil.copytree(base / "loftq_init", adapter)
    file = base / "model.safetensors" if changed == "base" else adapter / "adapter_model.safetensors"

    class Touches(Silent):
        def layer_merged(self, layer: object) -> None:
            os.utime(file, ns=(1, 1))

    from loftq_cli.merging.form import MergeOptions
    from loftq_cli.merging.plan import prepare_merge
    from loftq_cli.merging.run import merge_adapter

    prepared = prepare_merge(base, adapter, out, MergeOptions())
    with pytest.raises(StorageError, match="changed while it was"):
        merge_adapter(prepared, Touches(), overwrite=False, restart=False)
    assert not out.exists()


def test_every_tensor_is_in_the_checksums_under_its_file(source, out):
    from safetensors import safe_open

    run_conversion(source, out, **RECIPE)
    run_merge(out, out / "loftq_init", Path("merged"))
    for result in (out, Path("merged")):
        mark = json.loads((result / "checksums.json").read_text())
        weights = [name for name in mark["files"] if name.endswith(".safetensors")]
        assert sorted(mark["tensors"]) == sorted(weights)
        for name in weights:
            with safe_open(result / name, "pt") as file:
                assert sorted(mark["tensors"][name]) == sorted(file.keys())
            assert mark["files"][name] == file_sha256(result / name)


def test_a_result_whose_tokenizer_was_replaced_since_is_not_taken_for_done(source, out, tmp_path):
    shutil.copytree(source, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    command = ("quantize", "model", "out", "--rank", "4", "--iterations", "1", "--fit", "loftq", "-q")
    assert loftq(*command).returncode == 0
    assert "already done" in loftq(*command).stderr
    (tmp_path / "model" / "tokenizer.json").write_text('{"version": 2}')
    assert "exists already (--overwrite replaces it)" in loftq(*command).stderr


def test_where_the_file_system_has_no_locks_the_work_is_done_without(source, out, expected, monkeypatch):
    def nothing(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", nothing)
    run_conversion(source, out, **RECIPE)
    assert files_of(out) == expected


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "check its permissions, or write elsewhere"),
        (errno.EROFS, "check its permissions, or write elsewhere"),
        (errno.EIO, "check the disk, then run the same command to continue"),
        (errno.EMFILE, "ulimit -n shows how many a process may have open"),
        (errno.EDQUOT, "free some space or write elsewhere, then run the same command to continue"),
    ],
)
def test_what_the_system_refuses_comes_with_a_remedy(source, out, monkeypatch, number, remedy):
    def refuse(path, *arguments, real=os.open):
        if str(path).endswith(".safetensors") and arguments[0] & os.O_CREAT:
            raise OSError(number, os.strerror(number))
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError) as caught:
        run_conversion(source, out, **RECIPE)
    assert str(caught.value).endswith(f"{os.strerror(number).lower()} ({remedy})")


@pytest.mark.parametrize("is_used", [False, True])
def test_directories_made_for_a_result_that_failed_go_unless_somebody_uses_them(tmp_path, is_used):
    staging = Staging(tmp_path / "runs" / "today" / "out", fingerprint="f", overwrite=False, restart=False)
    with pytest.raises(ZeroDivisionError), staging.whole({}):
        if is_used:
            (tmp_path / "runs" / "notes.txt").touch()
        1 / 0  # noqa: B018
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == (["runs", "runs/notes.txt"] if is_used else [])
