"""Small files that travel with a model: tokenizer, generation settings, custom code. Files are copied, never read."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from loftq_cli.checkpoint.safetensors_file import is_tensor_name
from loftq_cli.checkpoint.watched_file import CHUNK_NBYTES, WatchedFile
from loftq_cli.output import disk
from loftq_cli.output.checksums import file_sha256

# Weights in other formats, and files of a training run or a repository: such files do not describe the result.
_WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz"),
    *(".h5", ".msgpack", ".ot", ".tflite", ".pb", ".mlmodel", ".onnx", ".onnx_data", ".xml"),
    *(".gguf", ".ggml"),
}
_SKIPPED_NAMES = {"config.json", "training_args.bin", "optimizer.pt", "quantize_config.json"}
SOURCE_CARD = "SOURCE_README.md"
MAX_NBYTES = 200_000_000  # bytes; the largest tokenizers have tens of MB


def find_side_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """(copied, left): relative paths of the files beside the weights, at most one folder deep, sorted.

    Left are weights in other formats, oversized files, and names outside UTF-8, which no JSON can list. Neither list
    has hidden files, `config.json` (the result has a fresh config.json) and folders with an adapter.
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
    """Name of each copy in the result -> source file, without the names in `leave`.

    README.md of the source becomes SOURCE_README.md: a result has a fresh README.md.
    """
    found = [] if source is None else find_side_files(source)[0]
    named = {SOURCE_CARD if path == Path("README.md") else path.as_posix(): path for path in found}
    return {name: Path(source or "") / path for name, path in named.items() if path.as_posix() not in leave}


def copy_side_files(copies: Mapping[str, Path], target: Path) -> None:
    """Copy `copies` into `target`, with normal permissions. Raises StorageError."""
    for name, source in copies.items():
        copy = target / name
        disk.make_directory(copy.parent)
        file, position = WatchedFile.open(source, may_be_empty=True), 0
        with disk.written_file(copy) as descriptor:
            for chunk in file.chunks(0, file.nbytes, CHUNK_NBYTES):
                disk.write_at(descriptor, position, chunk, copy)
                position += len(chunk)


def are_copied(copies: Mapping[str, Path], sums: Mapping[str, str]) -> bool:
    """Whether the source files still have the sha256 that a result lists for the copies."""
    return all(sums.get(name) == file_sha256(source) for name, source in copies.items())


def nbytes_of(copies: Mapping[str, Path]) -> int:
    """Total size of the copies in bytes."""
    return sum(source.stat().st_size for source in copies.values())
