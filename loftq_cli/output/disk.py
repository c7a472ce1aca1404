"""Every change that loftq-cli makes to a disk, as small operations: tests crash the program, or fill the disk, at each
operation. An OSError becomes a StorageError that names the file.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loftq_cli.errors import StorageError

_FREE = "free some space or write elsewhere, then run the same command to continue"
_ALLOW = "check its permissions, or write elsewhere"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FREE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _ALLOW),
    errno.EIO: "check the disk, then run the same command to continue",
    errno.EMFILE: "a larger --max-shard-size, or ulimit -n",
}


def make_directory(path: Path) -> None:
    """Make a directory unless the directory exists."""
    with _reported(path):
        path.mkdir(exist_ok=True)


def open_file(path: Path) -> int:
    """Open a file for reading and writing; a missing file is made with normal permissions."""
    with _reported(path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def resize(descriptor: int, nbytes: int, path: Path) -> None:
    """Cut the file, or extend the file by a hole."""
    with _reported(path):
        os.ftruncate(descriptor, nbytes)


def write_at(descriptor: int, position: int, data: bytes | memoryview, path: Path) -> None:
    """Write all of `data`: a system call writes at most 2 GB, and less on a nearly full disk."""
    view = memoryview(data)
    with _reported(path):
        while view:
            written = os.pwrite(descriptor, view, position)
            position += written
            view = view[written:]


def sync(descriptor: int, path: Path) -> None:
    """Return when all written bytes are on the disk. After an error the file cannot be trusted: the system may have
    dropped bytes.
    """
    with _reported(path):
        os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Return when the names in a directory are on the disk."""
    with _reported(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:  # a directory that can be written but not read
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a directory
                raise
        finally:
            os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Rename a file or a directory within a file system, atomically."""
    with _reported(new):
        os.rename(old, new)


def remove(path: Path) -> None:
    """Remove a file; a missing file is fine."""
    with _reported(path):
        path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a directory with all contents; a missing directory is fine. Links are removed, never followed."""
    with _reported(path):
        if os.path.lexists(path):
            shutil.rmtree(path)


def write_file(path: Path, data: bytes) -> None:
    """Replace the contents of a small file."""
    with written_file(path) as descriptor:
        write_at(descriptor, 0, data, path)


@contextmanager
def written_file(path: Path) -> Iterator[int]:
    """Yield a descriptor of an empty file during the block."""
    descriptor = open_file(path)
    try:
        resize(descriptor, 0, path)
        yield descriptor
    finally:
        os.close(descriptor)


def storage_error(error: OSError, path: Path) -> StorageError:
    """Turn an OSError into a single line for the user."""
    what = (error.strerror or "input/output error").lower()
    free = f", {_free(path)} are free" if error.errno == errno.ENOSPC else ""
    return StorageError(what + free, file=path, hint=_REMEDIES.get(error.errno or 0))


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path.parent).free / 1e9:.2f} GB"
    except OSError:
        return "0 GB"


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from None
