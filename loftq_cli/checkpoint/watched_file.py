"""A file under watch for changes during a run. Only regular files are opened, and opening never waits. The error about
an absent file names an interrupted replacement of a result.

The module knows nothing of the contents of a file.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.errors import InputError, StorageError

HIDDEN_INSIDE = ".partial"  # the hidden folder of an unfinished result in a mount point
REPLACED = "replaced"  # in the hidden folder: the previous result, until the new result is visible
CHUNK_NBYTES = 1 << 20  # bytes; larger chunks are no faster, because fresh memory costs more than reading


@dataclass(frozen=True, slots=True)
class WatchedFile:
    """A regular file, read by position. No descriptor stays open between reads; each read checks the identity of the
    file against the identity at the first opening.
    """

    path: Path
    identity: tuple[int, int, int, int]  # st_ino, st_size, st_mtime_ns, st_ctime_ns

    @classmethod
    def open(cls, path: Path, *, may_be_empty: bool = False) -> WatchedFile:
        """Remember the identity of the file.

        Raises InputError when `path` names no regular file, or an empty file, or a git-LFS pointer. `may_be_empty`
        accepts any contents.
        """
        descriptor = open_regular_file(path)
        try:
            file = cls(path, _identity(os.fstat(descriptor)))
        finally:
            os.close(descriptor)
        if not may_be_empty:
            refuse_placeholder(path, file.read(0, min(file.nbytes, 64)))
        return file

    @property
    def nbytes(self) -> int:
        return self.identity[1]

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Yield a descriptor during the block. Raises StorageError when the file changed or the system fails."""
        try:
            descriptor = open_regular_file(self.path)
        except InputError as exc:  # the path named a regular file at first
            raise _changed(self.path) from exc
        try:
            if _identity(os.fstat(descriptor)) != self.identity:
                raise _changed(self.path)
            yield descriptor
        except OSError as exc:
            raise StorageError(f"cannot be read: {exc.strerror}", file=self.path) from exc
        finally:
            os.close(descriptor)

    def read(self, offset: int, nbytes: int) -> bytearray:
        """Read `nbytes` bytes from `offset` on. Raises StorageError when the file ends earlier or changed."""
        buffer = bytearray(nbytes)
        self.read_into(offset, memoryview(buffer))
        return buffer

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read into existing memory: clearing fresh memory takes as long as reading."""
        with self.opened() as descriptor:
            _read_exactly(descriptor, offset, buffer, self.path)

    def read_whole(self, max_nbytes: int, *, hint: str) -> bytearray:
        """Read a small file to the end. Raises InputError with `hint` for more than `max_nbytes` bytes, StorageError
        when the file changed.
        """
        if self.nbytes > max_nbytes:
            raise too_large(self.path, max_nbytes, hint)
        return self.read(0, self.nbytes)

    def sha256(self, offset: int, nbytes: int) -> str:
        """The sha256 of `nbytes` bytes from `offset` on."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(min(nbytes, CHUNK_NBYTES)))
        with self.opened() as descriptor:
            for begin in range(offset, offset + nbytes, CHUNK_NBYTES):
                part = buffer[: min(CHUNK_NBYTES, offset + nbytes - begin)]
                _read_exactly(descriptor, begin, part, self.path)
                digest.update(part)
        return digest.hexdigest()

    def chunks(self, offset: int, nbytes: int, chunk_nbytes: int) -> Iterator[memoryview]:
        """Yield `nbytes` bytes from `offset` on in pieces of at most `chunk_nbytes`, each in a fresh buffer."""
        if chunk_nbytes < 1:
            raise ValueError("chunk_nbytes is at least 1")
        with self.opened() as descriptor:
            for begin in range(offset, offset + nbytes, chunk_nbytes):
                chunk = memoryview(bytearray(min(chunk_nbytes, offset + nbytes - begin)))
                _read_exactly(descriptor, begin, chunk, self.path)
                yield chunk

    def check_unchanged(self) -> None:
        """Raises StorageError when the file was replaced or written since opening."""
        if not self.is_unchanged():
            raise _changed(self.path)

    def is_unchanged(self) -> bool:
        """False when the file was replaced, written or removed since opening."""
        try:
            return _identity(os.stat(self.path)) == self.identity
        except OSError:
            return False


