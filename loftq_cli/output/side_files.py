"""Small files beside the weights: tokenizer, generation settings, custom code. Files are copied, never read."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from loftq_cli.checkpoint.safetensors_file import is_tensor_name
from loftq_cli.checkpoint.watched_file import CHUNK_NBYTES, WatchedFile
from loftq_cli.output import disk
from loftq_cli.output.checksums import file_sha256

# Weights in foreign formats, and files of a training run or a repository: the files do not describe the result.
_WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz"),
    *(".h5", ".msgpack", ".ot", ".tflite", ".pb", ".mlmodel", ".onnx", ".onnx_data", ".xml"),
    *(".gguf", ".ggml"),
}
_SKIPPED_NAMES = {"config.json", "training_args.bin", "optimizer.pt", "quantize_config.json"}
SOURCE_CARD = "SOURCE_README.md"
MAX_NBYTES = 200_000_000  # bytes; the largest tokenizers have tens of MB


def find_side_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """(copied, skipped): relative paths of the files beside the weights, at most a folder deep, sorted.

    Skipped are weights in foreign formats, oversized files, and names outside UTF-8, because no JSON can list the
    names. Hidden files, `config.json` (the result has a fresh config.json) and folders with an adapter are in no list.

    >>> for name in ("tokenizer.json", "model.gguf"):
    ...     Path(name).touch()
    >>> [[path.name for path in paths if path.suffix in (".json", ".gguf")] for paths in find_side_files(Path())]
    [['tokenizer.json'], ['model.gguf']]
    """
    copied: list[Path] = []
    skipped: list[Path] = []
    for root, folders, names in os.walk(directory):
        folder = Path(root).relative_to(directory)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if folder == Path() else []
        if folder != Path() and "adapter_config.json" in names:
            continue
        for name in sorted(names):
            path = folder / name
            if name.startswith(".") or (folder == Path() and name in _SKIPPED_NAMES) or name.endswith(".index.json"):
                continue
            full = directory / path
            is_left = full.suffix.lower() in _WEIGHT_SUFFIXES or not is_tensor_name(str(path))
            if is_left or not full.is_file() or full.stat().st_size > MAX_NBYTES:
                skipped.append(path)
            else:
                copied.append(path)
    return copied, skipped


def side_file_copies(source: Path | None, *, leave: Collection[str] = ()) -> dict[str, Path]:
    """Name of each copy in the result -> file in the folder `source`, without the names in `leave`.

    README.md of the source becomes SOURCE_README.md: a result has a fresh README.md.

    >>> Path("source").mkdir()
    >>> Path("source/README.md").touch()
    >>> side_file_copies(Path("source")), side_file_copies(None)
    ({'SOURCE_README.md': PosixPath('source/README.md')}, {})
    """
    paths = [] if source is None else find_side_files(source)[0]
    path_of = {SOURCE_CARD if path == Path("README.md") else path.as_posix(): path for path in paths}
    return {name: Path(source or "") / path for name, path in path_of.items() if path.as_posix() not in leave}


def copy_side_files(copies: Mapping[str, Path], target: Path) -> None:
    """Copy `copies`, relative name -> source file, into `target`, with normal permissions. Raises StorageError.

    >>> _ = Path("merges.txt").write_text("a b")
    >>> copy_side_files({"copy.txt": Path("merges.txt")}, Path())
    >>> Path("copy.txt").read_text()
    'a b'
    """
    for name, source in copies.items():
        copy = target / name
        disk.make_directory(copy.parent)
        file, position = WatchedFile.open(source, may_be_empty=True), 0
        with disk.written_file(copy) as descriptor:
            for chunk in file.chunks(0, file.nbytes, CHUNK_NBYTES):
                disk.write_at(descriptor, position, chunk, copy)
                position += len(chunk)


def are_copied(copies: Mapping[str, Path], sums: Mapping[str, str]) -> bool:
    """True if the source files still have the listed sha256 of the copies: `sums` is relative name -> sha256.

    >>> are_copied({}, {}), are_copied({"vocab.txt": Path(__file__)}, {"vocab.txt": "ab12"})
    (True, False)
    """
    return all(sums.get(name) == file_sha256(source) for name, source in copies.items())


def nbytes_of(copies: Mapping[str, Path]) -> int:
    """Total size of the copies in bytes.

    >>> _ = Path("vocab.txt").write_text("a b")
    >>> nbytes_of({"vocab.txt": Path("vocab.txt")})
    3
    """
    return sum(source.stat().st_size for source in copies.values())
