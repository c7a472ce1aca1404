"""Small files beside the weights: tokenizer, generation settings, custom code. Files are copied, configs are searched
for custom code, and nothing is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.safetensors_file import is_tensor_name
from loftq_cli.checkpoint.watched_file import CHUNK_NBYTES, WatchedFile
from loftq_cli.errors import InputError, printable
from loftq_cli.output import disk
from loftq_cli.output.checksums import file_sha256

# Weights in foreign formats, and files of a training run or a repository: the files do not describe the result.
_WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz"),
    *(".h5", ".msgpack", ".ot", ".tflite", ".pb", ".mlmodel", ".onnx", ".onnx_data", ".xml"),
    *(".gguf", ".ggml"),
}
_SKIPPED_NAMES = {"config.json", "training_args.bin", "optimizer.pt"}
# Descriptions of the source's quantization: false about a result.
_SKIPPED_NAMES |= {"quantize_config.json", "quant_config.json", "hf_quant_config.json"}
SOURCE_CARD = "SOURCE_README.md"
MAX_NBYTES = 200_000_000  # bytes; the largest tokenizers have tens of MB
_CODE_KEYS = frozenset({"auto_map", "custom_pipelines"})  # loaders import the named code under trust_remote_code
_MAX_NAMES = 5  # more names hide the sentence around the names
_CONFIG_ENDING = "config.json"  # loaders look for the keys in config.json, tokenizer_config.json and their like


def find_side_files(directory: Path, part: str = "") -> tuple[list[Path], list[Path]]:
    """(copied, skipped): relative paths of the files beside the weights, at most a folder deep, sorted. In a pipeline,
    every file in the folders of the other models is copied, weights included.

    part   the folder of the model inside the pipeline `directory`, with a slash at the end; empty for a model folder

    Skipped are weights in foreign formats, oversized files, and names outside UTF-8, because no JSON can list the
    names. Hidden files, `config.json` (the result has a fresh config.json) and folders with an adapter are in no list.

    >>> for name in ("tokenizer.json", "model.gguf"):
    ...     Path(name).touch()
    >>> [[path.name for path in paths if path.suffix in (".json", ".gguf")] for paths in find_side_files(Path())]
    [['tokenizer.json'], ['model.gguf']]
    """
    copied: list[Path] = []
    skipped: list[Path] = []
    home = Path(part)
    for root, folders, names in os.walk(directory, followlinks=bool(part)):
        folder = Path(root).relative_to(directory)
        is_model = folder in (Path(), home) or not part
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if folder == Path() or part else []
        for name in folders if part else ():
            _check_folder(directory / folder / name, directory)
        if folder != Path() and "adapter_config.json" in names:
            folders[:] = []
            continue
        for name in sorted(names):
            path = folder / name
            is_replaced = (folder in (Path(), home) and name in _SKIPPED_NAMES) or name.endswith(".index.json")
            if name.startswith(".") or (is_model and is_replaced):
                continue
            is_left = not is_tensor_name(str(path)) or not (directory / path).is_file()
            if is_left or (is_model and _is_heavy(directory / path)):
                skipped.append(path)
            else:
                copied.append(path)
    return copied, skipped


def _is_heavy(path: Path) -> bool:
    """True for weights in any format, and for a file too large to be a small file."""
    return path.suffix.lower() in _WEIGHT_SUFFIXES or path.stat().st_size > MAX_NBYTES


def _check_folder(folder: Path, pipeline: Path) -> None:
    """Raises InputError for a linked folder out of the pipeline, or back to a folder above the link."""
    if not folder.is_symlink():
        return
    if Path(os.path.realpath(folder)) in Path(os.path.realpath(folder.parent), "here").parents:
        raise InputError("is a link to a folder above itself", file=folder, hint="remove the link")
    _check_inside(folder, pipeline)


def side_file_copies(
    source: Path | None, *, leave: Collection[str] = (), remote_code: bool = True, part: str = ""
) -> dict[str, Path]:
    """Name of each copy in the result -> file in the folder `source`, without the names in `leave`, and without Python
    files unless `remote_code`.

    part   as for `find_side_files`

    README.md of the source becomes SOURCE_README.md: a result has a fresh README.md. Raises InputError for a link out
    of the folder.

    >>> Path("source").mkdir()
    >>> Path("source/README.md").touch()
    >>> side_file_copies(Path("source")), side_file_copies(None)
    ({'SOURCE_README.md': PosixPath('source/README.md')}, {})
    """
    paths = [] if source is None else find_side_files(source, part)[0]
    path_of = {SOURCE_CARD if path == Path("README.md") else path.as_posix(): path for path in paths}
    folder = Path(source or "")
    kept = {name: path for name, path in path_of.items() if path.as_posix() not in leave}
    copies = {name: folder / path for name, path in kept.items() if remote_code or path.suffix != ".py"}
    for path in (*copies.values(), folder / part / "config.json"):  # the config of a result repeats the config's values
        _check_inside(path, folder)
    return copies


def _check_inside(path: Path, folder: Path) -> None:
    """Raises InputError for a link out of the model's `folder`: a stranger's link may lead to a secret, and results are
    published. The snapshots in the cache of the hub link to files in the folder `blobs` of the same repository.
    """
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(place in target.parents for place in allowed):
        kind, copy = "file", shlex.join(["cp", "--remove-destination", str(target), str(path)])
        if target.is_dir():
            remove, copy = shlex.join(["rm", str(path)]), shlex.join(["cp", "-r", str(target), str(path)])
            kind, copy = "folder", f"{remove} && {copy}"
        hint = f"if the {kind} belongs to the model, put a copy in place of the link: {copy}"
        raise InputError(f"is a link out of the model's folder, to {target}", file=path, hint=hint)


def copy_side_files(copies: Mapping[str, Path], target: Path, *, remote_code: bool = True) -> None:
    """Copy `copies`, relative name -> source file, into `target`, with normal permissions. Unless `remote_code`,
    configs lose the names of custom code. Raises StorageError.

    >>> _ = Path("merges.txt").write_text("a b")
    >>> copy_side_files({"copy.txt": Path("merges.txt")}, Path())
    >>> Path("copy.txt").read_text()
    'a b'
    """
    for name, source in copies.items():
        copy = target / name
        for folder in reversed(Path(name).parents):
            disk.make_directory(target / folder)
        edited = None if remote_code else _data_without_code(source)
        if edited is not None:
            disk.write_file(copy, edited)
            continue
        file, position = WatchedFile.open(source, may_be_empty=True), 0
        with disk.written_file(copy) as descriptor:
            for chunk in file.chunks(0, file.nbytes, CHUNK_NBYTES):
                disk.write_at(descriptor, position, chunk, copy)
                position += len(chunk)


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the names of custom code, at any depth.

    >>> without_code({"model_type": "odd", "auto_map": {"AutoModel": "modeling_odd.OddModel"}})
    {'model_type': 'odd'}
    """
    kept = json.loads(json.dumps(config), object_pairs_hook=_drop_code_keys)
    assert isinstance(kept, dict)
    return kept


