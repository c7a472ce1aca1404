"""Torch zip files, written by torch and by hand, and refusals of them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.checkpoint.torch_file import TorchFile
from loftq_cli.errors import InputError


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def with_pickle(path: Path, data: bytes) -> Path:
    return zipped(path, {"archive/data.pkl": data, "archive/byteorder": b"little"})


def patched(path: Path, value: Any, old: bytes, new: bytes) -> Path:
    """What torch.save writes for `value`, with `old` in its pickle replaced by `new`."""
    members = members_of(saved(path, value))
    name = next(name for name in members if name.endswith("/data.pkl"))
    assert members[name].count(old) == 1
    return zipped(path, {**members, name: members[name].replace(old, new)})


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        TorchFile(path)
    assert caught.value.file == str(path)
    assert caught.value.hint is not None
    return caught.value


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


class Runs:
    """An object whose pickle calls `function(*args)` when it is loaded."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


NO_PICKLE = "holds no folder/data.pkl, where torch.save puts its pickle"
