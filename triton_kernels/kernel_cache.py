"""The files in which numba keeps compiled kernels, under a seal: a damaged file counts as absent, and the kernel is
compiled again. numba itself ends with an exception over a cut file, and runs a file with a flipped bit.
"""

from __future__ import annotations

import hashlib
import pickletools
from contextlib import suppress
from pathlib import Path
from typing import Any

_PARTS = ("_dump", "_load_data", "_load_index", "_data_path", "_index_path")  # of numba 0.61 and later
_SEAL_NBYTES = 32


def guard_cache(cache: Any) -> None:
    """Let `cache`, the cache of a kernel, append a sha256 to every file, and read whole files only. A write that fails,
    as on a full disk, is ignored.

    A numba without the parts that the seal needs keeps its own behaviour, but for failed writes.
    """
    save: Any = getattr(cache, "save_overload", None)

    def try_to_save(*arguments: Any) -> None:
        with suppress(OSError):
            save(*arguments)

    if save is not None:
        cache.save_overload = try_to_save
    file = getattr(cache, "_cache_file", None)
    if file is not None and all(hasattr(file, part) for part in _PARTS):
        _seal(file)


def _seal(file: Any) -> None:
    """Replace three methods of numba's reader and writer of cache files. Unpickling ignores the seal at the end."""
    dump, load_data, load_index = file._dump, file._load_data, file._load_index

    def dump_with_seal(value: Any) -> bytes:
        data: bytes = dump(value)
        return data + hashlib.sha256(data).digest()

    def load_whole_data(name: str) -> Any:
        _check_seal(file._data_path(name))
        return load_data(name)

    def load_whole_index() -> Any:
        try:
            _check_seal(file._index_path, has_version=True)
            return load_index()
        except Exception:  # pickle raises what it likes over a damaged version, which has no seal
            return {}

    file._dump, file._load_data, file._load_index = dump_with_seal, load_whole_data, load_whole_index


def _check_seal(path: str, *, has_version: bool = False) -> None:
    """Raises OSError, which numba takes for an absent file, unless `path` holds data and the seal of the data. With
    `has_version`, the version of numba, a pickle, comes first.
    """
    content = Path(path).read_bytes()
    start = _end_of_pickle(content) if has_version else 0
    data, seal = content[start:-_SEAL_NBYTES], content[-_SEAL_NBYTES:]
    if hashlib.sha256(data).digest() != seal:
        raise OSError(f"{path} is damaged")


def _end_of_pickle(content: bytes) -> int:
    """The end of the first pickle in `content`, which is not run; the end of `content` where no pickle ends."""
    try:
        return max((place or 0) + 1 for _, _, place in pickletools.genops(content))
    except ValueError:
        return len(content)
