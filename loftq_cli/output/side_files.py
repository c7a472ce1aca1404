"""The small files that travel with a model: tokenizer, generation settings, custom code. Copied, never read."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from loftq_cli.checkpoint.safetensors_file import is_tensor_name
from loftq_cli.checkpoint.watched_file import CHUNK_NBYTES, WatchedFile
from loftq_cli.output import disk
from loftq_cli.output.checksums import file_sha256

# Other forms of the same weights, and what belongs to a training run or a repository: none describes our output.
_WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz"),
    *(".h5", ".msgpack", ".ot", ".tflite", ".pb", ".mlmodel", ".onnx", ".onnx_data", ".xml"),
    *(".gguf", ".ggml"),
}
_SKIPPED_NAMES = {"config.json", "training_args.bin", "optimizer.pt", "quantize_config.json"}
SOURCE_CARD = "SOURCE_README.md"
MAX_NBYTES = 200_000_000  # the largest tokenizers have tens of MB; more is not a side file


def find_side_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """(copied, left): relative paths of the files beside the weights, at most one folder deep, in order.

    Left are files in other weight formats, oversized ones, and those whose name is no UTF-8, which no JSON can list.
    Hidden files and `config.json`, which we write ourselves, and folders that hold an adapter are in neither.
    """
    copied: list[Path] = []
    left: list[Path] = []
    for root, folders, names in os.walk(directory):
        here = Path(root).relative_to(directory)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if here == Path() else []
        if here != Path() and "adapter_config.json" in names:
            continue
        for name in sorted(names):
            path = here / name
            if name.startswith(".") or (here == Path() and name in _SKIPPED_NAMES) or name.endswith(".index.json"):
                continue
            full = directory / path
            is_left = full.suffix.lower() in _WEIGHT_SUFFIXES or not is_tensor_name(str(path))
            if is_left or not full.is_file() or full.stat().st_size > MAX_NBYTES:
                left.append(path)
            else:
                copied.append(path)
    return copied, left


def side_file_copies(source: Path | None, *, leave: Collection[str] = ()) -> dict[str, Path]:
    """Name of each copy in the result -> the file that is copied, but for the names in `leave`.

    The source's README.md becomes SOURCE_README.md: a result has a card of its own.
    """
    found = [] if source is None else find_side_files(source)[0]
    named = {SOURCE_CARD if path == Path("README.md") else path.as_posix(): path for path in found}
    return {name: Path(source or "") / path for name, path in named.items() if path.as_posix() not in leave}


def copy_side_files(copies: Mapping[str, Path], target: Path) -> None:
    """Make `copies` in `target`, with fresh normal permissions. Raises StorageError."""
    for name, source in copies.items():
        copy = target / name
        disk.make_directory(copy.parent)
        file, position = WatchedFile.open(source, may_be_empty=True), 0
        with disk.written_file(copy) as descriptor:
            for chunk in file.chunks(0, file.nbytes, CHUNK_NBYTES):
                disk.write_at(descriptor, position, chunk, copy)
                position += len(chunk)


def are_copied(copies: Mapping[str, Path], sums: Mapping[str, str]) -> bool:
    """Whether the files are still those whose sha256 a result lists by the names of the copies."""
    return all(sums.get(name) == file_sha256(source) for name, source in copies.items())


def nbytes_of(copies: Mapping[str, Path]) -> int:
    """Bytes that they take."""
    return sum(source.stat().st_size for source in copies.values())