def code_in(copies: Mapping[str, Path], config: Mapping[str, Any]) -> list[str]:
    """Names of files in a result that hold custom code, or name custom code: the copies, and the result's config.json.

    >>> _ = Path("modeling_odd.py").write_text("import os")
    >>> code_in({"modeling_odd.py": Path("modeling_odd.py")}, {"auto_map": {}})
    ['config.json', 'modeling_odd.py']
    """
    names = ["config.json"] if without_code(config) != config else []
    return names + [n for n, path in copies.items() if path.suffix == ".py" or _data_without_code(path) is not None]


def code_note(names: Collection[str]) -> str | None:
    """The note about the files in `code_in`; None without a file.

    >>> print(code_note(["config.json", "modeling_odd.py"]))
    config.json, modeling_odd.py: code of the original, which loaders run with trust_remote_code (--no-remote-code \
leaves the code out)
    """
    if not names:
        return None
    text = ", ".join(printable(name, 80) for name in list(names)[:_MAX_NAMES])
    more = f" and {len(names) - _MAX_NAMES} more files" if len(names) > _MAX_NAMES else ""
    reason = "code of the original, which loaders run with trust_remote_code"
    return f"{text}{more}: {reason} (--no-remote-code leaves the code out)"


def code_paragraph(names: Collection[str]) -> str:
    """The paragraph of a model card about the files in `code_in`, after an empty line; no text without a file.

    >>> code_paragraph([])
    ''
    """
    if not names:
        return ""
    listed = ", ".join(f"`{printable(name, 80).replace('`', '')}`" for name in names)
    return f"""
Code of the original: {listed}. loftq-cli ran none of the code, and nobody has checked the code. A loader
with `trust_remote_code=True` runs the code.
"""


def _data_without_code(path: Path) -> bytes | None:
    """The text of a config without the names of custom code; None for any other file. A text that Python cannot parse
    is no config to any loader.
    """
    if not path.name.endswith(_CONFIG_ENDING):
        return None
    file = WatchedFile.open(path, may_be_empty=True)
    data, found = bytes(file.read(0, file.nbytes)), list[str]()

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.extend(name for name, _ in pairs if name in _CODE_KEYS)
        return _drop_code_keys(pairs)

    try:
        values = json.loads(data, object_pairs_hook=keep)
    except (ValueError, RecursionError):
        return None
    return json.dumps(values, indent=2).encode() + b"\n" if found else None


def _drop_code_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if name not in _CODE_KEYS}


def are_copied(copies: Mapping[str, Path], sums: Mapping[str, str], *, remote_code: bool = True) -> bool:
    """True if the source files still give the listed sha256 of the copies: `sums` is relative name -> sha256. Unless
    `remote_code`, the copies of configs lost the names of custom code.

    >>> are_copied({}, {}), are_copied({"vocab.txt": Path(__file__)}, {"vocab.txt": "ab12"})
    (True, False)
    """
    for name, source in copies.items():
        edited = None if remote_code else _data_without_code(source)
        sha256 = file_sha256(source) if edited is None else hashlib.sha256(edited).hexdigest()
        if sums.get(name) != sha256:
            return False
    return True


def nbytes_of(copies: Mapping[str, Path]) -> int:
    """Total size of the copies in bytes.

    >>> _ = Path("vocab.txt").write_text("a b")
    >>> nbytes_of({"vocab.txt": Path("vocab.txt")})
    3
    """
    return sum(source.stat().st_size for source in copies.values())
