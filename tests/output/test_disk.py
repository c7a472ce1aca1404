"""The errors that a disk may answer with: which ones matter, and which ones mean only that a system lacks a call."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from loftq_cli.errors import StorageError
from loftq_cli.output import disk
from loftq_cli.output.checksums import Checksums, own_files


def fail(number: int):
    def call(*arguments: object, **keywords: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_directories_is_no_error(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail(number))
    disk.sync_directory(tmp_path)


def test_a_directory_that_could_not_be_synced_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    with pytest.raises(StorageError, match="input/output error") as caught:
        disk.sync_directory(tmp_path)
    assert caught.value.file == str(tmp_path)


def test_a_directory_that_may_be_written_and_not_read_is_no_error(tmp_path, monkeypatch):
    def denied(path: object, *arguments: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    disk.sync_directory(tmp_path)


def test_no_descriptor_stays_open_after_a_sync(tmp_path):
    before = os.listdir("/proc/self/fd")
    disk.sync_directory(tmp_path)
    assert os.listdir("/proc/self/fd") == before


def answering(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A C library whose exchange fails with the error `number`."""

    def renameat2(*arguments: object) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **keywords: SimpleNamespace(renameat2=renameat2))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV])
def test_a_system_without_the_exchange_says_so_and_changes_nothing(number, tmp_path, monkeypatch):
    answering(monkeypatch, number)
    assert disk.exchange(tmp_path / "a", tmp_path / "b") is False


def test_a_c_library_without_the_call_is_a_system_without_the_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **keywords: SimpleNamespace())
    assert disk.exchange(tmp_path / "a", tmp_path / "b") is False


def test_an_exchange_that_the_disk_refuses_names_the_output(tmp_path, monkeypatch):
    answering(monkeypatch, errno.EIO)
    with pytest.raises(StorageError, match="input/output error \\(check the disk") as caught:
        disk.exchange(tmp_path / "a", tmp_path / "b")
    assert caught.value.file == str(tmp_path / "b")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space or write elsewhere, then run the same command to continue"),
        (errno.EDQUOT, "free some space or write elsewhere, then run the same command to continue"),
        (errno.EROFS, "check its permissions, or write elsewhere"),
        (errno.EMFILE, "ulimit -n shows how many a process may have open"),
        (errno.ENOTDIR, None),
    ],
)
def test_common_causes_have_a_remedy(number, remedy, tmp_path):
    error = disk.storage_error(OSError(number, os.strerror(number)), tmp_path / "model.bin")
    assert error.hint == remedy
    assert ("are free" in error.message) == (number == errno.ENOSPC)


def test_an_error_without_a_text_is_an_error_of_the_disk(tmp_path):
    assert disk.storage_error(OSError(), tmp_path).message == "input/output error"


def test_the_free_space_of_a_place_that_is_gone_is_none(tmp_path):
    error = disk.storage_error(OSError(errno.ENOSPC, "No space left on device"), tmp_path / "gone" / "model.bin")
    assert error.message == "no space left on device, 0 GB are free"


def test_a_made_file_has_normal_permissions_and_a_link_is_refused(tmp_path):
    os.close(disk.open_file(tmp_path / "new"))
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~mask
    (tmp_path / "link").symlink_to(tmp_path / "new")
    with pytest.raises(StorageError):
        disk.open_file(tmp_path / "link")


def test_a_listed_file_that_is_absent_or_unreadable_is_not_ours(tmp_path):
    (tmp_path / "folder").mkdir()
    mark = Checksums("fingerprint", None, {"absent": "0" * 64, "folder": "0" * 64})
    assert own_files(tmp_path, mark, ["absent", "folder"]) == ([], ["absent", "folder"])


def test_removing_a_link_leaves_what_the_link_names(tmp_path: Path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    disk.remove(tmp_path / "link")
    assert sorted(os.listdir(tmp_path)) == ["kept"]
