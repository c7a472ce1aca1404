"""Every change of loftq-cli to a disk, as small operations: tests crash the program, or fill the disk, at each
operation. An OSError becomes a StorageError with the name of the file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loftq_cli.errors import StorageError

_FREE = "free some space or write elsewhere, then run the same command to continue"
_ALLOW = "check its permissions, or write elsewhere"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FREE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _ALLOW),
    errno.EIO: "check the disk, then run the same command to continue",
    errno.EMFILE: "ulimit -n shows how many a process may have open",
}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from linux/fcntl.h and linux/fs.h
# A kernel, a file system or a sandbox without the exchange answers so. A plain rename finds every other reason.
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV)


def make_directory(path: Path) -> None:
    """Make a directory unless the directory exists. Raises StorageError.

    >>> make_directory(Path("base"))
    >>> make_directory(Path("base"))
    >>> make_directory(Path("absent/base"))
    Traceback (most recent call last):
    loftq_cli.errors.StorageError: absent/base: no such file or directory
    """
    with _reported(path):
        path.mkdir(exist_ok=True)


def make_directories(path: Path) -> list[Path]:
    """Make a directory and the absent directories above, durably; return the made ones, outermost first. Raises
    StorageError.

    >>> make_directories(Path("runs/today")) == [Path("runs"), Path("runs/today")]
    True
    """
    made: list[Path] = []
    for directory in [*reversed(path.parents), path]:
        if not directory.is_dir():
            make_directory(directory)
            sync_directory(directory.parent)
            made.append(directory)
    return made


def nearest_path(path: Path) -> Path:
    """The path, or the innermost existing path above.

    >>> nearest_path(Path("absent/base")).as_posix()
    '.'
    """
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def remove_empty(path: Path) -> None:
    """Remove a directory if the directory is empty and the disk allows so.

    >>> make_directory(Path("empty"))
    >>> remove_empty(Path("empty"))
    """
    with suppress(OSError):
        path.rmdir()


def open_file(path: Path) -> int:
    """Open a file for reading and writing, and return the descriptor, which the caller closes. A missing file is made
    with normal permissions; a link is refused. Raises StorageError.
    """
    with _reported(path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def resize(descriptor: int, nbytes: int, path: Path) -> None:
    """Cut the file to `nbytes` bytes, or extend the file by a hole. `path` is for errors. Raises StorageError.

    >>> descriptor = open_file(Path("weights"))
    >>> resize(descriptor, 8, Path("weights"))
    >>> os.close(descriptor)
    >>> Path("weights").read_bytes() == bytes(8)
    True
    """
    with _reported(path):
        os.ftruncate(descriptor, nbytes)


def write_at(descriptor: int, position: int, data: bytes | memoryview, path: Path) -> None:
    """Write all of `data` from the byte `position` on: a single system call writes at most 2 GB, and less on a nearly
    full disk. `path` is for errors. Raises StorageError.

    >>> descriptor = open_file(Path("header"))
    >>> write_at(descriptor, 2, b"ab", Path("header"))
    >>> os.close(descriptor)
    >>> Path("header").read_bytes()
    b'\\x00\\x00ab'
    """
    view = memoryview(data)
    with _reported(path):
        while view:
            n_written = os.pwrite(descriptor, view, position)
            position += n_written
            view = view[n_written:]


def sync(descriptor: int, path: Path) -> None:
    """Return when all written bytes are on the disk. Raises StorageError; nobody may trust the file after the error,
    because the system may have dropped bytes.
    """
    with _reported(path):
        os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Return when the names in a directory are on the disk. Raises StorageError."""
    with _reported(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:  # the directory can be written but not read
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a directory
                raise
        finally:
            os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Rename a file or a directory within a file system, atomically. Raises StorageError.

    >>> make_directory(Path("staging"))
    >>> rename(Path("staging"), Path("result"))
    >>> Path("staging").exists(), Path("result").exists()
    (False, True)
    """
    with _reported(new):
        os.rename(old, new)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two files or directories within a file system, atomically: at every moment, both names
    exist. False where the system cannot; nothing has changed then. Raises StorageError.

    >>> write_file(Path("first"), b"1")
    >>> write_file(Path("second"), b"2")
    >>> was_exchanged = exchange(Path("first"), Path("second"))
    >>> Path("first").read_text() == ("2" if was_exchanged else "1")
    True
    """
    rename_with_flags = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename_with_flags is None:  # a C library older than the system call
        return False
    names = (os.fsencode(first), os.fsencode(second))
    if rename_with_flags(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise storage_error(OSError(number, os.strerror(number)), second)


def remove(path: Path) -> None:
    """Remove a file; a missing file is fine. Raises StorageError.

    >>> remove(Path("no such file"))
    """
    with _reported(path):
        path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a directory with all contents; a missing directory is fine. Links are removed, never followed. Raises
    StorageError.

    >>> make_directory(Path("stale"))
    >>> remove_tree(Path("stale"))
    >>> Path("stale").exists()
    False
    """
    with _reported(path):
        if os.path.lexists(path):
            shutil.rmtree(path)


def write_file(path: Path, data: bytes) -> None:
    """Replace the contents of a small file. Raises StorageError.

    >>> write_file(Path("recipe.toml"), b"rank = 16")
    >>> Path("recipe.toml").read_text()
    'rank = 16'
    """
    with written_file(path) as descriptor:
        write_at(descriptor, 0, data, path)


@contextmanager
def written_file(path: Path) -> Iterator[int]:
    """Yield a descriptor of an empty file during the block; an existing file is emptied. Raises StorageError."""
    descriptor = open_file(path)
    try:
        resize(descriptor, 0, path)
        yield descriptor
    finally:
        os.close(descriptor)


def storage_error(error: OSError, path: Path) -> StorageError:
    """Turn an OSError about `path` into a single line for the user, with a remedy for common causes.

    >>> print(storage_error(OSError(errno.EIO, "Input/output error"), Path("model.bin")))
    model.bin: input/output error (check the disk, then run the same command to continue)
    """
    reason = (error.strerror or "input/output error").lower()
    free = f", {_free(path)} are free" if error.errno == errno.ENOSPC else ""
    return StorageError(reason + free, file=path, hint=_REMEDIES.get(error.errno or 0))


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
