"""A checkpoint: the weight files of a folder, and all tensors in a single ordered dict.

Opening checks all headers and the index. Numbers are read later, on request.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, cast

from loftq_cli.checkpoint import quantized_source
from loftq_cli.checkpoint.json_files import MAX_JSON_NBYTES, parse_json_object
from loftq_cli.checkpoint.quantized_source import ScaledWeight
from loftq_cli.checkpoint.safetensors_file import is_tensor_name
from loftq_cli.checkpoint.watched_file import CHUNK_NBYTES, HIDDEN_INSIDE, WatchedFile, absent
from loftq_cli.errors import InputError, LoftqError, StorageError, printable
from loftq_cli.tensors.headers import TensorRef
from loftq_cli.tensors.libraries import ADAPTER_FILES, DEFAULT_LIBRARY, LIBRARIES, pipeline_in

if TYPE_CHECKING:
    import torch

_TORCH_FILE = "loftq_cli.checkpoint.torch_file:TorchFile"

# Ending of the name of a weight file -> reader class, imported on use.
READERS = {
    ".safetensors": "loftq_cli.checkpoint.safetensors_file:SafetensorsFile",
    ".bin": _TORCH_FILE,
    ".pt": _TORCH_FILE,
    ".pth": _TORCH_FILE,
}

# Names in the order of the search in a model folder; an index names the files to read.
MODEL_FILES = tuple(name for library in LIBRARIES.values() for name in library.model_files)

_ADAPTER_FILES = {"adapter_model.safetensors", *ADAPTER_FILES}
_OTHER_KINDS = {".gguf": "GGUF", ".h5": "TensorFlow", ".msgpack": "Flax"}
_MAX_NAMES = 10  # more names hide the sentence around the names
_LOOKED_FOR = f"looked for {', '.join(DEFAULT_LIBRARY.model_files)} or one other .safetensors file"
_DOWNLOAD = "download the missing files again"


class WeightsFile(Protocol):
    """The protocol of a reader of a weight file. SafetensorsFile documents each method."""

    path: Path
    tensors: dict[str, TensorRef]

    def load(self, name: str, *, pinned: bool = False) -> torch.Tensor: ...
    def load_rows(self, name: str, start: int, stop: int) -> torch.Tensor: ...
    def chunks(self, name: str, chunk_nbytes: int = CHUNK_NBYTES) -> Iterator[memoryview]: ...
    def sha256(self, name: str) -> str: ...
    def check_unchanged(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint of a single file or of many. No file stays open between reads.

    path       : the path from the user
    directory  : the model folder (with config.json), or the root of a pipeline; None for a lone weight file
    files      : the weight files, in the order of `tensors`
    index_file : the index of the weight files, if any
    tensors    : name -> TensorRef, by file name, then in the order of each file
    part       : the folder of the model inside a pipeline, with a slash at the end; empty for a model folder
    scaled     : the float8 weights with scales, by name: reading decodes them, and `tensors` shows no scales
    """

    path: Path
    directory: Path | None
    files: tuple[Path, ...]
    index_file: Path | None
    tensors: dict[str, TensorRef]
    _readers: dict[Path, WeightsFile] = field(repr=False)
    _index: WatchedFile | None = field(repr=False)
    _config: WatchedFile | None = field(repr=False)
    part: str = ""
    scaled: Mapping[str, ScaledWeight] = field(default_factory=dict)

    def load(self, name: str, *, pinned: bool = False) -> torch.Tensor:
        """Load a tensor, contiguous on the CPU, in fresh memory. `pinned` memory lets a GPU copy while computing.

        Raises KeyError for an unknown name, StorageError when the file changed or reading fails.
        """
        if name not in self.scaled:
            return self._reader(name).load(name, pinned=pinned)
        decoded = self.load_rows(name, 0, self.tensors[name].shape[0])
        return decoded.pin_memory() if pinned else decoded

    def load_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Load rows [start, stop) of the first dimension, [stop - start, ...]. Raises ValueError outside the tensor."""
        if name in self.scaled:
            codes = self._reader(name).load_rows(name, start, stop)
            return self.scaled[name].decode(codes, self._load_scale(name), start)
        return self._reader(name).load_rows(name, start, stop)

    def chunks(self, name: str, chunk_nbytes: int = CHUNK_NBYTES) -> Iterator[memoryview]:
        """Yield the bytes of a tensor, little-endian and row-major, in pieces of at most `chunk_nbytes`."""
        reader = self._reader(name)
        if name not in self.scaled:
            return reader.chunks(name, chunk_nbytes)
        load_codes, scale = partial(reader.load_rows, name), self._load_scale(name)
        return quantized_source.decoded_chunks(self.scaled[name], load_codes, scale, chunk_nbytes)

    def raw(self, name: str) -> bytes:
        """Read all bytes of a small tensor, without torch."""
        return b"".join(self.chunks(name))

    def sha256(self, name: str) -> str:
        """sha256 of the bytes of a tensor, as `chunks` yields the bytes."""
        if name not in self.scaled:
            return self._reader(name).sha256(name)
        return quantized_source.sha256_of(self.chunks(name))

    def config(self) -> dict[str, Any]:
        """Read config.json beside the weights; an empty dict without a config.json. The description of a quantization,
        from a part of the config or from a side file, is at the top; decoded weights need none.

        Raises InputError for a damaged file, StorageError when the file changed after opening.
        """
        folder = None if self.directory is None else self.directory / self.part
        return quantized_source.settle_description(self.raw_config(), folder, self.tensors, self.scaled)

    def raw_config(self) -> dict[str, Any]:
        """Read config.json as the file is. Raises the errors of `config`."""
        return {} if self._config is None else _json_in(self._config)

    def check_unchanged(self) -> None:
        """Raises StorageError when a weight file, the index or config.json was replaced or rewritten since opening."""
        for reader in self._readers.values():
            reader.check_unchanged()
        for file in (self._index, self._config):
            if file is not None:
                file.check_unchanged()

    def close(self) -> None:
        """End the use. Nothing is left to free: each read opens and closes a file."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load_scale(self, name: str) -> torch.Tensor:
        scale = self.scaled[name].scale
        return self._readers[scale.file].load(scale.name)

    def _reader(self, name: str) -> WeightsFile:
        return self._readers[self.tensors[name].file]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint at `path`: a model folder, the root of a pipeline, or a single weight file. The checkpoint of
    a pipeline has the tensors of the model that denoises.

    Raises InputError when `path` holds no checkpoint, an unsupported kind, a wrong header or a wrong index.
    Raises StorageError when a file or the folder cannot be read.

    >>> import torch
    >>> torch.save({"lm_head.weight": torch.ones(2, 3)}, "model.bin")
    >>> open_checkpoint(Path("model.bin")).tensors["lm_head.weight"].shape
    (2, 3)
    """
    if stat.S_ISDIR(_mode_of(path)):
        part = _part_of(path)
        return _decoding(replace(_open_folder(path / part), path=path, directory=path, part=part))
    return _decoding(_open_single(path, path, path.parent if os.path.isfile(path.parent / "config.json") else None))


def _decoding(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with decoded weights in place of float8 weights and scales."""
    if not any(ref.dtype in quantized_source.FLOAT8 for ref in checkpoint.tensors.values()):
        return checkpoint  # a damaged config is an error of reading the config
    scaled = quantized_source.find_scaled_weights(checkpoint.tensors, checkpoint.raw_config())
    return replace(checkpoint, tensors=quantized_source.without_companions(checkpoint.tensors, scaled), scaled=scaled)


