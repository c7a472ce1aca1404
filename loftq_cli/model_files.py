"""The small files of an output directory that are not weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loftq_cli.checkpoint import disk
from loftq_cli.report import dump_json


def write_texts(directory: Path, texts: Mapping[str, str]) -> None:
    """Write small files by relative name. Raises StorageError."""
    for name, text in texts.items():
        disk.write_file(directory / name, text.encode())


def index_json(shard_of: Mapping[str, str], total_nbytes: int) -> str:
    """model.safetensors.index.json."""
    return dump_json({"metadata": {"total_size": total_nbytes}, "weight_map": dict(sorted(shard_of.items()))})