def open_regular_file(path: Path) -> int:
    """Open `path` for reading and return a descriptor; the caller closes the descriptor. A link to a regular file is
    fine. A FIFO or a device is refused without waiting.

    Raises InputError when `path` names no regular file, StorageError when opening is not permitted.

    >>> open_regular_file(Path("absent"))
    Traceback (most recent call last):
    loftq_cli.errors.InputError: absent: no such file (check the path, or download the file again)
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError as exc:
        message = "is a link to a file that is not there" if os.path.islink(path) else "no such file"
        raise absent(path, message, "check the path, or download the file again") from exc
    except OSError as exc:
        raise StorageError(f"cannot be opened: {exc.strerror}", file=path, hint="check its permissions") from exc
    except ValueError as exc:  # a NUL or a lone surrogate in the name
        raise InputError("is not a possible file name", file=path, hint="check the path") from exc
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise InputError("is not a regular file", file=path, hint="give a file, not a folder, a pipe or a device")


def read_small_file(path: Path, max_nbytes: int, *, hint: str) -> bytes:
    """Read a file of bounded size to the end: the only way to all bytes of a file that is not kept under watch.

    Raises InputError when `path` names no regular file, and with `hint` for more than `max_nbytes` bytes; StorageError
    when opening or reading fails.

    >>> _ = Path("recipe.toml").write_text("rank = 8")
    >>> read_small_file(Path("recipe.toml"), 1000, hint="give a recipe")
    b'rank = 8'
    """
    with os.fdopen(open_regular_file(path), "rb") as stream:
        try:
            if os.fstat(stream.fileno()).st_size > max_nbytes:
                raise too_large(path, max_nbytes, hint)
            data = stream.read(max_nbytes + 1)  # files of /proc have no size
        except OSError as exc:
            raise StorageError(f"cannot be read: {exc.strerror}", file=path) from exc
    if len(data) > max_nbytes:
        raise too_large(path, max_nbytes, hint)
    return data


def too_large(path: Path, max_nbytes: int, hint: str) -> InputError:
    """The error about a file of more than `max_nbytes` bytes."""
    return InputError(f"is larger than the {max_nbytes} bytes allowed here", file=path, hint=hint)


def hidden_folder(target: Path) -> Path:
    """The folder of an unfinished result, beside the `target` of the result.

    >>> hidden_folder(Path("models/base"))
    PosixPath('models/.base.partial')
    """
    return target.parent / f".{target.name}.partial"


def absent(path: Path, message: str, hint: str) -> InputError:
    """The error about a `path` without a file or folder: `message` and `hint`, unless an interrupted replacement took
    the result at `path`, or the result around `path`, away. The error then names the place of the previous result.

    >>> print(absent(Path("base"), "no such folder", "check the path"))
    base: no such folder (check the path)
    """
    target = Path(os.path.realpath(path))
    for folder in (target, *target.parents):
        previous = hidden_folder(folder) / REPLACED
        if os.path.lexists(folder):
            break
        if previous.is_dir():
            message = f"a run was interrupted while it replaced {folder}; the previous result lies in {previous}"
            move = shlex.join(["mv", str(previous), str(folder)])
            hint = f"run the interrupted command again, or bring the previous result back: {move}"
    return InputError(message, file=path, hint=hint)


def refuse_placeholder(path: Path, head: bytes | bytearray) -> None:
    """Raises InputError when `head`, the first bytes of `path`, is a placeholder for a file never downloaded.

    >>> refuse_placeholder(Path("model.safetensors"), b"weights")
    """
    if not head:
        raise InputError("is empty", file=path, hint="download it again, or take it from its source")
    if head.startswith(b"version https://git-lfs"):
        raise InputError("is a git-LFS pointer, not the file itself", file=path, hint="run git lfs pull in its folder")


def _read_exactly(descriptor: int, offset: int, buffer: memoryview, path: Path) -> None:
    done = 0
    while done < len(buffer):  # a call reads at most 2 GB on Linux, less on some network file systems
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            message = f"changed while it was being read: it ends {len(buffer) - done} bytes early"
            raise StorageError(message, file=path, hint="run the command again when the file is complete")
        done += count


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _changed(path: Path) -> StorageError:
    hint = "run the command again when nothing else writes to it"
    return StorageError("changed while it was being read", file=path, hint=hint)