def faults(path: Path) -> Iterator[LoftqError]:
    """Yield every reason of `open_checkpoint` to refuse `path`; `open_checkpoint` stops at the first error.

    >>> _ = Path("damaged.safetensors").write_bytes(b"not a header")
    >>> [type(error).__name__ for error in faults(Path("damaged.safetensors"))]
    ['InputError']
    """
    try:
        path = path / _part_of(path) if stat.S_ISDIR(_mode_of(path)) else path
        weights = _weights_in(path) if path.is_dir() else path
        if weights == path or not weights.name.endswith(".index.json"):
            open_weights_file(weights)
            return
        file_of = _read_index(weights)[1]
    except LoftqError as error:
        yield error
        return
    for name in sorted(set(file_of.values())):
        try:
            _check_agrees(open_weights_file(path / name), file_of, weights)
        except LoftqError as error:
            yield error


def open_files(directory: Path, names: Sequence[str]) -> Checkpoint:
    """Open exactly the weight files called `names`; the directory may be incomplete. Raises the errors of
    `open_weights_file`.

    >>> import torch
    >>> torch.save({"lm_head.weight": torch.ones(2, 3)}, "part.bin")
    >>> list(open_files(Path(), ["part.bin"]).tensors)
    ['lm_head.weight']
    """
    readers = {directory / name: open_weights_file(directory / name) for name in names}
    tensors = {name: ref for reader in readers.values() for name, ref in reader.tensors.items()}
    return Checkpoint(directory, directory, tuple(readers), None, tensors, readers, None, None)


def open_weights_file(path: Path) -> WeightsFile:
    """Open a weight file with the reader for the ending of the name.

    Raises InputError for an unknown ending and for a damaged file, StorageError when reading fails.

    >>> import torch
    >>> torch.save({"lm_head.weight": torch.ones(2, 3)}, "weights.pt")
    >>> open_weights_file(Path("weights.pt")).tensors["lm_head.weight"].dtype
    'float32'
    """
    if path.suffix not in READERS:
        reason = "is an index" if path.name.endswith(".index.json") else "is not a weight file that is read here"
        kind = _OTHER_KINDS.get(path.suffix)
        raise InputError(
            f"is a {kind} file, which is not read here" if kind else reason,
            file=path,
            hint=f"give a model folder or a file that ends in {', '.join(READERS)}",
        )
    module, _, name = READERS[path.suffix].partition(":")
    return cast(WeightsFile, getattr(import_module(module), name)(path))


def _open_folder(path: Path) -> Checkpoint:
    weights = _weights_in(path)
    if weights.name.endswith(".index.json"):
        return _open_indexed(path, weights)
    return _open_single(path, weights, path)


def _part_of(directory: Path) -> str:
    """The folder of the model inside the pipeline in `directory`, with a slash at the end; empty for a model folder.

    Raises InputError for a pipeline without a model that denoises.
    """
    library = pipeline_in(_names_in(directory))
    if library is None:
        return ""
    part = next((name for name in library.denoisers if (directory / name).is_dir()), None)
    if part is None:
        message = f"is a pipeline of {library.name} without a folder {' or '.join(library.denoisers)}"
        raise InputError(message, file=directory, hint="give the folder of the model to convert")
    return f"{part}/"


def _open_single(path: Path, weights: Path, directory: Path | None) -> Checkpoint:
    reader = open_weights_file(weights)
    config = _config_in(directory)
    return Checkpoint(path, directory, (weights,), None, reader.tensors, {weights: reader}, None, config)


def _config_in(directory: Path | None) -> WatchedFile | None:
    if directory is None or not os.path.lexists(directory / "config.json"):
        return None
    return WatchedFile.open(directory / "config.json")


def _json_in(file: WatchedFile) -> dict[str, Any]:
    return parse_json_object(file.read_whole(MAX_JSON_NBYTES, hint=_DOWNLOAD), file=file.path)


def _open_indexed(directory: Path, index_file: Path) -> Checkpoint:
    (index, file_of), config = _read_index(index_file), _config_in(directory)
    names = sorted(set(file_of.values()))
    lacking = [name for name in names if not os.path.exists(directory / name)]
    if lacking:
        raise InputError(f"names files that are not there: {_list_names(lacking)}", file=index_file, hint=_DOWNLOAD)
    readers = {directory / name: open_weights_file(directory / name) for name in names}
    tensors: dict[str, TensorRef] = {}
    for reader in readers.values():
        _check_agrees(reader, file_of, index_file)
        tensors.update(reader.tensors)
    return Checkpoint(directory, directory, tuple(readers), index_file, tensors, readers, index, config)


def _read_index(index_file: Path) -> tuple[WatchedFile, dict[str, str]]:
    """The index file, and tensor name -> file name."""
    index = WatchedFile.open(index_file)
    return index, _check_weight_map(_json_in(index).get("weight_map"), index_file)


def _check_weight_map(weight_map: object, index_file: Path) -> dict[str, str]:
    """Check tensor name -> file name. A file name must not lead out of the folder."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("has no weight_map", file=index_file, hint=_DOWNLOAD)
    suffix = Path(index_file.name.removesuffix(".index.json")).suffix
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise InputError("its file is not given as text", file=index_file, tensor=tensor, hint=_DOWNLOAD)
        if not _is_plain_name(name) or Path(name).suffix != suffix:
            message = f'"{printable(name, 80)}" is not the name of a {suffix} file beside the index'
            raise InputError(message, file=index_file, tensor=tensor, hint="do not use this checkpoint")
    return weight_map


def _is_plain_name(name: str) -> bool:
    return is_tensor_name(name) and name not in (".", "..") and not any(c in name for c in "/\\\0")


def _check_agrees(reader: WeightsFile, file_of: dict[str, str], index_file: Path) -> None:
    """Raises InputError when the index and a weight file disagree about the tensors of the file."""
    file_name = reader.path.name
    lacking = [name for name, file in file_of.items() if file == file_name and name not in reader.tensors]
    if lacking:
        message = f"does not hold {_list_names(lacking)}, which {index_file.name} expects in it"
        raise InputError(message, file=reader.path, hint=_DOWNLOAD)
    unlisted = [name for name in reader.tensors if name not in file_of]
    if unlisted:
        message = f"holds {_list_names(unlisted)}, which {index_file.name} does not list"
        raise InputError(message, file=reader.path, hint="the files are of two versions; " + _DOWNLOAD)
    doubled = [name for name in reader.tensors if file_of[name] != file_name]
    if doubled:
        message = f"holds {_list_names(doubled)}, which {index_file.name} expects in {printable(file_of[doubled[0]])}"
        raise InputError(message, file=reader.path, hint="the files are of two versions; " + _DOWNLOAD)


def _weights_in(directory: Path) -> Path:
    """The index of a model folder, or the only weight file."""
    names = _names_in(directory)
    for name in MODEL_FILES:
        if name in names:
            return directory / name
    candidates = [name for name in names if name.endswith(".safetensors") and name not in _ADAPTER_FILES]
    if "adapter_config.json" in names or (not candidates and not ADAPTER_FILES.isdisjoint(names)):
        hint = "give the folder of the base model that it was trained on"
        raise InputError("is an adapter, not a model", file=directory, hint=hint)
    if len(candidates) == 1:
        return directory / candidates[0]
    foreign = sorted({_OTHER_KINDS[Path(name).suffix] for name in names if Path(name).suffix in _OTHER_KINDS})
    if candidates:
        message = f"holds {len(candidates)} .safetensors files and no index that joins them: {_list_names(candidates)}"
    elif HIDDEN_INSIDE in names:
        raise InputError("holds an unfinished result", file=directory, hint="run the interrupted command again")
    elif foreign:
        message = f"holds only {' and '.join(foreign)} weights, which are not read here"
    else:
        message = f"holds no weights; found {_list_names(names)}" if names else "is an empty folder"
    raise InputError(message, file=directory, hint=_LOOKED_FOR)


def _names_in(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError as exc:
        raise StorageError(f"cannot be listed: {exc.strerror}", file=directory, hint="check its permissions") from exc


def _mode_of(path: Path) -> int:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise _missing(path) from exc
    except OSError as exc:
        raise StorageError(f"cannot be opened: {exc.strerror}", file=path, hint="check its permissions") from exc
    except ValueError as exc:  # a NUL or a lone surrogate in the name
        raise InputError("is not a possible file name", file=path, hint="check the path") from exc


def _missing(path: Path) -> InputError:
    if os.path.islink(path):
        return absent(path, "is a link to something that is not there", "download the checkpoint again")
    hint = "check the path"
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path), re.ASCII) and path.suffix not in READERS:
        hint = f"for a model of the Hugging Face hub, run first: hf download {path} --local-dir {path.name}"
    return absent(path, "no such file or folder", hint)


def _list_names(names: list[str]) -> str:
    text = ", ".join(printable(name, 80) for name in names[:_MAX_NAMES])
    return text if len(names) <= _MAX_NAMES else f"{text} and {len(names) - _MAX_NAMES} more"
